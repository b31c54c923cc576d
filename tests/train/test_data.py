"""What the loader gives is what lies in the shards, at the place that the order says."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.columns import ColumnShard
from shards.dataset import Dataset
from shards.images import ImageShard, decode_rgb
from shards.settings import StageError, load_sections
from tests.train import tiny
from train import segments
from train.config import TrainConfig, TrainingSections
from train.data import Prefetcher
from train.encoder_config import AutoencoderConfig
from train.image_samples import ImageSamples
from train.latent_samples import Latents
from train.objectives import build
from train.placement import Placement

CONFIG = TrainConfig(images=100, batch_size=8, streams=4, window=3)


def where(placement: Placement, position: int) -> tuple[int, int]:
    (part,) = placement.locate(np.array([position]))
    shard, row = placement.order(part).locate(part.indices)
    return int(shard[0]), int(row[0])


def test_latents_by_position(run: Path) -> None:
    dataset = Dataset.open(str(run / "latents"))
    latents = Latents(CONFIG, [dataset], 0)
    positions = np.arange(25, 60)  # over the end of the epoch
    mean, logstd = latents.moments(positions)
    text, tokens = latents.embeddings(positions), latents.tokens(positions)
    assert logstd is not None
    for i, p in enumerate(positions):
        shard, row = where(latents.placement, p)
        arrays = ColumnShard(dataset, shard).arrays
        assert np.array_equal(mean[i], arrays["mean"][row].astype(np.float32))
        np.testing.assert_allclose(logstd[i], -15.0 + 0.098 * arrays["logstd"][row], rtol=1e-6)
        assert np.array_equal(text[i], arrays["embeddings"][arrays["embedding_index"][row]].astype(np.float32))
        assert np.array_equal(tokens[i], arrays["tokens"][row])


@pytest.mark.parametrize("cache", [0, 3000, 1 << 20])
def test_pictures_by_position(run: Path, cache: int) -> None:
    dataset = Dataset.open(str(run / "images"))
    placement = segments.placement_of(AutoencoderConfig(images=100, batch_size=8, streams=4, window=3), [dataset], 0)
    pictures = ImageSamples(dataset, placement, lambda p: p, cache)
    for _ in range(2):
        positions = np.arange(40)
        pixels, captions = pictures.pixels(positions), pictures.captions(positions)
        for i in range(40):
            shard, row = where(placement, i)
            source = ImageShard(dataset, shard)
            assert np.array_equal(pixels[i], decode_rgb(source.image_bytes(row)))
            assert captions[i] == source.captions[row]


def test_batch_of_latents_is_the_forward_process_of_its_samples(run: Path) -> None:
    """mean + std * noise, scaled; captions dropped at the asked rate, for the stored empty one."""
    sections = load_sections(
        str(tiny.write_config(run, tiny.configuration(run, caption_dropout=0.25))), (), TrainingSections
    )
    dataset = Dataset.open(str(run / "latents"))
    objective = build("train", sections.train, [dataset], sections.seed)
    positions = np.arange(2000)
    batch = objective.batch(positions)
    mean, logstd = objective.latents.moments(positions)
    noise = (batch["x0"].numpy() / 0.9 - mean) / np.exp(logstd)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise.ravel(), batch["noise"].numpy().ravel())[0, 1]) < 0.02
    dropped = (batch["text"] == 0).all(dim=(1, 2)).float().mean()
    assert abs(float(dropped) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)
    assert {int(batch["t"].min()) < 20, int(batch["t"].max()) > 980} == {True}
    part = objective.batch(positions[7:9])
    assert all(torch.equal(part[k], batch[k][7:9]) for k in batch)


def test_a_shard_that_is_gone_is_one_sentence(run: Path) -> None:
    (run / "latents" / "00001.safetensors").unlink()
    dataset = Dataset.open(str(run / "latents"))
    latents = Latents(CONFIG, [dataset], 0)
    with pytest.raises(StageError, match="shard 00001 cannot be read"):
        latents.moments(np.arange(40))


def test_working_ahead_is_bounded_in_order_and_passes_errors_on() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i
        raise ValueError("broken")

    with Prefetcher(items(), 3) as prefetcher:
        assert next(prefetcher) == 0
        time.sleep(0.3)
        assert len(made) <= 6  # one taken, three queued, one in hand, one being made
        assert [next(prefetcher) for _ in range(19)] == list(range(1, 20))
        with pytest.raises(ValueError, match="broken"):
            next(prefetcher)
    with Prefetcher(iter(range(10**9)), 2) as prefetcher:
        next(prefetcher)
    assert not any(t.name == "data" for t in threading.enumerate())


def test_waiting_is_measured() -> None:
    def slow() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.1)
            yield i

    with Prefetcher(slow(), 2) as prefetcher:
        assert list(prefetcher) == [0, 1, 2]
        assert 0.2 < prefetcher.waited < 5.0
