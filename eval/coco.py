"""COCO as the reference and the prompts of an FID-30k: one caption an image, its images as they are.

    carrara reference coco --annotations captions_val2014.json --images val2014 --out /data/coco30k

writes `images/`, finished image shards for eval.reference, and `prompts.jsonl` for eval.prompts_file. Published values
draw 30,000 captions of the 40,504 validation images of 2014; which ones, and whether the reference is those images or
all of them, differs from paper to paper and moves the value, so both are said and are in the protocol.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.shardwork import counted, parquet
from shards import images, storage
from shards.commit import Folder
from shards.dataset import write_manifest
from shards.fingerprint import Fingerprint, digest_bytes, digest_json
from shards.progress import Progress
from shards.settings import ConfigError
from shards.stage import Made, Task, commit

PER_SHARD = 1000
MAX_ANNOTATIONS = 2_000_000_000  # bytes
VERSION = 1


def reference(annotations: str, folder: str, out: str, count: int, seed: int = 0, everything: bool = False) -> str:
    """Write <out>/images and <out>/prompts.jsonl; a killed run goes on where it stood. Returns a sentence.

    count captions of as many images, drawn by `seed`, in COCO's own order of captions; everything: the shards hold all
    images of the annotations rather than those drawn. ConfigError where a file is missing or is not COCO's.
    """
    captions, names = _read(annotations)
    if not 1 <= count <= len(captions):
        raise ConfigError(f"reference: --count is {count}; {annotations} has {len(captions)} images with captions")
    sampled = random.Random(seed).sample(sorted(captions), count)
    chosen = sorted(captions) if everything else sampled
    source = Path(folder)
    absent = [names[i] for i in chosen if not (source / names[i]).is_file()]
    if absent:
        raise ConfigError(f"reference: {folder} lacks {len(absent)} of {len(chosen)} images, the first is {absent[0]}")
    root = storage.join(out, "images")
    lines = [json.dumps({"prompt": captions[i], "id": str(i)}, ensure_ascii=False) for i in sampled]
    prompts, url = ("\n".join(lines) + "\n").encode(), storage.join(out, "prompts.jsonl")
    if storage.exists(url) and storage.read_bytes(url) != prompts:
        raise ConfigError(f"reference: {url} is there with other prompts; name a new --out")
    source_digest = digest_json([[i, names[i], captions[i], (source / names[i]).stat().st_size] for i in chosen])
    begun = Folder.begin(root, Fingerprint("reference", VERSION, {}, source_digest), take_over=True)
    stats = []
    progress = Progress("reference", len(chosen), "images")
    for index in range(0, len(chosen), PER_SHARD):
        part = [(i, source / names[i], captions[i]) for i in chosen[index : index + PER_SHARD]]
        stats.append(commit(begun, Task(index // PER_SHARD), functools.partial(_made, part)))
        progress.update(len(part))
    progress.close()
    status = {"success": sum(s["count"] for s in stats), "failed": sum(s["rows"] - s["count"] for s in stats)}
    facts = {
        "source": "COCO",
        "drawn": count,
        "seed": seed,
        "reference": "all images" if everything else "the drawn ones",
    }
    write_manifest(root, "images", stats, {**facts, "status": {k: v for k, v in status.items() if v}})
    storage.write_atomic(url, prompts)
    failed = f" ({status['failed']} could not be read)" if status["failed"] else ""
    return (
        f"{count:,} captions (seed {seed}) are in {out}/prompts.jsonl; the reference is {facts['reference']}, "
        f"{status['success']:,}{failed}, in {root}"
    )


def _read(annotations: str) -> tuple[dict[int, str], dict[int, str]]:
    """The first caption of each image, and each image's file name, by its id."""
    file = Path(annotations)
    if not file.is_file() or file.stat().st_size > MAX_ANNOTATIONS:
        raise ConfigError(f"reference: there is no file {annotations}; give COCO's captions_val2014.json")
    try:
        found: Any = json.loads(file.read_bytes())
        first: dict[int, tuple[int, str]] = {}
        for a in found["annotations"]:
            i, caption = int(a["image_id"]), " ".join(str(a["caption"]).split())
            if caption and (i not in first or int(a["id"]) < first[i][0]):
                first[i] = (int(a["id"]), caption)
        names = {int(i["id"]): str(i["file_name"]) for i in found["images"]}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(f"reference: {annotations} is no captions file of COCO's ({e!r})") from None
    odd = next((n for n in names.values() if "/" in n or "\\" in n or n.startswith(".")), None)
    if odd is not None:
        raise ConfigError(f"reference: {annotations} names the file '{odd}', which is no plain name")
    return {i: caption for i, (_, caption) in first.items() if i in names}, names


def _made(part: Sequence[tuple[int, Path, str]]) -> Made:
    rows: list[dict[str, Any]] = []
    samples = []
    for i, file, caption in part:
        data, error = file.read_bytes(), None
        try:
            images.pixel_size(data)
            samples.append((f"{i:012d}", {_extension(file): data}))
        except ValueError as e:
            error = " ".join(str(e).split())[:300]
        rows.append(
            {
                "key": f"{i:012d}",
                "caption": caption,
                "status": "failed" if error else "success",
                "error": error,
                "sha256": digest_bytes(data),
                "image_ext": None if error else _extension(file),
            }
        )
    tar, extents = images.pack_tar(samples)
    where = {key: next(iter(p.values())) for (key, _), p in zip(samples, extents, strict=True)}
    table = {name: [r[name] for r in rows] for name in rows[0]}
    table["image_offset"] = [where[r["key"]][0] if r["key"] in where else None for r in rows]
    table["image_size"] = [where[r["key"]][1] if r["key"] in where else None for r in rows]
    return {".tar": tar, ".parquet": parquet(table)}, counted(table["status"])


def _extension(file: Path) -> str:
    return {"jpeg": "jpg"}.get(file.suffix.lower().lstrip("."), file.suffix.lower().lstrip("."))
