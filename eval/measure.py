"""From committed shards to metrics.json: every number with its count, standard error and interval, whole and by tag.

Shards are read in the order of their ids, so the result is the same, bit for bit, for any number of workers. What
belongs to real images alone is worked out once and kept (metrics/statistics.py).
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import judges, suites
from eval.metrics import clip_score, frechet, kernel, memorisation, moments, neighbours
from eval.metrics.definitions import DEFINITIONS, DISTANCES, FEW, SHARES
from eval.metrics.estimate import Estimate, mean_by_cluster, proportion, with_groups
from eval.metrics.inception_score import inception_score
from eval.metrics.retrieval import distinct, of_pairs
from eval.metrics.statistics import RealSide, from_npz
from eval.networks import INCEPTION_SHA256
from eval.prompts import controls
from eval.rows import column, group_of, live, table
from shards import storage
from shards.dataset import Dataset
from shards.fingerprint import digest_json

if TYPE_CHECKING:
    from eval.evaluation import Evaluation

log = logging.getLogger("carrara.eval")

FORMAT = 2


def write(url: str, metrics: dict[str, Any]) -> None:
    """Write the content of a metrics.json, with its own digest."""
    storage.write_json(url, {**metrics, "digest": digest_json(metrics)})


def read(url: str) -> dict[str, Any] | None:
    """The content of a metrics.json; None where there is none, it is torn, of an older layout, or not what was
    written: a number that was changed by hand is no measurement."""
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
        _warn(url, digest_json(found), "is torn or was edited and does not count; the eval stage measures it again")
        return None
    if found.get("format") != FORMAT:
        folder = url.rsplit("/", 1)[0]
        why = f"is of an older layout: it stays as it is, and the eval stage makes its like beside it; {folder} may go"
        _warn(url, digest_json(found), why)
        return None
    return dict(found)


@functools.lru_cache(maxsize=1024)  # once, however often it is looked at
def _warn(url: str, _content: str, what: str) -> None:
    log.warning("%s %s", url, what)


def inputs(evaluation: Evaluation, generated: Dataset) -> dict[str, str]:
    """Fingerprints of everything that `measure` reads."""
    found = {"images": generated.fingerprint}
    for stage in evaluation.generate.features():
        if (dataset := stage.committed(generated)) is not None:
            found[f"generated {stage.found.name}"] = dataset.fingerprint
    for stage in evaluation.real():
        if storage.exists(storage.join(stage.root, "dataset.json")):
            found[f"real {stage.found.name}"] = Dataset.open(stage.root).fingerprint
    return found | {f"scores {n}": d for n, d in suites.imported_digests(generated.root).items()}


class Images:
    """The generated images that are measured: their rows, and each network's columns for them, in order."""

    def __init__(self, evaluation: Evaluation, generated: Dataset) -> None:
        rows = table(generated) if len(generated.shards) else {}
        self.status = rows.get("status", [])
        asked = {p.id for p in evaluation.prompts}
        self.all = [i for i, p in enumerate(rows.get("prompt_id", ())) if p in asked]
        whole = live({name: [values[i] for i in self.all] for name, values in rows.items()})
        self.failed = len(self.all) - len(whole.get("key", ()))
        self.features: dict[str, Dataset] = {}
        index_of: dict[str, dict[str, int]] = {}
        usable = set(whole.get("key", ()))
        for stage in evaluation.generate.features():
            dataset = stage.committed(generated)
            if dataset is not None and len(dataset):
                keys = live(table(dataset, "key", "status"))["key"]
                index_of[stage.found.name] = {k: i for i, k in enumerate(keys)}
                usable &= index_of[stage.found.name].keys()
                self.features[stage.found.name] = dataset
        kept = [i for i, k in enumerate(whole.get("key", ())) if k in usable]
        self.failed += len(whole.get("key", ())) - len(kept)
        self.rows = {name: [values[i] for i in kept] for name, values in whole.items()}
        self.keys: list[str] = self.rows.get("key", [])
        self.feature_rows = {n: np.array([index[k] for k in self.keys], np.int64) for n, index in index_of.items()}
        self._columns: dict[tuple[str, str], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def column(self, network: str, name: str) -> np.ndarray:
        """[n, d] of the measured images."""
        if (network, name) not in self._columns:
            self._columns[network, name] = column(self.features[network], name)[self.feature_rows[network]]
        return self._columns[network, name]


def measure(evaluation: Evaluation, generated: Dataset) -> dict[str, Any]:
    """`metrics` (name -> estimate, direction, label, definition), `by_tag` (tag -> the same), `counts`, `jackknife`
    (name -> groups, sizes, left_out) of the generated images against the real ones, from what is committed."""
    config = evaluation.config
    images = Images(evaluation, generated)
    real = {
        s.found.name: Dataset.open(s.root)
        for s in evaluation.real()
        if storage.exists(storage.join(s.root, "dataset.json"))
    }
    meaning: Callable[[str], Hashable] | None = None
    definitions = dict(DEFINITIONS)
    if config.scorer:
        module = judges.scorer(config.scorer)
        meaning = getattr(module, "meaning", None)
        definitions |= {n: ("higher", _label(n), text) for n, text in module.SCORES.items()}
    imported = suites.imported(generated.root)
    definitions |= {n: ("higher", _label(n), f"scores made elsewhere: {s.source}") for n, s in imported.items()}

    found: dict[str, Estimate | None] = {}
    counts = {"images": len(images), "failed": images.failed}
    nearest: list[dict[str, Any]] = []
    tags: dict[str, dict[str, Estimate | None]] = {}
    floors: dict[str, float | None] = {}
    if len(images):
        sides = _sides(evaluation, real)
        everyone = np.arange(len(images))
        found, more = _generated(evaluation, images, sides, imported, meaning, everyone)
        counts |= more
        tags = _by_tag(evaluation, images, sides, imported, meaning)
        nearest_found = _memorisation(evaluation, images)
        if nearest_found is not None:
            found["near_training"], more, nearest = nearest_found
            counts |= more
    if "clip" in real and len(real["clip"]):
        of_real, more = _real(evaluation, real, meaning)
        found, counts = found | of_real, counts | more
        keys = live(table(real["clip"], "key", "status"))["key"]
        floors = {"fd_clip_unit": floor(column(real["clip"], "images"), keys, len(images))}
    of_judges = {
        name: round(float(np.nanmean(values)), 6)
        for network in ("judge", "preference", "scorer")
        if network in real and len(real[network])
        for name in _columns_of(real[network])
        if name != "atoms" and np.isfinite(values := column(real[network], name)).any()
    }
    weights = images.features["inception"].manifest["weights"] if "inception" in images.features else {}
    note = ""
    if weights.get("inception", INCEPTION_SHA256) != INCEPTION_SHA256:
        note = f"; these weights ({weights['inception'][:12]}) are not the published ones"

    def described(estimates: dict[str, Estimate | None]) -> dict[str, Any]:
        result = {}
        for name, e in sorted(estimates.items()):
            if e is None:
                continue
            better, label, text = definitions[name]
            text += note if name.startswith(("fid_", "kid_", "inception_")) or name.endswith("_inception") else ""
            few = name in DISTANCES and e.n < FEW
            result[name] = {**e.to_json(), "better": better, "label": label, "definition": text}
            if few:
                result[name]["caution"] = (
                    f"of {e.n:,} images: fewer than {FEW:,}, so that bias is most of it; good for comparing results of "
                    "as many images alone"
                )
            if name in SHARES or _is_share(images, imported, name):
                result[name]["unit"] = "share"
        return result

    return {
        "format": FORMAT,
        "metrics": described(found),
        "tags": _scorer_tags(config.scorer, images.rows.get("caption", [])),
        "by_tag": {tag: described(estimates) for tag, estimates in sorted(tags.items())},
        "counts": counts,
        "real": of_judges,
        "floors": {n: v for n, v in floors.items() if v is not None},
        "jackknife": _groups(found),
        "tag_jackknife": {tag: _groups(estimates) for tag, estimates in sorted(tags.items())},
        "nearest": nearest,
        "inputs": inputs(evaluation, generated),
    }


def _groups(estimates: dict[str, Estimate | None]) -> dict[str, Any]:
    """Of each estimate the values without each jackknife group, for paired comparisons."""
    return {
        n: {"groups": list(e.groups), "sizes": list(e.sizes or ()), "left_out": list(e.left_out)}
        for n, e in sorted(estimates.items())
        if e is not None and e.left_out is not None and e.groups is not None
    }


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _is_share(images: Images, imported: dict[str, suites.Imported], name: str) -> bool:
    """Whether a scorer's or an imported score is yes or no for every image."""
    if name in imported:
        values = imported[name].of(images.rows["prompt_id"], images.rows["replicate"])
    elif "scorer" in images.features and name in _columns_of(images.features["scorer"]):
        values = images.column("scorer", name)
    else:
        return False
    return bool(np.isin(values[np.isfinite(values)], (0.0, 1.0)).all())


def _columns_of(dataset: Dataset) -> list[str]:
    from shards.columns import ColumnShard

    position = next(p for p in range(len(dataset.shards)) if dataset.counts[p])
    return list(ColumnShard(dataset, position).arrays)


def _sides(evaluation: Evaluation, real: dict[str, Dataset]) -> dict[str, RealSide]:
    from latents.encoders import pick_device

    device = pick_device(evaluation.config.device)
    names = {"clip": ["images"], "inception": ["inception_tf", "inception_clean"], "dinov2": ["dinov2"]}
    return {
        c: RealSide(real[n], c, device)
        for n, columns in names.items()
        if n in real and len(real[n]) > 1
        for c in columns
    }


def _jackknifes(groups: np.ndarray) -> bool:
    """Whether there are two groups, and two images without any one of them."""
    sizes = np.bincount(groups) if len(groups) else np.zeros(0, np.int64)
    filled = sizes[sizes > 0]
    return len(filled) >= 2 and int(filled.sum() - filled.max()) >= 2


def _generated(
    evaluation: Evaluation,
    images: Images,
    sides: dict[str, RealSide],
    imported: dict[str, suites.Imported],
    meaning: Callable[[str], Hashable] | None,
    chosen: np.ndarray,
    tag: bool = False,
) -> tuple[dict[str, Estimate | None], dict[str, int]]:
    """The estimates of the chosen images (all, or those of a tag), and counts."""
    config = evaluation.config
    rows = {name: [values[i] for i in chosen] for name, values in images.rows.items()}
    prompts: list[str] = rows["prompt_id"]
    groups = group_of(prompts, config.jackknife_groups)
    found: dict[str, Estimate | None] = {}
    counts = {
        "prompts": len(set(prompts)),
        "distinct_captions": len(set(rows["caption"])),
        "blank": sum(map(bool, rows["blank"])),
        "repeated": len(chosen) - len(set(rows["sha256"])),
    }

    def mean(values: np.ndarray) -> Estimate | None:
        """Of a score an image; NaN where there is none. A yes-or-no score is a share."""
        there = np.isfinite(values)
        if not there.any():
            return None
        who = [p for p, t in zip(prompts, there, strict=True) if t]
        x = values[there].astype(np.float64)
        yes_no = bool(np.isin(x, (0.0, 1.0)).all())
        return with_groups((proportion if yes_no else mean_by_cluster)(x, who), x, groups[there])

    if "clip" in images.features:
        x, texts = images.column("clip", "images")[chosen], images.column("clip", "captions")[chosen]
        cosine = clip_score.cosines(x, texts)
        found["clip_score"] = with_groups(
            clip_score.clip_score(cosine, prompts)[0], 100 * np.maximum(cosine, 0), groups
        )
        found["clip_cosine"] = with_groups(clip_score.clip_score(cosine, prompts)[1], cosine, groups)
        found["diversity_clip"] = _diversity(x, prompts, groups)
        if not tag:
            truncated = images.column("clip", "truncated")[chosen][:, 0]
            counts["truncated_prompts"] = len({p for p, t in zip(prompts, truncated, strict=True) if t})
            counts["retrieval_candidates"] = _candidates(config.retrieval_candidates, rows["caption"], meaning)
            found["retrieval"] = of_pairs(x, texts, rows["caption"], config.retrieval_candidates, meaning, prompts)
            first = {p: i for i, p in reversed(list(enumerate(prompts)))}
            unique = list(first)
            other = dict(zip(unique, controls([rows["caption"][first[p]] for p in unique]), strict=True))
            pairs = [(i, first[unique[j]]) for i, p in enumerate(prompts) if (j := other[p]) is not None]
            if pairs:
                a, b = (list(side) for side in zip(*pairs, strict=True))
                cosines = clip_score.cosines(x[a], texts[b])
                found["clip_score_control"] = clip_score.clip_score(cosines, [prompts[i] for i in a])[0]
        if "images" in sides and _jackknifes(groups):
            side = sides["images"]
            found["cmmd"] = kernel.cmmd(x, side.features, groups, side.kernel("gaussian"), side.device)
            if not tag or len(chosen) >= FEW:
                found["fd_clip_unit"] = _distance(side.frechet, x, groups)
    for network in ("judge", "preference", "scorer"):
        if network in images.features:
            for name in _columns_of(images.features[network]):
                if name != "atoms":
                    found[name] = mean(images.column(network, name)[chosen][:, 0])
    for name, scores in imported.items():
        found[name] = mean(scores.of(prompts, rows["replicate"]))
    if _jackknifes(groups):
        found |= _of_networks(evaluation, images, sides, groups, prompts, chosen, tag)
    return found, counts


def _of_networks(
    evaluation: Evaluation,
    images: Images,
    sides: dict[str, RealSide],
    groups: np.ndarray,
    prompts: list[str],
    chosen: np.ndarray,
    tag: bool,
) -> dict[str, Estimate | None]:
    """What the Inception's and DINOv2's features say; without real images the Inception score alone."""
    found: dict[str, Estimate | None] = {}
    many = not tag or len(chosen) >= FEW
    if "inception" in images.features and not tag:
        found["inception_score"] = inception_score(images.column("inception", "inception_tf_logits")[chosen], groups)
    columns = (
        ("inception", "inception_tf", "fid_tf"),
        ("inception", "inception_clean", "fid_clean"),
        ("dinov2", "dinov2", "fd_dinov2_pil"),
    )
    for network, name, distance in columns:
        if network not in images.features:
            continue
        x, side = images.column(network, name)[chosen], sides.get(name)
        file = evaluation.config.fid_statistics.get(distance)  # type: ignore[call-overload]
        if many and file is not None:
            found[distance] = _distance(from_npz(file, f"eval.fid_statistics.{distance}", x.shape[1]), x, groups)
        elif many and side is not None:
            found[distance] = _distance(side.frechet, x, groups)
        if side is None or name == "inception_clean":
            continue
        kernel_name = "kid_tf" if network == "inception" else "kd_dinov2_pil"
        found[kernel_name] = kernel.kid(x, side.features, groups, side.kernel("polynomial"), side.device)
        if not tag and min(len(x), len(side)) > neighbours.NEIGHBOURS:
            shares = neighbours.prdc(side.features, x, prompts, side.radii, device=side.device)
            found |= {f"{share}_{network}": e for share, e in shares.items()}
    return found


def _distance(ref: frechet.Reference, x: np.ndarray, groups: np.ndarray) -> Estimate | None:
    """Frechet distance; a prompt's images stay in one jackknife group."""
    if len(x) <= ref.dim:
        return frechet.estimate_of(ref, x, groups)
    return frechet.estimate(ref, {int(g): moments.of(x[groups == g]) for g in np.unique(groups)})


def _diversity(x: np.ndarray, prompts: Sequence[str], groups: np.ndarray) -> Estimate | None:
    """Mean of 1 - cosine over the pairs of each prompt's images, a prompt being one draw; None without replicates.

    The mean over pairs of n unit vectors is (|sum|^2 - n) / (n (n - 1)).
    """
    _, index, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
    if counts.max() < 2:
        return None
    unit = np.asarray(x, np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    sums = np.zeros((len(counts), unit.shape[1]))
    np.add.at(sums, index, unit)
    several = counts > 1
    n = counts[several]
    values = 1 - ((sums[several] ** 2).sum(1) - n) / (n * (n - 1))
    group = np.zeros(len(counts), np.int64)
    group[index] = groups
    return with_groups(mean_by_cluster(values, range(len(values))), values, group[several])


def _by_tag(
    evaluation: Evaluation,
    images: Images,
    sides: dict[str, RealSide],
    imported: dict[str, suites.Imported],
    meaning: Callable[[str], Hashable] | None,
) -> dict[str, dict[str, Estimate | None]]:
    more = _scorer_tags(evaluation.config.scorer, images.rows["caption"])
    tags = [[*(t or ()), *more.get(c, ())] for t, c in zip(images.rows["tags"], images.rows["caption"], strict=True)]
    found: dict[str, list[int]] = {}
    for i, mine in enumerate(tags):
        for tag in dict.fromkeys(mine):
            found.setdefault(tag, []).append(i)
    result = {}
    for tag, chosen in found.items():
        result[tag] = _generated(evaluation, images, sides, imported, meaning, np.array(chosen), tag=True)[0]
    if "judge" in images.features:
        for skill, estimate in _by_skill(evaluation, images).items():
            result.setdefault(skill, {})["soft_tifa_am"] = estimate
    return result


def _scorer_tags(name: str | None, captions: Sequence[str]) -> dict[str, list[str]]:
    """Tags by caption, where the user's scorer has a rule for them."""
    rule = getattr(judges.scorer(name), "tags", None) if name else None
    return {} if rule is None else {c: list(rule(c)) for c in dict.fromkeys(captions)}


def _by_skill(evaluation: Evaluation, images: Images) -> dict[str, Estimate]:
    """Soft-TIFA's chances by the skill of each question, where a suite names one a question (GenEval 2)."""
    atoms = images.column("judge", "atoms")
    found: dict[str, list[tuple[float, str]]] = {}
    for i, extra in enumerate(images.rows["extra"]):
        skills = json.loads(extra).get("skills") if extra else None
        for j, skill in enumerate(skills if isinstance(skills, list) else ()):
            if j < atoms.shape[1] and np.isfinite(atoms[i, j]):
                found.setdefault(str(skill), []).append((float(atoms[i, j]), images.rows["prompt_id"][i]))
    result = {}
    for skill, values in found.items():
        x, who = (list(v) for v in zip(*values, strict=True))
        groups = group_of(who, evaluation.config.jackknife_groups)
        result[skill] = with_groups(mean_by_cluster(x, who), x, groups)
    return result


def _memorisation(
    evaluation: Evaluation, images: Images
) -> tuple[Estimate, dict[str, int], list[dict[str, Any]]] | None:
    stages = evaluation.nearest() if evaluation.config.memorisation else {}
    if len(stages) < 2 or not all(storage.exists(storage.join(s.root, "dataset.json")) for s in stages.values()):
        return None
    rows = images.feature_rows["clip"]
    return memorisation.measure(stages["generated"], stages["real"], images.rows["prompt_id"], images.keys, rows)


def _candidates(wanted: int, captions: Sequence[str], meaning: Callable[[str], Hashable] | None) -> int:
    return min(wanted, len(distinct(captions, [meaning(c) for c in captions] if meaning else None)))


def _real(
    evaluation: Evaluation, real: dict[str, Dataset], meaning: Callable[[str], Hashable] | None
) -> tuple[dict[str, Estimate | None], dict[str, int]]:
    clip, wanted = real["clip"], evaluation.config.retrieval_candidates
    rows = live(table(clip, "key", "caption", "status"))
    x, texts = column(clip, "images"), column(clip, "captions")
    keys, captions = rows["key"], [c or "" for c in rows["caption"]]
    found: dict[str, Estimate | None] = {
        "clip_score_real": clip_score.clip_score(clip_score.cosines(x, texts), keys)[0],
        "clip_retrieval_real": of_pairs(x, texts, captions, wanted, meaning),
    }
    if "vae" in real and len(real["vae"]):
        psnr = column(real["vae"], "psnr")[:, 0]
        found["vae_psnr"] = mean_by_cluster(psnr, range(len(psnr)))
    counts = {
        "real_images": len(keys),
        "real_failed": clip.manifest["status"].get("failed", 0),
        "real_retrieval_candidates": _candidates(wanted, captions, meaning),
    }
    return found, counts


def floor(x: np.ndarray, keys: Sequence[str], generated: int) -> float | None:
    """What fd_clip_unit would be, as it is shown, of a model without any fault: from the distance of two random halves
    of the real images x [m, d], whose bias is of order 1/n, brought to the sizes that are compared. None where the
    halves are too small for that (fewer than 2 d).

    Two samples of one distribution of a and b images are about c (1/a + 1/b) apart; halves are c * 4/m.
    """
    half = group_of([f"half {k}" for k in keys], 2)
    small = int(min((half == 0).sum(), (half == 1).sum()))
    if small < 2 * x.shape[1] or generated < 2 * x.shape[1]:
        return None
    a, b = (moments.of(x[half == side]) for side in (0, 1))
    apart = frechet.distance(frechet.reference(a), b)
    return apart * (1 / generated + 1 / len(x)) / (1 / a.n + 1 / b.n)


def provenance(evaluation: Evaluation) -> dict[str, Any]:
    """Where and how: command, git commit, versions, hardware, cost. Not part of the numbers."""
    from importlib.metadata import version

    done, _ = evaluation.generate.committed()
    images, seconds = sum(s["count"] for s in done), sum(s["seconds"] for s in done)
    features = [s for f in evaluation.generate.features() for s in _stats(f)]
    found = {
        "command": " ".join(sys.argv),
        "commit": _commit(),
        "versions": {
            n: version(n) for n in ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "scipy")
        },
        "python": platform.python_version(),
        "hardware": sorted({s.get("device", "") for s in done} - {""}),
        "seconds": round(seconds + sum(s["seconds"] for s in features), 1),
        "images_per_second": round(images / seconds, 3) if seconds else None,
    }
    return {k: v for k, v in found.items() if v not in (None, "", [], {})}


def _stats(stage: Any) -> list[dict[str, Any]]:
    from shards.dataset import read_stats

    dataset = stage.committed()
    return [s for i in (dataset.shards if dataset else ()) if (s := read_stats(stage.root, i.index))]


def _commit() -> str | None:
    """The commit of the code, `+` where the work tree differs from it; None outside git."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        if head.returncode:
            return None
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=30)
        return head.stdout.strip()[:12] + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None
