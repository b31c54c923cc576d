"""Two hosts on this machine: network namespaces with addresses of their own, DeepSpeed's launcher, pdsh.

What is real: two network stacks joined by a wire, the hostfile, DeepSpeed's runner and its launcher on each host,
pdsh, the ranks' rendezvous and collectives over the wire. What stands in: `ssh`, which here enters the namespace that
has the address, since a machine under test has no daemon and no keys. Needs root, iproute2 and pdsh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train import tiny
from tests.train.test_zero import assert_close, step_folder, tensors
from train import folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SSH = """#!/bin/bash
# ssh [options] address command...
while [ $# -gt 0 ]; do
    case "$1" in
        -o|-l|-p|-i) shift 2 ;;
        -*) shift ;;
        *) break ;;
    esac
done
address="${{1#*@}}"; shift
case "$address" in
{hosts}
    *) echo "no host $address" >&2; exit 255 ;;
esac
export GLOO_SOCKET_IFNAME=wire PATH={path}
exec ip netns exec "$space" bash -c "$*"
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Addresses of two hosts and their namespaces; a folder with `ssh` is first in PATH."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    tag = uuid.uuid4().hex[:6]
    spaces = {f"10.213.7.{i + 1}": f"carrara-{tag}-{i}" for i in range(2)}
    ends = [f"c{tag}{i}" for i in range(2)]
    try:
        for space in spaces.values():
            ip("netns", "add", space)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"no network namespaces here: {e.stderr!r}")
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, (address, space) in zip(ends, spaces.items(), strict=True):
            ip("link", "set", end, "netns", space)
            inside = ("-n", space)
            ip(*inside, "link", "set", end, "name", "wire")
            ip(*inside, "addr", "add", f"{address}/24", "dev", "wire")
            ip(*inside, "link", "set", "wire", "up")
            ip(*inside, "link", "set", "lo", "up")
        cases = "\n".join(f"    {address}) space={space} ;;" for address, space in spaces.items())
        folder = tmp_path / "bin"
        folder.mkdir()
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        (folder / "ssh").write_text(SSH.format(hosts=cases, path=path))
        (folder / "ssh").chmod(0o755)
        yield spaces | {"PATH": path}
    finally:
        for space in spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def prepare(run: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "images").symlink_to(run / "images")
    data = tiny.configuration(folder)
    data["clip"] |= {"images": 32, "eps": 1e-3}
    return tiny.write_config(folder, data)


def ended(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stdout
    assert (folder / "clip" / "model" / "open_clip_model.safetensors").is_file(), done.stdout


def launch(hosts: dict[str, str], space: str, *arguments: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_"))}
    env |= {"PATH": hosts["PATH"], "PYTHONPATH": str(tiny.ROOT), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "wire"}
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return subprocess.Popen(
        ["ip", "netns", "exec", space, launcher, *arguments],
        env=env,
        cwd=tiny.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, "")


def test_a_hostfile_with_pdsh_and_a_node_at_a_time_give_the_same_weights(
    hosts: dict[str, str], run: Path, tmp_path: Path
) -> None:
    addresses = [a for a in hosts if a != "PATH"]
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{a} slots=1\n" for a in addresses))
    one = prepare(run, tmp_path / "nodes")
    shared = ("--hostfile", str(hostfile), "--master_addr", addresses[0], "--master_port", "29533")
    nodes = [
        launch(
            hosts,
            hosts[a],
            *shared,
            "--no_ssh",
            "--node_rank",
            str(i),
            "train/main.py",
            "--stage",
            "clip",
            "--config",
            str(one),
        )
        for i, a in enumerate(addresses)
    ]
    for done in [wait(n) for n in nodes]:
        ended(done, tmp_path / "nodes")
    if not shutil.which("pdsh"):
        pytest.skip("--no_ssh works on two hosts; pdsh is not installed, so its launch was not tried")
    two = prepare(run, tmp_path / "pdsh")
    done = wait(launch(hosts, hosts[addresses[0]], *shared, "train/main.py", "--stage", "clip", "--config", str(two)))
    ended(done, tmp_path / "pdsh")
    for name in ("weights", *folders.STATES):
        a, b = (tensors(step_folder(tmp_path / which / "clip", 4), name) for which in ("nodes", "pdsh"))
        assert_close(a, b)
