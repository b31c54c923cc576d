"""What is read, and when: each byte once an epoch over all ranks, ahead of its need, from files and from S3."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import columns, images, storage
from shards.dataset import Dataset
from shards.settings import StageError
from tests.objects import bucket
from tests.train import tiny
from tests.train.test_mixture import bucketed, latents_of
from train import segments
from train.config import TrainConfig
from train.data import Prefetcher, batch_slots, micro_batches
from train.encoder_config import AutoencoderConfig
from train.image_samples import ImageSamples
from train.latent_samples import Latents
from train.placement import Placement, Segment, Source
from train.ranks import Ranks
from train.reader import Reader, Window

CONFIG = TrainConfig(images=10**6, batch_size=8, streams=8, window=6)


@contextlib.contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """The ranges of bytes that are read within."""
    ranges: list[tuple[str, int, int]] = []
    read, lock = storage.read_ranges, threading.Lock()

    def recorded(url: str, asked: Any) -> list[bytes]:
        with lock:
            ranges.extend((url, begin, end) for begin, end in asked)
        return read(url, asked)

    for module in (columns, images):
        patch.setattr(module.storage, "read_ranges", recorded)
    yield ranges
    patch.undo()


def epoch(latents: Latents, rank: int, world: int, batches: int) -> list[bytes]:
    found = []
    for b in range(batches):
        positions = 8 * b + batch_slots(8, rank, world, 0, 1)
        latents.expect(positions)
        mean, _ = latents.moments(positions)
        tokens = latents.tokens(positions)
        found += [m.tobytes() + t.tobytes() for m, t in zip(mean, tokens, strict=True)]
    return found


@pytest.mark.parametrize("where", ["files", "s3"])
def test_over_all_ranks_each_byte_is_read_once_an_epoch(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(columns, "_HEAD", 256)  # these files are small
        root = str(tmp_path) if where == "files" else stack.enter_context(bucket()) + "/latents"
        tiny.make_latents(root, counts=(70, 51, 61, 58), text="tokens")
        dataset = Dataset.open(root)
        wanted = ("mean", "logstd", "tokens")
        whole: set[tuple[str, int]] = set()
        total = 0
        for info in dataset.shards:
            file = columns.ColumnFile(storage.join(root, info.name + ".safetensors"))
            for name in wanted:
                begin, end = file.range(name, 0, info.count)
                whole |= {(file.url, i) for i in range(begin, end)}
                total += end - begin
        for world in (1, 2, 4):
            read: collections.Counter[tuple[str, int]] = collections.Counter()
            given: list[bytes] = []
            for rank in range(world):
                latents = Latents(CONFIG, [dataset], 5)
                latents.wants = set(wanted)
                with watched(monkeypatch) as ranges:
                    given += epoch(latents, rank, world, 30)
                    latents.close()
                mine = collections.Counter((u, i) for u, b, e in ranges for i in range(b, e))
                read += collections.Counter({place: n for place, n in mine.items() if place in whole})
                heads = [u for u, b, _ in ranges if b == 0]
                assert len(heads) == len(set(heads)), "a header is read once"
                share = sum(mine[p] for p in whole) / total
                assert share == pytest.approx(1 / world, abs=0.02)
            assert set(read) == whole
            assert set(read.values()) == {1}
            assert len(set(given)) == 240


def test_with_buckets_too_ranks_read_streams_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = bucketed(tmp_path, counts=(60, 80, 70))
    read: collections.Counter[tuple[str, int, int]] = collections.Counter()
    for rank in range(4):
        latents = latents_of(dataset, 8, streams=8, window=24)
        latents.wants = {"mean"}
        with watched(monkeypatch) as ranges:
            for b in range(20):  # less than an epoch of any bucket
                latents.moments(8 * b + batch_slots(8, rank, 4, 0, 1))
        read += collections.Counter(r for r in ranges if r[1] > 0)
    assert max(read.values()) == 1


def test_a_store_that_throttles_gives_the_same_samples(tmp_path: Path) -> None:
    """Every third read is answered by 503 SlowDown."""
    tiny.make_latents(tmp_path, counts=(40, 20), text="tokens")
    expected = epoch(Latents(CONFIG, [Dataset.open(str(tmp_path))], 5), 0, 1, 5)
    asked = []

    def throttled(method: str, path: str) -> bool:
        if method == "GET" and path.endswith(".safetensors"):
            asked.append(path)
            return len(asked) % 3 == 0
        return False

    with bucket(throttled=throttled) as url:
        for file in tmp_path.iterdir():
            if file.is_file():
                storage.write_atomic(f"{url}/latents/{file.name}", file.read_bytes())
        dataset = Dataset.open(f"{url}/latents")
        dataset.fingerprint = Dataset.open(str(tmp_path)).fingerprint
        assert epoch(Latents(CONFIG, [dataset], 5), 0, 1, 5) == expected
    assert len(asked) > 30


def test_reads_that_fail_are_tried_again_and_at_last_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    url, real, slept = str(tmp_path / "file"), storage._read_ranges, []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    failures = [OSError(16, "SlowDown"), TimeoutError("no answer"), ConnectionError("reset")]

    def flaky(*arguments: Any) -> list[bytes]:
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(storage, "_read_ranges", flaky)
    assert storage.read_ranges(url, [(2, 4), (9, 10)]) == [b"23", b"9"]
    assert len(slept) == 3
    assert slept[2] > slept[0]
    failures.extend([OSError("down")] * 100)
    with pytest.raises(OSError, match="file: cannot be read: OSError: down"):
        storage.read_ranges(url, [(0, 1)])
    assert 20 < sum(slept[3:]) < 200, "about a minute"
    failures.clear()
    with pytest.raises(ValueError, match="ends before byte 11"):
        storage.read_ranges(url, [(0, 11)])
    slept.clear()
    with pytest.raises(FileNotFoundError):
        storage.read_ranges(url + "x", [(0, 1)])
    assert not slept, "what is not there is not asked for again"


def test_a_shards_layout_is_asked_for_as_patiently_as_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(columns.pack_columns({"a": np.arange(3)}, {}))
    real, slept, failures = storage.size, [], [OSError(16, "Service Unavailable") for _ in range(6)]

    def flaky(url: str) -> int | None:
        if failures:
            raise failures.pop()
        return real(url)

    monkeypatch.setattr(storage, "size", flaky)
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    assert columns.ColumnFile(str(tmp_path / "file")).whole("a").tolist() == [0, 1, 2]
    assert len(slept) == 6
    with pytest.raises(FileNotFoundError):
        columns.ColumnFile(str(tmp_path / "absent"))
    assert len(slept) == 6, "what is not there is not asked for again"


def test_a_picture_window_is_one_read_of_the_tar(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(str(run / "images"))
    config = AutoencoderConfig(images=1000, batch_size=7, streams=2, window=5)
    placement = segments.placement_of(config, [dataset], 0)
    with bucket() as url:
        for file in (run / "images").iterdir():
            if file.is_file():
                storage.write_atomic(f"{url}/images/{file.name}", file.read_bytes())
        for remote in (False, True):
            source = Dataset.open(f"{url}/images") if remote else dataset
            samples = ImageSamples(source, placement, lambda p: p, 0)
            with watched(monkeypatch) as ranges:
                found = np.concatenate([samples.pixels(np.arange(7 * b, 7 * b + 7)) for b in range(4)])
                samples.close()
            assert len(found) == len({p.tobytes() for p in found}) == 28
            tars = [r for r in ranges if r[0].endswith(".tar")]
            order = next(iter(placement.orders.values()))
            windows = {(int(e), int(v), int(w)) for e, v, w, _ in np.array(order.spot(np.arange(28))).T}
            assert len(tars) == sum(len(order.runs(*w)) for w in windows)
            size = sum((run / "images" / f"{i:05d}.tar").stat().st_size for i in range(3))
            assert sum(e - b for _, b, e in tars) < size
            alone = images.ImageShard(source, 0)
            with watched(monkeypatch) as ranges:
                data = alone.image_bytes(3)
            assert [e - b for _, b, e in ranges] == ([len(data)] if remote else []), "of S3 no more than the picture"


# ---- ahead ------------------------------------------------------------------------------------------------


class Slow:
    """An objective whose windows take `pause` seconds each to read."""

    def __init__(self, pause: float, window: int = 8) -> None:
        source = Source("s", np.full((20, 1), 100))
        self.placement = Placement([Segment(0, 16, (16,), (source,))], 0, 32, window)
        self.loads: list[float] = []

        def load(source: int, bucket: int, runs: list[tuple[int, int, int]]) -> Window:
            time.sleep(pause)
            self.loads.append(time.perf_counter())
            rows = np.concatenate([np.arange(a, b) for _, a, b in runs])
            shards = np.concatenate([np.full(b - a, s) for s, a, b in runs])
            return Window(shards, rows, np.ones(len(rows), bool), {"number": shards * 100 + rows})

        self.reader = Reader(self.placement, load)

    def positions(self, images: int, rank: int, world: int, micro_step: int, micro: int) -> np.ndarray:
        return images + batch_slots(16, rank, world, micro_step, 16 // world // micro)

    def expect(self, positions: np.ndarray) -> None:
        self.reader.expect(positions)

    def batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
        rows = self.reader.take(positions)
        return {"number": torch.tensor([int(w.columns["number"][at]) for w, at in rows])}


def test_windows_are_read_before_they_are_needed_and_let_go_afterwards() -> None:
    objective: Any = Slow(0.06)
    config = TrainConfig(images=16 * 120, batch_size=16)
    ranks = Ranks(0, 1, torch.device("cpu"), False)
    seen: list[int] = []
    most = 0
    with Prefetcher(micro_batches(objective, config, ranks, 0), 3) as prefetcher:
        for step, batch in enumerate(prefetcher):
            seen += batch["number"].tolist()
            if step == 5:
                prefetcher.waited = 0.0  # the first windows of all streams come at once
            time.sleep(0.02)
            most = max(most, sum(len(h) for h in objective.reader._windows.values()))
    assert len(set(seen)) == 1920, "of 2,000"
    assert prefetcher.waited < 0.5 * 0.02 * 114, f"waited {prefetcher.waited:.2f} s in {0.02 * 114:.2f} s of steps"
    assert most <= 2 * 32, "of each stream one window, and the next once its turn is near"
    objective.reader.close()


def test_quick_steps_leave_a_store_far_away_the_time_to_answer() -> None:
    """A window that takes 25 steps to come is there when its turn is."""
    objective: Any = Slow(0.5, window=32)
    config = TrainConfig(images=16 * 120, batch_size=16)
    ranks = Ranks(0, 1, torch.device("cpu"), False)
    most = 0
    with Prefetcher(micro_batches(objective, config, ranks, 0), 3) as prefetcher:
        for step, _ in enumerate(prefetcher):
            if step == 5:
                prefetcher.waited = 0.0  # the first windows of all streams come at once
            time.sleep(0.04)
            most = max(most, sum(len(h) for h in objective.reader._windows.values()))
    assert prefetcher.waited < 0.1 * 0.04 * 114, f"waited {prefetcher.waited:.2f} s in {0.04 * 114:.2f} s of steps"
    assert most <= 1.5 * 32
    objective.reader.close()


def test_what_is_not_foreseen_is_read_when_it_is_asked_for() -> None:
    objective: Any = Slow(0.0)
    forwards = objective.batch(np.arange(400, 416))["number"]
    assert objective.batch(np.arange(16))["number"].tolist() != forwards.tolist()
    assert torch.equal(objective.batch(np.arange(400, 416))["number"], forwards)
    assert len(objective.reader._windows) <= 32


def test_an_error_of_reading_ahead_is_raised_where_the_sample_is_needed_and_can_be_tried_again() -> None:
    objective: Any = Slow(0.0)
    load, broken = objective.reader._load, [True]

    def sometimes(*arguments: Any) -> Window:
        if broken[0]:
            raise StageError("shard 00003 cannot be read")
        return load(*arguments)

    objective.reader._load = sometimes
    objective.expect(np.arange(16))
    with pytest.raises(StageError, match="shard 00003"):
        objective.batch(np.arange(16))
    broken[0] = False
    for _ in range(16):  # one window after the other is asked for again
        with contextlib.suppress(StageError):
            objective.batch(np.arange(16))
    assert len(objective.batch(np.arange(16))["number"]) == 16


def test_the_loaders_thread_is_on_the_ranks_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is a thread's own: without this, all ranks of a node would begin on the first GPU."""
    recorded: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: recorded.append((threading.current_thread().name, d)))
    with Prefetcher(iter([1]), 1, torch.device("cuda", 3)) as prefetcher:
        assert next(prefetcher) == 1
    assert recorded == [("data", torch.device("cuda", 3))]
    recorded.clear()
    with Prefetcher(iter([1]), 1, torch.device("cpu")) as prefetcher:
        assert next(prefetcher) == 1
    assert not recorded
