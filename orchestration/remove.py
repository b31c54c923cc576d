"""`carrara remove`: take images out of a run, see that they stay out, and say which checkpoints saw them.

    carrara remove --config mine.yaml --urls list.txt      the images behind these URLs, and copies of the same bytes
    carrara remove --config mine.yaml --sha256 list.txt    images by the sha256 of what was fetched
    carrara remove --config mine.yaml --host example.com   all that came from a host or those below it

First a part of the list (`taken_down/`), so that no ingest fetches them again from then on; then the account of who
saw them; then the image shards and the latent shards, in which they are blanked where they lie. While an ingest runs,
its finish does that. Killed at any point, the same command finishes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from curate import takedown as curate_takedown
from ingest import removal
from ingest.digests import with_flags
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, requested
from latents import takedown as latents_takedown
from orchestration.config import RunConfig
from orchestration.lease import Busy, Lease
from orchestration.parts import FITS, pretrained, shard_stages, taken_down_mark
from orchestration.runs import curated
from shards import storage
from shards.columns import column_rows
from shards.dataset import MANIFEST, Dataset, read_stats_of
from shards.fingerprint import digest_json
from shards.layout import RunPaths
from shards.listing import listed
from shards.progress import Progress
from shards.settings import ConfigError, StageError
from shards.takeover import take_over_as_it_is
from train.seen import Account, Unknown

log = logging.getLogger("carrara")

SHOWN = 10  # entries that are named of a longer list


def run(config: RunConfig, urls: str | None, sha256: str | None, host: str | None) -> str:
    """Do all of it; returns the report, as text. Raises ConfigError or StageError."""
    asked = requested(urls, sha256, host)
    paths = RunPaths(config.run)
    ingests = [s for s, _ in shard_stages("ingest", config) if isinstance(s, IngestStage)]
    known = TakenDown.read(paths.run)
    new = TakenDown.of(
        (d for d in asked.listed.urls if d not in known.urls),
        (d for d in asked.listed.bytes if d not in known.bytes),
        asked.listed.hosts - known.hosts,
    )
    created = int(new.create_if_any(paths.run))
    shards = {s.split: listed(s.root).committed.tolist() for s in ingests}
    hits = {s.split: _find(s, shards[s.split], asked.listed) for s in ingests}
    copies = {h.sha256 for some in hits.values() for h in some if h.sha256}
    if copies:
        created += TakenDown.of(bytes=(c for c in copies if not known.has_bytes(c))).create_if_any(paths.run)
        for s in ingests:
            hits[s.split] += _find(s, shards[s.split], TakenDown.of(bytes=copies))
    # What is blanked under the lease need not be looked for again, unless somebody else has listed or stored more.
    looked = {
        split: removal.Looked(known.parts, known.parts + created, frozenset(shards[split]), some)
        for split, some in hits.items()
    }
    # What an earlier, killed attempt at the same removal took out is out already: its account says it.
    name = digest_json([sorted(map(str, forms)) for _, forms in asked.entries])[:16]
    account_url = storage.join(paths.run, "removed", f"{name}.json")
    account = storage.read_json(account_url) or {"keys": {}, "checkpoints": []}
    keys = {
        split: sorted({h.key for h in some if h.live} | set(account["keys"].get(split, ())))
        for split, some in hits.items()
    }
    before = {c["folder"]: c for c in account["checkpoints"]}
    # Also of those that are out already: a second request for the same images is answered as the first.
    saw = sorted((before | checkpoints(config, paths, hits.get("train", ()))).values(), key=lambda c: str(c["folder"]))
    unknown = asked.unknown({form for some in hits.values() for h in some for form in h.by})
    pages = _pages(paths, set().union(*keys.values()) if keys else set())
    models = _models(paths, saw)
    storage.write_json(
        account_url, {"keys": keys, "checkpoints": saw, "unknown": unknown, "pages": pages, "models": models}
    )
    lines = [f"taken down: {sum(map(len, keys.values())):,} images"]
    for stage in ingests:
        done = _apply(stage, paths, looked[stage.split], len(keys[stage.split]))
        lines.append(f"  {'images' if stage.split == 'train' else 'heldout':9} {done}")
    lines.append(f"  latents   {settle_latents(config)}")
    lines += [f"  {name} {done}" for name, done in settle_curated(paths).items()]
    lines.append("checkpoints that saw them:" if saw else "no checkpoint saw them")
    lines += [f"  {c['folder']}: {_how_many(c)}" for c in saw]
    lines += [f"the model {m} was exported from one that saw them; export another" for m in models]
    lines += [f"{p} shows some of them; delete it, or make it anew" for p in pages]
    if unknown:
        shown = ", ".join(unknown[:SHOWN]) + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
        lines.append(
            f"{len(unknown)} of {len(asked.entries)} entries are not in this run: {shown}; none will be fetched"
        )
    lines.append("captions, URLs and digests of these rows stay in the sidecars, so that they are recognised")
    lines.append(f"the account is in {account_url}")
    return "\n".join(lines)


def _find(stage: IngestStage, shards: list[int], wanted: TakenDown) -> list[removal.Hit]:
    if not shards:
        return []
    return list(removal.find(stage.root, with_flags(stage.root, shards), wanted, len(shards), stage.name))


def _apply(stage: IngestStage, paths: RunPaths, looked: removal.Looked, count: int) -> str:
    """Blank what is listed in a split's committed shards, unless an ingest is at work; returns what was done.

    looked: what was found there. count: the images that are listed."""
    if not len(listed(stage.root).committed):
        return "nothing is stored"
    shards: set[int] = set()
    while True:
        try:
            with Lease(paths.status, stage.name, stage.root):
                stage.open_for_removal()
                if storage.exists(storage.join(stage.root, MANIFEST)):
                    found = stage.finish_removal(looked)
                    shards |= found
                else:
                    shards |= stage.apply_list(looked)[1]
        except Busy:
            return (
                f"{count:,} images: the running ingest takes them out when it finishes; stop it first where it must "
                "be at once"
            )
        # Looked at once more now that the lease is let go: another may have asked meanwhile, and was told to wait.
        if not stage.list_grew():
            return f"{len(shards):,} shards blanked; {count:,} images are out"


def _known(images: str) -> dict[str, Any]:
    """What a mark says: for how many parts of the list the finished images are blanked, which comes before all else."""
    manifest = storage.read_json(storage.join(images, MANIFEST)) or {}
    return {"list": manifest.get("list", 0)}


def settle_latents(config: RunConfig, again: bool = True) -> str:
    """Blank in the latents what the images have no more; returns what was done.

    again: look through them also where that was done for the present images.
    """
    paths = RunPaths(config.run)
    shards = listed(paths.latents, ".safetensors").committed
    known, mark = _known(paths.images), taken_down_mark(paths, "latents")
    if not len(shards):
        return "none"
    if not again and storage.read_json(mark) == known:
        return "were looked through"
    (stage, _), *_ = shard_stages("latents", config)
    try:
        with Lease(paths.status, stage.name, paths.latents):
            take_over_as_it_is(paths.latents, ".safetensors")
            bar = Progress("latents: take-down", len(shards), "shards")
            changed = latents_takedown.take_out(paths.latents, paths.images, bar.update)
            bar.close()
            storage.write_json(mark, known)
            if not changed:
                return "hold none of them"
            done = f"{len(changed):,} shards blanked"
            if not storage.exists(storage.join(paths.latents, MANIFEST)):
                return done
            try:
                tasks = [t.index for t in stage.tasks()]
                stage.finish(s for _, s in read_stats_of(paths.latents, tasks) if s is not None)
            except (ConfigError, StageError) as e:
                log.warning("latents: the manifest is not written anew: %s", e)
                return f"{done}; run latents to bring its manifest up to them"
            return done
    except Busy:
        return "another job is at work on them; give this command again when it has ended"


def settle_curated(paths: RunPaths, again: bool = True) -> dict[str, str]:
    """The same for scores, captions and control images; by `scores/<name>`, what was done."""
    outcome = {}
    for stage, root in curated(paths):
        name = root.removeprefix(paths.run).strip("/")
        drawn = stage.startswith("control-")  # images that were made of images, of one split or the other
        images = storage.join(paths.run, root.rpartition("/")[2]) if drawn else paths.images
        known, data = _known(images), ".tar" if drawn else ".safetensors"
        mark = taken_down_mark(paths, stage)
        if not again and storage.read_json(mark) == known:
            continue
        shards = listed(root, data).committed
        if not len(shards):
            continue
        try:
            with Lease(paths.status, stage, root):
                bar = Progress(f"{stage}: take-down", len(shards), "shards")
                if drawn:
                    changed = list(latents_takedown.take_out(root, images, bar.update, data))
                else:
                    changed = curate_takedown.take_out(root, images, bar.update)
                bar.close()
                if storage.exists(storage.join(root, MANIFEST)):
                    curate_takedown.amend(root)
                storage.write_json(mark, known)
            outcome[name] = f"{len(changed):,} shards blanked" if changed else "hold none of them"
        except Busy:
            outcome[name] = "another job is at work on them; give this command again when it has ended"
    return outcome


# ---- who saw them ------------------------------------------------------------------------------------------


def checkpoints(config: RunConfig, paths: RunPaths, hits: Iterable[removal.Hit]) -> dict[str, dict[str, Any]]:
    """By folder, the checkpoints of every fit that saw some of these images: how many, None where it is not known."""
    seen: dict[str, dict[str, Any]] = {}
    by_shard: dict[int, list[int]] = {}
    for h in hits:
        by_shard.setdefault(h.shard, []).append(h.row)
    if not by_shard:
        return seen
    for name in FITS:
        if pretrained(name, config):
            continue
        root = paths.latents if name == "train" else paths.images
        base = paths.run if name == "train" else storage.join(paths.run, name)
        folders = [f for f in storage.list_names(storage.join(base, "checkpoints")) if f.startswith("step-")]
        if not folders:
            continue
        try:
            dataset = Dataset.open(root)
        except StageError:
            continue
        samples = {shard: _samples(dataset, shard, rows) for shard, rows in by_shard.items()}
        for folder in folders:
            url = storage.join(base, "checkpoints", folder)
            manifest = _manifest(url)
            count = None if manifest is None else _count(manifest, dataset, samples)
            if manifest is not None and count != 0:
                seen[url] = {"folder": url, "fit": name, "images": manifest["images"], "pictures": count}
    return seen


def _count(manifest: dict[str, Any], dataset: Dataset, samples: dict[int, list[int]]) -> int | None:
    """How many of these samples a checkpoint saw; None where its order cannot be read."""
    try:
        account = Account(manifest, dataset)
        positions = [p for shard, some in samples.items() for p in account.first(shard, some)]
    except Unknown:
        return None
    return sum(p is not None and p < manifest["images"] for p in positions)


def _samples(dataset: Dataset, shard: int, rows: list[int]) -> list[int]:
    """Rows of the sidecar as numbers of samples within the shard: of a latent shard the row in its columns, of an image
    shard the number among those that were a success when they were trained on."""
    try:
        table = dataset.sidecar(shard)
    except FileNotFoundError:
        return []
    if dataset.kind == "latents":
        stored_rows = column_rows(table)
    else:
        stored = np.array(
            [
                s == "success" or e == "taken_down"
                for s, e in zip(*(table[n].to_pylist() for n in ("status", "error")), strict=True)
            ]
        )
        stored[dataset.excluded_rows(shard)] = False
        stored_rows = np.where(stored, np.cumsum(stored) - 1, -1)
    return [int(stored_rows[r]) for r in rows if stored_rows[r] >= 0]


def _manifest(folder: str) -> dict[str, Any] | None:
    """What a checkpoint was made from; None where the folder holds no complete one."""
    manifest = storage.read_object(storage.join(folder, "manifest.json"))
    return manifest if {"images", "fingerprint"} <= manifest.keys() else None


def _how_many(line: dict[str, Any]) -> str:
    if line["pictures"] is None:
        return "perhaps; the order of its training cannot be read"
    return f"{line['pictures']:,} of them"


def _models(paths: RunPaths, saw: list[dict[str, Any]]) -> list[str]:
    """The exported pipeline of the run, where it is of a checkpoint that saw them or is not there any more."""
    made = storage.read_object(storage.join(paths.model, "carrara.json"))
    if not made or not saw:
        return []
    least = min(c["images"] for c in saw if c["fit"] == "train") if any(c["fit"] == "train" for c in saw) else None
    names = {c["folder"].rpartition("/")[2] for c in saw if c["fit"] == "train"}
    late = least is not None and (made.get("images_seen") or least) >= least
    return [paths.model] if made.get("checkpoint") in names or late else []


def _pages(paths: RunPaths, keys: set[str]) -> list[str]:
    """The reports that show one of these samples, by the keys that stand in them."""
    found = []
    for name in storage.list_names(paths.reports):
        if name.endswith(".html") and keys:
            text = storage.read_bytes(storage.join(paths.reports, name)).decode("utf-8", "replace")
            if keys & set(re.findall(r"(?<![\w.])\d{5,}(?![\w.])", text)):
                found.append(storage.join(paths.reports, name))
                sheet = name.removesuffix(".html") + ".png"
                if storage.exists(storage.join(paths.reports, sheet)):
                    found.append(storage.join(paths.reports, sheet))
    return found
