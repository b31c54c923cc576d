"""What a report shows, read from the run's folders into plain values: pictures, curves, the data's funnel,
provenance."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import unicodedata
from typing import Any

import numpy as np
from PIL import Image

from eval import charts
from latents.pictures import resize_crop
from shards import storage
from shards.dataset import MANIFEST, Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths, shard_name

CAPTION_CAP = 280
SMALL = 96  # px; smaller pictures are shown enlarged with hard pixels, larger ones as thumbnails
THUMBNAIL = 320


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated picture beside the real one; verdicts: attribute -> whether the picture shows it as the prompt
    says."""

    prompt: str
    picture: str  # data: URI
    real: str | None
    cosine: float
    verdicts: dict[str, bool]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A held-out picture and what the VAE makes of it."""

    original: str
    decoded: str
    psnr: float
    caption: str


@dataclasses.dataclass(frozen=True)
class Step:
    """A line of the funnel: a share of the rows of the table. kind: start, loss, detail or end."""

    label: str
    count: int
    share: float
    kind: str


def plain(text: str, cap: int = CAPTION_CAP) -> str:
    """A caption that is safe to look at: control and bidi-control characters made visible, white space single, cut at
    `cap`.

    Escaping is the template's part; this takes away what escaping leaves: text that reorders or hides its neighbours.
    """
    words = " ".join(text[: 4 * cap].split())
    visible = "".join("\N{REPLACEMENT CHARACTER}" if _unseen(c) else c for c in words)
    shown = "".join(c for i, c in enumerate(visible) if not (unicodedata.combining(c) and _stacked(visible, i)))
    return shown if len(shown) <= cap else shown[: cap - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _unseen(character: str) -> bool:
    """Whether a character changes what is around it without being seen; the joiners of scripts and emoji may stay."""
    return character not in "\u200c\u200d" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")


def _stacked(text: str, index: int) -> bool:
    """Whether more than three combining marks already sit on this place (they would grow over other lines)."""
    return index >= 4 and all(unicodedata.combining(c) for c in text[index - 3 : index])


def data_uri(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] encoded anew: PNG where it is small, a JPEG thumbnail where it is not."""
    image = Image.fromarray(picture)
    sink = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(sink, "PNG")
        return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(sink, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


class Pictures:
    """The generated pictures of one cell, with the real ones of the held-out set."""

    def __init__(self, run: RunPaths, checkpoint: str, cell: str) -> None:
        self.dataset = Dataset.open(storage.join(run.eval, checkpoint, cell))
        self.shards = [ImageShard(self.dataset, p) for p in range(len(self.dataset.shards))]
        self.place = [(p, i) for p, shard in enumerate(self.shards) for i in range(len(shard))]
        self.rows = [shard.table.take(shard.rows).to_pylist() for shard in self.shards]
        self.resolution = int(self.dataset.manifest["protocol"]["resolution"])
        heldout = storage.exists(storage.join(run.heldout, MANIFEST))
        self.heldout = Dataset.open(run.heldout) if heldout else None
        self._real: dict[int, ImageShard] = {}

    def in_order(self, count: int) -> list[Sample]:
        """Pictures of the first `count` prompts, one each: chosen by nobody."""
        first = [(p, i) for p, i in self.place if self.rows[p][i]["replicate"] == 0]
        return [self._sample(*place) for place in first[:count]]

    def by_score(self, count: int) -> tuple[list[Sample], list[Sample]]:
        """The `count` pictures of highest and of lowest CLIP cosine, each from the extreme inwards."""
        ranked = sorted(self.place, key=lambda at: (self.rows[at[0]][at[1]]["clip_cosine"], at))
        count = min(count, len(ranked) // 2)
        return [self._sample(*at) for at in ranked[::-1][:count]], [self._sample(*at) for at in ranked[:count]]

    def _sample(self, position: int, i: int) -> Sample:
        row = self.rows[position][i]
        verdicts = {n.removeprefix("shows_"): v for n, v in row.items() if n.startswith("shows_") and v is not None}
        picture = decode_rgb(self.shards[position].image_bytes(i))
        return Sample(plain(row["caption"]), data_uri(picture), self._real_picture(row), row["clip_cosine"], verdicts)

    def _real_picture(self, row: dict[str, Any]) -> str | None:
        position, i = row["source_shard"], row["source_row"]
        if self.heldout is None or not 0 <= position < len(self.heldout.shards):
            return None
        shard = self._real.setdefault(position, ImageShard(self.heldout, position))
        if i >= len(shard) or shard.keys[i] != row["source_key"]:
            return None  # the held-out set was made again since
        try:
            return data_uri(resize_crop(decode_rgb(shard.image_bytes(i)), self.resolution)[0])
        except ValueError:
            return None


@dataclasses.dataclass(frozen=True)
class Twin:
    """One prompt and noise drawn by two checkpoints; data: URIs."""

    prompt: str
    before: str
    after: str


def twins(before: Pictures, after: Pictures, count: int) -> list[Twin]:
    """The first `count` prompts that both cells drew, one picture each, in the order of `after`."""
    there = {
        (row["prompt_id"], row["replicate"]): (p, i) for p, rows in enumerate(before.rows) for i, row in enumerate(rows)
    }
    found: list[Twin] = []
    for p, i in after.place:
        row = after.rows[p][i]
        at = there.get((row["prompt_id"], row["replicate"]))
        if row["replicate"] or at is None:
            continue
        pictures = [
            data_uri(decode_rgb(side.shards[q].image_bytes(j))) for side, (q, j) in ((before, at), (after, (p, i)))
        ]
        found.append(Twin(plain(row["caption"]), *pictures))
        if len(found) == count:
            break
    return found


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A generated picture and the training picture nearest to it; data: URIs."""

    prompt: str
    picture: str
    train: str
    caption: str
    cosine: float
    near: bool


def neighbours(run: RunPaths, metrics: dict[str, Any], pictures: Pictures) -> list[Neighbour]:
    """The nearest pairs that the memorisation search found, but for those whose pictures are not there any more."""
    if not metrics.get("nearest") or not storage.exists(storage.join(run.images, MANIFEST)):
        return []
    train = Dataset.open(run.images)
    positions = {s.index: p for p, s in enumerate(train.shards)}
    here = {rows[i]["key"]: (p, i) for p, rows in enumerate(pictures.rows) for i in range(len(rows))}
    found = []
    for pair in metrics["nearest"]:
        if pair["key"] not in here or pair["train_shard"] not in positions:
            continue
        shard = ImageShard(train, positions[pair["train_shard"]])
        if pair["train_key"] not in shard.keys:
            continue
        j = shard.keys.index(pair["train_key"])
        p, i = here[pair["key"]]
        try:
            original = resize_crop(decode_rgb(shard.image_bytes(j)), pictures.resolution)[0]
            drawn = decode_rgb(pictures.shards[p].image_bytes(i))
        except ValueError:
            continue
        prompt, caption = plain(pictures.rows[p][i]["caption"]), plain(shard.captions[j])
        found.append(Neighbour(prompt, data_uri(drawn), data_uri(original), caption, pair["cosine"], pair["near"]))
        shard.close()
    return found


def settings_diff(run: RunPaths, before: str, after: str) -> list[tuple[str, str, str]] | None:
    """(name, before, after) of every setting in which two checkpoints' training differs; None if one is unknown."""
    tables = []
    for name in (before, after):
        manifest = storage.read_json(storage.join(run.checkpoints, name, "manifest.json"))
        if not isinstance(manifest, dict):
            return None
        tables.append(flat({k: manifest[k] for k in ("config", "model_config", "libraries") if k in manifest}))
    a, b = tables
    return [(n, a.get(n, ""), b.get(n, "")) for n in sorted(a.keys() | b.keys()) if a.get(n) != b.get(n)]


def reconstructions(run: RunPaths, metrics: dict[str, Any], count: int) -> list[Reconstruction]:
    """Held-out pictures beside what the VAE makes of them, the first ones of the reference."""
    if not metrics.get("reference") or not storage.exists(storage.join(run.heldout, MANIFEST)):
        return []
    reference = Dataset.open(storage.join(run.eval, "reference", metrics["reference"]["root"]))
    heldout = Dataset.open(run.heldout)
    positions = {s.index: p for p, s in enumerate(heldout.shards)}
    found: list[Reconstruction] = []
    for info in reference.shards:
        if info.index not in positions or len(found) >= count:
            continue
        shard = ImageShard(heldout, positions[info.index])
        with storage.open_read(storage.join(reference.root, shard_name(info.index) + ".tar")) as tar:
            for i, row in enumerate(reference.sidecar(info.index).to_pylist()):
                if row["image_offset"] is None or len(found) >= count or i >= len(shard) or shard.keys[i] != row["key"]:
                    continue
                tar.seek(row["image_offset"])
                decoded = decode_rgb(tar.read(row["image_size"]))
                original = resize_crop(decode_rgb(shard.image_bytes(i)), decoded.shape[0])[0]
                found.append(Reconstruction(data_uri(original), data_uri(decoded), row["psnr"], plain(row["caption"])))
    return found


CURVES = (  # folder, key of the log's lines, title, logarithmic
    ("train", "loss", "UNet: loss", True),
    ("train", "lr", "UNet: learning rate", False),
    ("autoencoder", "loss", "VAE: loss", True),
    ("autoencoder", "psnr", "VAE: PSNR of training pictures, dB", False),
    ("clip", "loss", "CLIP: contrastive loss", False),
    ("clip", "accuracy", "CLIP: accuracy within a batch", False),
)


def curves(run: RunPaths) -> list[charts.Chart]:
    """Loss, learning rate and a figure of merit of each fit, from its log.jsonl; what was not fitted has no curve."""
    drawn = []
    for folder, key, title, log_scale in CURVES:
        points = [
            (line["images"], line[key]) for line in log_lines(storage.join(run.run, folder)) if _number(line, key)
        ]
        if len(points) >= 2:
            x, y = zip(*points, strict=True)
            drawn.append(charts.draw(charts.Line(title, x, y, log_scale=log_scale, noisy=key != "lr")))
    return drawn


def log_lines(folder: str) -> list[dict[str, Any]]:
    """The lines of a fit's log.jsonl that are whole."""
    url = storage.join(folder, "log.jsonl")
    if not storage.exists(url):
        return []
    lines = []
    for text in storage.read_bytes(url).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the torn last line of a killed run
        if isinstance(line, dict) and _number(line, "images"):
            lines.append(line)
    return lines


def _number(line: dict[str, Any], key: str) -> bool:
    value = line.get(key)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


LOSSES = (
    ("filtered", "set aside by a filter"),
    ("failed_to_download", "could not be fetched"),
    ("failed_to_resize", "were no usable picture"),
    ("opted_out", "opted out"),
    ("duplicate", "duplicates"),
)


def funnel(root: str) -> list[Step]:
    """From rows of the table to pictures, with the reasons of every loss; empty where there is no manifest."""
    manifest = storage.read_json(storage.join(root, MANIFEST))
    if not isinstance(manifest, dict):
        return []
    counts = manifest.get("counts", {})
    rows = max(int(counts.get("rows", manifest["rows"])), 1)
    steps = [Step("rows in the table", rows, 1.0, "start")]
    details = {
        "filtered": manifest.get("filtered_by", {}),
        "duplicate": manifest.get("duplicates_by", {}),
    }
    errors = dict(manifest.get("errors", {}))
    for status, label in LOSSES:
        if not counts.get(status):
            continue
        steps.append(Step(label, counts[status], counts[status] / rows, "loss"))
        reasons = details.get(status) or {c: n for c, n in errors.items() if _belongs(c, status)}
        for code, number in sorted(reasons.items(), key=lambda r: (-r[1], r[0])):
            if number:
                steps.append(Step(plain(str(code).replace("_", " "), 80), number, number / rows, "detail"))
    steps.append(Step("pictures", int(manifest["count"]), manifest["count"] / rows, "end"))
    return steps


def _belongs(code: str, status: str) -> bool:
    """Whether an error code of the ingest explains rows of a status."""
    if code in ("caption_empty", "filtered_out"):
        return status == "filtered"
    if code in ("x_robots_tag", "tdm_reservation"):
        return status == "opted_out"
    resize = code.startswith("image_") or code == "not_an_image"
    return status == ("failed_to_resize" if resize else "failed_to_download")


def provenance(run: RunPaths, checkpoint: str) -> dict[str, dict[str, Any]]:
    """Tables of names and values: how the model was trained and what its parts are, as its own files say."""
    manifest = storage.read_json(storage.join(run.checkpoints, checkpoint, "manifest.json"))
    exported = storage.read_json(storage.join(run.model, "carrara.json"))
    latents = storage.read_json(storage.join(run.latents, MANIFEST))
    tables: dict[str, dict[str, Any]] = {}
    training = None
    if isinstance(manifest, dict):
        training = manifest.get("config")
    elif isinstance(exported, dict) and exported.get("checkpoint") == checkpoint:
        training = exported.get("training")
    if isinstance(training, dict):
        tables["Training"] = flat(training)
    if isinstance(latents, dict):
        tables["Latents"] = flat({k: latents[k] for k in ("settings", "vae", "text", "count") if k in latents})
    for name, folder in (("Autoencoder", run.autoencoder), ("CLIP", run.clip)):
        facts = storage.read_json(storage.join(folder, "model", "carrara.json"))
        if isinstance(facts, dict):
            tables[name] = flat(facts)
    return tables


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and short texts."""
    result: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, dict) and inner:
            result |= flat(inner, name)
        else:
            text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
            result[plain(name, 120)] = plain(text, 240)
    return result
