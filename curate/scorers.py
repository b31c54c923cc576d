"""The kinds of score: each is built once a process and turns the samples of one shard into columns.

    scorer = build(config, find)          # find: the dataset of another score, by name
    columns, embeddings = scorer(shard)   # {name: float32 [N] or a list of text}, {name: float16 [N,D]}

Batches are formed within the shard, in its order, so that a shard's columns are the same on any worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from curate import pixels
from curate.config import CaptionScore, ClassifierScore, ClipScore, DuplicateScore, HeadScore, PixelScore, Score
from curate.duplicates import FinishedIndex, Index
from curate.embeddings import read_embeddings
from latents.resize import prefetch
from shards import images
from shards.dataset import Dataset
from shards.fingerprint import digest_file, digest_json
from shards.settings import ConfigError, StageError

Columns = dict[str, "np.ndarray | list[str]"]
Embeddings = dict[str, np.ndarray]
MODEL_FILES = (".json", ".txt", ".model", ".jinja", ".safetensors")  # no pickle, no code
TENSOR_FILES = (".safetensors", ".pth", ".pt", ".bin")


class Scorer(Protocol):
    """Turns one image shard into columns, one value a sample that can be used, in the shard's order."""

    def __call__(self, shard: images.ImageShard) -> tuple[Columns, Embeddings]: ...


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that were found. ref: as the user named them; digest: 64 hex digits over all that they decide."""

    ref: str
    digest: str


def find_weights(score: Score, own_clip: str) -> Weights | None:
    """The weights of a score, None where it has none; raises ConfigError where they are not there.

    own_clip: the run's own CLIP, where the score names no other.
    """
    if isinstance(score, ClipScore):
        from latents.weights import find_clip

        found = find_clip(score.model or own_clip)
        found.require_image_encoder()
        return Weights(found.ref, found.digest)
    if isinstance(score, HeadScore):
        path = Path(score.weights).expanduser()
        if not path.is_file() or path.suffix not in TENSOR_FILES:
            raise ConfigError(f"the head '{score.weights}' is no file ending in {', '.join(TENSOR_FILES)}")
        return Weights(score.weights, digest_file(str(path)))
    if isinstance(score, ClassifierScore):
        return Weights(score.model, tensors_digest(model_folder(score.model, "classifier")))
    return None


def build(score: Score, weights: Weights | None, embeddings: Callable[[], Dataset], index: Index | None) -> Scorer:
    """The scorer of a configuration. embeddings: opens the dataset that a head reads; index: of duplicates."""
    if isinstance(score, ClipScore):
        assert weights is not None
        return _Clip(score, weights)
    if isinstance(score, HeadScore):
        return _Head(score, embeddings)
    if isinstance(score, ClassifierScore):
        return _Classifier(score)
    if isinstance(score, PixelScore):
        return lambda shard: _pixels(score, shard)
    if isinstance(score, DuplicateScore):
        assert index is not None
        finished = FinishedIndex(index)
        return lambda shard: _duplicates(finished, shard)
    assert isinstance(score, CaptionScore)
    return _captions


# ---- images ----------------------------------------------------------------------------------------------


def decoded(shard: images.ImageShard, threads: int, window: int) -> Iterator[tuple[bytes, np.ndarray | None]]:
    """The file and the pixels, uint8 [H,W,3], of each sample in order, decoded ahead by threads; None for pixels that
    cannot be decoded."""

    def load(i: int) -> tuple[bytes, np.ndarray | None]:
        data = shard.image_bytes(i)
        try:
            return data, images.decode_rgb(data)
        except ValueError:
            return data, None

    yield from prefetch(load, len(shard), threads, window)


def _in_batches(
    shard: images.ImageShard, score: ClipScore | ClassifierScore, run: Callable[[list[np.ndarray]], np.ndarray]
) -> np.ndarray:
    """float32 [N,D] of `run` over the images, rows of NaN where one cannot be decoded."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    members: list[int] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        if batch:
            found.append((np.array(members), run(batch)))
            members.clear()
            batch.clear()

    for i, (_, image) in enumerate(decoded(shard, score.decode_threads, 2 * score.batch_size)):
        if image is not None:
            members.append(i)
            batch.append(image)
        if len(batch) == score.batch_size:
            flush()
    flush()
    width = found[0][1].shape[1] if found else 0
    whole = np.full((len(shard), width), np.nan, np.float32)
    for rows, values in found:
        whole[rows] = values
    return whole


class _Clip:
    def __init__(self, score: ClipScore, weights: Weights) -> None:
        from latents.encoders import load_text, pick_device, require_digest

        self.score = score
        self.clip = load_text(weights.ref, device=pick_device(score.device))
        require_digest("the CLIP", self.clip.digest, weights.digest, weights.ref)

    def __call__(self, shard: images.ImageShard) -> tuple[Columns, Embeddings]:
        batch = self.score.batch_size
        image = _in_batches(shard, self.score, lambda some: self.clip.encode_images(some, batch).numpy())
        captions = shard.captions
        distinct, index = np.unique(np.array(captions, object).astype(str), return_inverse=True)
        text = self.clip.encode_captions(list(distinct), batch).numpy()[index.reshape(-1)] if captions else image
        similarity = (image * text).sum(axis=1, dtype=np.float64).astype(np.float32)
        similarity[[not c for c in captions]] = np.nan  # there is nothing to agree with
        return {"similarity": similarity}, {"image": image.astype(np.float16), "text": text.astype(np.float16)}


class _Classifier:
    def __init__(self, score: ClassifierScore) -> None:
        import torch
        import transformers

        from latents.encoders import pick_device

        folder = model_folder(score.model, "classifier")
        self.score, self.torch, self.device = score, torch, pick_device(score.device)
        try:
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            model = transformers.AutoModelForImageClassification.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(f"the classifier '{score.model}': {' '.join(str(e).split())[:300]}") from None
        self.model = model.eval().to(self.device)
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.labels = [_column(str(label)) for label in labels]
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"the classifier '{score.model}' has labels that cannot be told apart as column names")

    def __call__(self, shard: images.ImageShard) -> tuple[Columns, Embeddings]:
        values = _in_batches(shard, self.score, self._run)
        if not values.shape[1]:
            values = np.full((len(shard), len(self.labels)), np.nan, np.float32)
        return {label: values[:, i] for i, label in enumerate(self.labels)}, {}

    def _run(self, arrays: list[np.ndarray]) -> np.ndarray:
        with self.torch.inference_mode():
            batch = self.processor(images=arrays, return_tensors="pt").to(self.device)
            logits = self.model(**batch).logits.float()
            probability = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)
            return probability.cpu().numpy()


def model_folder(ref: str | None, what: str) -> Path:
    """The folder of a transformers model, as it lies here or fetched from the hub: settings and safetensors alone.

    Raises ConfigError where there is none. what: `classifier`, for the sentence.
    """
    folder = Path(ref or "").expanduser()
    if ref and folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(ref), allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"])
        )
    except Exception as e:  # the hub's client raises many types, for names that it does not take as well
        raise ConfigError(
            f"the {what} '{ref}' is no folder here and cannot be had from the hub: {' '.join(str(e).split())[:200]}"
        ) from None


def tensors_digest(folder: Path) -> str:
    """64 hex digits over the settings and weights in a model's folder; raises ConfigError where it has no weights."""
    files = sorted(p for p in folder.iterdir() if p.suffix in MODEL_FILES)
    if not any(p.suffix == ".safetensors" for p in files):
        raise ConfigError(f"{folder} holds no .safetensors")
    return digest_json([[p.name, digest_file(str(p))] for p in files])


def _column(label: str) -> str:
    """A label as a column name: lower case, runs of anything but letters and digits as one _."""
    plain = "".join(c if c.isalnum() else " " for c in label.lower())
    return "_".join(plain.split()) or "label"


# ---- heads on embeddings -----------------------------------------------------------------------------------


class _Head:
    def __init__(self, score: HeadScore, embeddings: Callable[[], Dataset]) -> None:
        self.score = score
        self.layers = load_head(score.weights)
        outputs = self.layers[-1][0].shape[0]
        default = ["score"] if outputs == 1 else [f"score_{i}" for i in range(outputs)]
        self.columns = score.columns or default
        if len(self.columns) != outputs:
            raise ConfigError(
                f"the head '{score.weights}' has {outputs} outputs, and 'columns' names {len(self.columns)}"
            )
        self.dataset = embeddings()

    def __call__(self, shard: images.ImageShard) -> tuple[Columns, Embeddings]:
        features = read_embeddings(self.dataset, shard.info.index, shard.rows, "image").astype(np.float32)
        wanted = self.layers[0][0].shape[1]
        if features.shape[1] != wanted:
            raise StageError(
                f"the head '{self.score.weights}' takes {wanted} features, and those of '{self.score.embeddings}' "
                f"have {features.shape[1]}; name the score whose CLIP it was trained on"
            )
        values = features.astype(np.float64)
        for i, (weight, bias) in enumerate(self.layers):
            values = values @ weight.T.astype(np.float64) + bias
            if self.score.activation == "relu" and i + 1 < len(self.layers):
                values = np.maximum(values, 0)
        if self.score.output == "sigmoid":
            values = 1 / (1 + np.exp(-values))
        elif self.score.output == "softmax":
            values = np.exp(values - values.max(axis=1, keepdims=True))
            values /= values.sum(axis=1, keepdims=True)
        return {name: values[:, i].astype(np.float32) for i, name in enumerate(self.columns)}, {}


def load_head(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The layers of a linear map or MLP: (weight float32 [out,in], bias float32 [out]).

    Layers are the file's matrices named `....weight`, in the order of the numbers in their names, as torch's Sequential
    numbers them. Raises ConfigError where this is no such file; pickled objects other than tensors are not loaded.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # each reader raises its own types for a damaged file
        raise ConfigError(f"the head '{path}' cannot be read as tensors: {' '.join(str(e).split())[:200]}") from None
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict):
        raise ConfigError(f"the head '{path}' holds no named tensors")
    numbered: list[tuple[list[int], str]] = []
    for name, tensor in tensors.items():
        if getattr(tensor, "ndim", 0) == 2 and name.rpartition(".")[2] == "weight":
            numbered.append(([int(p) for p in name.split(".") if p.isdigit()], name))
    numbered.sort()
    layers: list[tuple[np.ndarray, np.ndarray]] = []
    width = None
    for _, name in numbered:
        weight = tensors[name].float().numpy()
        bias = tensors.get(name.removesuffix("weight") + "bias")
        if width is not None and weight.shape[1] != width:
            raise ConfigError(f"the head '{path}': {name} takes {weight.shape[1]} values where {width} come")
        width = weight.shape[0]
        layers.append((weight, bias.float().numpy() if bias is not None else np.zeros(width, np.float32)))
    if not layers:
        raise ConfigError(f"the head '{path}' holds no matrix named ...weight")
    return layers


# ---- no network --------------------------------------------------------------------------------------------


def _pixels(score: PixelScore, shard: images.ImageShard) -> tuple[Columns, Embeddings]:
    rows = [
        pixels.measure(data, image) if image is not None else (np.nan,) * len(pixels.COLUMNS)
        for data, image in decoded(shard, score.decode_threads, 32)
    ]
    table = np.array(rows, np.float32).reshape(len(rows), len(pixels.COLUMNS))
    return {name: table[:, i] for i, name in enumerate(pixels.COLUMNS)}, {}


def _duplicates(finished: FinishedIndex, shard: images.ImageShard) -> tuple[Columns, Embeddings]:
    return {**finished.columns(shard.info.index, shard.rows)}, {}


def _captions(shard: images.ImageShard) -> tuple[Columns, Embeddings]:
    import py3langid
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    captions = shard.captions
    languages = [str(py3langid.classify(c)[0]) if any(map(str.isalpha, c)) else "" for c in captions]
    numbers = {
        "tokens": [len(tokenizer.encode(c)) for c in captions],
        "words": [len(c.split()) for c in captions],
        "characters": [len(c) for c in captions],
    }
    return {"language": languages, **{k: np.array(v, np.float32) for k, v in numbers.items()}}, {}
