"""Carrara's packages have names that others use too (`train`, `eval`, `demo`): theirs must not be taken for ours.

A folder that comes before ours where Python looks for modules, such as a Ray job's working folder, may hold a user's
own train.py or eval/. Then ours are put in front (by orchestration/__init__.py, so in every worker too); where
that does not help, the command line says so in a sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES = ("shards", "ingest", "curate", "latents", "train", "eval", "demo")


def put_first() -> None:
    """Where one of our packages is hidden by another of its name, look in our folder before all others."""
    if hidden() is not None:
        sys.path.insert(0, ROOT)
        importlib.invalidate_caches()


def hidden() -> str | None:
    """A sentence that names what is, or would be, imported in the place of a package of ours; None where nothing is."""
    for name in NAMES:
        module = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if module is None else module.__spec__
        found = (spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))) or "not there"
        if not os.path.abspath(found).startswith(os.path.join(ROOT, name)):
            return (
                f"'{name}' is {found}, and not Carrara's own package in {ROOT}; rename it, or start Carrara from "
                "another folder and without that one in PYTHONPATH"
            )
    return None
