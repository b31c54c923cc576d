"""The manifests: as kustomize renders them, by KubeRay's and Kubernetes' own schemas, unknown fields refused; their
commands by Carrara's parser, their configuration by its models, and the hook that drains a node on a Ray."""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cronsim import CronSim

from orchestration.config import load
from orchestration.parts import STAGES
from shards.settings import ConfigError
from tests.deploy.lines import parse
from tests.deploy.test_packaging import PYPROJECT
from tests.orchestration.head import ROOT

FOLDER = ROOT / "deploy/kubernetes"
FOLDERS = [p.parent.relative_to(FOLDER) for p in sorted(FOLDER.rglob("kustomization.yaml"))]
APPLIED = [f for f in FOLDERS if str(f) not in ("common", "tls")]
SCHEMAS = json.loads((Path(__file__).parent / "crds/kuberay.json").read_text())
KUBERNETES = "1.32"  # the oldest that is supported when this was written

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the manifests; it is not here")


@functools.cache
def rendered(folder: str) -> tuple[dict[str, Any], ...]:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def check(resource: dict[str, Any]) -> None:
    """Raises jsonschema's or kubernetes-validate's error."""
    if resource["kind"] in SCHEMAS["kinds"]:
        schema = {**SCHEMAS["kinds"][resource["kind"]], "$defs": SCHEMAS["$defs"]}
        jsonschema.Draft202012Validator(schema).validate(resource)
    else:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def job_spec(resource: dict[str, Any]) -> dict[str, Any] | None:
    spec = resource.get("spec", {})
    return (
        spec if resource["kind"] == "RayJob" else spec.get("jobTemplate") if resource["kind"] == "RayCronJob" else None
    )


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any] | None:
    job = job_spec(resource)
    return resource["spec"] if resource["kind"] == "RayCluster" else job["rayClusterSpec"] if job else None


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """The specs of all pods within a resource."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from pods(inner)


@pytest.mark.parametrize("folder", APPLIED, ids=str)
def test_each_resource_has_the_fields_that_its_schema_knows_and_no_others(folder: Path) -> None:
    found = rendered(str(folder))
    assert {"ConfigMap"} < {r["kind"] for r in found}
    for resource in found:
        check(resource)
        assert resource["metadata"]["namespace"] == "carrara"


def test_the_schemas_refuse_what_kubernetes_would() -> None:
    """A field of another name, deep inside, a missing one, another type: in each of the kinds that are used."""
    for folder in ("raycluster", "rayjob", "watch", "watch-cronjob"):
        for resource in rendered(folder):
            if resource["kind"] == "ConfigMap":
                continue
            for pod in pods(resource):
                container = pod["containers"][0]
                for change in ({"imagePullPolice": "Always"}, {"ports": [{"name": "x"}]}, {"image": 1}):
                    kept = dict(container)
                    container.update(change)
                    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
                        check(resource)
                    container.clear()
                    container.update(kept)
            check(resource)
    rendered.cache_clear()


@pytest.mark.parametrize("folder", APPLIED, ids=str)
def test_each_resource_keeps_the_operators_own_rules(folder: Path) -> None:
    """Of KubeRay's ValidateRayClusterSpec, ValidateRayJobSpec and ValidateRayCronJobSpec, those that apply here."""
    for resource in rendered(str(folder)):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", resource["metadata"]["name"])
        if schedule := resource.get("spec", {}).get("schedule"):
            assert "TZ" not in schedule
            next(CronSim(schedule, datetime.datetime.now()))
        if job := job_spec(resource):
            assert not ("clusterSelector" in job and job.get("backoffLimit"))
            assert job["shutdownAfterJobFinishes"]
            assert job["backoffLimit"] >= 1
        if spec := cluster_spec(resource):
            assert spec["authOptions"]["mode"] == "token"
            assert spec["rayVersion"] == installed_ray()
            for group in spec["workerGroupSpecs"]:
                assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
                assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"  # autoscaler v2


def installed_ray() -> str:
    [version] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    return version


@pytest.mark.parametrize("folder", APPLIED, ids=str)
def test_each_pod_is_bounded_and_closed_and_has_all_that_it_mounts(folder: Path) -> None:
    resources = rendered(str(folder))
    maps = {r["metadata"]["name"] for r in resources if r["kind"] == "ConfigMap"}
    secret = yaml.safe_load((FOLDER / "common/secret.example.yaml").read_text())
    kubernetes_validate.validate(secret, KUBERNETES, strict=True)
    assert not any(secret["stringData"].values())  # an example, and nobody's key
    seen = 0
    for pod in pods(resources):
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert {v["configMap"]["name"] for v in volumes.values() if "configMap" in v} <= maps
        for container in pod["containers"]:
            seen += 1
            assert container["image"] == f"carrara:{PYPROJECT['project']['version']}"
            assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert container["securityContext"]["runAsNonRoot"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert [e["secretRef"]["name"] for e in container["envFrom"]] == [secret["metadata"]["name"]]
    assert seen == (1 if str(folder) == "watch-cronjob" else 3)


@pytest.mark.parametrize("folder", APPLIED, ids=str)
def test_each_command_is_one_that_carrara_takes_with_a_configuration_that_is_there(
    folder: Path, tmp_path: Path
) -> None:
    resources = rendered(str(folder))
    lines = [shlex.split(job["entrypoint"]) for r in resources if (job := job_spec(r))]
    lines += [c["command"] for r in resources if r["kind"] == "CronJob" for p in pods(r) for c in p["containers"]]
    assert len(lines) == (0 if str(folder) == "raycluster" else 1)
    for name, *arguments in lines:
        assert name == "carrara"
        parse(arguments)
        path = Path(arguments[arguments.index("--config") + 1])
        mounts = {m["mountPath"] for p in pods(resources) for c in p["containers"] for m in c["volumeMounts"]}
        assert str(path.parent) in mounts
        [data] = [r["data"] for r in resources if r["kind"] == "ConfigMap"]
        (tmp_path / path.name).write_text(data[path.name])
        config = load(str(tmp_path / path.name), [], str(tmp_path), tables=False)
        assert config.run.startswith("s3://")
        assert config.ray.latents.num_gpus == config.ray.train.num_gpus == config.ray.eval.num_gpus == 1


@pytest.mark.parametrize("mode", ["HTTPMode", "SidecarMode"])
@pytest.mark.parametrize("folder", [f for f in APPLIED if str(f) == "rayjob" or f.parent.name == "stages"], ids=str)
def test_a_job_may_be_submitted_as_the_operator_can(folder: Path, mode: str) -> None:
    """Without a pod that submits it. KubeRay's rules for SidecarMode, in which bash on the head's pod is given the
    entrypoint as a part of a line, are those of ValidateRayJobSpec and BuildJobSubmitCommand."""
    [job] = [r for r in rendered(str(folder)) if r["kind"] == "RayJob"]
    spec = {**job["spec"], "submissionMode": mode}
    check({**job, "spec": spec})
    assert not {"clusterSelector", "submitterPodTemplate", "submitterConfig"} & set(spec)
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head.get("restartPolicy", "Never") == "Never"
    [container] = head["containers"]
    assert {"name": "dashboard", "containerPort": 8265} in container["ports"]  # where it is submitted, on loopback
    assert shlex.join(shlex.split(spec["entrypoint"])) == spec["entrypoint"]


def test_there_is_a_job_for_every_stage_and_its_name_says_which() -> None:
    assert {f.name for f in FOLDERS if f.parent.name == "stages"} == set(STAGES)
    for name in STAGES:
        [job] = [r for r in rendered(f"stages/{name}") if r["kind"] == "RayJob"]
        assert job["metadata"]["name"] == f"carrara-{name}"
        assert job["spec"]["entrypoint"].split()[1] == name


def test_what_a_worker_claims_fits_a_node() -> None:
    """A worker that no node has room for would wait for ever."""
    [cluster, *_] = [r for r in rendered("raycluster") if r["kind"] == "RayCluster"]
    nodes = {
        g["groupName"]: {
            k: float(v.removesuffix("Gi"))
            for k, v in g["template"]["spec"]["containers"][0]["resources"]["limits"].items()
        }
        for g in cluster["spec"]["workerGroupSpecs"]
    }
    config = load(str(FOLDER / "common/run.yaml"), [], "/", tables=False)
    assert config.ray.ingest.num_cpus <= nodes["cpu"]["cpu"]
    for pool in (config.ray.latents, config.ray.eval, config.ray.train):
        assert pool.num_cpus <= nodes["gpu"]["cpu"]
        assert pool.num_gpus == nodes["gpu"]["nvidia.com/gpu"]
    groups = {g["groupName"]: g["maxReplicas"] for g in cluster["spec"]["workerGroupSpecs"]}
    assert config.ray.ingest.most_workers == groups["cpu"] * nodes["cpu"]["cpu"]
    assert config.train.ranks <= groups["gpu"]


def test_tls_is_a_component_that_adds_one_field(tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, copy)
    with open(copy / "raycluster/kustomization.yaml", "a") as f:
        f.write("components: [../tls]\n")
    done = subprocess.run(["kubectl", "kustomize", str(copy / "rayjob")], capture_output=True, text=True)
    [job] = [r for r in yaml.safe_load_all(done.stdout) if r["kind"] == "RayJob"]
    assert job["spec"]["rayClusterSpec"]["tlsOptions"] == {"enabled": True}
    check(job)


def test_the_image_is_named_in_one_place_as_the_documents_have_it(tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, copy)
    [line] = re.findall(r"^ +(images: .+)$", (ROOT / "docs/kubernetes.md").read_text(), flags=re.M)
    for folder in ("raycluster", "watch-cronjob"):
        with open(copy / folder / "kustomization.yaml", "a") as f:
            f.write(line + "\n")
    for folder in ("stages/ingest", "rayjob", "watch", "watch-cronjob"):
        done = subprocess.run(["kubectl", "kustomize", str(copy / folder)], capture_output=True, text=True)
        images = re.findall(r" image: (.+)", done.stdout)
        assert images, done.stderr
        assert set(images) == {"REGISTRY/carrara:0.1.0"}


def test_a_line_that_carrara_would_refuse_is_refused_here() -> None:
    for line in (
        "ingst",
        "ingest --config",
        "ingest --no-such-option",
        "train mine",
        "human pack",
        "submit eval --modle x",
    ):
        with pytest.raises(ConfigError):
            parse(line.split())


DRAINED = """
import subprocess, sys, time
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
node = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address)

@ray.remote(num_cpus=1)
def work():
    time.sleep(12)
    return "done"

found = work.remote()
while ray.available_resources().get("CPU", 0) > 0:
    time.sleep(0.2)
began = time.monotonic()
hook = subprocess.Popen(["bash", "-c", sys.argv[1]])
while node.node_id not in ray._private.state.state.get_draining_nodes():
    assert hook.poll() is None, "the hook ended before the node was drained"
    time.sleep(0.2)
print("drained", flush=True)
assert hook.poll() is None, "the hook waits for the work in hand"
print(ray.get(found), flush=True)
hook.wait(60)
print("ended", flush=True)
"""


@pytest.mark.slow
def test_the_hook_drains_the_node_and_waits_for_what_is_in_hand(tmp_path: Path) -> None:
    """In a space of processes of its own, in which the node's raylet is found as in a pod."""
    if os.geteuid() != 0:
        pytest.skip("a space of processes of its own needs root")
    [cluster] = [r for r in rendered("raycluster") if r["kind"] == "RayCluster"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        *shell, hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert shell == ["bash", "-c"]
        assert "--deadline-remaining-seconds 100" in hook
        assert pod["terminationGracePeriodSeconds"] > 100
    # There are two raylets here, the head's and the node's; a pod has one: the newest stands for it.
    hook = hook.replace("pgrep --oldest", "pgrep --newest")
    (tmp_path / "drained.py").write_text(DRAINED)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # With an address and a way out that leads nowhere: Ray looks which address it would take.
    network = "ip link set lo up; ip addr add 10.213.9.1/24 dev lo; ip route add default dev lo;"
    inside = f"{network} exec {shlex.quote(sys.executable)} {tmp_path}/drained.py {shlex.quote(hook)}"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--ipc", "bash", "-c", inside],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.stdout.split()[-3:] == ["drained", "done", "ended"], done.stdout + done.stderr
