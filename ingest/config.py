"""The `ingest` section of a run's YAML: where the rows come from, which are kept, how images are fetched and stored.

ingest:
  table: corpus/*.parquet            # a file, a folder or a glob; parquet, csv, tsv, jsonl, each also .gz
  heldout_fraction: 0.01             # or heldout_table: a table of its own
  keep_columns: [similarity]         # carried into the sidecar
  filters:
    - {column: similarity, min: 0.28}
    - {column: LANGUAGE, in: [en]}
  image_size: 256
"""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ingest.addresses import allowed
from ingest.captions import DEFAULT_STEPS, STEPS
from shards.settings import Strict

Scalar = bool | int | float | str
ResizeMode = Literal["center_crop", "border", "keep_ratio", "keep_ratio_largest", "no"]
EncodeFormat = Literal["png", "jpg", "webp"]
Animations = Literal["first_frame", "refuse"]
Reencode = Literal["always", "needed"]
Filter = Literal["lanczos", "bicubic"]
Channel = Annotated[int, Field(ge=0, le=255)]


class ColumnsConfig(Strict):
    """Which columns hold the URL and the caption; without an entry the known families are recognised."""

    url: str | None = None
    caption: str | None = None
    types: dict[str, Literal["string", "int", "float"]] = Field(
        default={}, description="types of columns, where the first rows (of a text table) or files do not show them"
    )


class FilterConfig(Strict):
    """One condition that a row must meet to be fetched; every condition given here must hold.

    `column` is a column of the table, or one of the derived ones: caption_characters, caption_words (of
    the cleaned caption), aspect_ratio (long side / short side) and smaller_side (both from the table's
    width and height).
    """

    model_config = ConfigDict(populate_by_name=True)

    column: str
    min: float | None = None
    max: float | None = None
    in_: tuple[Scalar, ...] | None = Field(default=None, alias="in")
    not_in: tuple[Scalar, ...] | None = None
    matches: str | None = Field(default=None, description="a regular expression that is found in the value")
    missing: Literal["drop", "keep"] = Field(default="drop", description="what becomes of a row without a value")

    @field_validator("matches")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as e:
                raise ValueError(f"not a regular expression ({e})") from None
        return value

    @model_validator(mode="after")
    def _has_condition(self) -> FilterConfig:
        if all(v is None for v in (self.min, self.max, self.in_, self.not_in, self.matches)):
            raise ValueError(f"the filter on '{self.column}' needs one of min, max, in, not_in, matches")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"the filter on '{self.column}' has min above max, so no row could pass")
        return self

    @property
    def label(self) -> str:
        """What the funnel calls this filter: `similarity >= 0.28`."""
        parts = []
        if self.min is not None:
            parts.append(f">= {self.min:g}")
        if self.max is not None:
            parts.append(f"<= {self.max:g}")
        if self.in_ is not None:
            parts.append("in " + ", ".join(map(str, self.in_)))
        if self.not_in is not None:
            parts.append("not in " + ", ".join(map(str, self.not_in)))
        if self.matches is not None:
            parts.append(f"matches {self.matches}")
        return f"{self.column} {' and '.join(parts)}"


class FetchConfig(Strict):
    """Limits on the network. Times are seconds; none of these is part of a shard's fingerprint but max_bytes."""

    concurrency: int = Field(default=128, ge=1, le=10_000, description="requests under way in one worker process")
    host_concurrency: int = Field(
        default=8, ge=1, description="requests to one host, by all workers of the run together"
    )
    connect_timeout: float = Field(default=10.0, gt=0)
    timeout: float = Field(default=30.0, gt=0, description="for one attempt from the first byte sent to the last read")
    min_speed: float = Field(default=1024.0, ge=0, description="bytes/s, on average, once min_speed_after has passed")
    min_speed_after: float = Field(default=5.0, gt=0)
    max_bytes: int = Field(default=50_000_000, ge=1, description="of a body, after content decoding")
    body_memory: int = Field(
        default=256_000_000,
        ge=1,
        description="bytes of bodies that a worker holds at once, coming in and being decoded",
    )
    decode_memory: int = Field(
        default=2_000_000_000, ge=500_000_000, description="bytes that a process may take that decodes other than JPEGs"
    )
    decode_timeout: float = Field(default=60.0, gt=0, description="after which such a process is ended with its image")
    max_redirects: int = Field(default=5, ge=0)
    retries: int = Field(default=2, ge=0, description="further attempts after a transient failure")
    backoff: float = Field(default=0.5, ge=0, description="wait before the first retry; doubles with each")
    max_backoff: float = Field(default=30.0, ge=0, description="longest wait, also where Retry-After asks for more")
    host_failures: int = Field(
        default=10, ge=0, description="failures to connect in a row after which a host is left alone; 0: never"
    )
    host_pause: float = Field(default=60.0, gt=0, description="for so long; then one request tries it again")
    user_agent: str = "carrara/0.1 (image-text dataset builder)"
    allow_addresses: tuple[str, ...] = Field(
        default=(),
        description="networks that may be reached although they are not public, e.g. 127.0.0.1/32 or 127.0.0.1:8701",
    )
    verify_tls: bool = True
    nameservers: tuple[str, ...] = Field(
        default=(), description="name servers to ask, e.g. 127.0.0.1 or 10.0.0.2:5353; none: as the system does"
    )
    ndots: int = Field(default=1, ge=0, le=15, description="dots from which on a name is asked for as it is, first")
    proxy: str | None = Field(
        default=None,
        description="http://[user:password@]host:port that all requests go through; it then looks up names, "
        "and has to refuse private addresses",
    )
    canaries: tuple[str, ...] = Field(
        default=("www.iana.org", "www.wikipedia.org", "www.cloudflare.com"),
        description="hosts, perhaps with :port, that are known to be there: tried where many of a table's are not, to "
        "tell a dead table from a machine without network",
    )

    @field_validator("allow_addresses")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            allowed(text)
        return value

    @field_validator("nameservers")
    @classmethod
    def _servers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            bracketed = re.fullmatch(r"\[(.+)\](?::([0-9]{1,5}))?", text)
            plain = re.fullmatch(r"([0-9.]+)(?::([0-9]{1,5}))?", text)
            found = bracketed or plain
            try:
                ipaddress.ip_address(found[1] if found else text)
            except ValueError as e:
                raise ValueError(
                    f"write each name server as an address, such as 10.0.0.2 or 10.0.0.2:5353 ({e})"
                ) from None
        return value

    @field_validator("proxy")
    @classmethod
    def _proxy(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urllib.parse.urlsplit(value)
            if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
                raise ValueError("write the proxy as http://host:port")
        return value

    @field_validator("canaries")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", text):
                raise ValueError(f"write '{text}' as the name of a host, perhaps with :port")
        return value

    @model_validator(mode="after")
    def _room_for_one(self) -> FetchConfig:
        if self.body_memory < self.max_bytes:
            if "body_memory" in self.model_fields_set:
                raise ValueError("body_memory is less than max_bytes, so that the largest body would have no room")
            self.__dict__["body_memory"] = self.max_bytes
        return self

    @field_validator("user_agent")
    @classmethod
    def _header(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+[ -~]*", value):
            raise ValueError("begin the user agent with a product name such as my-crawler/1.0, printable ASCII alone")
        return value


class OptOutConfig(Strict):
    """Which refusals by the server are respected; see ingest/optout.py."""

    respect: bool = True
    directives: tuple[str, ...] = ("noai", "noimageai", "noml", "noindex", "noimageindex", "none")
    agents: tuple[str, ...] = Field(
        default=("img2dataset",), description="names that X-Robots-Tag may address beside our own product name"
    )
    tdm_reservation: bool = True
    robots_txt: bool = Field(default=False, description="ask each host's robots.txt too (RFC 9309), once a run")


SourceKind = Literal["table", "folder", "parquet", "webdataset"]
SOURCES: dict[SourceKind, str] = {  # what each is, for people
    "table": "a table of URLs",
    "folder": "a folder of images",
    "parquet": "parquet or Arrow files with the images' bytes",
    "webdataset": "WebDataset tars",
}


class SourceConfig(Strict):
    """What lies at `table`, where that is no table of URLs; see ingest/sources.py."""

    kind: Literal["auto", SourceKind] = Field(
        default="auto",
        description="folder: images with captions beside them; parquet: (or Arrow) with the bytes inside; webdataset: "
        "tars; auto: recognised by what is there",
    )
    captions: Literal["file", "lines", "folder"] = Field(
        default="file",
        description="of a folder: a caption file is one caption, or each of its lines is one; folder: as file, and "
        "the folder's name where there is none",
    )
    adopt: bool = Field(
        default=False,
        description="of webdataset: leave the images where they lie and write an index of them alone; the tars are "
        "never written to, and must stay",
    )
    image_column: str | None = Field(default=None, description="of parquet: the column with the images' bytes")
    files_below: tuple[str, ...] = Field(
        default=(), description="of a table: folders (or fsspec URLs) whose files rows may name by path or file:// URL"
    )


class DuplicatesConfig(Strict):
    """Which samples count as one another's duplicates, over the whole run; the earliest stays."""

    url: bool = Field(default=True, description="the same URL and caption")
    bytes: bool = Field(default=True, description="the same fetched bytes and caption")
    perceptual: Literal["off", "same_caption", "any_caption"] = Field(
        default="off", description="images that look alike, by their 64-bit perceptual hash"
    )
    distance: int = Field(default=0, ge=0, le=7, description="bits in which the hashes of such images may differ")


class IngestConfig(Strict):
    """The settings of the ingest stage."""

    engine: Literal["carrara", "img2dataset"] = Field(
        default="carrara", description="what fetches and resizes; img2dataset runs in a process of its own"
    )
    table: str
    heldout_table: str | None = None
    heldout_fraction: float = Field(default=0.0, ge=0.0, lt=1.0, description="of distinct captions, by their hash")
    source: SourceConfig = SourceConfig()
    columns: ColumnsConfig = ColumnsConfig()
    keep_columns: tuple[str, ...] = ()
    samples_per_shard: int = Field(default=10_000, ge=1, le=1_000_000)
    filters: tuple[FilterConfig, ...] = ()
    swapped_sizes: bool = Field(default=False, description="the table's width is the height, as in raw laion2B")
    captions: tuple[str, ...] = Field(default=DEFAULT_STEPS, description="cleaning steps, in their order")
    empty_captions: Literal["drop", "keep"] = "drop"
    caption_repeats: int | None = Field(default=None, ge=1, description="samples that may share one caption")
    duplicates: DuplicatesConfig = DuplicatesConfig()
    fetch: FetchConfig = FetchConfig()
    opt_out: OptOutConfig = OptOutConfig()
    image_size: int = Field(default=256, ge=8, le=4096)
    resize_mode: ResizeMode = "center_crop"
    downscale_filter: Filter = Field(default="bicubic", description="lanczos is a little sharper and slower")
    only_if_bigger: bool = Field(default=False, description="leave images alone that are smaller than image_size")
    encode_format: EncodeFormat = "jpg"
    encode_quality: int | None = Field(default=None, description="jpg, webp: 1..100 (95); png: compression 0..9 (6)")
    background: tuple[Channel, Channel, Channel] = Field(
        default=(255, 255, 255), description="what lies under transparent pixels and in the border"
    )
    animations: Animations = Field(default="first_frame", description="what is stored of images that move")
    reencode: Reencode = Field(
        default="always", description="needed: keep the fetched bytes where the image needs no change"
    )
    max_pixels: int = Field(default=64_000_000, ge=1, description="of a fetched image, by its header")
    decode_threads: int = Field(default=1, ge=1, le=64)

    @field_validator("resize_mode", mode="before")
    @classmethod
    def _no_is_a_mode(cls, value: object) -> object:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    @field_validator("captions")
    @classmethod
    def _known_steps(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for step in value:
            if step not in STEPS:
                raise ValueError(f"unknown caption step '{step}'; there are {', '.join(STEPS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> IngestConfig:
        if self.source.adopt:
            if self.source.kind not in ("auto", "webdataset") or self.engine != "carrara":
                raise ValueError("source.adopt is for WebDataset tars, and needs engine: carrara")
            if self.resize_mode != "no" and "resize_mode" in self.model_fields_set:
                raise ValueError("source.adopt leaves images as they are; leave resize_mode away, or set it to no")
            self.__dict__["resize_mode"] = "no"
        if self.heldout_table and self.heldout_fraction:
            raise ValueError("give heldout_table or heldout_fraction, not both")
        low, high = (0, 9) if self.encode_format == "png" else (1, 100)
        if self.encode_quality is not None and not low <= self.encode_quality <= high:
            raise ValueError(
                f"encode_quality of {self.encode_format} lies in {low}..{high}; it is {self.encode_quality}"
            )
        if self.engine == "img2dataset":
            self._img2dataset_can()
        labels = [f.label for f in self.filters]
        if len(set(labels)) != len(labels):
            raise ValueError("two filters are the same; leave one away")
        return self

    def _img2dataset_can(self) -> None:
        others = {
            "animations": self.animations != "first_frame",
            "reencode": self.reencode != "always",
            "background": self.background != (255, 255, 255),
            "downscale_filter": self.downscale_filter != "bicubic",
            "decode_threads": self.decode_threads != 1,
            "opt_out.robots_txt": self.opt_out.robots_txt,
        }
        # Its client has one deadline and a number of attempts; a limit that somebody set and nobody keeps is no limit.
        known = {"concurrency", "timeout", "retries", "user_agent", "allow_addresses"}
        others |= {f"fetch.{name}": True for name in sorted(self.fetch.model_fields_set - known)}
        for name, is_set in others.items():
            if is_set:
                raise ValueError(f"engine: img2dataset does not know ingest.{name}; leave it away")

    @property
    def quality(self) -> int:
        """`encode_quality`, or the format's default."""
        return self.encode_quality if self.encode_quality is not None else 6 if self.encode_format == "png" else 95

    @property
    def has_heldout(self) -> bool:
        """Whether a held-out split is to be made."""
        return bool(self.heldout_table) or self.heldout_fraction > 0
