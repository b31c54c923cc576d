"""Draw the demo's corpus: pictures, a table of URLs and captions in LAION's schema, and the dirt that real tables have.

    FOLDER/pictures/00/000000.jpg ...   what demo/server.py serves
    FOLDER/server.json                  the files that it serves badly, and how
    FOLDER/table.parquet                for training, in the columns of SCHEMA
    FOLDER/heldout.parquet              the same columns; clean; combinations that the other table never has
    FOLDER/corpus.json                  what was planted, and what an ingest must therefore count

The same settings give the same bytes. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from demo.scenes import Scene, caption, draw, exchanged, sample

VERSION = 4  # raised whenever the bytes change
SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.int32()),
        ("similarity", pa.float64()),
        ("punsafe", pa.float32()),
        ("pwatermark", pa.float32()),
        ("aesthetic", pa.float32()),
        ("LANGUAGE", pa.string()),
        ("WRONG", pa.list_(pa.string())),  # captions in the same words that are not true (scenes.exchanged)
    ]
)
# Width and height of the sources: none below 64, so that a demo at 64 px enlarges nothing; all aspect ratios <= 1.5.
SOURCES = ((64, 64), (80, 80), (96, 64), (64, 96), (96, 96), (112, 80), (80, 112), (128, 128), (128, 96), (144, 96))
# (file format, how often): what the pictures are stored as.
FORMATS = {
    "jpeg": 46,
    "jpeg_progressive": 6,
    "jpeg_turned": 3,  # stored on its side, with an EXIF orientation that says so
    "jpeg_cmyk": 1,
    "png": 18,
    "png_palette": 4,
    "png_alpha": 4,  # only for white grounds: transparent there
    "webp": 14,
    "webp_lossless": 4,
}
_SUFFIX = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}

# The filters that the counts in corpus.json assume (a row fails at most one of them).
FILTERS = {"width": ">= 48", "height": ">= 48", "punsafe": "<= 0.5", "language": "in en", "caption": "not empty"}
TINY = 24

# Dirt, as shares of the pictures; of each kind there is at least one row.
DIRT = {
    "not_found": 0.010,  # 404
    "gone": 0.003,  # 410
    "refused": 0.001,  # nobody listens at that port
    "short_body": 0.001,  # fewer bytes than the Content-Length says
    "truncated": 0.003,  # the file itself ends early
    "html": 0.004,  # a web page under a picture's name
    "opted_out": 0.004,  # X-Robots-Tag: noai
    "repeated": 0.008,  # the same URL and caption once more
    "copied": 0.005,  # the same bytes and caption under another URL
    "narrow": 0.004,  # WIDTH below 48
    "flat": 0.003,  # HEIGHT below 48
    "foreign": 0.008,  # LANGUAGE is not en
    "unsafe": 0.004,  # punsafe above 0.5
    "wordless": 0.004,  # no caption: null, empty or blank
}
# Kinds that are kept, odd as they are.
ODD = {"escaped": 0.004, "hostile": 0.001, "redirected": 0.003}

# What an ingest says of each kind of dirt: its status, where it counts that, and the error, filter or rule it names.
OUTCOMES = {
    "not_found": ("failed_to_download", "errors", "http_not_found"),
    "gone": ("failed_to_download", "errors", "http_not_found"),
    "refused": ("failed_to_download", "errors", "connect_refused"),
    "short_body": ("failed_to_download", "errors", "body_truncated"),
    "truncated": ("failed_to_resize", "errors", "image_truncated"),
    "html": ("failed_to_resize", "errors", "not_an_image"),
    "opted_out": ("opted_out", "errors", "x_robots_tag"),
    "repeated": ("duplicate", "duplicates_by", "duplicate_url"),
    "copied": ("duplicate", "duplicates_by", "duplicate_bytes"),
    "narrow": ("filtered", "filtered_by", "width"),
    "flat": ("filtered", "filtered_by", "height"),
    "foreign": ("filtered", "filtered_by", "language"),
    "unsafe": ("filtered", "filtered_by", "punsafe"),
    "wordless": ("filtered", "filtered_by", "caption"),
}
HOSTILE = (
    "<script>alert(document.domain)</script> {}",
    '"><img src=x onerror=alert(1)> {}',
    "{} </td></table><h1>free pictures</h1>",
    "{{{{ 7*7 }}}} {}",
)
FOREIGN = (
    ("fr", "une petite forme de couleur sur un fond uni"),
    ("de", "eine kleine farbige Form vor hellem Grund"),
    ("ja", "無地の背景に小さな図形"),
    ("es", "una figura pequeña sobre un fondo liso"),
)
_PAGE = "<!DOCTYPE html><html><head><title>Moved</title></head><body><p>This picture has moved.</p></body></html>\n"


class CorpusError(Exception):
    """The corpus cannot be drawn; the message says what to change."""


@dataclass(frozen=True)
class CorpusSummary:
    """What lies in a folder.

    expected: how many rows there are, how many end with each status, and the errors, filters and duplicate rules that
    account for those that do not end well (see OUTCOMES). planted: rows of each kind of DIRT and ODD.
    """

    folder: str
    settings: dict[str, Any]
    expected: dict[str, Any]
    heldout: dict[str, int]
    planted: dict[str, int]
    formats: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Path:
        return Path(self.folder, "table.parquet")

    @property
    def heldout_table(self) -> Path:
        return Path(self.folder, "heldout.parquet")


def draw_corpus(
    folder: str | Path, base_url: str, images: int = 6000, heldout: int = 600, seed: int = 0, progress: bool = True
) -> CorpusSummary:
    """Draw the corpus into `folder`, or do nothing where it is there already, and say what it holds.

    images: clean rows of the table (all dirt comes on top); heldout: rows of the held-out table; base_url: where the
    server will be, e.g. http://127.0.0.1:8090. Raises CorpusError where the folder holds something else.
    """
    settings = {
        "version": VERSION,
        "base_url": base_url.rstrip("/"),
        "pictures": images,
        "heldout": heldout,
        "seed": seed,
    }
    if images < 10 or heldout < 1:
        raise CorpusError(f"a corpus has at least 10 images and 1 held-out image, not {images} and {heldout}")
    folder = Path(folder).absolute()
    if folder.exists():
        return _existing(folder, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        _write(partial, settings, progress)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was quicker; what it drew is checked below.
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _existing(folder, settings)


def load_summary(folder: str | Path) -> CorpusSummary:
    """What corpus.json says; raises CorpusError where there is none."""
    path = Path(folder, "corpus.json")
    try:
        content = json.loads(path.read_text("utf-8"))
        return CorpusSummary(folder=str(Path(folder).absolute()), **content)
    except (OSError, ValueError, TypeError):
        reason = f"{path.name} is missing or unreadable"
        raise CorpusError(f"{folder} holds no corpus ({reason}); give another folder") from None


def _existing(folder: Path, settings: dict[str, Any]) -> CorpusSummary:
    summary = load_summary(folder)
    differing = [name for name in settings if summary.settings.get(name) != settings[name]]
    if differing:
        listed = ", ".join(f"{name} {summary.settings.get(name)} and not {settings[name]}" for name in differing)
        raise CorpusError(f"the corpus in {folder} was drawn with {listed}; remove the folder or give another")
    return summary


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half drawn."""
    for stale in folder.parent.glob(f".{folder.name}.*.partial"):
        pid = stale.name.split(".")[-2]
        try:
            os.kill(int(pid), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(stale, ignore_errors=True)
        except PermissionError:
            pass  # alive, and somebody else's


# ---------------------------------------------------------------- pictures


def encode(scene: Scene, rng: random.Random, width: int, height: int, kind: str) -> bytes:
    """The scene as a file of one of FORMATS, width x height pixels as seen upright."""
    out = io.BytesIO()
    if kind == "png_alpha":
        draw(scene, rng, width, height, transparent=True).save(out, "PNG", compress_level=4)
        return out.getvalue()
    image = draw(scene, rng, width, height)
    if kind.startswith("jpeg"):
        options: dict[str, Any] = {"quality": rng.randint(88, 96), "progressive": kind == "jpeg_progressive"}
        if kind == "jpeg_turned":
            # Orientation 6: what is stored must be turned by 90 degrees clockwise to stand upright.
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif = Image.Exif()
            exif[0x0112] = 6
            options["exif"] = exif.tobytes()
        if kind == "jpeg_cmyk":
            image = image.convert("CMYK")
        image.save(out, "JPEG", **options)
    elif kind == "png_palette":
        image.quantize(64, dither=Image.Dither.NONE).save(out, "PNG", compress_level=4)
    elif kind == "png":
        image.save(out, "PNG", compress_level=4)
    elif kind in ("webp", "webp_lossless"):
        image.save(out, "WEBP", quality=rng.randint(88, 96), lossless=kind == "webp_lossless", method=1)
    else:
        raise ValueError(f"a format is one of {', '.join(FORMATS)}, not {kind!r}")
    return out.getvalue()


class _Writer:
    """Files and rows, as they come."""

    def __init__(self, folder: Path, settings: dict[str, Any], bar: tqdm[Any]) -> None:
        self.folder, self.base_url, self.seed, self.bar = folder, settings["base_url"], settings["seed"], bar
        self.files = 0
        self.formats: Counter[str] = Counter()
        self.behaviours: dict[str, dict[str, Any]] = {}
        (folder / "pictures").mkdir()

    def file(self, data: bytes, suffix: str) -> str:
        """Store bytes under the next name; returns the URL's path."""
        path = f"/pictures/{self.files // 1000:02d}/{self.files:06d}{suffix}"
        target = self.folder / path[1:]
        if self.files % 1000 == 0:
            target.parent.mkdir()
        target.write_bytes(data)
        self.files += 1
        return path

    def image(
        self,
        rng: random.Random,
        of: str = "train",
        scene: Scene | None = None,
        kind: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[str, Scene, dict[str, Any], bytes]:
        """Draw and store one picture; returns (path, scene, a row without dirt, bytes)."""
        scene = scene or sample(rng, of)
        width, height = size or rng.choice(SOURCES)
        if kind is None:
            kind = rng.choices(list(FORMATS), list(FORMATS.values()))[0]
            if kind == "png_alpha" and scene.ground != "white":
                kind = "png"
        data = encode(scene, rng, width, height, kind)
        path = self.file(data, _SUFFIX[kind.partition("_")[0]])
        self.formats[kind] += 1
        self.bar.update(1)
        return path, scene, self.row(path, caption(scene, rng), width, height, rng), data

    def row(self, path: str, text: str, width: int, height: int, rng: random.Random) -> dict[str, Any]:
        """A row as a crawl would have it, with plausible scores."""
        return {
            "URL": path if "://" in path else self.base_url + path,
            "TEXT": text,
            "WIDTH": width,
            "HEIGHT": height,
            "similarity": round(min(0.5, max(0.28, rng.gauss(0.33, 0.03))), 6),
            "punsafe": rng.betavariate(1, 20) * 0.5,
            "pwatermark": rng.betavariate(1, 6),
            "aesthetic": rng.gauss(5.2, 0.6),
            "LANGUAGE": "en",
            "WRONG": exchanged(text),
        }


def _write(folder: Path, settings: dict[str, Any], progress: bool) -> None:
    """Everything, into an empty folder."""
    images, heldout, seed = settings["pictures"], settings["heldout"], settings["seed"]
    planted = {kind: max(1, round(images * share)) for kind, share in (DIRT | ODD).items()}
    undrawn = ("not_found", "gone", "refused", "html", "repeated", "copied")
    total = images + heldout + sum(planted[kind] for kind in DIRT if kind not in undrawn)
    with tqdm(total=total, desc="corpus", unit="images", disable=None if progress else True) as bar:
        writer = _Writer(folder, settings, bar)
        rows = _train_rows(writer, images, planted, seed)
        train_formats = dict(sorted(writer.formats.items()))
        heldout_rows = [writer.image(random.Random(f"{seed}/heldout/{i}"), "heldout")[2] for i in range(heldout)]
    tables = {"table.parquet": rows, "heldout.parquet": heldout_rows}
    for name, content in tables.items():
        pq.write_table(pa.Table.from_pylist(content, schema=SCHEMA), folder / name, compression="zstd")
    _write_json(folder / "server.json", dict(sorted(writer.behaviours.items())))

    counts: dict[str, Counter[str]] = {name: Counter() for name in ("status", "errors", "filtered_by", "duplicates_by")}
    for kind in DIRT:
        status, where, what = OUTCOMES[kind]
        counts["status"][status] += planted[kind]
        counts[where][what] += planted[kind]
    counts["status"]["success"] = len(rows) - counts["status"].total()
    summary = CorpusSummary(
        folder="",
        settings=settings,
        expected={
            "rows": len(rows),
            **{name: dict(sorted(c.items())) for name, c in counts.items()},
            "filters": FILTERS,
        },
        heldout={"rows": len(heldout_rows), "captions": len({row["TEXT"] for row in heldout_rows})},
        planted=planted,
        formats=train_formats,
        sha256={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (*tables, "server.json")},
    )
    written = asdict(summary)
    del written["folder"]  # it may be moved
    _write_json(folder / "corpus.json", written)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _train_rows(writer: _Writer, images: int, planted: dict[str, int], seed: int) -> list[dict[str, Any]]:
    """The training table: `images` clean rows (some of them odd) and the planted dirt, shuffled."""
    clean: list[tuple[dict[str, Any], bytes]] = []
    odd = [kind for kind in ODD for _ in range(planted[kind])]
    for i in range(images):
        rng = random.Random(f"{seed}/train/{i}")
        kind = odd[i] if i < len(odd) else ""
        scene, text = None, None
        if kind == "escaped":  # a caption with an ampersand, escaped as in web pages
            while text is None or "&" not in text:
                scene = sample(rng, "train", pair_share=1.0)
                text = caption(scene, rng)
            text = html.escape(text)
        path, scene, row, data = writer.image(rng, scene=scene)
        if text is not None:
            row |= {"TEXT": text, "WRONG": exchanged(text)}
        if kind == "hostile":
            row |= {"TEXT": rng.choice(HOSTILE).format(row["TEXT"]), "WRONG": []}
        if kind == "redirected":
            moved = f"/moved/{i:06d}{Path(path).suffix}"
            writer.behaviours[moved] = {"status": 302, "headers": {"Location": path}}
            row["URL"] = writer.base_url + moved
        clean.append((row, data))

    rows = [row for row, _ in clean]
    for kind in DIRT:
        rows += [_dirty_row(writer, kind, i, random.Random(f"{seed}/{kind}/{i}"), clean) for i in range(planted[kind])]
    random.Random(f"{seed}/order").shuffle(rows)
    return rows


def _dirty_row(
    writer: _Writer, kind: str, i: int, rng: random.Random, clean: list[tuple[dict[str, Any], bytes]]
) -> dict[str, Any]:
    """One row of a kind of DIRT, with its file and what the server does with it."""
    text = caption(sample(rng, "train"), rng)
    width, height = rng.choice(SOURCES)
    if kind in ("repeated", "copied"):
        # Each row at most once, or a copy would have copies; near the end, where no odd rows are.
        row, data = clean[-1 - (2 * i + (kind == "copied")) % len(clean)]
        path = "" if kind == "repeated" else writer.file(data, Path(row["URL"]).suffix)
        return dict(row) if kind == "repeated" else {**row, "URL": writer.base_url + path}
    if kind == "not_found":
        return writer.row(f"/lost/{i:06d}.jpg", text, width, height, rng)
    if kind == "gone":
        path = f"/gone/{i:06d}.jpg"
        writer.behaviours[path] = {"status": 410}
        return writer.row(path, text, width, height, rng)
    if kind == "refused":
        # Port 1 (tcpmux) of the same host: nobody listens there.
        host = writer.base_url.partition("://")[2].partition("/")[0].rpartition(":")[0] or "127.0.0.1"
        return writer.row(f"http://{host}:1/{i:06d}.jpg", text, width, height, rng)
    if kind == "html":
        path = writer.file(_PAGE.encode(), ".jpg")
        writer.behaviours[path] = {"headers": {"Content-Type": "text/html; charset=utf-8"}}
        return writer.row(path, text, width, height, rng)
    if kind == "truncated":
        path, _, row, data = writer.image(rng, kind="jpeg")
        (writer.folder / path[1:]).write_bytes(data[: len(data) * 3 // 5])
        return row
    size = {"narrow": (TINY, 64), "flat": (96, TINY)}.get(kind)
    path, _, row, _ = writer.image(rng, size=size)
    if kind == "short_body":
        writer.behaviours[path] = {"short": True}
    elif kind == "opted_out":
        tag = ("noai", "noimageai, noai", "noai, noimageindex")[i % 3]
        writer.behaviours[path] = {"headers": {"X-Robots-Tag": tag}}
    elif kind == "foreign":
        row["LANGUAGE"], row["TEXT"] = FOREIGN[i % len(FOREIGN)]
    elif kind == "unsafe":
        row["punsafe"] = float(np.float32(rng.uniform(0.6, 0.99)))
    elif kind == "wordless":
        row["TEXT"] = (None, "", "   ")[i % 3]
    return row
