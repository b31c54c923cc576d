"""The Slurm scripts with stand-ins for sbatch's environment, srun and scontrol: what is queued again and what is not,
a stage on a Ray that `ray symmetric-run` starts, and a training by DeepSpeed's launcher that is stopped and goes on.

What stands in: srun runs the tasks of all nodes as processes of this machine, scontrol notes what it is asked. What is
real: the scripts, bash, ray and deepspeed as installed, the signals."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from shards.dataset import Dataset
from tests.deploy.lines import parse
from tests.orchestration.head import ROOT
from tests.train import tiny
from train import folders

SCRIPTS = sorted((ROOT / "deploy/slurm").glob("*.sbatch"))

STANDINS = {
    # srun [--options] COMMAND...: COMMAND once for each node, as a task of its own; ends with the highest exit code.
    "srun": """
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_PROCID=$i SLURM_NODEID=$i "$@" & tasks+=($!); done
highest=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > highest)) && highest=$code; done
exit $highest
""",
    "scontrol": """
case "$1 $2" in
    "show hostnames") for ((i = 0; i < SLURM_NNODES; i++)); do echo "node$i"; done ;;
    "show job") echo "JobId=$3 JobState=${FAKE_STATE:-RUNNING} Reason=None" ;;
    *) echo "$@" >> "$FAKE_ASKED" ;;
esac
""",
}
# ray symmetric-run as its help has it: the command on the head, which is told by the address; others join it.
RAY = """
[ "$1" = symmetric-run ] || exit 2
shift
while [ "$1" != -- ]; do
    case "$1" in --address) address=$2 ;; --min-nodes | --num-cpus | --object-store-memory) ;; *) exit 2 ;; esac
    shift 2
done
shift
[ -n "${FAKE_NO_RAY:-}" ] && exit 0 # what the real one does where Ray does not start
[ "$SLURM_PROCID" = 0 ] || { echo "joined $RAY_AUTH_TOKEN"; exit 0; }
python -m http.server --bind "${address%:*}" "${address#*:}" > /dev/null 2>&1 &
server=$!
until (: < "/dev/tcp/${address%:*}/${address#*:}") 2> /dev/null; do sleep 0.1; done
sleep 2 # others find it
"$@"
code=$?
kill $server
exit $code
"""
CARRARA = """
trap 'echo asked >> "$FAKE_ASKED"; exit 75' TERM
echo "carrara $* at $RAY_ADDRESS with $RAY_AUTH_TOKEN below ${RAY_TMPDIR-}" >> "$FAKE_ASKED"
[ -n "${FAKE_CODE:-}" ] && exit "$FAKE_CODE"
for _ in $(seq 600); do sleep 0.1; done
"""


def _free() -> int:
    """A port that is free, of those that jobs' numbers lead to."""
    for port in random.sample(range(20000, 30000), 100):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.fixture
def allocation(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a script as Slurm would on the first of some nodes. standins: further commands that stand in; cwd: where
    the job was submitted."""

    def start(
        script: str,
        *arguments: str,
        nodes: int,
        standins: dict[str, str] | None = None,
        cwd: Path = ROOT,
        **more: str,
    ) -> subprocess.Popen[str]:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in {**STANDINS, **(standins or {})}.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
            (tmp_path / "bin" / name).chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "RANK", "MASTER_"))}
        env = {
            **inherited,
            "PATH": os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "TMPDIR": str(tmp_path),
            "SLURM_JOB_ID": str(_free() - 20000),
            "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
            "SLURM_NNODES": str(nodes),
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "CARRARA_HEAD_IP": "127.0.0.1",
            "FAKE_ASKED": str(tmp_path / "asked"),
            "OMP_NUM_THREADS": "1",
            **more,
        }
        line = ["bash", str(ROOT / "deploy/slurm" / script), *arguments]
        return subprocess.Popen(line, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def asked(tmp_path: Path) -> list[str]:
    file = tmp_path / "asked"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(found: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


FAKE = {"ray": RAY, "carrara": CARRARA}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_each_script_is_clean_asks_for_its_signal_and_calls_a_stage(script: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "shellcheck"),
            "-x",
            "-P",
            str(script.parent),
            "-e",
            "SC1091",
            str(script),
            str(script.parent / "common.sh"),
            "-s",
            "bash",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.M))
    assert options["signal"] == "B:USR1@300"  # to the script, not to Ray's processes, which would die of it
    assert {"requeue", "exclusive", "open-mode"} <= set(options)
    assert options["job-name"] == f"carrara-{script.stem}"
    last = shlex.split(text.splitlines()[-1])
    assert last[-1] == "$@"
    if last[0] == "stage":
        parse([last[1], "--config", "x.yaml", "seed=1"])
    else:
        assert last[0] == "fit"


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_it_ends_as_the_command_ends_and_only_75_is_queued_again(
    tmp_path: Path, allocation: Callable[..., subprocess.Popen[str]], code: int
) -> None:
    process = allocation("ingest.sbatch", "--config", "a b.yaml", nodes=2, standins=FAKE, FAKE_CODE=str(code))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    [line, *others] = asked(tmp_path)
    token = re.fullmatch(r"carrara ingest --config a b\.yaml at 127\.0\.0\.1:\d+ with ([0-9a-f]{64}) below /tmp", line)
    assert token, line
    assert f"joined {token[1]}" in out  # the other node has the same token, and waited for the head
    assert [o.split()[0] for o in others] == (["requeue"] if code == 75 else [])
    assert not list(tmp_path.glob("carrara-*"))


@pytest.mark.parametrize(
    ("number", "state", "again"),
    [(signal.SIGUSR1, "RUNNING", True), (signal.SIGTERM, "PREEMPTED", True), (signal.SIGTERM, "CANCELLED", False)],
)
def test_a_signal_to_the_script_stops_the_command_and_a_cancelled_job_stays_cancelled(
    tmp_path: Path, allocation: Callable[..., subprocess.Popen[str]], number: int, state: str, again: bool
) -> None:
    process = allocation("eval.sbatch", "--config", "x.yaml", nodes=1, standins=FAKE, FAKE_STATE=state)
    wait_for(lambda: asked(tmp_path), process)
    time.sleep(0.3)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert [line.split()[0] for line in asked(tmp_path)] == ["carrara", "asked", *(["requeue"] if again else [])]


def test_a_ray_that_does_not_start_is_a_failure_though_its_command_says_0(
    tmp_path: Path, allocation: Callable[..., subprocess.Popen[str]]
) -> None:
    process = allocation("latents.sbatch", "--config", "x.yaml", nodes=1, standins=FAKE, FAKE_NO_RAY="1")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "carrara: the command was not run to its end" in out
    assert asked(tmp_path) == []


def test_other_nodes_do_not_wait_for_ever_for_a_head_that_failed(
    tmp_path: Path, allocation: Callable[..., subprocess.Popen[str]]
) -> None:
    port = _free()
    process = allocation(
        "latents.sbatch",
        "--config",
        "x.yaml",
        nodes=2,
        standins=FAKE,
        FAKE_NO_RAY="1",
        CARRARA_HEAD_WAIT_S="2",
        SLURM_JOB_ID=str(port - 20000),
    )
    try:
        out, _ = process.communicate(timeout=20)
    finally:
        with socket.create_server(("127.0.0.1", port)):  # what still waits would do so for ever
            process.communicate()
    assert process.returncode == 1
    assert "carrara: no Ray at 127.0.0.1:" in out


def test_a_train_py_of_ones_own_where_the_job_is_submitted_is_not_taken_for_ours(
    tmp_path: Path, allocation: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('not ours')")
    launcher = 'while [ "$1" != --master_port ]; do shift; done; echo "$3 $*" >> "$FAKE_ASKED"'
    process = allocation(
        "train.sbatch",
        "--config",
        "x.yaml",
        nodes=1,
        standins={"deepspeed": launcher},
        cwd=tmp_path,
        CARRARA_SLURM=str(ROOT / "deploy/slurm"),
        PYTHONPATH=str(ROOT),
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert [line.split()[0] for line in asked(tmp_path)] == [str(ROOT / "train/main.py")]


def test_the_stand_in_for_ray_takes_what_the_real_one_takes() -> None:
    """Of `ray symmetric-run --help` and `ray start --help`, by their own parsers."""
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import symmetric_run

    known = {o for command in (symmetric_run, start) for p in command.params for o in p.opts}
    assert {"--address", "--min-nodes", "--num-cpus", "--object-store-memory"} <= known


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_on_the_ray_that_symmetric_run_starts(
    tmp_path: Path, allocation: Callable[..., subprocess.Popen[str]]
) -> None:
    """In a space of processes of its own: at its end `ray symmetric-run` stops every Ray that it sees."""
    if os.geteuid() != 0:
        pytest.skip("a space of processes of its own needs root")
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 90, 200)).save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text(f"a plain picture, number {i}")
    config = {"run": str(tmp_path / "run"), "ingest": {"table": str(tmp_path / "photos"), "image_size": 64}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    real = Path(sys.executable).parent  # what symmetric-run starts as `ray` is no further stand-in
    inside = (
        "ip link set lo up; ip addr add 10.213.9.1/24 dev lo; ip route add default dev lo; "
        f'PATH={shlex.quote(str(real))}:$PATH exec unshare --pid --fork --kill-child --mount-proc ray "$@"'
    )
    space = f'exec unshare --net bash -c {shlex.quote(inside)} ray "$@"'
    process = allocation(
        "ingest.sbatch",
        "--config",
        str(tmp_path / "mine.yaml"),
        nodes=1,
        standins={"ray": space},
        CARRARA_HEAD_IP="10.213.9.1",
        SLURM_CPUS_ON_NODE="2",
        RAY_agent_register_timeout_ms="180000",
    )
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
    assert len(list(Dataset.open(str(tmp_path / "run/images")).shards)) == 1
    assert asked(tmp_path) == []


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_training_by_deepspeed_on_two_nodes_is_stopped_in_time_and_goes_on(
    tmp_path: Path, allocation: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    tiny.make_images(run / "images")
    data = tiny.configuration(run)
    data["clip"] |= {"images": 100_000, "checkpoint_every_images": 50_000}
    config = tiny.write_config(tmp_path, data)
    more = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    arguments = ("--config", str(config), "--stage", "clip")
    process = allocation("train.sbatch", *arguments, nodes=2, **more)
    wait_for(lambda: list(run.glob("clip/**/log.jsonl")), process, 400)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert [line.split()[0] for line in asked(tmp_path)] == ["requeue"], out
    saved = folders.latest_complete(run / "clip" / "checkpoints")
    assert saved is not None, out
    seen = int(folders.read_manifest(saved)["images"])
    # Queued again, the same line goes on, here to an end that is near.
    more_images = f"clip.images={seen + 16}"
    process = allocation("train.sbatch", *arguments, "--adopt", more_images, nodes=2, **more)
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
    assert folders.read_manifest(folders.latest_complete(run / "clip" / "checkpoints"))["images"] == seen + 16
    assert (run / "clip/model/open_clip_model.safetensors").is_file()
    assert [line.split()[0] for line in asked(tmp_path)] == ["requeue"], out


def test_rays_sockets_fit_below_the_longest_folder_that_is_left_to_it() -> None:
    longest = re.search(r"temporary}\" -le (\d+) \]", (ROOT / "deploy/slurm/common.sh").read_text())
    assert longest is not None
    # As ray._private.node names them, in a process of the highest number that Linux gives on 64 bits.
    session = f"session_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{(1 << 22) - 1}"
    assert int(longest[1]) + len(f"/ray/{session}/sockets/plasma_store") <= 107
