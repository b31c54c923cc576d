"""Benchmarks that score images in an environment of their own: images out in the layouts they read, scores back in.

    carrara images RUN CHECKPOINT PROTOCOL --layout geneval --out DIR     images out, and index.jsonl that names them
    carrara scores RUN CHECKPOINT PROTOCOL --name geneval FILE            their scores in, as a metric like any other

    files      <key>.png
    geneval    <number>/metadata.jsonl (the suite's own line), <number>/samples/<replicate>.png
    dpg        <id>.png: a prompt's four images in a square
    compbench  samples/<prompt>_<number>.png (T2I-CompBench reads the prompt from the name)

A file of scores is JSON lines: `id` (an image's key) or `file`/`filename` (its name in the export), and `score` or
`correct`; GenEval's own results are such a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from eval.inputs import read_lines
from eval.metrics.definitions import is_free
from eval.rows import images_of
from eval.shardwork import png
from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import digest_json
from shards.images import decode_rgb
from shards.progress import Progress
from shards.settings import ConfigError, StageError

LAYOUTS = ("files", "geneval", "dpg", "compbench")
SQUARE = 4  # images of a prompt in one of DPG's
SCORES = "scores"  # folder beside the shards
LARGEST = 1e30  # size of a score: of larger ones not even the squares could be summed


def export(images: str, layout: str, out: str) -> int:
    """Write all images of the generated shards in `images` into the folder `out`; returns how many.

    A file that is there with these bytes stays; one with others, or a folder that holds something else, is an error:
    nothing is overwritten. ConfigError, StageError.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"images: --layout is '{layout}'; it is one of {', '.join(LAYOUTS)}")
    dataset = Dataset.open(images)
    folder = Path(out)
    index = folder / "index.jsonl"
    if folder.is_dir() and any(folder.iterdir()) and not index.exists():
        raise ConfigError(f"images: {out} is not empty; name a new folder")
    if index.exists() and not _is_ours(index):
        raise ConfigError(f"images: {index} is no index of an export; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    index.touch()
    progress = Progress("images", len(dataset), "images")
    lines, count = [], 0
    number: dict[str, int] = {}  # of a prompt, in the order in which they come
    square: dict[str, list[tuple[dict[str, Any], bytes]]] = {}
    for row, data in images_of(dataset):
        if data is None:
            raise StageError(f"images: {images} keeps some images alone (eval.keep_images); make them again")
        n = number.setdefault(row["prompt_id"], len(number))
        if layout == "dpg":
            waiting = square.setdefault(row["prompt_id"], [])
            waiting.append((row, data))
            if len(waiting) == SQUARE:
                name = f"{_plain(row['name'] or f'{n:05d}')}.png"
                _put(folder / name, png(_square([decode_rgb(d) for _, d in square.pop(row["prompt_id"])])))
                lines += [{"id": r["key"], "file": name, "prompt": r["caption"]} for r, _ in waiting]
        else:
            name = {
                "files": f"{row['key']}.png",
                "geneval": f"{n:05d}/samples/{row['replicate']:05d}.png",
                "compbench": f"samples/{_in_name(row['caption'])}_{count:06d}.png",
            }[layout]
            _put(folder / name, data)
            if layout == "geneval":
                _put(folder / f"{n:05d}" / "metadata.jsonl", _own_line(row))
            lines.append({"id": row["key"], "file": name, "prompt": row["caption"]})
        count += 1
        progress.update(1)
    progress.close()
    if square:
        raise StageError(
            f"images: the layout dpg wants {SQUARE} images a prompt, and {len(square)} prompts have others; set "
            f"eval.replicates to {SQUARE}"
        )
    written = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines).encode()
    if not written.startswith(index.read_bytes()):  # that of a result with fewer images may grow
        raise ConfigError(f"images: {out} holds the images of another result; name a new folder")
    storage.write_atomic(str(index), written)
    return count


def _is_ours(index: Path) -> bool:
    """Whether a file is an index as `export` writes it, or the empty one of an export that was killed."""
    with index.open("rb") as f:
        line = f.readline(1_000_000)
    try:
        return not line or json.loads(line).keys() == {"id", "file", "prompt"}
    except (ValueError, AttributeError, RecursionError):
        return False


def _put(file: Path, data: bytes) -> None:
    if file.exists():
        if file.read_bytes() != data:
            raise ConfigError(f"images: {file} is there with other content; name a new folder")
        return
    storage.write_atomic(str(file), data)


def _own_line(row: dict[str, Any]) -> bytes:
    return (row["extra"] or json.dumps({"prompt": row["caption"]}, ensure_ascii=False)).encode() + b"\n"


def _square(images: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.concatenate(images[:2], axis=1), np.concatenate(images[2:], axis=1)], axis=0)


def _plain(name: str) -> str:
    """A suite's id as a file name: an id is hostile text, and must not leave the folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:120] or "prompt"


def _in_name(prompt: str) -> str:
    """A prompt as part of a file name. T2I-CompBench splits at the first underscore."""
    return re.sub(r"[/\\\0_\x00-\x1f]+", " ", prompt).strip(" .")[:150] or "prompt"


# ---- scores ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Imported:
    """Scores by (prompt id, replicate), and the file that they came from."""

    source: str
    scores: dict[tuple[str, int], float]

    def of(self, prompts: Sequence[str], replicates: Sequence[int]) -> np.ndarray:
        """Of these images, NaN where there is none."""
        found = [self.scores.get((p, r), math.nan) for p, r in zip(prompts, replicates, strict=True)]
        return np.array(found, np.float64)


def bring_in(images: str, name: str, file: str, index: str | None = None) -> int:
    """Take the scores of `file` for the images of these shards as the metric `name`; returns how many.

    index: the export's index.jsonl, where the file names images by their files. ConfigError, with the line, where one
    cannot be used, and where there are scores of that name already.
    """
    if not is_free(name):
        raise ConfigError(f"scores: '{name}' is no free name; give one of small letters, digits and _, such as geneval")
    dataset = Dataset.open(images)
    keys: dict[str, tuple[str, int]] = {}
    for shard in dataset.shards:
        rows = dataset.sidecar(shard.index).select(["key", "prompt_id", "replicate"]).to_pylist()
        keys |= {r["key"]: (r["prompt_id"], r["replicate"]) for r in rows}
    files: dict[str, str] = {}
    if index is not None:
        for line in read_lines(index, "scores", "the index.jsonl of an export"):
            if line.strip():
                try:
                    entry = json.loads(line)
                    files[str(entry["file"])] = str(entry["id"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise ConfigError(f"scores: {index} is no index.jsonl of `carrara images`") from None
    scores: dict[tuple[str, int], float] = {}
    for number, line in enumerate(read_lines(file, "scores", "JSON lines with id and score"), 1):
        if not line.strip():
            continue
        where = f"scores: {file}, line {number}"
        key, score = _score(line, where, files)
        if key not in keys:
            raise ConfigError(f"{where}: there is no image '{key}' in {images}")
        if keys[key] in scores:
            raise ConfigError(f"{where}: image '{key}' has a score already")
        scores[keys[key]] = score
    if not scores:
        raise ConfigError(f"scores: {file} has no scores; write JSON lines with id and score")
    url = storage.join(images, SCORES, f"{name}.json")
    content: dict[str, Any] = {"source": os.path.basename(file)}
    content["scores"] = sorted([p, r, s] for (p, r), s in scores.items())
    if storage.exists(url) and _kept(url) != Imported(content["source"], scores):
        raise ConfigError(f"scores: {images} has other scores named {name}; give these another name")
    storage.write_json(url, content)
    return len(scores)


def _score(line: str, where: str, files: dict[str, str]) -> tuple[str, float]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: it is no JSON ({e})") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{where}: it is no object such as {{"id": ..., "score": ...}}')
    score = values.get("score", values.get("correct"))
    if not isinstance(score, int | float) or not abs(score) <= LARGEST:
        raise ConfigError(f'{where}: it needs a finite number "score" (at most {LARGEST:g}), or "correct"')
    if isinstance(values.get("id"), str):
        return values["id"], float(score)
    file = values.get("file", values.get("filename"))
    if not isinstance(file, str):
        raise ConfigError(f'{where}: it names no image; give "id", or "file" with the export\'s --index')
    parts = PurePosixPath(file.replace("\\", "/")).parts
    for start in range(len(parts)):  # an absolute path, or one from elsewhere
        if (key := files.get("/".join(parts[start:]))) is not None:
            return key, float(score)
    raise ConfigError(f"{where}: '{file}' is not in the export's index; give --index DIR/index.jsonl")


def imported(images: str) -> dict[str, Imported]:
    """The scores that were brought in for these images, by name; StageError where a file of them is damaged."""
    folder = storage.join(images, SCORES)
    files = [f for f in storage.list_names(folder) if f.endswith(".json")]
    return {f.removesuffix(".json"): _kept(storage.join(folder, f)) for f in files}


def _kept(url: str) -> Imported:
    try:
        content: Any = storage.read_json(url)
        scores = {(str(p), int(r)): float(s) for p, r, s in content["scores"]}
        return Imported(str(content["source"]), scores)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise StageError(f"{url} is damaged; delete it, and bring the scores in again") from None


def imported_digests(images: str) -> dict[str, str]:
    """Digest of each of the imported scores."""
    return {n: digest_json(sorted([p, r, v] for (p, r), v in s.scores.items())) for n, s in imported(images).items()}
