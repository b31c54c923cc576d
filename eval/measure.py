"""From committed shards to metrics.json: every number with its count, standard error and interval, whole and by tag.

Shards are read in the order of their ids, so the result is the same, bit for bit, for any number of workers. What
belongs to real images alone is worked out once and kept (metrics/statistics.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eval import scoring, suites
from eval.config import EvalConfig
from eval.metrics import clip_score, frechet, kernel, memorisation, moments, neighbours
from eval.metrics.definitions import DEFINITIONS, DISTANCES, FEW, SHARES
from eval.metrics.estimate import Estimate, mean_by_cluster, proportion, with_groups
from eval.metrics.inception_score import inception_score
from eval.metrics.retrieval import meanings_of, of_pairs
from eval.metrics.statistics import RealSide, floor, from_npz
from eval.networks import INCEPTION_SHA256, SCORING
from eval.prompts import controls
from eval.rows import column, group_of, live, table
from shards import storage
from shards.columns import ColumnShard
from shards.dataset import MANIFEST, Dataset
from shards.fingerprint import digest_json

if TYPE_CHECKING:
    from eval.evaluation import Evaluation
    from shards.stage import Stage

log = logging.getLogger("carrara.eval")

FORMAT = 2
ATOMS = "atoms"  # the column of a judge that is no score an image: the chances of each question


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
    """Fingerprints of everything that `measure` reads, and of the metrics that it knows."""
    found = {"images": generated.fingerprint, "definitions": digest_json(DEFINITIONS)}
    for stage in evaluation.generate.features():
        if (dataset := stage.committed(generated)) is not None:
            found[f"generated {stage.found.name}"] = dataset.fingerprint
    for stage in evaluation.real():
        if _is_finished(stage):
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

    def scores(self, network: str) -> list[str]:
        """Names of the columns that are a score an image."""
        return [n for n in _columns_of(self.features[network]) if n != ATOMS] if network in self.features else []


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the numbers of all images, and those of each tag, are taken from. sides: the real side of each column that
    distances are taken in; meaning: equal for captions that say the same, where the user's scorer has a rule for it."""

    config: EvalConfig
    images: Images
    sides: dict[str, RealSide]
    imported: dict[str, suites.Imported]
    meaning: Callable[[str], Hashable] | None

    @functools.cached_property
    def meanings(self) -> list[Hashable]:
        """What the caption of each image says."""
        return meanings_of(self.images.rows["caption"], self.meaning)

    @functools.cached_property
    def retrieval(self) -> np.ndarray | None:
        """Of each image [n] the chance that its prompt is found from it, among those of all images."""
        x, texts = (self.images.column("clip", c) for c in ("images", "captions"))
        return of_pairs(x, texts, self.meanings, self.config.retrieval_candidates)

    @functools.cached_property
    def neighbours(self) -> dict[str, dict[str, np.ndarray]]:
        """By network what `neighbours.prdc` says of all images, where there are enough of them."""
        columns = {"inception": "inception_tf", "dinov2": "dinov2"}
        enough = {n: s for n, c in columns.items() if (s := self.sides.get(c)) and len(s) > neighbours.NEIGHBOURS}
        return {
            n: neighbours.prdc(s.features, self.images.column(n, columns[n]), s.radii, device=s.device)
            for n, s in enough.items()
            if n in self.images.features and len(self.images) > neighbours.NEIGHBOURS
        }

    def part(self, chosen: npt.ArrayLike, tag: bool = False) -> Part:
        """The images at these indices."""
        index = np.asarray(chosen, np.int64)
        rows = {name: [values[i] for i in index] for name, values in self.images.rows.items()}
        return Part(self, index, tag, rows, group_of(rows["prompt_id"], self.config.jackknife_groups))


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """All images, or those of a tag, of which not every number is taken. groups [n]: the jackknife group of each."""

    of: Measured
    chosen: npt.NDArray[np.int64]
    tag: bool
    rows: dict[str, list[Any]]
    groups: npt.NDArray[np.int64]

    def estimates(self) -> dict[str, Estimate | None]:
        """By name; None where there is nothing to take one from."""
        found = self._of_scores()
        if "clip" in self.of.images.features:
            found |= self._of_clip()
        if self._jackknifes():
            found |= self._of_inception_and_dinov2()
        return found

    def counts(self) -> dict[str, int]:
        """Of prompts, and of images that are blank or repeat another."""
        found = {
            "prompts": len(set(self.rows["prompt_id"])),
            "distinct_captions": len(set(self.rows["caption"])),
            "blank": sum(map(bool, self.rows["blank"])),
            "repeated": len(self.chosen) - len(set(self.rows["sha256"])),
        }
        if "clip" in self.of.images.features:
            cut = self._column("clip", "truncated")[:, 0]
            found["truncated_prompts"] = len({p for p, t in zip(self.rows["prompt_id"], cut, strict=True) if t})
            found["retrieval_candidates"] = _candidates(self.of.config, self.of.meanings)
        return found

    def _column(self, network: str, name: str) -> np.ndarray:
        return self.of.images.column(network, name)[self.chosen]

    def _jackknifes(self) -> bool:
        """Whether there are two groups, and two images without any one of them."""
        sizes = np.bincount(self.groups)
        return int((sizes > 0).sum()) >= 2 and int(sizes.sum() - sizes.max()) >= 2

    @property
    def _enough(self) -> bool:
        """Whether a Frechet distance is taken: of a tag with few images it would be bias alone."""
        return not self.tag or len(self.chosen) >= FEW

    def _of_scores(self) -> dict[str, Estimate | None]:
        """Means of the scores of each image, made here and elsewhere."""
        images = self.of.images
        found: dict[str, Estimate | None] = {}
        for network in SCORING:
            for name in images.scores(network):
                found[name] = self._score(self._column(network, name)[:, 0])
        for name, scores in self.of.imported.items():
            found[name] = self._score(scores.of(self.rows["prompt_id"], self.rows["replicate"]))
        return found

    def _score(self, values: np.ndarray) -> Estimate | None:
        """The mean of a score an image; NaN where there is none. A yes-or-no score is a share."""
        there = np.flatnonzero(np.isfinite(values))
        return self._mean(values[there], there, _yes_or_no(values)) if len(there) else None

    def _mean(self, values: np.ndarray, rows: Any = slice(None), share: bool = False) -> Estimate:
        """Of a value an image of these rows, a prompt's images being one draw."""
        x, who = values.astype(np.float64), np.asarray(self.rows["prompt_id"])[rows]
        return with_groups((proportion if share else mean_by_cluster)(x, who), x, self.groups[rows])

    def _of_clip(self) -> dict[str, Estimate | None]:
        """How well images fit their prompts, how they differ, and how far they are from the real ones, to a CLIP."""
        x, texts = self._column("clip", "images"), self._column("clip", "captions")
        prompts, groups = self.rows["prompt_id"], self.groups
        found: dict[str, Estimate | None] = {}
        cosine = clip_score.cosines(x, texts)
        found["clip_score"] = self._mean(100 * np.maximum(cosine, 0))
        found["clip_cosine"] = self._mean(cosine)
        found["diversity_clip"] = clip_score.diversity(x, prompts, groups)
        if self.of.retrieval is not None:
            found["retrieval"] = self._mean(self.of.retrieval[self.chosen], share=True)
        if not self.tag:
            found["clip_score_control"] = self._with_other_prompts(x, texts)
        side = self.of.sides.get("images")
        if side is not None and self._jackknifes():
            found["cmmd"] = kernel.cmmd(x, side.features, groups, side.kernel("gaussian"), device=side.device)
            if self._enough:
                found["fd_clip_unit"] = self._distance(side.frechet, x)
        return found

    def _with_other_prompts(self, x: np.ndarray, texts: np.ndarray) -> Estimate | None:
        """CLIP score of each image [n, d] with another prompt's text [n, d]."""
        prompts = self.rows["prompt_id"]
        first = {p: i for i, p in reversed(list(enumerate(prompts)))}
        unique = list(first)
        other = dict(zip(unique, controls([self.rows["caption"][first[p]] for p in unique]), strict=True))
        pairs = [(i, first[unique[j]]) for i, p in enumerate(prompts) if (j := other[p]) is not None]
        if not pairs:
            return None
        a, b = (list(side) for side in zip(*pairs, strict=True))
        return clip_score.clip_score(clip_score.cosines(x[a], texts[b]), [prompts[i] for i in a])[0]

    def _of_inception_and_dinov2(self) -> dict[str, Estimate | None]:
        """Distances to the real images; without those the Inception score alone."""
        images = self.of.images
        found: dict[str, Estimate | None] = {}
        if "inception" in images.features and not self.tag:
            found["inception_score"] = inception_score(self._column("inception", "inception_tf_logits"), self.groups)
        for network, name, distance in (
            ("inception", "inception_tf", "fid_tf"),
            ("inception", "inception_clean", "fid_clean"),
            ("dinov2", "dinov2", "fd_dinov2_pil"),
        ):
            if network not in images.features:
                continue
            x, side = self._column(network, name), self.of.sides.get(name)
            file = self.of.config.fid_statistics.get(distance)  # type: ignore[call-overload]
            if self._enough and file is not None:
                known = from_npz(file, f"eval.fid_statistics.{distance}", x.shape[1])
                found[distance] = self._distance(known, x)
            elif self._enough and side is not None:
                found[distance] = self._distance(side.frechet, x)
            if side is None or name == "inception_clean":
                continue
            kernel_name = "kid_tf" if network == "inception" else "kd_dinov2_pil"
            within = side.kernel("polynomial")
            found[kernel_name] = kernel.kid(x, side.features, self.groups, within, device=side.device)
        for network, shares in self.of.neighbours.items():
            found[f"precision_{network}"] = self._mean(shares["precision"][self.chosen], share=True)
            found[f"density_{network}"] = self._mean(shares["density"][self.chosen])
            if not self.tag:  # of real images, which have no tags
                found |= {f"{n}_{network}": proportion(shares[n]) for n in ("recall", "coverage")}
        return found

    def _distance(self, ref: frechet.Reference, x: np.ndarray) -> Estimate:
        """Frechet distance; a prompt's images stay in one jackknife group."""
        if len(x) <= ref.dim:
            return frechet.estimate_of(ref, x, self.groups)
        return frechet.estimate(ref, {int(g): moments.of(x[self.groups == g]) for g in np.unique(self.groups)})


def measure(evaluation: Evaluation, generated: Dataset) -> dict[str, Any]:
    """`metrics` (name -> estimate, direction, label, definition), `by_tag` (tag -> the same), `counts`, `jackknife`
    (name -> groups, sizes, left_out) of the generated images against the real ones, from what is committed."""
    config = evaluation.config
    images = Images(evaluation, generated)
    real = {s.found.name: Dataset.open(s.root) for s in evaluation.real() if _is_finished(s)}
    module = scoring.scorer(config.scorer) if config.scorer else None
    meaning = getattr(module, "meaning", None)
    imported = suites.imported(generated.root)
    measured = Measured(config, images, _sides(config, real), imported, meaning)
    tags = _scorer_tags(module, images.rows.get("caption", ()))

    found: dict[str, Estimate | None] = {}
    by_tag: dict[str, dict[str, Estimate | None]] = {}
    counts = {"images": len(images), "failed": images.failed}
    nearest: list[dict[str, Any]] = []
    floors: dict[str, float | None] = {}
    if len(images):
        everything = measured.part(range(len(images)))
        found, by_tag = everything.estimates(), _by_tag(measured, tags)
        counts |= everything.counts()
        near = _memorisation(evaluation, images)
        if near is not None:
            found["near_training"], more, nearest = near
            counts |= more
    if "clip" in real and len(real["clip"]):
        of_real, more = _real(config, real, meaning)
        found, counts = found | of_real, counts | more
        keys = live(table(real["clip"], "key", "status"))["key"]
        floors = {"fd_clip_unit": floor(column(real["clip"], "images"), keys, len(images))}
    describe = functools.partial(_described, _definitions(module, measured), _shares(measured))
    return {
        "format": FORMAT,
        "metrics": describe(found),
        "tags": tags,
        "by_tag": {tag: describe(estimates) for tag, estimates in sorted(by_tag.items())},
        "counts": counts,
        "real": _scores_of_real(real),
        "floors": {n: v for n, v in floors.items() if v is not None},
        "jackknife": _groups(found),
        "tag_jackknife": {tag: _groups(estimates) for tag, estimates in sorted(by_tag.items())},
        "nearest": nearest,
        "inputs": inputs(evaluation, generated),
    }


# ---- what a number is called, and what it is ---------------------------------------------------------


def _definitions(module: ModuleType | None, measured: Measured) -> dict[str, tuple[str, str, str]]:
    """DEFINITIONS, with those of scores of one's own and of scores made elsewhere, and what is to be said of weights
    that are not the published ones."""
    own = dict(module.SCORES) if module else {}
    own |= {n: f"scores made elsewhere: {s.source}" for n, s in measured.imported.items()}
    found = DEFINITIONS | {n: ("higher", n.replace("_", " ").capitalize(), text) for n, text in own.items()}
    inception = measured.images.features.get("inception")
    weights = inception.manifest["weights"].get("inception", INCEPTION_SHA256) if inception else INCEPTION_SHA256
    if weights != INCEPTION_SHA256:
        note = f"; these weights ({weights[:12]}) are not the published ones"
        of_inception = {n for n in found if n.startswith(("fid_", "kid_", "inception_")) or n.endswith("_inception")}
        found |= {n: (found[n][0], found[n][1], found[n][2] + note) for n in of_inception}
    return found


def _shares(measured: Measured) -> set[str]:
    """Names of the metrics that are shares of images: those known as such, and every yes-or-no score."""
    images, found = measured.images, set(SHARES)
    for name, scores in measured.imported.items() if len(images) else ():
        if _yes_or_no(scores.of(images.rows["prompt_id"], images.rows["replicate"])):
            found.add(name)
    return found | {n for n in images.scores("scorer") if _yes_or_no(images.column("scorer", n))}


def _yes_or_no(values: np.ndarray) -> bool:
    """Whether every value that is there is 0 or 1."""
    return bool(np.isin(values[np.isfinite(values)], (0.0, 1.0)).all())


def _described(
    definitions: dict[str, tuple[str, str, str]], shares: set[str], estimates: dict[str, Estimate | None]
) -> dict[str, Any]:
    """What metrics.json says of each estimate."""
    result: dict[str, Any] = {}
    for name, e in sorted(estimates.items()):
        if e is None:
            continue
        better, label, text = definitions[name]
        result[name] = {**e.to_json(), "better": better, "label": label, "definition": text}
        if name in DISTANCES and e.n < FEW:
            result[name]["caution"] = (
                f"of {e.n:,} images: fewer than {FEW:,}, so that bias is most of it; good for comparing results of "
                "as many images alone"
            )
        if name in shares:
            result[name]["unit"] = "share"
    return result


def _groups(estimates: dict[str, Estimate | None]) -> dict[str, Any]:
    """Of each estimate the values without each jackknife group, for paired comparisons."""
    return {
        n: {"groups": list(e.groups), "sizes": list(e.sizes or ()), "left_out": list(e.left_out)}
        for n, e in sorted(estimates.items())
        if e is not None and e.left_out is not None and e.groups is not None
    }


# ---- by tag, and beside the generated images ---------------------------------------------------------


def _by_tag(measured: Measured, tags: dict[str, list[str]]) -> dict[str, dict[str, Estimate | None]]:
    """Of each tag of a prompt, and of those that the user's scorer gives its caption."""
    rows = measured.images.rows
    chosen: dict[str, list[int]] = {}
    for i, (own, caption) in enumerate(zip(rows["tags"], rows["caption"], strict=True)):
        for tag in dict.fromkeys([*(own or ()), *tags.get(caption, ())]):
            chosen.setdefault(tag, []).append(i)
    result = {tag: measured.part(indices, tag=True).estimates() for tag, indices in chosen.items()}
    if "judge" in measured.images.features:
        for skill, estimate in _by_skill(measured).items():
            result.setdefault(skill, {})["soft_tifa_am"] = estimate
    return result


def _scorer_tags(module: ModuleType | None, captions: Sequence[str]) -> dict[str, list[str]]:
    """Tags by caption, where the user's scorer has a rule for them."""
    rule = getattr(module, "tags", None)
    return {} if rule is None else {c: list(rule(c)) for c in dict.fromkeys(captions)}


def _by_skill(measured: Measured) -> dict[str, Estimate]:
    """Soft-TIFA's chances by the skill of each question, where a suite names one a question (GenEval 2)."""
    atoms, rows = measured.images.column("judge", "atoms"), measured.images.rows
    found: dict[str, list[tuple[float, str]]] = {}
    for i, extra in enumerate(rows["extra"]):
        skills = json.loads(extra).get("skills") if extra else None
        for j, skill in enumerate(skills if isinstance(skills, list) else ()):
            if j < atoms.shape[1] and np.isfinite(atoms[i, j]):
                found.setdefault(str(skill), []).append((float(atoms[i, j]), rows["prompt_id"][i]))
    result = {}
    for skill, values in found.items():
        x, who = (list(v) for v in zip(*values, strict=True))
        groups = group_of(who, measured.config.jackknife_groups)
        result[skill] = with_groups(mean_by_cluster(x, who), x, groups)
    return result


def _memorisation(
    evaluation: Evaluation, images: Images
) -> tuple[Estimate, dict[str, int], list[dict[str, Any]]] | None:
    stages = evaluation.nearest() if evaluation.config.memorisation else {}
    if len(stages) < 2 or not all(_is_finished(s) for s in stages.values()):
        return None
    rows = images.feature_rows["clip"]
    return memorisation.measure(stages["generated"], stages["real"], images.rows["prompt_id"], images.keys, rows)


def _sides(config: EvalConfig, real: dict[str, Dataset]) -> dict[str, RealSide]:
    from latents.encoders import pick_device

    device = pick_device(config.device)
    names = {"clip": ["images"], "inception": ["inception_tf", "inception_clean"], "dinov2": ["dinov2"]}
    return {
        c: RealSide(real[n], c, device)
        for n, columns in names.items()
        if n in real and len(real[n]) > 1
        for c in columns
    }


def _is_finished(stage: Stage) -> bool:
    return storage.exists(storage.join(stage.root, MANIFEST))


def _columns_of(dataset: Dataset) -> list[str]:
    position = next(p for p in range(len(dataset.shards)) if dataset.counts[p])
    return list(ColumnShard(dataset, position).arrays)


def _candidates(config: EvalConfig, meanings: Sequence[Hashable]) -> int:
    return min(config.retrieval_candidates, len(set(meanings)))


def _scores_of_real(real: dict[str, Dataset]) -> dict[str, float]:
    """Means of the scores of the real images."""
    return {
        name: round(float(np.nanmean(values)), 6)
        for network in SCORING
        if network in real and len(real[network])
        for name in _columns_of(real[network])
        if name != ATOMS and np.isfinite(values := column(real[network], name)).any()
    }


def _real(
    config: EvalConfig, real: dict[str, Dataset], meaning: Callable[[str], Hashable] | None
) -> tuple[dict[str, Estimate | None], dict[str, int]]:
    """The tools' own quality, on real images: the CLIP's and the VAE's."""
    clip = real["clip"]
    rows = live(table(clip, "key", "caption", "status"))
    x, texts = column(clip, "images"), column(clip, "captions")
    keys, meanings = rows["key"], meanings_of([c or "" for c in rows["caption"]], meaning)
    hits = of_pairs(x, texts, meanings, config.retrieval_candidates)
    found: dict[str, Estimate | None] = {
        "clip_score_real": clip_score.clip_score(clip_score.cosines(x, texts), keys)[0],
        "clip_retrieval_real": None if hits is None else proportion(hits, meanings),
    }
    if "vae" in real and len(real["vae"]):
        psnr = column(real["vae"], "psnr")[:, 0]
        found["vae_psnr"] = mean_by_cluster(psnr, range(len(psnr)))
    counts = {
        "real_images": len(keys),
        "real_failed": clip.manifest["status"].get("failed", 0),
        "real_retrieval_candidates": _candidates(config, meanings),
    }
    return found, counts
