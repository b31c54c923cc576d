"""Captions beside images: in text and JSON files of their names, in metadata files, in members of a tar."""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.formats import decoded
from ingest.listing import Row, Wanted
from ingest.tables import CAPTION_NAMES
from shards.settings import ConfigError

log = logging.getLogger("carrara.ingest")

CAPTION_FILES = (".txt", ".caption", ".json")
LONGEST_TEXT = 1 << 20  # bytes of a caption file or member


def beside(fs: Any, image: str, there: set[str], wanted: Wanted) -> tuple[list[str], Row]:
    """The captions in the files beside an image, and what else a .json there says."""
    stem = image.rpartition(".")[0]
    for suffix in CAPTION_FILES:
        name = next((n for s in (suffix, suffix.upper()) for n in (stem + s, image + s) if n in there), None)
        if name is None:
            continue
        try:
            if fs.size(name) > LONGEST_TEXT:
                log.warning("%s: larger than %d bytes, which no caption is; it is left out", name, LONGEST_TEXT)
                continue
            data = fs.cat_file(name)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as e:
            log.warning("%s: cannot be read (%s); it is left out", name, type(e).__name__)
            continue
        if suffix == ".json":
            facts = json_object(data)
            if captions := captions_in(facts, wanted.given.caption):
                return captions, facts
            continue
        lines = [line for line in (" ".join(raw.split()) for raw in text(data).splitlines()) if line]
        if lines:
            return (lines if wanted.source.captions == "lines" else [" ".join(lines)]), {}
    return [], {}


def metadata(fs: Any, files: Sequence[str]) -> dict[str, Row]:
    """By image, the rows of Hugging Face's metadata files, whose `file_name` is meant from the file's own folder."""
    found: dict[str, Row] = {}
    for file in files:
        folder = file.rpartition("/")[0]
        try:
            with fs.open(file, "rb") as stream:
                for row in _records(stream, file):
                    name = row.get("file_name")
                    if isinstance(name, str) and name and ".." not in name.split("/"):
                        found[f"{folder}/{name}"] = row
        except (ValueError, pa.ArrowException, OSError, csv.Error) as e:
            why = " ".join(str(e).split())[:200]
            raise ConfigError(f"{file}: cannot be read as a table of captions: {why}") from None
    return found


def _records(stream: IO[bytes], file: str) -> Iterator[Row]:
    if file.lower().endswith(".parquet"):
        for batch in pq.ParquetFile(stream).iter_batches():
            yield from batch.to_pylist()
    elif file.lower().endswith(".csv"):
        yield from csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
    else:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise ValueError(f"line {number}: {e}") from None
                if isinstance(row, dict):
                    yield row


def captions_in(facts: Mapping[str, Any], given: str | None) -> list[str]:
    """The captions that a JSON object or a row holds, under the name that is given or one that is known."""
    if given is not None:
        return texts(facts.get(given))
    lower = {k.lower(): v for k, v in facts.items() if isinstance(k, str)}
    for name in ("captions", *CAPTION_NAMES):
        if found := texts(lower.get(name)):
            return found
    return []


def texts(value: Any) -> list[str]:
    """The texts of a value, one or a list of them, but for empty ones."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v.strip()]


def text(data: bytes) -> str:
    """Text in UTF-16 where its byte order mark stands first, as Windows writes it; else as in tables."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").strip()
    return decoded(data.removeprefix(codecs.BOM_UTF8)).strip()


def json_object(data: bytes | None) -> Row:
    """The object in a JSON file; empty where there is none, or something else."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
