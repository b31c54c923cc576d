"""The latents stage: one image shard in, one latent shard out, each sample accounted for.

    stage = LatentsStage(config, RunPaths(run), vae_ref, text_ref, seed=0)
    work = stage.worker()
    stage.finish(work(task) for task in stage.tasks())

A latent shard is a pure function of its image shard, the settings and the weights: it has the same bytes on any
worker. What is here knows the whole run: its settings, its tasks, its accounting; latents/worker.py makes a shard.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from latents.columns import rows_digest
from latents.config import LatentsConfig
from latents.moments import ChannelStats
from latents.sidecar import STATUSES
from latents.source import image_settings
from latents.takedown import NOT_SELECTED
from latents.weights import VaeWeights, find_vae, text_facts
from latents.worker import Worker
from shards import storage
from shards.columns import ColumnFile, column
from shards.commit import Folder
from shards.dataset import MANIFEST, Dataset, read_stats_of, write_manifest
from shards.exclusions import write_exclusions
from shards.fingerprint import Fingerprint, digest_json
from shards.layout import RunPaths, shard_name
from shards.listing import listed
from shards.made_with import read_made_with
from shards.selection import Selection
from shards.settings import ConfigError, StageError
from shards.stage import Task, refuse_other_settings
from shards.takeover import is_old, old_digests, old_version

log = logging.getLogger("carrara.latents")

VERSION = 3  # raise it when the bytes of a shard change for the same settings
READABLE = (2,)  # older ones, to whose shards new ones may be added


@dataclasses.dataclass
class _LeftOut:
    """Rows (int64) of a latent shard that are excluded by now: those with a latent, those that were set aside."""

    latents: np.ndarray
    failed: np.ndarray
    unselected: int = 0


class LatentsStage:
    """Stage over the run's image shards. Small and picklable: settings and paths."""

    name = "latents"
    unit = "images"
    data = ".safetensors"
    max_in_flight = 2  # shards a worker is given at a time

    def __init__(self, config: LatentsConfig, run: RunPaths, vae_ref: str, text_ref: str, seed: int = 0) -> None:
        self.config, self.run = config, run
        self.vae_ref, self.text_ref = vae_ref, text_ref
        # Nothing here is random: posterior draws happen in the trainer. The seed is taken so that all
        # stages are built alike, and kept out of the fingerprint.
        self.seed = seed
        self.root = run.latents
        self._opened: tuple[tuple[int, int] | None, Dataset] | None = None

    def made_with(self, redo: bool = False) -> Fingerprint:
        """Settings and weights; raises ConfigError where weights are missing or do not fit the resolution.

        redo: with thresholds of now for latents.select, whatever is recorded.
        """
        vae, text = find_vae(self.vae_ref), text_facts(self.config, self.text_ref)
        for bucket in self.config.bucket_list():
            if bucket.width % vae.downscale or bucket.height % vae.downscale:
                field, value = "resolution", bucket.width
                if self.config.buckets:
                    field, value = "buckets.step", self.config.buckets.step
                raise ConfigError(
                    f"latents.{field} is {value}, which this VAE cannot encode: make it a multiple of {vae.downscale}"
                )
        if self.config.moments and not vae.has_posterior:
            raise ConfigError(
                f"the VAE '{vae.ref}' is an {vae.kind}, which has no posterior to draw from: "
                "set latents.moments to false"
            )
        weights = {"vae": vae.digest, "text": text["digest"]}
        stored = read_made_with(self.root)
        settings = {**self.config.settings(), **self._curated(None if redo else stored)}
        if self.config.features is not None:
            from latents.vision import find_vision

            tower = find_vision(self.config.features.pretrained)
            weights["features"], settings["features"] = tower.digest, tower.settings(self.config.features)
        kept = stored is not None and stored.get("taken_over_from") and stored["version"] in READABLE
        version = stored["version"] if stored is not None and kept else VERSION
        return Fingerprint(self.name, version, settings, None, weights)

    def features(self) -> dict[str, Any] | None:
        """The facts of the vision tower whose features are stored; None where none are. Raises ConfigError."""
        if self.config.features is None:
            return None
        from latents.vision import find_vision

        return find_vision(self.config.features.pretrained).facts(self.config.features)

    def _curated(self, stored: dict[str, Any] | None) -> dict[str, Any]:
        """Settings of what comes from scores and captions: rules with their thresholds, which stay once they are
        recorded, and what made the captions. Raises ConfigError where a score or the captions are not finished."""
        found: dict[str, Any] = {}
        if self.config.select:
            known = (stored or {}).get("settings", {}).get("select")
            found["select"] = Selection(self.run.run, self.config.select, known).settings
        for name in self.config.captions:
            root = storage.join(self.run.run, "captions", name)
            made = read_made_with(root)
            if made is None or not storage.exists(storage.join(root, MANIFEST)):
                raise ConfigError(
                    f"latents.captions: there are no finished captions '{name}' in {root}; name them under "
                    "curate.captions and run 'carrara caption'"
                )
            parts = {k: made.get(k) for k in ("stage", "version", "settings", "weights")}
            found.setdefault("captions", {})[name] = digest_json(parts)[:32]
        return found

    def begin(self, redo: bool = False, each: Any = map) -> None:
        """Make the folder ready, or take one of an older version over; raises ConfigError where those latents are of
        other images than the run's."""
        made_with = self.made_with(redo)
        if is_old(self.root) and not redo:
            self._refuse_other_images()
            # What readers still understand goes on as it is; each shard says how its columns lie.
            made_with = dataclasses.replace(made_with, version=old_version(self.root, READABLE) or VERSION)
        Folder.begin(self.root, made_with, self.data, redo=redo, take_over=True)

    def _refuse_other_images(self) -> None:
        digests = old_digests(self.run.images)
        committed = listed(self.root, self.data).committed
        for index, stats in read_stats_of(self.root, (int(i) for i in committed)):
            if stats is not None and stats["fingerprint"]["input"] != digests.get(index):
                raise ConfigError(
                    f"{self.root}: shard {shard_name(index)} was made of other images than lie in {self.run.images} "
                    "now; give --redo to set this folder aside and make it anew, or set 'run' to another folder"
                )

    def tasks(self) -> Iterator[Task]:
        """One task an image shard. Its latents are done where they are committed for the shard as it was born: what is
        excluded or taken out later is left out by the reader."""
        images = self.images()
        self._refuse_void(images)
        for position, info in enumerate(images.shards):
            yield Task(info.index, info.born if images.format > 1 else None, position)

    def is_current(self) -> bool:
        """Whether the manifest was written for the image shards' present one."""
        manifest = storage.read_json(storage.join(self.root, MANIFEST))
        return isinstance(manifest, dict) and manifest.get("images") == self.images().fingerprint

    def _refuse_void(self, dataset: Dataset) -> None:
        """Raises ConfigError where the images have lost already what these settings are about."""
        how = image_settings(dataset)
        mode, size = how.get("resize_mode"), how.get("image_size")
        for field, asked in (("buckets", self.config.buckets is not None), ("crop", self.config.crop == "random")):
            if asked and mode in ("center_crop", "border"):
                raise ConfigError(
                    f"latents.{field}: the images in {dataset.root} are all square, since they were stored with "
                    f"ingest.resize_mode {mode}; ingest them with keep_ratio, or leave {field} out"
                )
        largest = max(self.config.resolutions)
        if mode != "no" and size is not None and largest > size and not self.config.enlarge:
            field = "resolution" if largest == self.config.resolution else "more_resolutions"
            raise ConfigError(
                f"latents.{field} is {largest}, but the images in {dataset.root} were stored with ingest.image_size "
                f"{size}: each would be enlarged; lower it, ingest larger images, or set latents.enlarge to true"
            )

    def worker(self) -> Worker:
        """Load the encoders once; the result makes one shard a call."""
        return Worker(self)

    def finish(self, stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """Check the accounting, merge the statistics in shard order, write the manifest and return it."""
        vae, text, features = find_vae(self.vae_ref), text_facts(self.config, self.text_ref), self.features()
        refuse_other_settings(self)  # weights may have been exchanged during the run
        images, total = self.images(), None
        expected = {s.index: s for s in images.shards}
        status: Counter[str] = Counter()
        errors: Counter[str] = Counter()
        buckets = self.config.bucket_list()
        laid: list[
            list[int]
        ] = []  # rows of each bucket in each shard's columns, whatever became of their samples since
        later: list[int] = []  # shards of which samples were excluded since
        without = 0

        def folded() -> Iterator[dict[str, Any]]:
            nonlocal total, without
            for s in stats:
                index = s["shard"]
                source = expected.pop(index, None)
                out = images.exclusions.rows(index)
                left_out = self._left_out(index, out) if len(out) and s.get("excluded") != rows_digest(out) else None
                without += _check_accounting(self.root, s, source, left_out)
                if left_out is not None and len(left_out.latents):
                    later.append(index)
                status.update(s["status"])
                errors.update(s["errors"])
                if s["channels"]:
                    part = ChannelStats.from_json(s["channels"])
                    total = part if total is None else total.merge(part)
                laid.append(s.get("laid") or self._laid(index))
                yield s

        def exclusions() -> str | None:
            return write_exclusions(self.root, (self._excluded(images, index) for index in later))

        def extra() -> dict[str, Any]:
            if expected:
                raise StageError(f"{self.root}: {len(expected)} shards are missing, the first is {min(expected)}")
            if total is None:
                raise StageError(f"{self.root}: not one image could be encoded; see 'error' in the shards' .parquet")
            if without:
                log.warning(
                    "%s: %d images that can be used have no latents: they were left out when the latents were "
                    "made; --redo makes them",
                    self.root,
                    without,
                )
            return {
                "images": images.fingerprint,
                "resolution": self.config.resolution,
                "buckets": [b.to_json() for b in buckets],
                "laid": laid,
                "settings": self.config.settings(),
                "vae": _vae_facts(vae),
                "text": text,
                **({} if features is None else {"features": features}),
                "channels": total.summary(),
                "status": {k: status[k] for k in STATUSES if status[k]},
                "errors": dict(sorted(errors.items())),
                "without_latents": without,
            }

        return write_manifest(self.root, "latents", folded(), extra, exclusions)

    def _laid(self, index: int) -> list[int]:
        """The rows of each bucket in the columns of a shard whose stats are too old to say so."""
        shapes = ColumnFile(storage.join(self.root, shard_name(index) + self.data)).columns
        count = len(self.config.bucket_list())
        return [shapes[column("mean", b, count)][1][0] for b in range(count)]

    def _left_out(self, index: int, out: np.ndarray) -> _LeftOut:
        """Of the rows that are excluded now: those that have a latent, and those that were to have one."""
        table = storage.read_parquet(storage.join(self.root, shard_name(index) + ".parquet"), ["status", "error"])
        status, error = (np.array(table[n].to_pylist(), object)[out] for n in ("status", "error"))
        unselected = int((error == NOT_SELECTED).sum())
        return _LeftOut(out[status == "success"], out[status == "failed_to_encode"], unselected)

    def _excluded(self, images: Dataset, index: int) -> pa.Table:
        table = images.exclusions.of(index)
        rows = table["row"].to_numpy()
        return table.filter(pa.array(np.isin(rows, self._left_out(index, rows.astype(np.int64)).latents)))

    def images(self) -> Dataset:
        """The image shards by their manifest as it is now, which is parsed once: 200,000 shards make it long."""
        stamp = storage.stamp(storage.join(self.run.images, MANIFEST))
        if self._opened is None or self._opened[0] != stamp:
            self._opened = (stamp, Dataset.open(self.run.images))
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # workers open it themselves


def _check_accounting(root: str, stats: dict[str, Any], source: Any, left_out: _LeftOut | None) -> int:
    """Rows in = rows out, each with one status; raises StageError naming the shard where that does not hold.

    Returns how many images of the shard that can be used now have no latent: they were left out when it was made.
    """
    shard = f"{root}: shard {stats['shard']}"
    if source is None:
        raise StageError(f"{shard} has no image shard; the images changed during the run, run the same command again")
    unknown = set(stats["status"]) - set(STATUSES)
    if unknown:
        raise StageError(f"{shard} has rows with the unknown status '{min(unknown)}'")
    if sum(stats["status"].values()) != stats["rows"] or stats["rows"] != source.rows:
        raise StageError(f"{shard} has {stats['rows']} rows where its image shard has {source.rows}; rows were lost")
    success, failed = stats["status"].get("success", 0), stats["status"].get("failed_to_encode", 0)
    done = success + failed + stats.get("not_selected", 0)
    if left_out is not None:
        done -= len(left_out.latents) + len(left_out.failed) + left_out.unselected
    changed = left_out is not None or "excluded" in stats  # what was left out once may be in use again
    if success != stats["count"] or done > source.count or (done < source.count and not changed):
        raise StageError(
            f"{shard} has {stats['count']} latents and {failed} set aside where there were {source.count} images"
        )
    return source.count - done


def _vae_facts(vae: VaeWeights) -> dict[str, Any]:
    return {
        "ref": vae.ref,
        "digest": vae.digest,
        "kind": vae.kind,
        "scaling_factor": vae.scaling_factor,
        "config": vae.config,
    }
