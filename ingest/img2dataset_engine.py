"""`engine: img2dataset`: img2dataset's own fetching and resizing, for those who want its exact images.

It runs shard by shard in a process of its own (this file as a script), since it prints, leaks and may
hang; what it leaves is read back, checked row by row and packed and committed like what we make. Its
client knows nothing of private addresses, so in that process every socket is judged by our guard, and answers
by our reading of the opt-out headers (those of the last hop, since it follows redirects unseen). Bodies are not
bounded there, nor requests to a host, and a row's deadline is img2dataset's own; limits of that kind are refused
by the configuration.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ingest.addresses import AddressRefused, Guard
from ingest.config import IngestConfig
from ingest.errors import Rejected
from ingest.optout import product_name, robots_refusal, tdm_refusal
from ingest.pixels import EncodedImage, hashes
from ingest.pool import Outcome
from ingest.takedown import TakenDown
from ingest.urls import parse_url
from shards.settings import ConfigError, StageError

_DISALLOWED = "Use of image disallowed by X-Robots-Tag directive"  # its downloader.py
_START_S = 120.0  # its imports


def require() -> None:
    """Raise ConfigError where img2dataset is not installed."""
    if importlib.util.find_spec("img2dataset") is None:
        raise ConfigError("ingest.engine is img2dataset, which is not installed; pip install 'carrara[img2dataset]'")


class Img2datasetPool:
    """What work.Crew is, by img2dataset."""

    def __init__(self, config: IngestConfig, taken_down: TakenDown | None = None) -> None:
        require()
        self.config, self.taken_down = config, taken_down or TakenDown()

    def fetch_all(self, urls: dict[int, str]) -> dict[int, Outcome]:
        """The outcome of each URL, by the number it comes with; raises StageError where img2dataset gave none."""
        outcomes: dict[int, Outcome] = {}
        todo: list[int] = []
        for i, url in urls.items():
            try:
                parse_url(url)  # it would read file: and data: URLs
                todo.append(i)
            except Rejected as e:
                outcomes[i] = Outcome.of(e.code, e.message)
        if todo:
            with tempfile.TemporaryDirectory(prefix="carrara-img2dataset-") as folder:
                self._run(Path(folder), [urls[i] for i in todo])
                for i, outcome in zip(todo, self._read(Path(folder), len(todo)), strict=True):
                    outcomes[i] = outcome
        return outcomes

    def close(self) -> None:
        """Nothing is held between shards."""

    def _run(self, folder: Path, urls: list[str]) -> None:
        table = pa.table({"url": urls})
        with pa.OSFile(str(folder / "rows.feather"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        (folder / "config.json").write_text(self.config.model_dump_json(by_alias=True, exclude_unset=True))
        fetch = self.config.fetch
        rounds = -(-len(urls) // fetch.concurrency) * (fetch.retries + 1)
        limit = _START_S + 4 * rounds * fetch.timeout
        with open(folder / "log", "wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "ingest.img2dataset_engine", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ
                | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                start_new_session=True,
            )
            try:
                code = child.wait(limit)
            except subprocess.TimeoutExpired:
                raise StageError(f"img2dataset did not end within {limit:.0f} s and was killed") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if code:
            last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise StageError(f"img2dataset ended with {code}: {last[0][:300]}")

    def _read(self, folder: Path, count: int) -> list[Outcome]:
        """What became of each row, in order; raises StageError where a row is missing or its image is not whole."""
        try:
            rows = pq.read_table(folder / "out" / "00000.parquet").to_pylist()
            with tarfile.open(folder / "out" / "00000.tar") as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
            by_row = {int(r["key"]): r for r in rows}
        except (OSError, ValueError, pa.ArrowException, tarfile.TarError) as e:
            raise StageError(f"what img2dataset wrote cannot be read: {e}") from None
        if sorted(by_row) != list(range(count)) or len(rows) != count:
            raise StageError(f"img2dataset lost rows: {count} went in, {len(by_row)} came out")
        return [self._outcome(by_row[i], members) for i in range(count)]

    def _outcome(self, row: dict[str, Any], members: dict[str, bytes]) -> Outcome:
        message = " ".join((row["error_message"] or "").split())[:300]
        if self.taken_down.has_bytes(row["sha256"]):
            return Outcome.of("taken_down", sha256=row["sha256"])
        if row["status"] == "success":
            data = members.get(f"{row['key']}.{self.config.encode_format}", b"")
            try:
                with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                    size, rgb = image.size, np.asarray(image.convert("RGB"))
            except Exception as e:
                raise StageError(f"img2dataset stored an image that cannot be decoded ({type(e).__name__})") from None
            if size != (row["width"], row["height"]):
                raise StageError(f"img2dataset stored an image of {size}, its parquet says otherwise")
            sizes = (row["width"], row["height"], row["original_width"], row["original_height"])
            encoded = EncodedImage(data, self.config.encode_format, *sizes, row["exif"] or "{}", *hashes(rgb))
            return Outcome("success", None, None, encoded, row["sha256"], len(data), 1)
        if message == _DISALLOWED:
            return Outcome.of("x_robots_tag", message, attempts=1)
        if AddressRefused.__name__ in message:
            return Outcome.of("address_refused", attempts=1)
        code = "img2dataset_resize" if row["status"] == "failed_to_resize" else "img2dataset_download"
        return Outcome.of(code, message, attempts=1)


def main(folder: str) -> None:
    """The child: guard the sockets, then img2dataset's own downloader over the rows of the folder."""
    import socket

    config = IngestConfig.model_validate_json((Path(folder) / "config.json").read_text())
    guard, connect = Guard(config.fetch.allow_addresses), socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not guard.permits(str(address[0]), int(address[1])):
            raise AddressRefused(f"{AddressRefused.__name__}: {address[0]} is not a public address")
        connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign, assignment]

    import img2dataset.downloader
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    opt_out, ours = config.opt_out, product_name(config.fetch.user_agent)

    def disallowed(headers: Any, *_: Any) -> bool:
        tags, reserved = headers.get_all("X-Robots-Tag", []), headers.get_all("TDM-Reservation", [])
        refused = robots_refusal(tags, (ours, *opt_out.agents), opt_out.directives)
        return refused is not None or (opt_out.tdm_reservation and tdm_refusal(reserved))

    img2dataset.downloader.is_disallowed = disallowed
    resizer = Resizer(
        config.image_size,
        config.resize_mode,
        config.only_if_bigger,
        encode_format=config.encode_format,
        encode_quality=config.quality,
        max_image_area=config.max_pixels,
    )
    out = Path(folder) / "out"
    out.mkdir()
    rows = Path(folder) / "rows.feather"
    with pa.memory_map(str(rows)) as source:
        count = pa.ipc.open_file(source).read_all().num_rows
    download = Downloader(
        WebDatasetSampleWriter,
        resizer,
        config.fetch.concurrency,
        False,
        True,
        str(out),
        ["url"],
        config.fetch.timeout,
        max(count, 2),
        5,
        "sha256",
        None,
        config.encode_format,
        config.fetch.retries,
        ours,
        ["asked by disallowed"] if opt_out.respect else None,
    )
    done, _ = download((0, str(rows)))
    stats = json.loads((out / "00000_stats.json").read_text()) if done else {}
    if stats.get("count") != count:
        sys.exit("img2dataset did not finish its shard")


if __name__ == "__main__":
    main(sys.argv[1])
