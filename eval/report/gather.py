"""What a report shows, read from the run's folders into plain values: images, curves, the data's funnel,
provenance."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import itertools
import json
import math
import unicodedata
from typing import Any

import numpy as np
from PIL import Image

from eval.networks import SCORING
from eval.report import charts, scores
from eval.rows import images_of
from latents.resize import resize_crop
from shards import storage
from shards.columns import ColumnShard
from shards.dataset import MANIFEST, Dataset
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths, shard_name
from shards.settings import StageError

CAPTION_CAP = 280
SMALL = 96  # px; smaller images are shown enlarged with hard pixels, larger ones as thumbnails
THUMBNAIL = 320


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated image, and the real one of its caption; scores: by name; data: URIs."""

    prompt: str
    image: str
    real: str | None
    cosine: float | None
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """A held-out image and what the VAE makes of it."""

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


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] encoded anew: PNG where it is small, a JPEG thumbnail where it is not."""
    image = Image.fromarray(pixels)
    sink = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(sink, "PNG")
        return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(sink, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


class Images:
    """The generated images of one result, with the real ones of the held-out set, CLIP cosines and scores."""

    def __init__(self, run: RunPaths, result: dict[str, Any]) -> None:
        self.dataset = Dataset.open(storage.join(run.eval, result["checkpoint"], result["images"]))
        self.shards = [ImageShard(self.dataset, p) for p in range(len(self.dataset.shards))]
        self.rows = [shard.table.take(shard.rows).to_pylist() for shard in self.shards]
        kept = ((p, i) for p, rows in enumerate(self.rows) for i in range(len(rows)))
        self.positions = [(p, i) for p, i in kept if self.rows[p][i]["image_offset"] is not None]
        self.resolution = int(self.dataset.manifest["generation"]["size"])
        heldout = storage.exists(storage.join(run.heldout, MANIFEST))
        self.heldout = Dataset.open(run.heldout) if heldout else None
        self._real: dict[int, ImageShard] = {}
        self._protocol = result["protocol"]

    @functools.cached_property
    def _scored(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """By key: the CLIP's cosine, and the scores by name, from the features of this result's networks."""
        cosines: dict[str, float] = {}
        scores: dict[str, dict[str, float]] = {}
        folder = storage.join(self.dataset.root, "features")
        for name in storage.list_names(folder):
            network, root = name.rsplit("-", 1)[0], storage.join(folder, name)
            known = storage.exists(storage.join(root, MANIFEST))
            if not known or network not in ("clip", *SCORING):
                continue
            features = Dataset.open(root)
            if features.manifest["weights"].get(network) != self._protocol[network]:
                continue
            if features.manifest["resolution"] != self._protocol["resolution"]:
                continue  # of the same images as another protocol resizes them
            for position in range(len(features.shards)):
                shard = ColumnShard(features, position)
                if network == "clip":
                    cosine = (shard.arrays["images"] * shard.arrays["captions"]).sum(1)
                    cosines |= dict(zip(shard.keys, map(float, cosine), strict=True))
                    continue
                for column, values in shard.arrays.items():
                    for key, value in zip(shard.keys, values[:, 0] if column != "atoms" else (), strict=False):
                        if math.isfinite(value):
                            scores.setdefault(key, {})[column] = float(value)
        return cosines, scores

    def in_order(self, count: int) -> list[Sample]:
        """Images of the first `count` prompts, one each: chosen by nobody."""
        first = [(p, i) for p, i in self.positions if self.rows[p][i]["replicate"] == 0]
        return [self._sample(*position) for position in first[:count]]

    def by_score(self, count: int) -> tuple[list[Sample], list[Sample]]:
        """The `count` images of highest and of lowest CLIP cosine, each from the extreme inwards."""
        cosines, _ = self._scored
        with_cosine = [at for at in self.positions if self._key(at) in cosines]
        ranked = sorted(with_cosine, key=lambda at: (cosines[self._key(at)], at))
        count = min(count, len(ranked) // 2)
        return [self._sample(*at) for at in ranked[::-1][:count]], [self._sample(*at) for at in ranked[:count]]

    def by_tag(self, tags: dict[str, list[str]] | None, most: int, count: int) -> list[tuple[str, list[Sample]]]:
        """The first `count` images of each of the `most` largest tags; tags: of a caption, beyond the suite's own."""
        found: dict[str, list[tuple[int, int]]] = {}
        for p, i in self.positions:
            row = self.rows[p][i]
            for tag in dict.fromkeys([*(row["tags"] or ()), *(tags or {}).get(row["caption"], ())]):
                found.setdefault(tag, []).append((p, i))
        largest = sorted(found, key=lambda t: (-len(found[t]), t))[:most]
        return [(plain(t, 60), [self._sample(*at) for at in found[t][:count]]) for t in sorted(largest)]

    def _key(self, at: tuple[int, int]) -> str:
        return str(self.rows[at[0]][at[1]]["key"])

    def caption(self, at: tuple[int, int]) -> str:
        """Of the image at (shard, row)."""
        return str(self.rows[at[0]][at[1]]["caption"])

    def _sample(self, position: int, i: int) -> Sample:
        row, (cosines, scores) = self.rows[position][i], self._scored
        real, key = self._real_image(row), row["key"]
        return Sample(plain(row["caption"]), self.uri((position, i)), real, cosines.get(key), scores.get(key, {}))

    def uri(self, at: tuple[int, int]) -> str:
        """The image at (shard, row), as a data: URI."""
        return data_uri(decode_rgb(self.shards[at[0]].image_bytes(at[1])))

    def by_prompt(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(shard, row) of each image that is there, by its prompt's id and its number among that prompt's."""
        rows = ((self.rows[p][i], (p, i)) for p, i in self.positions)
        return {(row["prompt_id"], row["replicate"]): at for row, at in rows}

    def _real_image(self, row: dict[str, Any]) -> str | None:
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


def first_images(run: RunPaths, result: dict[str, Any], count: int) -> list[tuple[str, Image.Image]]:
    """(caption, image) of the first prompts of a result; none where images are not kept, or gone."""
    try:
        kept = images_of(Dataset.open(storage.join(run.eval, result["checkpoint"], result["images"])))
        first = ((row["caption"], data) for row, data in kept if data is not None and row["replicate"] == 0)
        return [(plain(c, 120), Image.fromarray(decode_rgb(data))) for c, data in itertools.islice(first, count)]
    except (StageError, OSError, ValueError):
        return []


def thumbnails(run: RunPaths, result: dict[str, Any], count: int) -> list[tuple[str, str]]:
    """(caption, data: URI) of the first images of a result, small."""
    found = first_images(run, result, count)
    for _, image in found:
        image.thumbnail((64, 64), Image.Resampling.LANCZOS)
    return [(caption, data_uri(np.asarray(image))) for caption, image in found]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt and noise drawn by two models; data: URIs."""

    prompt: str
    before: str
    after: str


def pairs(before: Images, after: Images, count: int) -> list[Pair]:
    """The first `count` prompts that both have, one image each, in the order of `after`."""
    there, here = before.by_prompt(), after.by_prompt()
    shared = [key for key in here if key in there and key[1] == 0]
    return [
        Pair(plain(after.caption(here[key])), before.uri(there[key]), after.uri(here[key])) for key in shared[:count]
    ]


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A generated image and the training image nearest to it; data: URIs."""

    prompt: str
    image: str
    train: str
    caption: str
    cosine: float
    near: bool


def neighbours(run: RunPaths, metrics: dict[str, Any], images: Images) -> list[Neighbour]:
    """The nearest pairs that the memorisation search found, but for those whose images are not there any more."""
    if not metrics.get("nearest") or not storage.exists(storage.join(run.images, MANIFEST)):
        return []
    train = Dataset.open(run.images)
    positions = {s.index: p for p, s in enumerate(train.shards)}
    here = {rows[i]["key"]: (p, i) for p, rows in enumerate(images.rows) for i in range(len(rows))}
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
            original = resize_crop(decode_rgb(shard.image_bytes(j)), images.resolution)[0]
            generated = decode_rgb(images.shards[p].image_bytes(i))
        except ValueError:
            continue
        prompt, caption = plain(images.rows[p][i]["caption"]), plain(shard.captions[j])
        found.append(Neighbour(prompt, data_uri(generated), data_uri(original), caption, pair["cosine"], pair["near"]))
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


def reconstructions(run: RunPaths, result: dict[str, Any], count: int) -> list[Reconstruction]:
    """Real images beside what the VAE makes of them, the first ones of the features' sheets."""
    wanted = result["inputs"].get("real vae")
    for aside in storage.list_names(run.eval):
        for name in storage.list_names(storage.join(run.eval, aside)) if aside.startswith("real-") else ():
            root = storage.join(run.eval, aside, name)
            if name.startswith("vae-") and storage.exists(storage.join(root, MANIFEST)):
                features = Dataset.open(root)
                if features.fingerprint == wanted and storage.exists(storage.join(run.heldout, MANIFEST)):
                    return _reconstructions(Dataset.open(run.heldout), features, count)
    return []


def _reconstructions(heldout: Dataset, features: Dataset, count: int) -> list[Reconstruction]:
    positions = {s.index: p for p, s in enumerate(heldout.shards)}
    found: list[Reconstruction] = []
    for position, info in enumerate(features.shards):
        sidecar = features.sidecar(info.index)
        if info.index not in positions or len(found) >= count or "image_offset" not in sidecar.column_names:
            continue
        shard = ImageShard(heldout, positions[info.index])
        columns = ColumnShard(features, position)
        psnr = dict(zip(columns.keys, columns.arrays["psnr"][:, 0], strict=True))
        with storage.open_read(storage.join(features.root, shard_name(info.index) + ".tar")) as tar:
            for i, row in enumerate(sidecar.to_pylist()):
                if row["image_offset"] is None or len(found) >= count or i >= len(shard) or shard.keys[i] != row["key"]:
                    continue
                tar.seek(row["image_offset"])
                decoded = decode_rgb(tar.read(row["image_size"]))
                original = resize_crop(decode_rgb(shard.image_bytes(i)), decoded.shape[0])[0]
                caption = plain(row["caption"] or "")
                found.append(Reconstruction(data_uri(original), data_uri(decoded), float(psnr[row["key"]]), caption))
    return found


CURVES = (  # folder, key of the log's lines, title, logarithmic
    ("train", "loss", "UNet: loss", True),
    ("train", "lr", "UNet: learning rate", False),
    ("autoencoder", "loss", "VAE: loss", True),
    ("autoencoder", "psnr", "VAE: PSNR of training images, dB", False),
    ("clip", "loss", "CLIP: contrastive loss", False),
    ("clip", "accuracy", "CLIP: accuracy within a batch", False),
)


def curves(run: RunPaths) -> list[charts.Chart]:
    """Loss, learning rate and a figure of merit of each fit, from its log.jsonl; what was not fitted has no curve."""
    found = []
    for folder, key, title, log_scale in CURVES:
        points = [
            (line["images"], line[key]) for line in log_lines(storage.join(run.run, folder)) if is_number(line, key)
        ]
        if len(points) >= 2:
            x, y = zip(*points, strict=True)
            found.append(charts.draw(charts.Line(title, x, y, log_scale=log_scale, noisy=key != "lr")))
    return found


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
        if isinstance(line, dict) and is_number(line, "images"):
            lines.append(line)
    return lines


def is_number(line: dict[str, Any], key: str) -> bool:
    """Whether a line of a log has a finite number of this name."""
    value = line.get(key)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


LOSSES = (
    ("filtered", "set aside by a filter"),
    ("failed_to_download", "could not be fetched"),
    ("failed_to_resize", "were no usable image"),
    ("opted_out", "opted out"),
    ("duplicate", "duplicates"),
)


def funnel(root: str) -> list[Step]:
    """From rows of the table to images, with the reasons of every loss; empty where there is no manifest."""
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
    steps.append(Step("images", int(manifest["count"]), manifest["count"] / rows, "end"))
    return steps


def score_charts(run: RunPaths, checkpoint: str) -> list[charts.Chart]:
    """How the scores of what a checkpoint was trained on are spread, beside those of all images."""
    return [
        charts.distribution(
            h.column, h.edges.tolist(), h.scored.tolist(), None if h.given is None else h.given.tolist(), h.ends
        )
        for h in scores.histograms(run, checkpoint)
    ]


def _belongs(code: str, status: str) -> bool:
    """Whether an error code of the ingest explains rows of a status."""
    if code in ("caption_empty", "filtered_out"):
        return status == "filtered"
    if code in ("x_robots_tag", "tdm_reservation"):
        return status == "opted_out"
    resize = code.startswith("image_") or code == "not_an_image"
    return status == ("failed_to_resize" if resize else "failed_to_download")


def provenance(run: RunPaths, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables of names and values: how it was measured and what it cost, how the model was trained, what its parts are;
    without what was left unset."""
    checkpoint = result["checkpoint"]
    manifest = storage.read_json(storage.join(run.checkpoints, checkpoint, "manifest.json"))
    exported = storage.read_json(storage.join(run.model, "carrara.json"))
    latents = storage.read_json(storage.join(run.latents, MANIFEST))
    measured = storage.read_json(storage.join(run.eval, checkpoint, result["folder"], "provenance.json"))
    tables: dict[str, dict[str, Any]] = {}
    if isinstance(measured, dict):
        tables["Measured by"] = flat(measured)
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
        elif inner not in (None, "", {}, []):
            texts = inner if isinstance(inner, list) and all(isinstance(i, str) for i in inner) else [inner]
            text = ", ".join(i if isinstance(i, str) else json.dumps(i, ensure_ascii=False) for i in texts)
            result[plain(name, 120)] = plain(text, 240)
    return result
