"""A look at finished latents: decoded beside their originals, in numbers, and encoded again to see whether they drift.

Writes `<run>/reports/latents.html`, a page that needs no other file, and `latents.png`, its contact sheet. The drift
check encodes a random few images and captions again with the encoders of today and compares with what is stored:
the same weights give the same latents up to rounding, whatever the batch, so more than that means that a shard was
edited, or that a library or a driver computes something else now.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from latents.arithmetic import fixed_arithmetic
from latents.buckets import Bucket
from latents.columns import FEATURES
from latents.encoders import Vae, load_text_of, load_vae, pick_device, require_digest
from latents.moments import dequantise_logstd
from latents.resize import crop_place, resize_crop_to
from latents.stage import LatentsStage
from latents.text import Text
from latents.weights import text_facts
from shards import images, storage
from shards.columns import ENDS, ColumnShard, packed_rows, value_of
from shards.dataset import Dataset
from shards.settings import StageError
from shards.verify import verify_shard

# Root mean square of what may differ, over that of the values themselves. Batches of other sizes change the last bits
# of float32, and half precision stores eleven; bfloat16 arithmetic keeps eight.
TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 5e-2}
SHARDS_LOOKED_AT = 32  # at most; each is read in full


@dataclasses.dataclass(frozen=True)
class Seen:
    """One sample at one resolution. psnr: of the decoded mean against the cut original, dB; drift: relative root mean
    square of the stored mean against that of today; original, decoded: uint8 [H,W,3]."""

    key: str
    caption: str
    shard: str
    bucket: Bucket
    psnr: float
    drift: float
    original: np.ndarray
    decoded: np.ndarray


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found. text_drift: as Seen.drift, of the captions' embeddings; None where tokens alone are stored.
    features_drift: the largest, of a vision tower's features; None where there are none."""

    samples: list[Seen]
    text_drift: float | None
    features_drift: float | None
    tokens_differ: int
    channels: dict[str, Any]
    scaling_factor: float
    damaged: list[str]
    tolerance: float

    @property
    def drifted(self) -> list[Seen]:
        """The samples whose stored latents are not those of today."""
        return [s for s in self.samples if not s.drift <= self.tolerance]

    @property
    def complaint(self) -> str:
        """One sentence that says what is wrong; empty where nothing is."""
        if self.damaged:
            return f"{len(self.damaged)} shards are damaged: {self.damaged[0]}; run latents again"
        if self.drifted:
            worst = max(self.drifted, key=lambda s: math.inf if math.isnan(s.drift) else s.drift)
            return (
                f"{len(self.drifted)} of {len(self.samples)} latents are not what the encoders give now (sample "
                f"{worst.key} of shard {worst.shard} is off by {100 * worst.drift:.2g} %, rounding is at most "
                f"{100 * self.tolerance:.2g} %); see what changed, or make them again with --redo"
            )
        if self.tokens_differ:
            return f"{self.tokens_differ} captions have other tokens now; open_clip's tokenizer or the captions changed"
        if self.text_drift is not None and not self.text_drift <= self.tolerance:
            return f"the captions' embeddings are off by {100 * self.text_drift:.2g} %; make them again with --redo"
        if self.features_drift is not None and not self.features_drift <= self.tolerance:
            return (
                f"the vision tower's features are off by {100 * self.features_drift:.2g} %; make them again with --redo"
            )
        return ""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, in dB; infinite for equal ones."""
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)


def inspect(stage: LatentsStage, count: int = 32, seed: int = 0) -> Inspection:
    """Look at `count` samples, drawn at random; raises StageError where the weights are not those of the dataset."""
    dataset, source = Dataset.open(stage.root), Dataset.open(stage.run.images)
    manifest, config = dataset.manifest, stage.config
    device = pick_device(config.device)
    buckets = [Bucket(**b) for b in manifest["buckets"]]
    vae = load_vae(stage.vae_ref, device, config.precision)
    require_digest("the VAE", vae.digest, manifest["vae"]["digest"], vae.ref)
    text = load_text_of(_moved(manifest["text"], text_facts(config, stage.text_ref)), device, config.precision)
    rng = np.random.default_rng(seed)
    seen: list[Seen] = []
    damaged: list[str] = []
    differ = 0
    rows_then: list[np.ndarray] = []
    rows_now: list[np.ndarray] = []
    vision = _tower(stage, manifest.get(FEATURES), device)
    features: list[tuple[np.ndarray, np.ndarray]] = []  # stored, and of today
    with fixed_arithmetic(config.threads):
        for position, chosen in _draw(dataset, count, rng):
            info = dataset.shards[position]
            if damage := verify_shard(dataset.root, info.index):
                damaged.append(damage)
                continue
            columns, image_shard = ColumnShard(dataset, position), _image_shard(source, info.index)
            own = {key: i for i, key in enumerate(image_shard.keys)}
            keys, captions = columns.keys, image_shard.captions
            chosen = [n for n in chosen if value_of(columns.arrays, "alive", n) != 0]  # not those taken down since
            for n in chosen:
                if keys[n] not in own:
                    raise StageError(
                        f"{source.root}: the image of sample {keys[n]} is not there any more; run latents again"
                    )
                i = own[keys[n]]
                for r in range(columns.arrays["bucket"].shape[1] if "bucket" in columns.arrays else 1):
                    drawn = manifest["settings"].get("crop") == "random"
                    place = crop_place(keys[n]) if drawn else None
                    seen.append(_look(vae, columns, image_shard, i, n, r, buckets, (keys[n], captions[i]), place))
                    stored = value_of(columns.arrays, FEATURES, n, r)
                    if vision is not None and stored is not None:
                        features.append((stored, vision.encode(seen[-1].original[None]).numpy()[0]))
            then, now, others = _text(text, columns, [captions[own[keys[n]]] for n in chosen], chosen)
            differ += others
            rows_then, rows_now = [*rows_then, *then], [*rows_now, *now]
            image_shard.close()
    return Inspection(
        seen,
        _relative(np.stack(rows_then), np.stack(rows_now)) if rows_then else None,
        max((_relative(*pair) for pair in features), default=None),
        differ,
        manifest["channels"],
        float(manifest["vae"]["scaling_factor"]),
        damaged,
        TOLERANCE[config.precision],
    )


def _tower(stage: LatentsStage, facts: dict[str, Any] | None, device: str) -> Any:
    """The vision tower of stored features with these facts; None where none are stored."""
    if facts is None:
        return None
    from latents.vision import VisionEncoder, find_vision

    asked = stage.config.features
    tower = find_vision(asked.pretrained if asked is not None else facts["ref"])
    return VisionEncoder(tower, facts, device, stage.config.precision)


def _draw(dataset: Dataset, count: int, rng: np.random.Generator) -> list[tuple[int, list[int]]]:
    """(shard position, rows) of `count` samples out of at most SHARDS_LOOKED_AT shards, both drawn at random."""
    full = np.flatnonzero(dataset.counts)
    some = np.sort(rng.permutation(full)[:SHARDS_LOOKED_AT])
    ends = np.cumsum(dataset.counts[some])
    chosen = np.sort(rng.choice(int(ends[-1]), min(count, int(ends[-1])), replace=False))
    which = np.searchsorted(ends, chosen, side="right")
    starts = ends - dataset.counts[some]
    return [(int(some[w]), [int(p - starts[w]) for p in chosen[which == w]]) for w in np.unique(which).tolist()]


def _image_shard(source: Dataset, index: int) -> images.ImageShard:
    position = next((p for p, s in enumerate(source.shards) if s.index == index), None)
    if position is None:
        raise StageError(f"{source.root}: image shard {index} is not there any more; run latents again")
    return images.ImageShard(source, position)


def _look(
    vae: Vae,
    columns: ColumnShard,
    image_shard: images.ImageShard,
    i: int,
    n: int,
    r: int,
    buckets: list[Bucket],
    names: tuple[str, str],
    place: tuple[float, float] | None,
) -> Seen:
    mean, codes = (value_of(columns.arrays, name, n, r) for name in ("mean", "logstd"))
    assert mean is not None
    bucket = buckets[int(columns.arrays["bucket"][n, r]) if "bucket" in columns.arrays else r]
    cut = resize_crop_to(images.decode_rgb(image_shard.image_bytes(i)), bucket.width, bucket.height, place)[0].copy()
    now, logstd = (x.numpy()[0] for x in vae.encode(cut[None]))
    drift = _relative(mean, now)
    if codes is not None and np.abs(dequantise_logstd(codes) - logstd).max() > 0.5:
        drift = max(drift, float(np.abs(dequantise_logstd(codes) - logstd).max()))
    decoded = vae.decode(mean[None].astype(np.float32))[0]
    return Seen(*names, columns.info.name, bucket, psnr(cut, decoded), drift, cut, decoded)


def _moved(facts: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The facts of a manifest, with the places where the configuration has the weights now."""
    found = {**facts, "ref": now["ref"]}
    if "encoders" in facts and "encoders" in now:
        pairs = zip(facts["encoders"], now["encoders"], strict=True)
        found["encoders"] = [{**then, "ref": new["ref"]} for then, new in pairs]
    return found


def _text(
    text: Text, columns: ColumnShard, captions: list[str], chosen: list[int]
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Stored and present embeddings of these captions, and how many have other tokens now."""
    tokens = text.tokens_of(captions)
    stored = {
        name: np.array([value_of(columns.arrays, name, n) for n in chosen], np.int64).reshape(ids.shape)
        for name, ids in tokens.items()
    }
    others = [(ids != stored[name]).reshape(len(chosen), -1).any(axis=1) for name, ids in tokens.items()]
    differ = int(np.any(others, axis=0).sum())
    if "embeddings" not in columns.arrays:
        return [], [], differ
    index = np.array([value_of(columns.arrays, "embedding_index", n) for n in chosen], np.int64).tolist()
    now = list(text.encode_tokens(stored)[0].numpy())
    if ENDS not in columns.arrays:
        return [columns.arrays["embeddings"][i] for i in index], now, differ
    then = np.zeros((len(index), *now[0].shape), np.float16) if now else np.zeros(0)
    for row, i in zip(then, index, strict=True):
        packed = packed_rows(columns.arrays[ENDS], np.array([i]))
        row[: len(packed)] = columns.arrays["embeddings"][packed]
    return list(then), now, differ


def _relative(stored: np.ndarray, now: np.ndarray) -> float:
    a, b = stored.astype(np.float64), now.astype(np.float64)
    return float(np.sqrt(np.mean(np.square(a - b)) / max(float(np.mean(np.square(b))), 1e-12)))


# ---- what a person sees ----------------------------------------------------------------------------


def summary(found: Inspection) -> str:
    """The numbers as text."""
    values = np.array([s.psnr for s in found.samples] or [math.nan])
    lines = [
        f"{len(values)} latents decoded: PSNR {values.mean():.2f} dB in the mean, {np.median(values):.2f} median, "
        f"{values.min():.2f} at the least",
        f"encoded again: off by {100 * max((s.drift for s in found.samples), default=0):.3g} % at the most "
        f"(rounding: up to {100 * found.tolerance:.3g} %)",
    ]
    if found.text_drift is not None:
        lines.append(f"captions embedded again: off by {100 * found.text_drift:.3g} %")
    if found.features_drift is not None:
        lines.append(f"seen by the vision tower again: off by {100 * found.features_drift:.3g} % at the most")
    lines += ["", f"{'channel':>8}{'mean':>10}{'std':>10}{'least':>10}{'most':>10}{'std drawn':>12}{'x scaling':>12}"]
    c = found.channels
    for k, row in enumerate(zip(c["mean"], c["std"], c["min"], c["max"], c["sample_std"], strict=True)):
        lines.append(
            f"{k:>8}"
            + "".join(f"{x:>10.4g}" for x in row[:4])
            + f"{row[4]:>12.4g}{row[4] * found.scaling_factor:>12.4g}"
        )
    scaled = np.array(c["sample_std"]) * found.scaling_factor
    if scaled.min() < 0.5 or scaled.max() > 2:
        lines.append("a channel's std is far from 1 after scaling: is the VAE's scaling_factor the right one?")
    return "\n".join(lines)


def pairs_sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray]], columns: int = 4, cell: int = 192) -> Image.Image:
    """Pairs of original and decoded image, uint8 [H,W,3], left to right, each fitted into `cell` pixels."""
    rows = max(1, math.ceil(len(pairs) / columns))
    gap = 8
    sheet = Image.new("RGB", (columns * (2 * cell + gap) + gap, rows * (cell + gap) + gap), "white")
    for k, pair in enumerate(pairs):
        left, top = gap + (k % columns) * (2 * cell + gap), gap + (k // columns) * (cell + gap)
        for j, pixels in enumerate(pair):
            image = Image.fromarray(pixels)
            scale = cell / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            small = max(image.size) < cell // 2
            image = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
            sheet.paste(image, (left + j * cell + (cell - size[0]) // 2, top + (cell - size[1]) // 2))
    return sheet


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c}"
    "pre{background:#f5f4f1;padding:1rem;overflow-x:auto}figure{display:inline-block;margin:.5rem;width:21rem;"
    "vertical-align:top}figure img{width:49%}figcaption{font-size:13px;color:#444;overflow-wrap:anywhere}"
    ".bad{color:#a11}"
)


def page_of(title: str, body: str, style: str = "") -> str:
    """An HTML page with further `style`, which needs no other file; nothing on it may run. title: escaped here."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{body}</body></html>\n"
    )


def figure_of(original: np.ndarray, decoded: np.ndarray, caption: str, bad: bool = False) -> str:
    """A figure of a page. original, decoded: uint8 [H,W,3]; caption: HTML."""
    pair = "".join(f'<img alt="" src="{data_uri(pixels)}">' for pixels in (original, decoded))
    marked = ' class="bad"' if bad else ""
    return f"<figure>{pair}<figcaption{marked}>{caption}</figcaption></figure>"


def page(found: Inspection, title: str) -> str:
    """The HTML page. Captions are other people's text: everything is escaped."""
    figures = []
    for s in found.samples:
        caption = (
            f"{html.escape(s.key)} &middot; {s.bucket.width}&times;{s.bucket.height} &middot; {s.psnr:.1f} dB "
            f"&middot; drift {100 * s.drift:.2g} %<br>{html.escape(s.caption[:200])}"
        )
        figures.append(figure_of(s.original, s.decoded, caption, s in found.drifted))
    verdict = f'<p class="bad">{html.escape(found.complaint)}</p>' if found.complaint else "<p>Nothing is wrong.</p>"
    return page_of(
        title,
        f"{verdict}<pre>{html.escape(summary(found))}</pre><p>Left: the original as it was cut. Right: what the VAE "
        f"makes of its latent.</p>{''.join(figures)}",
    )


def data_uri(pixels: np.ndarray) -> str:
    """An image, uint8 [H,W,3], as a PNG within a page."""
    return "data:image/png;base64," + base64.b64encode(images.png_bytes(pixels)).decode()


def write(found: Inspection, reports: str, title: str) -> str:
    """Write the page and the contact sheet into a folder; returns where the page is."""
    return write_page(reports, "latents", page(found, title), [(s.original, s.decoded) for s in found.samples])


def write_page(reports: str, name: str, text: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """Write a page and the contact sheet of its pairs as `name`.html and .png; returns where the page is."""
    sink = io.BytesIO()
    pairs_sheet(pairs).save(sink, "PNG")
    storage.write_atomic(storage.join(reports, f"{name}.png"), sink.getvalue())
    url = storage.join(reports, f"{name}.html")
    storage.write_atomic(url, text.encode("utf-8", "replace"))
    return url
