"""From committed shards to metrics.json: every number with its count, standard error and interval.

Shards are read in the order of their ids, so the result is the same, bit for bit, for any number of workers. A
Frechet distance needs the memory of its moments alone; retrieval, kernel distances and neighbours need all features
of one network at once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from eval import clipscore, encoders, faithfulness, frechet, manifold, memorisation, mmd
from eval.config import EvalConfig
from eval.estimate import Estimate, with_groups
from eval.inception_score import inception_score
from eval.moments import Accumulator
from eval.networks import INCEPTION_SHA256
from eval.retrieval import distinct, of_pairs
from shards import storage
from shards.columns import ColumnShard
from shards.commit import born, read_made_with
from shards.dataset import Dataset
from shards.fingerprint import digest_bytes, digest_json

log = logging.getLogger("carrara.eval")

METRICS = "metrics.json"

# name -> (which way is better, definition)
DEFINITIONS: dict[str, tuple[str, str]] = {
    "fd_clip_unit": (
        "lower",
        "Frechet distance between unit-length CLIP features of generated and of held-out real pictures; delete-a-group "
        "jackknife over prompts; not an FID, which is measured on Inception features",
    ),
    "fd_clip_unit_real": (
        "lower",
        "the same distance between two halves of the held-out real pictures: what a perfect model would come near to",
    ),
    "clip_score": ("higher", "100 * mean(max(cos, 0)) of picture and prompt, no prefix"),
    "clip_cosine": ("higher", "mean cosine of picture and prompt"),
    "clip_score_control": ("", "CLIP score of the same pictures with other prompts: what luck alone gives"),
    "clip_score_real": ("", "CLIP score of the held-out real pictures with their own captions"),
    "retrieval": ("higher", "share of generated pictures whose own prompt ranks first among distinct held-out prompts"),
    "clip_retrieval_real": (
        "higher",
        "share of held-out real pictures whose own caption ranks first: the CLIP's own skill",
    ),
    "vae_psnr": ("higher", "mean PSNR in dB of the VAE's reconstruction of held-out pictures"),
    "cmmd": (
        "lower",
        "1000 * squared MMD (Gaussian kernel, sigma 10, biased) of unit-length CLIP features against the held-out real "
        "pictures'; published values are on ViT-L/14 at 336 px",
    ),
    "fid_tf": (
        "lower",
        "FID as torch-fidelity measures it: the Inception of 2015, TensorFlow 1's resize; the generated side's bias is "
        "taken out of bias_corrected alone",
    ),
    "fid_clean": ("lower", "FID as clean-fid measures it: the Inception of 2015, Pillow's bicubic resize in float32"),
    "kid_tf": ("lower", "unbiased KID of all pictures at once on fid_tf's features; may be negative"),
    "isc_tf": ("higher", "Inception score of all pictures at once (one split) on fid_tf's logits"),
    "fd_dinov2_pil": ("lower", "Frechet distance on DINOv2's class token, pictures stretched to 224 px by Pillow"),
    "near_training": (
        "",
        "share of generated pictures whose nearest training picture, by CLIP features, is nearer than that of 99 % of "
        "the held-out real pictures; 1 % would be as novel as real pictures are",
    ),
}
_NEIGHBOURS = {
    "precision": ("higher", "share of generated pictures within the 5th-neighbour ball of a real one"),
    "recall": ("higher", "share of real pictures within the 5th-neighbour ball of a generated one"),
    "density": (
        "higher",
        "mean number of real pictures' 5th-neighbour balls that hold a generated one, over 5",
    ),
    "coverage": ("higher", "share of real pictures with a generated one within their 5th-neighbour ball"),
}
for _space, _where in (("tf", "fid_tf's features"), ("dinov2_pil", "DINOv2's features")):
    for _name, (_better, _text) in _NEIGHBOURS.items():
        DEFINITIONS[f"{_name}_{_space}"] = (_better, f"{_text}, on {_where}; depends on the numbers of pictures")


def write(url: str, metrics: dict[str, Any]) -> None:
    """Write the content of a metrics.json, with its own digest."""
    storage.write_json(url, {**metrics, "digest": digest_json(metrics)})


def read(url: str) -> dict[str, Any] | None:
    """The content of a metrics.json; None where there is none, it is torn, or it is not what was written: a number that
    was changed by hand is no measurement."""
    try:
        found = storage.read_json(url)
    except NotADirectoryError:
        return None
    except ValueError:
        found = {}
    if found is None:
        return None
    whole = isinstance(found, dict) and "metrics" in found
    if not whole or found.pop("digest", None) != digest_json(found):
        _warn(url, digest_json(found))
        return None
    return dict(found)


@functools.lru_cache(maxsize=1024)  # once, however often it is looked at
def _warn(url: str, _content: str) -> None:
    log.warning("%s is torn or was edited and does not count; the eval stage measures it again", url)


def dataset_of(root: str, stats: Sequence[dict[str, Any]]) -> Dataset:
    """The committed shards as a dataset, whether or not its manifest is written yet.

    Its own manifest also tells how many pictures were dropped, and how many were converted to RGB."""
    shards = [
        {
            "index": s["shard"],
            "rows": s["rows"],
            "count": s["count"],
            "born": born(s),
        }
        for s in sorted(stats, key=lambda s: s["shard"])
    ]
    weights = (read_made_with(root) or {}).get("weights") or {} if stats else {}
    manifest = {
        "kind": "generated",
        "fingerprint": digest_json(shards)[:32],
        "shards": shards,
        "weights": weights,
        "dropped": sum(s["rows"] - s["count"] for s in stats),
        "converted": sum(s.get("converted", 0) for s in stats),
    }
    return Dataset(root, manifest)


def measure(
    config: EvalConfig, generated: Dataset, real: Dataset | None, features: Mapping[str, Dataset] | None = None
) -> dict[str, Any]:
    """`metrics` (name -> estimate, direction, definition), `counts` and `jackknife` (name -> sizes, left_out) of the
    generated shards against the reference's, and of the feature shards (real, generated, train) that there are."""
    features = features or {}
    judge = faithfulness.load(config.faithfulness)
    found: dict[str, Estimate | None] = {}
    counts: dict[str, int] = {"pictures": 0, "failed": 0}
    if len(generated):
        found, counts = _generated(config, generated, judge)
    if real is not None and len(real):
        of_real, real_counts = _real(config, real, judge)
        found, counts = found | of_real, counts | real_counts
        if len(generated):
            found["fd_clip_unit"] = _distance(config, generated, real, "images")
            found["cmmd"] = _cmmd(config, generated, real)
    if "generated" in features:
        found |= _of_networks(config, features["generated"], features.get("real"))
    nearest: list[dict[str, Any]] = []
    weights = features["generated"].manifest["weights"] if "generated" in features else {}
    odd = weights.get("inception", INCEPTION_SHA256) != INCEPTION_SHA256
    note = f"; these weights ({weights.get('inception', '')[:12]}) are not the published ones" if odd else ""
    if "train" in features and real is not None and len(generated):
        found["near_training"], more, nearest = memorisation.measure(generated, real, features["train"])
        counts |= more
    described = {n: _described(n, e, note) for n, e in sorted(found.items()) if e is not None}
    groups = {
        n: {"sizes": list(e.sizes), "left_out": list(e.left_out)}
        for n, e in sorted(found.items())
        if e is not None and e.left_out is not None and e.sizes is not None
    }
    return {"metrics": described, "counts": counts, "jackknife": groups, "nearest": nearest}


def _described(name: str, estimate: Estimate, note: str = "") -> dict[str, Any]:
    if name in DEFINITIONS:
        better, text = DEFINITIONS[name]
        text += note if name.endswith("_tf") or name == "fid_clean" else ""
    else:
        side, attribute = name.split("_", 1)
        what = "every attribute" if attribute == "all" else attribute
        better = "higher" if side == "faithful" else ""
        text = {
            "faithful": f"share of generated pictures that show {what} as the prompt says",
            "control": f"the same pictures judged by another prompt's {what}: what luck alone gives",
            "real": f"share of held-out real pictures in which the judge finds {what} as the caption says",
        }[side]
    return {**estimate.to_json(), "better": better, "definition": text}


def _generated(
    config: EvalConfig, generated: Dataset, judge: faithfulness.Judge | None
) -> tuple[dict[str, Estimate | None], dict[str, int]]:
    table = _columns(generated)
    live = [i for i, status in enumerate(table["status"]) if status == "success"]
    of_live = {name: [column[i] for i in live] for name, column in table.items()}
    prompts: list[Hashable] = of_live["prompt_id"]
    images, texts = _features(generated, "images"), _features(generated, "captions")
    meaning = judge.meaning if judge else None
    score, cosine = clipscore.clip_score(of_live["clip_cosine"], prompts)
    owner = _group(of_live["prompt_id"], config.jackknife_groups)
    clamped = 100 * np.maximum(np.asarray(of_live["clip_cosine"], np.float64), 0)
    found: dict[str, Estimate | None] = {
        "clip_score": with_groups(score, clamped, owner),
        "clip_cosine": with_groups(cosine, of_live["clip_cosine"], owner),
    }
    captions: list[str] = of_live["caption"]
    row_of = {caption: i for i, caption in enumerate(captions)}
    paired = [i for i, control in enumerate(of_live["control"]) if control in row_of]
    if paired:
        others = texts[[row_of[of_live["control"][i]] for i in paired]]
        cosines = clipscore.cosines(images[paired], others)
        found["clip_score_control"] = clipscore.clip_score(cosines, [prompts[i] for i in paired])[0]
    found["retrieval"] = of_pairs(images, texts, captions, config.retrieval_candidates, meaning, prompts)
    if judge:
        for side, prefix in (("faithful", "shows"), ("control", "control")):
            shares = faithfulness.shares(of_live, judge.attributes, prefix, prompts)
            found |= {f"{side}_{a}": e for a, e in shares.items()}
        for attribute in judge.attributes:
            right, estimate = of_live[f"shows_{attribute}"], found.get(f"faithful_{attribute}")
            if estimate is not None and estimate.n == len(live):
                found[f"faithful_{attribute}"] = with_groups(estimate, right, owner)
    counts = {
        "retrieval_candidates": _candidates(config, captions, judge),
        "pictures": len(live),
        "failed": len(table["status"]) - len(live),
        "prompts": len(set(prompts)),
        "distinct_captions": len(set(captions)),
        "truncated_prompts": sum({p: bool(t) for p, t in zip(prompts, of_live["truncated"], strict=True)}.values()),
        "blank": sum(map(bool, of_live["blank"])),
        "repeated": len(live) - len(set(of_live["sha256"])),
    }
    return found, counts


def _candidates(config: EvalConfig, captions: Sequence[str], judge: faithfulness.Judge | None) -> int:
    return min(
        config.retrieval_candidates, len(distinct(captions, [judge.meaning(c) for c in captions] if judge else None))
    )


def _real(
    config: EvalConfig, real: Dataset, judge: faithfulness.Judge | None
) -> tuple[dict[str, Estimate | None], dict[str, int]]:
    table = _columns(real)
    live = [i for i, status in enumerate(table["status"]) if status == "success"]
    of_live = {name: [column[i] for i in live] for name, column in table.items()}
    images, texts = _features(real, "images"), _features(real, "captions")
    meaning = judge.meaning if judge else None
    keys, captions = of_live["key"], of_live["caption"]
    found: dict[str, Estimate | None] = {
        "vae_psnr": encoders.reconstruction(of_live["psnr"]),
        "clip_score_real": clipscore.clip_score(of_live["clip_cosine"], keys)[0],
        "clip_retrieval_real": of_pairs(images, texts, captions, config.retrieval_candidates, meaning),
        "fd_clip_unit_real": _halves(config, images, keys),
    }
    if judge:
        shares = faithfulness.shares(of_live, judge.attributes, "shows", keys)
        found |= {f"real_{a}": e for a, e in shares.items()}
    counts = {
        "real_pictures": len(live),
        "real_failed": len(table["status"]) - len(live),
        "real_retrieval_candidates": _candidates(config, captions, judge),
    }
    return found, counts


def _distance(config: EvalConfig, generated: Dataset, real: Dataset, column: str) -> Estimate | None:
    """Frechet distance on one column of features; a prompt's pictures stay in one jackknife group.

    From moments that are merged over the shards in order; where there are no more pictures than dimensions, from the
    features themselves, which is then exact and quick.
    """
    if len(real) < 2:
        return None
    dim = _width(generated, column)
    if len(real) <= dim:
        ref = frechet.reference_of(_features(real, column))
    else:
        total = Accumulator(dim)
        for _, features, keys in _rows(real, column):
            total.add(features, keys)
        ref = frechet.reference(total.result())
    if len(generated) <= dim:
        x, owner = _features(generated, column), _group(_prompts(generated), config.jackknife_groups)
        return frechet.estimate_of(ref, x, owner) if _jackknifes(np.bincount(owner)) else None
    groups = [Accumulator(dim) for _ in range(config.jackknife_groups)]
    for table, features, keys in _rows(generated, column):
        owner = _group(table, config.jackknife_groups)
        for g in np.unique(owner):
            groups[g].add(features[owner == g], [k for k, o in zip(keys, owner, strict=True) if o == g])
    if not _jackknifes(np.array([g.n for g in groups])):
        return None
    return frechet.estimate(ref, [g.result() for g in groups if g.n])


def _jackknifes(sizes: np.ndarray) -> bool:
    """Whether there are two groups, and two pictures without any one of them."""
    filled = sizes[sizes > 0]
    return len(filled) >= 2 and int(filled.sum() - filled.max()) >= 2


def _rows(dataset: Dataset, column: str) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
    """Of each shard with pictures: their prompts (keys where they have none), features [n, d], keys."""
    for position in range(len(dataset.shards)):
        if dataset.counts[position]:
            shard = ColumnShard(dataset, position)
            yield _prompts_of(shard), shard.arrays[column], shard.keys


def _prompts_of(shard: ColumnShard) -> list[str]:
    if "prompt_id" not in shard.table.column_names:
        return shard.keys
    rows = zip(shard.table["prompt_id"].to_pylist(), shard.table["status"].to_pylist(), strict=True)
    return [str(prompt) for prompt, status in rows if status == "success"]


def _prompts(dataset: Dataset) -> list[str]:
    return [p for i in range(len(dataset.shards)) if dataset.counts[i] for p in _prompts_of(ColumnShard(dataset, i))]


def _width(dataset: Dataset, column: str) -> int:
    return next(int(features.shape[1]) for _, features, _ in _rows(dataset, column))


def _cmmd(config: EvalConfig, generated: Dataset, real: Dataset) -> Estimate | None:
    owner = _group(_prompts(generated), config.jackknife_groups)
    if len(real) < 2 or not _jackknifes(np.bincount(owner)):
        return None
    return mmd.cmmd(_features(generated, "images"), _features(real, "images"), owner)


def _of_networks(config: EvalConfig, generated: Dataset, real: Dataset | None) -> dict[str, Estimate | None]:
    """What the Inception's and DINOv2's features say; without real pictures the Inception score alone."""
    found: dict[str, Estimate | None] = {}
    prompts = _prompts(generated)
    owner = _group(prompts, config.jackknife_groups)
    if not _jackknifes(np.bincount(owner)):
        return found
    if config.inception is not None:
        found["isc_tf"] = inception_score(_features(generated, "inception_tf_logits"), owner)
    if real is None or len(real) < 2:
        return found
    spaces = (["inception_tf"] if config.inception else []) + (["dinov2"] if config.dinov2 else [])
    for column in spaces:
        space = "tf" if column == "inception_tf" else "dinov2_pil"
        x, y = _features(generated, column), _features(real, column)
        if space == "tf":
            found["fid_tf"] = _distance(config, generated, real, column)
            found["fid_clean"] = _distance(config, generated, real, "inception_clean")
            found["kid_tf"] = mmd.kid(x, y, owner)
        else:
            found["fd_dinov2_pil"] = _distance(config, generated, real, column)
        if min(len(x), len(y)) > manifold.NEIGHBOURS:
            found |= {f"{name}_{space}": e for name, e in manifold.prdc(y, x, prompts).items()}
    return found


def _halves(config: EvalConfig, images: np.ndarray, keys: Sequence[str]) -> Estimate | None:
    """One half of the real pictures against the other, split and grouped by a hash of their keys."""
    half = _group([f"half {k}" for k in keys], 2)
    chosen = images[half == 1]
    owner = _group([k for k, h in zip(keys, half, strict=True) if h == 1], config.jackknife_groups)
    if (half == 0).sum() < 2 or not _jackknifes(np.bincount(owner)):
        return None
    dim = images.shape[1]
    if len(chosen) <= dim:
        return frechet.estimate_of(frechet.reference_of(images[half == 0]), chosen, owner)
    groups = [Accumulator(dim) for _ in np.unique(owner)]
    for accumulator, g in zip(groups, np.unique(owner), strict=True):
        accumulator.add(chosen[owner == g])
    return frechet.estimate(frechet.reference_of(images[half == 0]), [g.result() for g in groups])


def _group(names: Sequence[str], groups: int) -> np.ndarray:
    """Jackknife group of each name, by its hash: it does not change when other pictures come or go."""
    return np.array([int(digest_bytes(str(name).encode())[:8], 16) % groups for name in names], dtype=np.int64)


def _columns(dataset: Dataset) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {}
    for shard in dataset.shards:
        for name, column in dataset.sidecar(shard.index).to_pydict().items():
            table.setdefault(name, []).extend(column)
    return table


def _features(dataset: Dataset, name: str) -> np.ndarray:
    return np.concatenate(
        [ColumnShard(dataset, p).arrays[name] for p in range(len(dataset.shards)) if dataset.counts[p]]
    )
