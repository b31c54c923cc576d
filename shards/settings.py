"""Strict configuration: pydantic models that refuse unknown keys, one YAML a run, dotted overrides.

Also the two errors that are meant for a person. Both carry one sentence that says what to change:
`ConfigError` before any work has begun (exit code 2), `StageError` during the work (exit code 1).
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

SECTIONS = ("run", "seed", "ray", "ingest", "curate", "autoencoder", "clip", "latents", "train", "eval", "notify")


class ConfigError(Exception):
    """The configuration cannot be used; the text is one sentence that says what to change."""


class StageError(Exception):
    """A stage cannot go on; the text is one sentence that says why and what to do."""


class NodeTrouble(StageError):
    """This machine cannot do the work at the moment, whichever shard it is given: no DNS, no route, out of descriptors,
    memory or disk. Raised by a worker in place of an error of its rows; the engine gives the shard back uncounted, and
    leaves the machine out after a few. The text is one sentence that says what is wrong there.
    """


class Strict(pydantic.BaseModel):
    """Base of every configuration model: unknown keys are errors, values do not change once read."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )


M = TypeVar("M", bound=pydantic.BaseModel)


def load_yaml(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a run's YAML and apply dotted overrides such as `latents.batch_size=64` (values are YAML).

    Raises ConfigError where the file is missing, is not a YAML mapping, or an override has no `=`.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: there is no such configuration file; name one with --config or CARRARA_CONFIG")
    try:
        with open(path, encoding="utf-8") as f:
            data = yaml.load(f, Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(e).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections such as run, ingest and train")
    apply_overrides(data, overrides)
    return data


def validate(model: type[M], data: dict[str, Any], source: str) -> M:
    """Build `model` from `data`; raises ConfigError with one sentence that names file, field and remedy."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as e:
        raise ConfigError(_sentence(model, e, source)) from None


def load_sections(path: str, overrides: Sequence[str], model: type[M]) -> M:
    """Validate only the sections of a run's YAML that `model` has fields for.

    For processes such as the trainer that lie below orchestration/ and do not know every section: the
    other names of SECTIONS are skipped, any other top-level key is refused. Relative paths are from the current folder.
    """
    data = load_yaml(path, overrides)
    for key in data:
        if key not in SECTIONS:
            raise ConfigError(f"{path}: unknown section '{key}'{_nearest(str(key), SECTIONS)}")
    return validate(model, resolved({k: v for k, v in data.items() if k in model.model_fields}, os.getcwd()), path)


# The fields that name files: of kind "path" always, of kind "reference" perhaps a name on a hub. `*`: each of them.
_PATHS = {
    "run": "path",
    "ingest.table": "path",
    "ingest.heldout_table": "path",
    "ingest.source.files_below.*": "path",
    "curate.scores.*.model": "reference",
    "curate.scores.*.weights": "path",
    "curate.captions.*.model": "reference",
    "autoencoder.pretrained": "reference",
    "autoencoder.start_from": "reference",
    "autoencoder.perceptual.weights": "reference",
    "clip.pretrained": "reference",
    "latents.text_encoder.pretrained": "reference",
    "latents.features.pretrained": "reference",
    "train.start_from": "reference",
    "train.adapter.start_from": "path",
    "train.sources.*.latents": "path",
    "train.validation.latents": "path",
    "eval.model": "reference",
    "eval.prompts_file": "path",
    "eval.clip": "reference",
    "eval.inception": "reference",
    "eval.dinov2": "path",
    "eval.reference": "path",
    "eval.fid_statistics.*": "path",
    "eval.judge.model": "reference",
    "eval.preference.pickscore": "reference",
    "eval.preference.hps": "path",
    "eval.preference.aesthetic": "path",
    "eval.preference.aesthetic_clip": "reference",
}


def resolved(data: Mapping[str, Any], base: str) -> dict[str, Any]:
    """A copy of a run's settings in which relative paths are absolute, as meant from the folder `base`."""
    result = copy.deepcopy(dict(data))
    for where, kind in _PATHS.items():
        _resolve(result, where.split("."), absolute if kind == "path" else _reference, base)
    return result


def _resolve(here: Any, keys: Sequence[str], change: Callable[[str, str], str], base: str) -> None:
    key, *rest = keys
    found: Sequence[Any] = ()
    if isinstance(here, dict):
        found = list(here) if key == "*" else [key] if key in here else []
    elif isinstance(here, list) and key == "*":
        found = range(len(here))
    for index in found:
        if rest:
            _resolve(here[index], rest, change, base)
        elif isinstance(here[index], str):
            here[index] = change(here[index], base)


def absolute(path: str, base: str) -> str:
    """A path as meant from the folder `base`; URLs are absolute already."""
    if "://" in path:
        return path
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))


def _reference(ref: str, base: str) -> str:
    """`folder`, `file.safetensors` or `MODEL:file` made absolute where that is there; otherwise the name it is."""
    model, colon, path = ref.rpartition(":")
    found = absolute(path, base)
    return f"{model}{colon}{found}" if path and os.path.exists(found) else ref


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML would silently let the last one win."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = getattr(key_node, "value", None)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", key_node.start_mark)
        if isinstance(key, str):
            seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change `data` in place by `section.key=value`: values are YAML, a number between dots is a place in a list.
    Raises ConfigError where one cannot be applied."""
    for override in overrides:
        _apply_override(data, override)


def _apply_override(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override '{override}': write it as section.key=value, for example latents.batch_size=64")
    try:
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.constructor.ConstructorError as e:
        raise ConfigError(f"override '{override}': {e.problem}") from None
    except yaml.YAMLError:
        value = text
    if name == "run" and not isinstance(value, str):  # a name, also where YAML takes it for a number or a date
        value = text.strip()
    here: Any = data
    for i, key in enumerate(keys):
        where, last = ".".join(keys[:i]), i == len(keys) - 1
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                raise ConfigError(
                    f"override '{override}': '{where}' is a list of {len(here)}; name one by its place, from "
                    f"{where}.0 to {where}.{max(len(here) - 1, 0)}, or give the whole list"
                )
            index: Any = int(key)
        elif isinstance(here, dict):
            index = key
        else:
            raise ConfigError(f"override '{override}': '{where}' is a single value in the configuration, not a section")
        if last:
            here[index] = value
        elif isinstance(here, dict) and here.get(index) is None:
            here[index] = {}
            here = here[index]
        else:
            here = here[index]


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; the names here are {', '.join(names)}"


def _sentence(model: type[pydantic.BaseModel], error: pydantic.ValidationError, source: str) -> str:
    details = error.errors()
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    where = ".".join(str(x) for x in first["loc"]) or "top level"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        section = _model_at(model, first["loc"][:-1])
        names = list(section.model_fields) if section else []
        return f"{source}: unknown key '{where}'{_nearest(str(first['loc'][-1]), names) if names else ''}{more}"
    if first["type"] == "missing":
        return f"{source}: '{where}' is missing and has no default{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = repr(first["input"])
    given = f"; it is {shown}" if len(shown) <= 80 and not isinstance(first["input"], dict) else ""
    return f"{source}: '{where}': {message[:1].lower() + message[1:]}{given}{more}"


def _model_at(model: type[pydantic.BaseModel], loc: tuple[int | str, ...]) -> type[pydantic.BaseModel] | None:
    """The model that holds the field at `loc`, looking through unions, lists and dicts; None where there is none."""
    here: Any = model
    for part in loc:
        if isinstance(here, type) and issubclass(here, pydantic.BaseModel):
            field = here.model_fields.get(str(part))
            candidates = _models_in(field.annotation) if field else []
            if not candidates:
                return None
            here = candidates[0]
    return here if isinstance(here, type) and issubclass(here, pydantic.BaseModel) else None


def _models_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_in(a)]
