"""`carrara remove`: take pictures out of a run, see that they stay out, and say which checkpoints saw them.

    carrara remove --config mine.yaml --urls list.txt      the pictures behind these URLs, and copies of the same bytes
    carrara remove --config mine.yaml --sha256 list.txt    pictures by the sha256 of what was fetched
    carrara remove --config mine.yaml --host example.com   all that came from a host or those below it

First the list (`taken_down.parquet`), so that no ingest fetches them again from then on; then the account of
who saw them, while the order of the training can still be computed; then the image shards, then the latent
shards, only those concerned. Killed at any point, the same command finishes.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.rewrite import committed_indices, matches, take_down
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, requested, url_digest
from orchestration import stages
from orchestration.config import RunConfig
from orchestration.lease import Lease
from shards import storage
from shards.columns import ColumnShard, keep_rows, pack_columns, unpack_columns
from shards.dataset import MANIFEST, Dataset, commit_shard, read_stats, shard_state
from shards.fingerprint import digest_json
from shards.images import ImageShard
from shards.layout import RunPaths, shard_name
from shards.settings import ConfigError, StageError
from shards.stage import Task
from train.order import Order

log = logging.getLogger("carrara")

_BLOCK = 1 << 20  # positions of the training order looked at together


def run(config: RunConfig, urls: str | None, sha256: str | None, host: str | None) -> str:
    """Do all of it; returns what there is to tell, as text. Raises ConfigError or StageError."""
    asked = requested(urls, sha256, host)
    paths = RunPaths(config.run)
    ingests = [s for s, _ in stages.shard_stages("ingest", config) if isinstance(s, IngestStage)]
    # What an earlier, killed attempt at the same removal found can no longer be found: its account says it.
    name = digest_json([sorted(v) for v in (asked.urls, asked.bytes, asked.hosts)])[:16]
    account_url = storage.join(paths.run, "removed", f"{name}.json")
    account = storage.read_json(account_url) or {"keys": {}, "sha256": [], "checkpoints": []}
    found = {s.split: _find(s.root, asked) for s in ingests}
    copies = {f.sha256 for rows in found.values() for f in rows if f.sha256 and url_digest(f.url) in asked.urls}
    asked = asked | TakenDown(bytes=frozenset(copies | set(account["sha256"])))
    if copies:
        found = {s.split: _find(s.root, asked) for s in ingests}
    (TakenDown.read(paths.run) | asked).write(paths.run)
    new = {split: {f.key for f in rows if f.key} for split, rows in found.items()}
    keys = {split: sorted(some | set(account["keys"].get(split, ()))) for split, some in new.items()}
    known = {c["folder"]: c for c in account["checkpoints"]}
    saw = sorted((_checkpoints(config, paths, new["train"]) | known).values(), key=lambda c: str(c["folder"]))
    storage.write_json(account_url, {"keys": keys, "sha256": sorted(asked.bytes), "checkpoints": saw})

    rewritten: dict[Literal["train", "heldout"], list[int]] = {}
    for stage in ingests:
        if committed_indices(stage.root):
            with Lease(paths.status, stage.name, stage.root):
                rewritten[stage.split], _ = take_down(stage, asked)
    latents = _latents(config, paths)
    lines = [f"taken down: {sum(map(len, keys.values())):,} pictures"]
    lines.append(f"  list      {storage.join(paths.run, 'taken_down.parquet')}")
    for split, indices in rewritten.items():
        folder = "images" if split == "train" else "heldout"
        lines.append(f"  {folder:9} {len(indices):,} shards rewritten; {len(keys[split]):,} pictures are out")
    lines.append(f"  latents   {latents}")
    lines.append("checkpoints that saw them:" if saw else "no checkpoint saw them")
    lines += [f"  {c['folder']}: {_how_many(c)}" for c in saw]
    lines.append(f"the account is in {account_url}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A row on the list that is not marked yet; its key where it is a success."""

    key: str | None
    url: str
    sha256: str | None


def _how_many(line: dict[str, Any]) -> str:
    return (
        f"{line['pictures']:,} of them"
        if line["pictures"] is not None
        else "perhaps; it was fitted on an earlier state"
    )


def _find(root: str, listed: TakenDown) -> list[_Found]:
    found = []
    for index in committed_indices(root):
        rows = matches(root, index, listed)
        if rows:
            table = _sidecar(root, index, ["key", "status", "url", "sha256"])
            for row in table.take(pa.array(rows, pa.int64())).to_pylist():
                key = row["key"] if row["status"] == "success" else None
                found.append(_Found(key, row["url"] or "", row["sha256"]))
    return found


def _sidecar(root: str, index: int, columns: list[str] | None = None) -> pa.Table:
    return storage.read_parquet(storage.join(root, shard_name(index) + ".parquet"), columns)


# ---- who saw them ------------------------------------------------------------------------------------------


def _checkpoints(config: RunConfig, paths: RunPaths, keys: set[str]) -> dict[str, dict[str, Any]]:
    """By folder, the checkpoints of every fit that saw some of these pictures: how many, None where it is not known."""
    seen: dict[str, dict[str, Any]] = {}
    if not keys:
        return seen
    for name in stages.FITS:
        if stages.pretrained(name, config):
            continue
        root = paths.latents if name == "train" else paths.images
        try:
            dataset: Dataset | None = Dataset.open(root)
        except StageError:
            dataset = None
        base = paths.run if name == "train" else storage.join(paths.run, name)
        where = _locate(dataset, keys) if dataset is not None else []
        firsts: dict[tuple[int, int], list[int]] = {}
        for folder in storage.list_names(storage.join(base, "checkpoints")):
            url = storage.join(base, "checkpoints", folder)
            manifest = _manifest(url) if folder.startswith("step-") else None
            if manifest is None:
                continue
            count: int | None = None
            # Where buckets or several sources were trained on, the order is not this one dataset's: not known.
            plain = dataset is not None and "bucket_counts" not in dataset.manifest
            if dataset is not None and plain and manifest["fingerprint"].get("input") == dataset.fingerprint:
                settings = manifest["fingerprint"]["settings"]
                how = (int(settings["seed"]), int(settings["shuffle_window"]))
                if how not in firsts:
                    firsts[how] = first_positions(Order(dataset.counts, dataset.fingerprint, *how), where)
                count = sum(p < manifest["images"] for p in firsts[how])
            if count != 0:
                line = {"folder": url, "fit": name, "images": manifest["images"], "pictures": count}
                seen[url] = line
    return seen


def _manifest(folder: str) -> dict[str, Any] | None:
    """What a checkpoint was made from; None where the folder holds no complete one."""
    try:
        manifest = storage.read_json(storage.join(folder, "manifest.json"))
    except ValueError:
        return None
    whole = isinstance(manifest, dict) and {"images", "fingerprint"} <= manifest.keys()
    return manifest if whole else None


def _locate(dataset: Dataset, keys: set[str]) -> list[tuple[int, int]]:
    """(position of the shard, row within it) of these samples, as the training's order counts them."""
    kind: Any = ColumnShard if dataset.kind == "latents" else ImageShard
    found = []
    for position in range(len(dataset.shards)):
        shard = kind(dataset, position)
        found += [(position, row) for row, key in enumerate(shard.keys) if key in keys]
    return found


def first_positions(order: Order, where: Iterable[tuple[int, int]]) -> list[int]:
    """When each of these (shard position, row) comes for the first time, in images; all within the first epoch."""
    wanted = set(where)
    firsts: list[int] = []
    for begin in range(0, order.size, _BLOCK):
        if len(firsts) == len(wanted):
            break
        positions = np.arange(begin, min(begin + _BLOCK, order.size), dtype=np.int64)
        shards, rows = order.locate(positions)
        for shard, row in wanted:
            firsts += positions[(shards == shard) & (rows == row)].tolist()
    return sorted(firsts)


# ---- latents -----------------------------------------------------------------------------------------------


def _latents(config: RunConfig, paths: RunPaths) -> str:
    """Take what is taken down out of the latent shards, without encoding anything again; returns what was done."""
    root = paths.latents
    held = [i for i in committed_indices(root) if _taken_down(paths, i) - _taken_down_latents(root, i)]
    if not held:
        return "none" if not committed_indices(root) else "hold none of them"
    (stage, _), *_ = stages.shard_stages("latents", config)
    with Lease(paths.status, stage.name, root):
        storage.remove(storage.join(root, MANIFEST))
        tasks: dict[int, Task] = {}
        try:
            tasks = {t.index: t for t in stage.tasks()}
        except (ConfigError, StageError) as e:
            log.warning("latents: the shards concerned are deleted, since they cannot be judged: %s", e)
        cut = [i for i in held if i in tasks and _cut(paths, tasks[i])]
        for index in set(held) - set(cut):
            for suffix in ("_stats.json", ".safetensors", ".parquet"):
                storage.remove(storage.join(root, shard_name(index) + suffix))
        if tasks and all(shard_state(root, t).state == "done" for t in tasks.values()):
            stage.finish(s for i in sorted(tasks) if (s := read_stats(root, i)) is not None)
            return f"{len(cut):,} shards rewritten"
    return f"{len(cut):,} shards rewritten, {len(held) - len(cut):,} deleted; run latents to make what is missing"


def _taken_down(paths: RunPaths, index: int) -> set[int]:
    """The rows of an image shard that are taken down; none where there is no such shard."""
    if read_stats(paths.images, index) is None:
        return set()
    return _taken_down_latents(paths.images, index)


def _taken_down_latents(root: str, index: int) -> set[int]:
    errors = _sidecar(root, index, ["error"])["error"].to_pylist()
    return {i for i, error in enumerate(errors) if error == "taken_down"}


def _cut(paths: RunPaths, task: Task) -> bool:
    """Rewrite one latent shard as its image shard now is; False where more than the removal lies between them."""
    from latents.stage import describe

    root, name = paths.latents, shard_name(task.index)
    stats = read_stats(root, task.index)
    if stats is None or any(not c.startswith("input") for c in task.fingerprint.differs(stats["fingerprint"])):
        return False
    table, taken = _sidecar(root, task.index), _taken_down(paths, task.index)
    images = Dataset.open(paths.images)
    shard = ImageShard(images, next(p for p, s in enumerate(images.shards) if s.index == task.index))
    status = table["status"].to_pylist()
    encoded = [i for i, s in enumerate(status) if s in ("success", "failed_to_encode") and i not in taken]
    if encoded != shard.rows.tolist():
        return False  # a duplicate of what has gone has taken its place, say
    live = [i for i, s in enumerate(status) if s == "success"]
    kept = np.array([n for n, i in enumerate(live) if i not in taken], np.int64)
    arrays, metadata = unpack_columns(storage.read_bytes(storage.join(root, name + ".safetensors")))
    arrays = keep_rows(arrays, kept, len(live))
    source = shard.table
    for place, field in enumerate(table.schema):
        # A row that has gone is as the image shard has it, and knows nothing of a crop.
        values = table[field.name].to_pylist()
        theirs = source[field.name].to_pylist() if field.name in source.column_names else [None] * len(values)
        values = [theirs[i] if i in taken else v for i, v in enumerate(values)]
        table = table.set_column(place, field, pa.array(values, field.type))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    buckets = len(stats.get("buckets", [0]))
    old = {k: v for k, v in stats.items() if k not in ("files", "fingerprint", "shard")}
    new = old | describe(arrays, table, buckets)
    files = {".safetensors": pack_columns(arrays, metadata), ".parquet": sink.getvalue()}
    commit_shard(root, task.index, files, new, task.fingerprint)
    return True
