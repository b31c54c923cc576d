"""What the bytes of a shard or a model depend on, as a hash that can also say what changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any


def digest_bytes(data: bytes | memoryview) -> str:
    """sha256 of bytes, as lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """sha256 of a local file, streamed, as lower-case hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of a JSON value in its canonical form (sorted keys, no spaces, UTF-8)."""
    return digest_bytes(_canonical(value).encode("utf-8", "surrogatepass"))


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Everything the bytes of one shard (or one trained model) depend on.

    stage, version: which code made it; the version is raised by hand when that code's output changes.
    settings: the stage's own settings, those alone that change the bytes. input: the digest of what was
    read. weights: the digests of the networks used, by name.
    """

    stage: str
    version: int
    settings: dict[str, Any]
    input: Any = None
    weights: dict[str, str] | None = None
    # The canonical JSON of all but the input, where `of` has worked it out.
    _rest: str | None = dataclasses.field(default=None, repr=False, compare=False)

    def of(self, input: Any) -> Fingerprint:
        """The same but for the input. What stays the same is put into JSON once: there may be 200,000 of these."""
        rest = self._rest
        if rest is None:
            parts = {k: v for k, v in self._parts().items() if k != "input"}
            rest = _canonical(parts).removeprefix("{")
            object.__setattr__(self, "_rest", rest)  # a cache; the dataclass is frozen
        other = object.__new__(Fingerprint)  # the constructor of a frozen dataclass takes six times as long
        other.__dict__.update(self.__dict__, input=input, _rest=rest)
        return other

    def to_json(self) -> dict[str, Any]:
        """The parts and their digest, as stored in `_stats.json`."""
        return {**self._parts(), "digest": self.digest}

    @property
    def digest(self) -> str:
        """32 hex digits of the sha256 over all parts."""
        if self._rest is None:
            return digest_json(self._parts())[:32]
        # "input" is the first of the names.
        text = f'{{"input":{_canonical(self.input)},{self._rest}'
        return digest_bytes(text.encode("utf-8", "surrogatepass"))[:32]

    def differs(self, stored: dict[str, Any]) -> list[str]:
        """What is unlike between a stored fingerprint and this one: `settings.image_size: 64 -> 32`, ..."""
        ours = _flatten(json.loads(json.dumps(self._parts())))
        theirs = _flatten({k: v for k, v in stored.items() if k != "digest"})
        absent = "absent"
        return [
            f"{name}: {_short(theirs.get(name, absent))} -> {_short(ours.get(name, absent))}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name, absent) != theirs.get(name, absent)
        ]

    def _parts(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "version": self.version,
            "settings": self.settings,
            "input": self.input,
            "weights": self.weights,
        }


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else text[:12] + "..." + text[-4:]
