"""Triples for `train.edit`: image before, instruction, image after, drawn by prompt-to-prompt from a table of edited
captions, as those of InstructPix2Pix were (Brooks et al. 2023, arXiv:2211.09800, section 3.1).

    carrara edit-table path/to/stable-diffusion --table captions.jsonl --out triples --count 4

A line of the table is a JSON object of `input` (a caption), `edit` (an instruction) and `output` (the caption when that
is done), the names of the authors' own table. OUT gets parquet files of ROWS triples with the columns of their
published images, original_image, edit_prompt and edited_image, so that a run ingests it as any parquet with images. A
triple that cannot be drawn is a row without images that says why: rows, and so keys, stay as they are numbered.

A file is written once and whole: the same command goes on with the next, and does nothing where all are there.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval import model as models
from eval.edit import DrawnPairs, PairGenerator
from eval.prompts import MAX_CHARS
from eval.shardwork import png
from shards import storage
from shards.fingerprint import Fingerprint, digest_json
from shards.layout import RunPaths
from shards.local import TMP_MARK
from shards.progress import Progress
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara.eval")

VERSION = 1
ROWS = 64  # triples of a file: what a kill costs at the most
ABOUT = "triples.json"
WANTED = ("input", "edit", "output")
SCHEMA = pa.schema(
    [
        ("original_image", pa.binary()),
        ("edit_prompt", pa.string()),
        ("edited_image", pa.binary()),
        ("original_prompt", pa.string()),
        ("edited_prompt", pa.string()),
        ("error", pa.string()),
    ]
)


def read_table(url: str) -> list[dict[str, str]]:
    """Its lines. Raises ConfigError where it is not there, or one of them is not as it should be."""
    try:
        text = storage.read_bytes(url).decode()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--table {url}: {type(e).__name__}; name a file of JSON lines in UTF-8") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a pair of surrogates is JSON, but no text
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(n), str) and row[n].strip() for n in WANTED):
            raise ConfigError(f"--table {url}: line {number} is no JSON object with texts {', '.join(WANTED)}")
        if longest := [n for n in WANTED if len(row[n]) > MAX_CHARS]:
            raise ConfigError(f"--table {url}: line {number}: {longest[0]} has more than {MAX_CHARS} characters")
        rows.append({n: row[n] for n in WANTED})
    if not rows:
        raise ConfigError(f"--table {url}: it has no lines")
    return rows


def draw_table(request: DrawnPairs, ref: str, table: str, out: str) -> tuple[int, int]:
    """Draw what is not there yet of `request.count` triples a line; how many there are now, and how many could not be
    drawn. ref: a run, or a diffusers pipeline's folder. Raises ConfigError where `out` holds something else."""
    from latents.arithmetic import fixed_arithmetic

    rows, run = read_table(table), RunPaths(ref)
    of_pipeline = storage.exists(storage.join(ref, "model_index.json"))
    model = models.of_pipeline(ref) if of_pipeline else models.find(run, request.checkpoint, request.weights)
    settings = request.model_dump(mode="json", exclude={"device", "checkpoint"}) | {"table": digest_json(rows)}
    made = Fingerprint("triples", VERSION, settings, "", {"model": model.digest})
    _refuse_other(out, made)
    total = len(rows) * request.count
    files = [storage.join(out, f"{start // ROWS:05d}.parquet") for start in range(0, total, ROWS)]
    missing = [i for i, file in enumerate(files) if not storage.exists(file)]
    if missing:
        with fixed_arithmetic(request.threads):
            generator = PairGenerator(request, model, run)
            begun = {"fingerprint": made.to_json(), "checkpoint": model.name}
            if not storage.create(storage.join(out, ABOUT), json.dumps(begun).encode()):
                _refuse_other(out, made)
            bar = Progress("triples", total, "triples", done=total - sum(min(ROWS, total - i * ROWS) for i in missing))
            for i in missing:
                lines = list(_drawn(generator, rows, range(i * ROWS, min(total, (i + 1) * ROWS)), bar))
                sink = io.BytesIO()
                pq.write_table(pa.Table.from_pylist(lines, SCHEMA), sink, compression="none")  # of PNGs
                storage.write_atomic(files[i], sink.getvalue())
            bar.close()
    errors = [e for f in files for e in storage.read_parquet(f, ["error"])["error"].to_pylist()]
    failed = [e for e in errors if e is not None]
    if len(failed) == total:
        raise StageError(f"{out}: not one triple could be generated: {failed[0]}")
    return total, len(failed)


def _refuse_other(out: str, made: Fingerprint) -> None:
    """Raise ConfigError where the folder holds anything but triples that are made like this."""
    try:
        others = [name for name in storage.list_names(out) if TMP_MARK not in name]
    except NotADirectoryError:
        raise ConfigError(f"{out} is no folder; name one that is not there yet") from None
    found = storage.read_object(storage.join(out, ABOUT)).get("fingerprint")
    if others and not isinstance(found, dict):
        raise ConfigError(f"{out} is there and holds no triples of Carrara's; name a folder that is not there yet")
    if isinstance(found, dict) and found.get("digest") != made.digest:
        raise ConfigError(f"{out} holds triples of another table or model, or other settings; name another folder")


def _drawn(
    generator: PairGenerator, rows: list[dict[str, str]], numbers: range, bar: Progress
) -> Iterator[dict[str, Any]]:
    for number in numbers:
        row = rows[number // generator.request.count]
        line: dict[str, Any] = {
            "edit_prompt": row["edit"],
            "original_prompt": row["input"],
            "edited_prompt": row["output"],
            "error": None,
        }
        try:
            generator.ask(row["input"], row["output"], names=("input", "output"))
            images, _ = generator.draw(number)
            line |= dict(zip(("original_image", "edited_image"), map(png, images), strict=True))
        except (ConfigError, StageError) as e:
            log.warning("triples: line %d of the table: %s", number // generator.request.count + 1, e)
            line["error"] = str(e)
        bar.update()
        yield line
