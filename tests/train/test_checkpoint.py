"""Checkpoints: every layout reads every other's, and what is killed, torn or full leaves the one before."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shards.settings import StageError
from tests.train import forked, tiny
from tests.train.test_engine import BATCH, config_of, furthest
from tests.train.test_zero import assert_same, settings
from train import checkpoint, folders
from train.engine import Engine

pytestmark = pytest.mark.timeout(900)

STATES = ("weights", "exp_avg", "exp_avg_sq", "ema", "ema_0.050")
States = dict[str, dict[str, torch.Tensor]]


def make(config: str, stage: int, optimizer: str = "muon") -> Engine:
    from train import ranks

    objective, c = config_of(config, zero_stage=stage, optimizer=optimizer, ema_stds=(0.05,))
    me = ranks.join(1)
    return Engine(c, objective, me, BATCH // me.world, 1)


def go(engine: Engine, steps: range) -> None:
    me = engine.ranks
    for step in steps:
        positions = np.arange(step * BATCH, (step + 1) * BATCH)[me.rank :: me.world]
        engine.backward(engine.objective.batch(positions))
        engine.rates(1e-3, {"ema": 0.9, "ema_0.050": 0.5})
        engine.step(lambda figures, norm: norm.isfinite())


def gathered(engine: Engine) -> States:
    """All states whole, by exchange of pieces: what a checkpoint should come to, without one."""
    mine: dict[str, list[Any]] = {}
    arrays = {(flat, state): values for flat, state, values in engine.arrays()}
    for p in engine.pieces:
        for state in STATES:
            if (values := arrays.get((p.flat, state))) is not None:
                part = values.narrow(0, p.start, p.length).clone()
                mine.setdefault(state, []).append((p.name, p.shape, p.offset, part))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: States = {}
    for state in STATES:
        whole = found.setdefault(state, {})
        for name, shape, offset, part in (x for rank in everyone for x in rank.get(state, ())):
            full = whole.setdefault(name, torch.full(shape, torch.nan))
            full.view(-1)[offset : offset + len(part)] = part
    return found


def write(config: str, root: str) -> tuple[States, States]:
    """Three steps on 2 ranks under each stage, saved; the states then, and two steps later."""
    results = {}
    for stage in range(4):
        engine = make(config, stage)
        go(engine, range(3))
        saver = checkpoint.Saver(f"{root}/zero{stage}", engine, folders.Keep(2), engine.ranks)
        saver.save(3, {"optimizer_steps": 3, "images": 24})
        saved = gathered(engine)
        saver.finish()
        go(engine, range(3, 5))
        results[stage] = (saved, gathered(engine))
    if dist.get_rank() == 0:
        torch.save(results, f"{root}/states.pt")
    return results[0]


def read(config: str, root: str, stages: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """(stage written, stage read, how far off two steps later) of all that do not lose a bit."""
    found = []
    results = torch.load(f"{root}/states.pt")
    for stage in stages:
        engine = make(config, stage)
        for written, (saved, after) in results.items():
            where = checkpoint.newest(f"{root}/zero{written}", engine.ranks)
            assert where is not None
            checkpoint.load(*where, engine)
            now = gathered(engine)
            for state in STATES:
                assert_same(now[state], saved[state])
            go(engine, range(3, 5))
            then = gathered(engine)
            found.append((written, stage, max(furthest(then[s], after[s]) for s in STATES)))
    return found


@pytest.mark.parametrize(
    ("world", "stages"),
    [
        (1, (0, 2)),
        pytest.param(2, (0, 1, 2, 3), marks=pytest.mark.slow),
        pytest.param(4, (1, 3), marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
def test_what_two_ranks_wrote_under_any_stage_is_read_by_any(
    run: Path, tmp_path: Path, world: int, stages: tuple[int, ...]
) -> None:
    """Bit for bit, all states of Muon and AdamW; training goes on as it did, to the same bits at the same layout."""
    config = str(settings(run))
    forked.on_ranks(2, write, config, str(tmp_path))
    for found in forked.on_ranks(world, read, config, str(tmp_path), stages):
        assert len(found) == 4 * len(stages)
        for written, stage, off in found:
            assert off < 1e-5, (written, stage)
            if (world, written) == (2, stage):
                assert off == 0.0, stage


# ---- faults ----------------------------------------------------------------------------------------


def begun(config: str, root: str) -> tuple[Engine, checkpoint.Saver]:
    """An engine of two ranks with checkpoint 1 at least, which is loaded."""
    engine = make(config, 1, "adamw")
    found = checkpoint.newest(root, engine.ranks)
    if found:
        checkpoint.load(*found, engine)
    saver = checkpoint.Saver(root, engine, folders.Keep(9), engine.ranks)
    if not found:
        saver.save(1, {"optimizer_steps": 0, "images": 8})
        saver.finish()
    return engine, saver


def killed(config: str, root: str, where: str) -> None:
    """Save step 2, and die by -9: rank 1 half-way through its file, or rank 0 before the manifest."""
    engine, saver = begun(config, root)
    put_file, put_manifest = checkpoint.put_file, checkpoint.put_manifest

    def half(url: str, parts: Any) -> Any:
        if engine.ranks.rank == 1:
            put_file(url, [bytes(part)[: len(part) // 2] for part in parts])
            os.kill(os.getpid(), signal.SIGKILL)
        return put_file(url, parts)

    def never(folder: str, manifest: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "half":
        checkpoint.put_file = half
    elif where == "manifest":
        checkpoint.put_manifest = never
    saver.save(2, {"optimizer_steps": 0, "images": 16})
    saver.finish()
    checkpoint.put_file, checkpoint.put_manifest = put_file, put_manifest


def steps_of(root: Path) -> list[int]:
    return sorted(folders.step_of(f) for f in folders.folders(root) if not folders.damage(f))


@pytest.mark.parametrize("where", ["half", "manifest"])
def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(run: Path, tmp_path: Path, where: str) -> None:
    config, root = str(settings(run)), tmp_path / "c"
    ranks = forked.start(2, killed, config, str(root), where)
    ends = []
    for rank in ranks:
        with pytest.raises(forked.RankError) as e:
            rank.result()
        ends.append(e.value.summary.splitlines()[0])
    # The other one is told, and does not wait for the dead.
    assert sum(e.startswith("killed") for e in ends) == 1
    assert sum("StageError" in e and "cannot be written" in e for e in ends) == 1
    assert steps_of(root) == [1]
    assert os.listdir(root / "step-00000002")  # what was written, of which nothing counts
    forked.on_ranks(2, killed, config, str(root), "")
    assert steps_of(root) == [1, 2]
    manifest = folders.read_manifest(root / "step-00000002")
    assert sorted(os.listdir(root / "step-00000002")) == sorted([*manifest["files"], "manifest.json"])


def full(config: str, root: str) -> str:
    engine, saver = begun(config, root)
    put_file = checkpoint.put_file

    def no_space(url: str, parts: Any) -> Any:
        if engine.ranks.rank == 1:
            raise OSError(28, "No space left on device")
        return put_file(url, parts)

    checkpoint.put_file = no_space
    saver.save(2, {"optimizer_steps": 0, "images": 16})
    try:
        saver.finish()
    except StageError as e:
        return str(e)
    return ""


def test_a_full_disk_on_one_rank_is_told_on_all(run: Path, tmp_path: Path) -> None:
    errors = forked.on_ranks(2, full, str(settings(run)), str(tmp_path / "c"))
    assert all("rank-00001-of-00002" in t and "No space left" in t for t in errors), errors
    assert steps_of(tmp_path / "c") == [1]


def newest_on_two(config: str, root: str) -> str | None:
    from train import ranks

    found = checkpoint.newest(root, ranks.join(1))
    return found[0] if found else None


def test_a_flipped_bit_and_a_missing_file_are_found_by_all_ranks_together(run: Path, tmp_path: Path) -> None:
    config, root = str(settings(run)), tmp_path / "c"
    forked.on_ranks(2, killed, config, str(root), "")
    newest = str(root / "step-00000002")
    assert forked.on_ranks(2, newest_on_two, config, str(root)) == [newest] * 2
    for file in sorted(folders.read_manifest(newest)["files"]):
        path = Path(newest) / file
        data = path.read_bytes()
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        assert "does not have the sha256" in folders.damage(newest)
        assert folders.damage(newest, contents=False) == ""
        assert forked.on_ranks(2, newest_on_two, config, str(root)) == [str(root / "step-00000001")] * 2
        path.write_bytes(data)
    path.unlink()
    assert "is absent" in folders.damage(newest, contents=False)
    assert forked.on_ranks(1, newest_on_two, config, str(root)) == [str(root / "step-00000001")]


def test_what_carrara_did_not_put_there_stays(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step in (1, 2, 3):
        folder = root / folders.folder_name(step)
        folder.mkdir(parents=True)
        (folder / "rank-00000-of-00001-0123abcd.safetensors").write_bytes(b"12345")
        files = {"rank-00000-of-00001-0123abcd.safetensors": {"size": 5, "sha256": "?"}}
        (folder / "manifest.json").write_text(json.dumps({"format_version": 2, "images": step, "files": files}))
    (root / "step-00000001" / "notes.txt").write_text("mine")
    folders.delete_old(root, folders.Keep(1), named=("step-00000002",))
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]
    assert [p.name for p in (root / "step-00000001").iterdir()] == ["notes.txt"]


# ---- an object store, and checkpoints of before ----------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="runs")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # they keep the address they began with
    yield "s3://runs/one"
    server.stop()


def on_s3(config: str, root: str) -> States:
    engine = make(config, 2)
    found = checkpoint.newest(root, engine.ranks)
    if found:
        checkpoint.load(*found, engine)
        return gathered(engine)
    go(engine, range(2))
    saver = checkpoint.Saver(root, engine, folders.Keep(2), engine.ranks)
    for step in (2, 3, 4):
        saver.save(step, {"optimizer_steps": 2, "images": 16})
    saver.finish()
    return gathered(engine)


@pytest.mark.slow
def test_an_object_store_keeps_them_too(run: Path, bucket: str) -> None:
    config = str(settings(run))
    # In processes of their own: s3fs' event loop does not live through a fork.
    code = (
        "import sys, torch; from tests.train import test_checkpoint as t; "
        "found = t.on_s3(sys.argv[1], sys.argv[2]); "
        "import torch.distributed as dist; dist.get_rank() or torch.save(found, sys.argv[3])"
    )
    results = []
    for i, world in enumerate((2, 1)):
        out = run / f"{i}.pt"
        tiny.finish_ranks(tiny.start_ranks(["-c", code, config, bucket, str(out)], world))
        results.append(torch.load(out))
    for state in STATES:
        assert_same(results[0][state], results[1][state])
    assert [folders.step_of(f) for f in folders.folders(bucket)] == [4, 3]
    assert folders.damage(folders.folders(bucket)[0]) == ""
    assert_same(checkpoint.load_weights(folders.folders(bucket)[0], "ema"), results[0]["ema"])


FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_c20ac09.tar.xz"


def load_old(folder: str) -> States:
    from shards.dataset import Dataset
    from train import ranks
    from train.config import TrainConfig
    from train.objectives import build

    me = ranks.join(1)
    manifest = folders.read_manifest(folder)
    known = {k: v for k, v in manifest["config"].items() if k in TrainConfig.model_fields}
    config = TrainConfig.model_validate({**known, "zero_stage": 1})
    objective = build("train", config, [Dataset.open("run/latents")], 3)
    engine = Engine(config, objective, me, config.batch_size // me.world, 1)
    checkpoint.load(folder, manifest, engine)
    return gathered(engine)


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """... a run that version c20ac09 made: into an engine, and whole for an export."""
    from safetensors.torch import load_file

    if not FIXTURE.exists():
        pytest.skip("no run of the version before is kept here")
    with tarfile.open(FIXTURE) as f:
        f.extractall(tmp_path, filter="data")
    monkeypatch.chdir(next(p.parent for p in sorted(tmp_path.rglob("run.yaml"))))
    folder = "run/checkpoints/step-00000005"
    assert folders.latest_complete("run/checkpoints") == folder
    stored = {state: load_file(f"{folder}/{state}.safetensors") for state in ("weights", "exp_avg", "ema")}
    for found in forked.on_ranks(2, load_old, folder):
        for state, values in stored.items():
            assert_same(found[state], values)
    assert_same(checkpoint.load_weights(folder, "raw"), stored["weights"])
    assert_same(checkpoint.load_weights(folder), stored["ema"])


@pytest.mark.slow
def test_a_run_on_an_object_store_is_trained_stopped_and_gone_on_with(run: Path, bucket: str) -> None:
    """`run: s3://...` through train/main.py: latents, checkpoints, log and status all lie there."""
    import s3fs

    store = s3fs.S3FileSystem(skip_instance_cache=True)
    root = bucket.removeprefix("s3://")
    for folder in ("latents", "images"):
        store.put(str(run / folder), f"{root}/{folder}", recursive=True)
    data = tiny.configuration(run, checkpoint_every_images=16, images=48)
    data["run"] = bucket
    config = tiny.write_config(run, data)
    code = "from tests.train import forked; import sys; forked.run_stage(sys.argv[1], 'train', sys.argv[2:])"
    without_export = "import train.finish as f; f.finish = lambda *a, **k: None; " + code
    tiny.finish_ranks(tiny.start_ranks(["-c", without_export, str(config), "train.images=32"], 2))
    assert folders.step_of(folders.latest_complete(f"{bucket}/checkpoints") or "") == 4
    tiny.finish_ranks(tiny.start_ranks(["-c", without_export, str(config), "train.images=32"], 1))
    store.invalidate_cache()
    lines = store.cat_file(f"{root}/train/log.jsonl").decode().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [8, 16, 24, 32]
    assert json.loads(store.cat_file(f"{root}/status/train.json"))["state"] == "done"
    assert any("tfevents" in p for p in store.find(f"{root}/train/tensorboard"))
