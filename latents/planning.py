"""What pre-encoding would store, take and cost, for each choice there is, before any of it is done.

Rates are measured on images of the run's own image shards, with the run's own encoders, and kept in
`<run>/status/latents-rates.json` for as long as settings and weights stay the same; everything else is arithmetic,
which needs neither encoders nor images. Whoever trains in the cloud pays for three things: the encoders' hours, the
storage by the month, and, for what is not stored, the trainer's own hours in every epoch.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from latents.columns import id_type
from latents.config import LatentsConfig
from latents.stage import LatentsStage
from latents.weights import clips_of, find_clip, find_sequence, find_vae, text_facts
from shards import images, storage
from shards.fingerprint import digest_json
from shards.settings import ConfigError, StageError

MICRO_BYTES, INDEX_BYTES = 24, 4  # of a sample and a resolution; of a sample
RATES = "latents-rates.json"


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one worker was measured to need, in seconds: for the decoding and cutting of an image (on one thread), for
    its VAE, and for the CLIP of a distinct caption. distinct: distinct captions a sample, within a shard. sidecar:
    bytes a row beside the columns. where: the machine. samples: how many images that was measured on."""

    decode: float
    vae: float
    text: float
    distinct: float
    sidecar: float
    area: float  # latent places a sample, over all resolutions
    where: str
    samples: int
    tokens: float = 0.0  # a caption, where captions have as many rows as tokens; else 0
    features: float = 0.0  # seconds of the vision tower for an image, over all resolutions


@dataclasses.dataclass(frozen=True)
class Prices:
    """worker_hour, trainer_hour: money for an hour of one encoding worker and of one training rank.
    terabyte_month: of storage. months: how long it is kept. epochs: how often each sample is trained on.
    worker_speed, trainer_speed: times the speed measured here."""

    worker_hour: float = 1.0
    trainer_hour: float = 2.0
    terabyte_month: float = 23.0
    months: float = 1.0
    epochs: float = 1.0
    worker_speed: float = 1.0
    trainer_speed: float = 1.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to do it. bytes_a_sample of storage; hours of workers beforehand; once, storage, training: money for
    these hours, for the storage, and for what is left to the trainer in all epochs."""

    name: str
    bytes_a_sample: float
    hours: float
    once: float
    storage: float
    training: float
    break_even: float | None  # epochs from which it is cheaper than to store nothing

    @property
    def money(self) -> float:
        """All of it."""
        return self.once + self.storage + self.training


def column_bytes(text: str, moments: bool, rates: Rates, facts: dict[str, int], resolutions: int = 1) -> float:
    """Bytes of a sample's columns. facts: channels, context, width, pooled (0 where it is not stored), flips (2 where
    mirrored images are encoded too), how many encoders have tokens of their own; one each, where left out. And of an
    id, 2 where left out, and of what says how long a caption is, 0 where left out; and how many values a vision tower's
    features have, 0 where left out."""
    flips = facts.get("flips", 1)
    latent = facts["channels"] * rates.area * flips
    ids = facts.get("id_bytes", 2) * facts["context"] * facts.get("encoders", 1) + facts.get("length_bytes", 0)
    size = latent * (3 if moments else 2) + ids + MICRO_BYTES * resolutions
    size += 2 * facts.get("features", 0) * flips * resolutions
    if text == "embeddings":
        rows = rates.tokens or facts["context"]
        size += INDEX_BYTES + rates.distinct * 2 * (rows * facts["width"] + facts["pooled"])
    return size


def choices(samples: int, rates: Rates, prices: Prices, facts: dict[str, int], resolutions: int = 1) -> list[Choice]:
    """Every choice for so many samples: nothing stored, and each pair of text and moments."""

    def training(seconds: float) -> float:  # money an epoch
        return samples * seconds / prices.trainer_speed / 3600 * prices.trainer_hour

    online = training(rates.vae + rates.features + rates.distinct * rates.text)
    found = [Choice("online: nothing stored", 0.0, 0.0, 0.0, 0.0, prices.epochs * online, None)]
    for text in ("tokens", "embeddings"):
        for moments in (False, True):
            size = column_bytes(text, moments, rates, facts, resolutions) + rates.sidecar
            beforehand = (rates.vae + rates.features) * facts.get("flips", 1) + (
                rates.distinct * rates.text if text == "embeddings" else 0.0
            )
            hours = samples * beforehand / prices.worker_speed / 3600
            rest = training(0.0 if text == "embeddings" else rates.distinct * rates.text)
            kept = samples * size / 1e12 * prices.terabyte_month * prices.months
            once = hours * prices.worker_hour
            saved = online - rest
            name = f"{text}, {'moments' if moments else 'means alone'}"
            even = (once + kept) / saved if saved > 0 else None
            found.append(Choice(name, size, hours, once, kept, prices.epochs * rest, even))
    return found


def facts_of(stage: LatentsStage) -> dict[str, int]:
    """The sizes that the columns follow from; the weights are looked at, not loaded."""
    vae, text = find_vae(stage.vae_ref), text_facts(stage.config, stage.text_ref)
    pooled = 0
    if stage.config.text_pooled:
        second = stage.config.second_clip
        clip = find_clip(second.pretrained if second else stage.text_ref)
        pooled = int(clip.model_cfg.get("embed_dim") or clip.width)
    channels = int(vae.config["latent_channels"])
    found = {"channels": channels, "context": text["context_length"], "width": text["width"], "pooled": pooled}
    if stage.config.sequence is not None:
        vocabulary = find_sequence(stage.config.sequence.pretrained).vocabulary
        found |= {"id_bytes": id_type(vocabulary).itemsize, "length_bytes": 2}
    if (features := stage.features()) is not None:
        found["features"] = features["grid"] ** 2 * features["width"]
    return found | {"encoders": len(clips_of(text))} | ({"flips": 2} if stage.config.flip else {})


def rates_of(stage: LatentsStage, samples: int = 64, measure_again: bool = False) -> Rates:
    """The rates that were measured with these settings and weights, else measured now (which loads the encoders)."""
    key = rates_key(stage)
    url = storage.join(stage.run.status, RATES)
    try:
        known = storage.read_json(url)
    except ValueError:
        known = None
    if isinstance(known, dict) and known.get("key") == key and not measure_again:
        return Rates(**known["rates"])
    rates = _measure(stage, samples)
    storage.write_json(url, {"key": key, "rates": dataclasses.asdict(rates)})
    return rates


def rates_key(stage: LatentsStage) -> str:
    """What rates depend on: everything but the choices that a plan is to compare."""
    weights = [find_vae(stage.vae_ref).digest, text_facts(stage.config, stage.text_ref)["digest"]]
    if (features := stage.features()) is not None:
        weights.append(features["digest"])
    settings = {k: v for k, v in stage.config.settings().items() if k not in ("text", "moments", "flip")}
    return digest_json([settings, stage.config.device, weights])[:32]


def _measure(stage: LatentsStage, samples: int) -> Rates:
    """Time the three parts on the first images of the first shard that has some."""
    import platform

    import torch

    from latents.arithmetic import fixed_arithmetic

    try:
        dataset = stage.images()
    except StageError:
        dataset = None
    position = next((p for p, s in enumerate(dataset.shards) if s.count), None) if dataset else None
    if dataset is None or position is None:
        raise ConfigError(
            f"plan: {stage.run.images} has no finished image shards to measure on; ingest a small table first"
        )
    worker = stage.worker()
    shard = images.ImageShard(dataset, position)
    count = min(samples, len(shard))
    plan = worker.images.plan(shard)
    load = worker.images.loader(shard, plan)
    began = time.thread_time()
    loaded = [(int(plan.order[k]), load(k)) for k in range(count)]
    decode = (time.thread_time() - began) / count
    live = [(i, s) for i, s in loaded if s.error is None]
    if not live:
        raise StageError(f"{shard.url}: not one of the first {count} images can be decoded")
    seconds = features = 0.0
    with fixed_arithmetic(stage.config.threads):
        for r in range(len(stage.config.resolutions)):
            batches: dict[int, list[np.ndarray]] = {}
            for i, s in live:
                batches.setdefault(int(plan.bucket[i, r]), []).append(s.pixels[r])
            size = stage.config.batch_size
            for batch in batches.values():
                stacks = [np.stack(batch[i : i + size]) for i in range(0, len(batch), size)]
                worker.vae.encode_stored(stacks[0])()  # the first of a shape chooses its kernels
                began = time.perf_counter()
                for stack in stacks:
                    worker.vae.encode_stored(stack)()
                seconds += time.perf_counter() - began
                if worker.vision is not None:
                    worker.vision.encode_stored(stacks[0])()
                    began = time.perf_counter()
                    for stack in stacks:
                        worker.vision.encode_stored(stack)()
                    features += time.perf_counter() - began
        tokens, index = worker.tokenise(shard.captions)
        distinct = len(np.unique(index[:-1]))
        worker.embed_captions({n: ids[:1] for n, ids in tokens.items()}, np.zeros(1, np.int64))
        rows = np.unique(index, return_index=True)[1][: max(count, stage.config.batch_size)]
        began = time.perf_counter()
        worker.embed_captions({n: ids[rows] for n, ids in tokens.items()}, np.arange(len(rows)))
        text = (time.perf_counter() - began) / len(rows)
    shard.close()
    downscale = worker.vae.downscale
    area = np.array([b.width * b.height / downscale**2 for b in stage.config.bucket_list()])
    sidecar = storage.size(storage.join(dataset.root, shard.info.name + ".parquet")) or 0
    device = torch.cuda.get_device_name() if worker.device == "cuda" else f"CPU, {stage.config.threads} threads"
    return Rates(
        decode=decode,
        vae=seconds / len(live),
        text=text,
        features=features / len(live),
        tokens=float(tokens["text_length"][:-1].mean()) if "text_length" in tokens else 0.0,
        distinct=distinct / len(shard),
        sidecar=sidecar / max(shard.info.count, 1) + 2500 / max(shard.info.count, 1),  # and the stats file
        area=float(area[plan.bucket].sum(axis=1).mean()),
        where=f"{platform.node()} ({device})",
        samples=len(live),
    )


def report(
    config: LatentsConfig, samples: int, workers: int, rates: Rates, prices: Prices, facts: dict[str, int]
) -> str:
    """The plan as text."""
    threads = max(1, int(np.ceil(rates.decode / (rates.vae + rates.features))))
    tower = f"the vision tower {1e3 * rates.features:.3g} ms an image, " if rates.features else ""
    lines = [
        f"{samples:,} images; measured on {rates.samples} of them on {rates.where}:",
        f"  VAE {1e3 * rates.vae:.3g} ms an image, CLIP {1e3 * rates.text:.3g} ms a distinct caption "
        f"({rates.distinct:.2f} an image), {tower}decoding {1e3 * rates.decode:.3g} ms on one thread",
        f"  so {threads} decoding thread{'s' if threads > 1 else ''} can keep one worker's encoders busy",
        "",
    ]
    table: list[tuple[str, ...]] = [
        ("", "bytes", "storage,", "worker", "hours on", "", "money for", "", "", "pays from"),
        ("", "a sample", "TB", "hours", f"{workers} workers", "encoding", "storage", "training", "all", "epoch"),
    ]
    for c in choices(samples, rates, prices, facts, len(config.resolutions)):
        table.append(
            (
                c.name,
                f"{c.bytes_a_sample:,.0f}",
                f"{samples * c.bytes_a_sample / 1e12:,.3f}",
                f"{c.hours:,.1f}",
                f"{c.hours / workers:,.1f}",
                *(f"{money:,.0f}" for money in (c.once, c.storage, c.training, c.money)),
                "" if c.break_even is None else f"{c.break_even:.2f}",
            )
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        first, *rest = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]).rstrip())
    lines += [
        "",
        f"money: {prices.worker_hour:g} for an hour of a worker, {prices.trainer_hour:g} of a training rank, "
        f"{prices.terabyte_month:g} for a terabyte and month; {prices.months:g} months, {prices.epochs:g} epochs",
        f"speed: workers {prices.worker_speed:g}, training ranks {prices.trainer_speed:g} times what was measured here",
        "'pays from epoch': where a choice costs less than to encode anew in every epoch",
    ]
    return "\n".join(lines)


def image_count(stage: LatentsStage, rows: int | None) -> int:
    """How many images there are to plan for: those of the run, or `rows` times the share that was a success there."""
    try:
        dataset = stage.images()
    except StageError:
        dataset = None
    if rows is None:
        if dataset is None:
            raise ConfigError(
                f"plan: {stage.run.images} has no finished image shards, so give the table's size with --rows"
            )
        return len(dataset)
    share = len(dataset) / max(dataset.manifest["rows"], 1) if dataset is not None else 1.0
    return round(rows * share)
