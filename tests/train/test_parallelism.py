"""What is said of data, tensor and pipeline parallelism: counts against plain formulas, the split against one rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import parallelism
from benchmarks.parallelism import LINKS, UNETS
from shards.settings import ConfigError, validate
from train.config import TrainConfig
from train.encoder_config import ClipConfig
from train.fit_config import KEPT_BY_DATA, KEPT_BY_TENSOR, MOST_WEIGHTS


@pytest.fixture(scope="module")
def sd2() -> parallelism.Counted:
    return parallelism.count(UNETS["SD 2"])


def test_tensor_parallelism_is_refused_with_the_figures_that_were_counted(sd2: parallelism.Counted) -> None:
    nvlink = LINKS["NVLink"]
    assert round(parallelism.data_parallel(sd2, nvlink), 2) == KEPT_BY_DATA
    assert round(parallelism.tensor_parallel(sd2, nvlink, 2), 2) == KEPT_BY_TENSOR
    assert parallelism.largest_model(3, 8) == pytest.approx(MOST_WEIGHTS, rel=0.01)
    for config in (TrainConfig, ClipConfig):
        with pytest.raises(
            ConfigError, match=r"tensor_parallel is 2, .* keep 91% .* and 59% when two share each layer"
        ):
            validate(config, {"tensor_parallel": 2}, "x.yaml")
    assert TrainConfig(tensor_parallel=1).settings().get("tensor_parallel") is None, "it is no part of what a run is"


def test_counts_are_those_of_the_unet(sd2: parallelism.Counted) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["SD 2"])
    assert sd2.weights == sum(p.numel() for p in unet.parameters()) == 865_910_724
    # Of a transformer block at h x w places of C channels: 8 C^2 for two attentions' own projections over the places
    # (q, k, v, out; q, out), and a feed-forward of 12 C^2, twice each; two products of attention over all places, and
    # over the caption's 77; keys and values of the caption.
    total = outputs = 0
    for side, channels, count in ((64, 320, 5), (32, 640, 5), (16, 1280, 5), (8, 1280, 1)):
        n = side**2
        projections = 2 * n * channels**2 * (4 + 2 + 12) + 2 * 77 * 1024 * channels * 2
        attention = 2 * 2 * n * n * channels + 2 * 2 * n * 77 * channels
        total += count * (projections + attention)
        outputs += count * n * channels
    assert sd2.of_blocks == 3 * total
    assert sd2.blocks == outputs
    assert sd2.flops > sd2.of_blocks + sd2.of_resnets > 0.8 * sd2.flops
    # All of it lies in some layer of the pipeline but the time's embedding and the last convolution.
    assert 0.99 < 3 * sum(u.flops for u in sd2.units) / sd2.flops <= 1
    assert sd2.units[-1].passed == 64 * 64 * 320, "behind the last layer no skip waits"
    assert sd2.units[0].passed == 2 * 64 * 64 * 320, "the first one's output is passed, and waits as a skip"


def test_data_parallelism_pays_more_where_links_are_quick_and_batches_large(sd2: parallelism.Counted) -> None:
    for link in LINKS.values():
        work, sent = 16 * sd2.flops / 200e12, 2 * 7 / 8 * 4 * sd2.weights / link.summed
        assert parallelism.data_parallel(sd2, link) == pytest.approx(work / (work + sent))
        assert parallelism.data_parallel(sd2, link, 4) == pytest.approx(4 * work / (4 * work + sent))
        best = parallelism.data_parallel(sd2, link, 4)
        assert all(parallelism.tensor_parallel(sd2, link, t, c) < best for t in (2, 8) for c in (False, True))


def test_stages_are_as_even_as_they_can_be() -> None:
    flops = [5, 1, 1, 1, 5, 3, 2]
    for stages in (2, 3, 4):
        ways = itertools.combinations(range(1, len(flops)), stages - 1)
        least = min(max(_parts(flops, way)) for way in ways)
        assert max(_parts(flops, parallelism.even(flops, stages))) == least
    assert parallelism.even([1, 1, 1, 9], 2) == [3]


def _parts(flops: list[int], ends: Sequence[int]) -> list[int]:
    return [sum(flops[a:b]) for a, b in itertools.pairwise([0, *ends, len(flops)])]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_split_layers_are_exact_on_two_ranks() -> None:
    """By torch's own column- and row-wise layers; each block sums six times a step, as the arithmetic says."""
    found = parallelism.measure(turns=1, batch=2)
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-5)
    assert found["gradients"] < 1e-3
    assert found["blocks"] == 7
    assert found["collectives"] >= 6 * found["blocks"]
