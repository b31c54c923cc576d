"""Makes kuberay.json from KubeRay's CRDs: `python -m tests.deploy.crds.make FOLDER-WITH-THE-CRDS VERSION`.

Descriptions are taken out, parts that occur several times (a pod's template above all) stand once under $defs, and
objects whose fields are listed may have no others, as `kubectl apply` with strict
validation has it. Status is left out.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
SHARED = 300  # characters from which on a part that occurs again is shared


def strict(schema: Any) -> Any:
    """A schema of Kubernetes as one of JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        k: ({name: strict(s) for name, s in v.items()} if k == "properties" else strict(v))
        for k, v in schema.items()
        if k != "description" and not k.startswith("x-kubernetes-")
    }
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


def key(part: Any) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"))


def count(part: Any, found: Counter[str]) -> None:
    if isinstance(part, dict):
        found[key(part)] += 1
        if found[key(part)] > 1:
            return  # what is within is shared with it
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        count(inner, found)


def shared(part: Any, found: Counter[str], defs: dict[str, Any], top: bool = False) -> Any:
    if isinstance(part, list):
        return [shared(p, found, defs) for p in part]
    if not isinstance(part, dict):
        return part
    text = key(part)
    if not top and found[text] > 1 and len(text) > SHARED:
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        if name not in defs:
            defs[name] = shared(part, found, defs, top=True)
        return {"$ref": f"#/$defs/{name}"}
    return {k: shared(v, found, defs) for k, v in part.items()}


def main(folder: str, version: str) -> None:
    schemas = {}
    for kind, plural in KINDS.items():
        crd = yaml.safe_load((Path(folder) / f"ray.io_{plural}.yaml").read_text())
        [found] = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        schema = strict(found["schema"]["openAPIV3Schema"])
        schema["properties"].pop("status", None)
        schemas[kind] = schema
    found, defs = Counter[str](), {}
    count(schemas, found)
    small = {kind: shared(schema, found, defs) for kind, schema in schemas.items()}
    out = {"source": f"KubeRay {version}, ray-operator/config/crd/bases, Apache-2.0", "kinds": small, "$defs": defs}
    text = json.dumps(out, sort_keys=True, separators=(",", ":"))
    (Path(__file__).parent / "kuberay.json").write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
