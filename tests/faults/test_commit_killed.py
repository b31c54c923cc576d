"""Writers that commit the same shards with other bytes and are killed (SIGKILL) at any moment, a reader that looks all
the time, and in the end one resume: on a folder and on S3, with small tars and with real ones.

What is looked at is what tests/shards/test_protocol.py explores: stats over other files than they name, commits that
go or change, shards that a resume does not end.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import time
from contextlib import ExitStack
from typing import Any

import pytest

from shards import commit, storage
from shards.commit import Folder
from shards.dataset import read_stats
from shards.fingerprint import Fingerprint
from shards.layout import shard_name
from shards.local import TMP_MARK
from shards.settings import StageError
from shards.verify import verify_shard
from tests.objects import bucket

MADE_WITH = Fingerprint("torture", 1, {})
SMALL, REAL = (20_000, 60_000), (205_000_000, 215_000_000)


def made(rng: random.Random, sizes: tuple[int, int]) -> dict[str, bytes]:
    """Another tar than others', or one of two that several share; always a sidecar of its own."""
    seed = rng.choice([b"same-1", b"same-2", rng.randbytes(8)])
    size = random.Random(seed).randrange(*sizes)
    tar = hashlib.shake_128(seed).digest(min(size, 1 << 20))
    return {".tar": (tar * (-(-size // len(tar))))[:size], ".parquet": rng.randbytes(rng.randrange(2000, 4000))}


def work(root: str, environment: dict[str, str], seed: int, sizes: tuple[int, int]) -> None:
    """A writer's life: the first shards that are not committed, where all the others are too, until it is killed.
    Between operations it now and then sleeps for long."""
    os.environ.update(environment)
    rng, index = random.Random(seed), 0
    real = commit.Files
    naps = [0.0, 0.0, 0.0, 0.001, 0.01, 0.08] if sizes == SMALL else [0.0, 0.05]

    class Sleepy(real):
        def __getattribute__(self, name: str) -> Any:
            if name in ("read", "digest", "create", "remove"):
                time.sleep(rng.choice(naps))
            return super().__getattribute__(name)

    commit.Files = Sleepy
    folder = Folder.begin(root, MADE_WITH)
    while True:
        while storage.exists(storage.join(root, shard_name(index) + "_stats.json")):
            index += 1
        try:
            folder.commit(index + rng.choice([0, 0, 1]), made(rng, sizes), {"rows": 1, "count": 1})
        except StageError as e:
            print("refused:", e, flush=True)


def wrong(root: str, index: int) -> tuple[str, str | None]:
    """What is wrong with a shard, and which commit it is of; read one file after the other, as a reader does."""
    stats = read_stats(root, index)
    if stats is None:
        return "", None
    return verify_shard(root, index), stats["born"]


def torture(
    root: str, kills: int, every_s: float, sizes: tuple[int, int], least: int, writers: int = 3
) -> dict[str, int]:
    """least: shards that must have been committed between the kills, or these came too fast to mean anything."""
    rng = random.Random(1)
    folder = Folder.begin(root, MADE_WITH, take_over=True)
    environment = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.faults.test_commit_killed", "s3fs"])

    def start() -> Any:
        process = processes.Process(target=work, args=(root, environment, rng.randrange(1 << 30), sizes), daemon=True)
        process.start()
        return process

    alive = [start() for _ in range(writers)]
    faults: dict[str, bool] = {}
    known: dict[int, str] = {}
    next_kill, done, deadline = time.monotonic() + every_s, 0, time.monotonic() + 500
    try:
        while (done < kills or len(known) < least) and time.monotonic() < deadline:
            if time.monotonic() > next_kill and len(known) * kills >= done * least:
                i = rng.randrange(writers)
                alive[i].kill()
                alive[i].join()
                alive[i] = start()
                done, next_kill = done + 1, time.monotonic() + every_s * rng.uniform(0.5, 1.5)
            index = max(0, len(known) + rng.randrange(-10, 3))
            problem, born = wrong(root, index)
            if problem:
                faults[f"shard {index}: {problem}"] = True
            if index in known and born != known[index]:
                faults[f"shard {index}: a commit {'went' if born is None else 'changed'}"] = True
            if born is not None:
                known[index] = born
            time.sleep(0.01)
    finally:
        for process in alive:
            process.kill()
            process.join()
    end = max(known, default=0)
    while read_stats(root, end) is not None:
        end += 1  # writers were ahead of the reader
    ended = fetched = 0
    for index in range(end + 3):
        name = storage.join(root, shard_name(index))
        had_tar, had_stats = storage.exists(name + ".tar"), storage.exists(name + "_stats.json")
        stats = folder.adopt(index)
        assert (stats is None) == (not had_tar), "what is stored is never made again"
        ended += had_tar and not had_stats
        if stats is None:
            fetched += 1
            stats = folder.commit(index, made(rng, sizes), {"rows": 1, "count": 1})
        problem, born = wrong(root, index)
        if problem or born != stats["born"] or (index in known and born != known[index]):
            faults[f"shard {index} after the resume: {problem or born}"] = True
    folder.sweep()
    left = [n for n in storage.list_names(folder.beside) if TMP_MARK not in n]
    assert not faults, "\n".join(faults)
    assert not left
    assert done >= kills
    assert len(known) >= least
    return {"kills": done, "shards": end, "ended": ended, "fetched": fetched}


@pytest.mark.slow
@pytest.mark.parametrize("store", ["folder", "s3"])
def test_killed_writers_of_the_same_shards_leave_whole_ones(tmp_path, store):
    with ExitStack() as stack:
        root = str(tmp_path / "images") if store == "folder" else f"{stack.enter_context(bucket())}/run/images"
        print(store, torture(root, kills=40, every_s=0.25, sizes=SMALL, least=10))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("store", ["folder", pytest.param("s3", marks=pytest.mark.nightly)])
def test_the_same_with_tars_of_real_size(tmp_path, store):
    """Over 200 MB: on S3 they go in parts, and some requests are lost or told to come again."""
    rng = random.Random(2)

    def sometimes(method: str, path: str) -> bool:
        return "000" in path and rng.random() < 0.1

    with ExitStack() as stack:
        if store == "folder":
            root = str(tmp_path / "images")
        else:
            root = f"{stack.enter_context(bucket(lose=sometimes, busy=sometimes))}/run/images"
        print(store, torture(root, kills=4, every_s=1.0, sizes=REAL, least=3, writers=2))
