"""What data, tensor and pipeline parallelism cost a UNet: python -m benchmarks.parallelism [counts] [measure] [rows]

counts    UNets of 0.14 to 5 billion weights at 512 px: FLOPs, activations and exchanged bytes counted on tensors
          without values, and from these, with the rates of a GPU and of its links as stated inputs, the share of the
          GPUs' time that each way leaves to arithmetic of use. Nothing is overlapped, the worst case for each alike
measure   on two ranks here, by gloo: attention and feed-forward of a UNet2DConditionModel split by torch's
          ColwiseParallel and RowwiseParallel, exact against one rank, with its collectives counted; its step against
          that of two ranks that share the batch (data parallelism), in turn
rows      FSDP2 cuts each parameter by its first side into whole rows: what the fullest rank then keeps, counted

All ways get the same GPUs and the same global batch of BATCH images a GPU. Bytes are those that a GPU sends in a ring:
an all-reduce of n bytes over t GPUs is 2 (t - 1) / t n, a reduce-scatter or an all-gather half of that.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import os
import socket
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from train.config import TrainConfig
from train.plan import GIB, memory

BATCH = 16  # images a GPU
SIDE = 64  # of the latents: 512 px
CONTEXT = 77
RATE = 200e12  # FLOP/s that a GPU reaches in bf16: an H100 was measured at 148 to 215 (docs/train.md)
GPUS = 8  # that train together; over the network, nodes of 8


@dataclasses.dataclass(frozen=True)
class Link:
    """Bytes a second. own: of what each GPU sends for itself. summed: of gradients, of which a node sends one copy."""

    own: float
    summed: float


# NVLink 4 (450 GB/s each way) and PCIe 5 x16 (63 GB/s) at two thirds of their data sheets; a node's 400 Gbit/s, which
# its 8 GPUs share.
LINKS = {"NVLink": Link(300e9, 300e9), "PCIe": Link(42e9, 42e9), "network": Link(6.25e9, 50e9)}
AVAILABLE = 78 * GIB  # of an 80 GB card


def small(width: int) -> dict[str, Any]:
    """Stable Diffusion 2's UNet with `width` channels in place of 320."""
    heads = width // 64
    return {
        "sample_size": SIDE,
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "attention_head_dim": (heads, 2 * heads, 4 * heads, 4 * heads),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }


def large(width: int) -> dict[str, Any]:
    """SDXL's UNet with `width` channels in place of 320, without its further conditions."""
    heads = width // 64
    return {
        "sample_size": SIDE,
        "block_out_channels": (width, 2 * width, 4 * width),
        "attention_head_dim": (heads, 2 * heads, 4 * heads),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    }


UNETS = {
    "SD 2 at 128": small(128),
    "SD 2 at 192": small(192),
    "SD 2": small(320),
    "SDXL": large(320),
    "SDXL at 448": large(448),
}


@dataclasses.dataclass(frozen=True)
class Unit:
    """A layer of the UNet as a pipeline would cut it. flops: forward, of one image. passed: values of an image that lie
    behind it and are still needed: its output and what skips wait."""

    name: str
    flops: int
    passed: int


@dataclasses.dataclass(frozen=True)
class Counted:
    """A UNet on one image. flops: forward and backward, of all, of what is split in transformer blocks (their linear
    layers and attention), and of its residual blocks' convolutions. blocks, resnets: values of the outputs of
    all transformer blocks, and of all residual blocks, each of which is summed over the ranks of tensor parallelism.
    split, filters: weights of the split layers of transformer blocks, and of the residual blocks' convolutions."""

    weights: int
    split: int
    filters: int
    flops: int
    of_blocks: int
    of_resnets: int
    blocks: int
    resnets: int
    units: tuple[Unit, ...]


def count(config: dict[str, Any]) -> Counted:
    """Everything about a UNet that the arithmetic needs, on the meta device."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.models.resnet import ResnetBlock2D

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        unet.set_attn_processor(AttnProcessor())  # whose products are counted whatever the fused one is
        x = torch.empty(1, 4, config["sample_size"], config["sample_size"])
        text = torch.empty(1, CONTEXT, config["cross_attention_dim"])
        time_ = torch.zeros(1, dtype=torch.long)
    sizes: dict[str, int] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _given: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            sizes[name] = out.numel()

        return keep

    for name, module in unet.named_modules():
        module.register_forward_hook(hook(name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, time_, text)
    counts = {k.partition(".")[2]: sum(v.values()) for k, v in counter.get_flop_counts().items() if "." in k}
    blocks = [n for n, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)]
    resnets = [n for n, m in unet.named_modules() if isinstance(m, ResnetBlock2D)]
    return Counted(
        weights=sum(p.numel() for p in unet.parameters()),
        split=sum(p.numel() for n in blocks for p in unet.get_submodule(n).parameters() if p.ndim == 2),
        filters=sum(p.numel() for n in resnets for p in unet.get_submodule(n).parameters() if p.ndim == 4),
        flops=3 * counter.get_total_flops(),
        of_blocks=3 * sum(counts[n] for n in blocks),
        of_resnets=3 * sum(counts[n] for n in resnets),
        blocks=sum(sizes[n] for n in blocks),
        resnets=sum(sizes[n] for n in resnets),
        units=tuple(_units(unet, counts, sizes)),
    )


def _units(unet: Any, counts: dict[str, int], sizes: dict[str, int]) -> list[Unit]:
    """Residual block and attention together, in the order in which they run."""
    found: list[Unit] = []
    waiting = [sizes["conv_in"]]  # skips, the last of which is taken first
    found.append(Unit("conv_in", counts.get("conv_in", 0), sizes["conv_in"] + sum(waiting)))

    def layer(block: Any, name: str, j: int) -> tuple[int, int]:
        flops, size = counts[f"{name}.resnets.{j}"], sizes[f"{name}.resnets.{j}"]
        if getattr(block, "attentions", None):
            flops += counts[f"{name}.attentions.{j}"]
        return flops, size

    for i, block in enumerate(unet.down_blocks):
        name = f"down_blocks.{i}"
        for j in range(len(block.resnets)):
            flops, size = layer(block, name, j)
            waiting.append(size)
            found.append(Unit(f"{name}.{j}", flops, size + sum(waiting)))
        if block.downsamplers:
            size = sizes[f"{name}.downsamplers.0"]
            waiting.append(size)
            found.append(Unit(f"{name}.down", counts[f"{name}.downsamplers.0"], size + sum(waiting)))
    found.append(Unit("mid_block", counts["mid_block"], sizes["mid_block"] + sum(waiting)))
    for i, block in enumerate(unet.up_blocks):
        name = f"up_blocks.{i}"
        for j in range(len(block.resnets)):
            flops, size = layer(block, name, j)
            waiting.pop()
            found.append(Unit(f"{name}.{j}", flops, size + sum(waiting)))
        if block.upsamplers:
            size = sizes[f"{name}.upsamplers.0"]
            found.append(Unit(f"{name}.up", counts[f"{name}.upsamplers.0"], size + sum(waiting)))
    return found


# ---- the arithmetic: share of the GPUs' time that is arithmetic of use -------------------------------------


def seconds(c: Counted) -> float:
    """Of arithmetic a step, where each GPU has BATCH images."""
    return BATCH * c.flops / RATE


def data_parallel(c: Counted, link: Link, micro_batches: int = 1) -> float:
    """ZeRO 0 to 2: gradients are summed in float32 and, from 1 on, the new float32 weights gathered, as many bytes;
    once a step, however many micro-batches of BATCH images it has."""
    work = micro_batches * seconds(c)
    return work / (work + summed(c.weights, GPUS, link))


def summed(weights: float, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce of float32 values over `ranks`."""
    return 2 * (ranks - 1) / ranks * 4 * weights / link.summed


def zero_3(c: Counted, link: Link) -> float:
    """Float32 weights gathered forward and backward, and gradients reduced."""
    return seconds(c) / (seconds(c) + 1.5 * summed(c.weights, GPUS, link))


def tensor_parallel(c: Counted, link: Link, ranks: int, convolutions: bool = False) -> float:
    """Groups of `ranks` GPUs, each with the images of them all, split attention and feed-forward (Megatron: Shoeybi et
    al. 2019, arXiv:1909.08053): three sums of a block's output forward and three backward, in 16 bits; the rest is done
    by each. convolutions: the residual blocks' too, by channels, with one sum each way; its norms' groups must divide.
    Data parallelism over the groups comes on top."""
    part = c.of_blocks + (c.of_resnets if convolutions else 0)
    values = 6 * c.blocks + (2 * c.resnets if convolutions else 0)
    weights = c.split + (c.filters if convolutions else 0)
    images = ranks * BATCH
    work = images * (c.flops - part + part / ranks) / RATE
    sums = 2 * (ranks - 1) / ranks * 2 * values * images / link.own
    return seconds(c) / (work + sums + summed(c.weights - weights + weights / ranks, GPUS // ranks, link))


def pipeline(c: Counted, link: Link, stages: int, micro_batches: int = 8) -> tuple[float, float]:
    """(share of useful arithmetic, largest stage's share of the FLOPs). The UNet in `stages` runs of whole layers, as
    even as they can be; 1F1B or GPipe, whose bubble is (S - 1) / (m + S - 1). What is passed forward, with all skips
    that wait, and as much backward, is in 16 bits. A group's GPUs have the images of them all; data parallelism over
    the groups comes on top."""
    ends = even([u.flops for u in c.units], stages)
    flops = [sum(u.flops for u in c.units[a:b]) for a, b in zip([0, *ends], [*ends, len(c.units)], strict=True)]
    largest = max(flops) / sum(flops)
    passed = max(c.units[e - 1].passed for e in ends) * 2 * 2
    images = stages * BATCH
    a_micro = images / micro_batches * (c.flops * largest / RATE + passed / link.own)
    work = a_micro * (micro_batches + stages - 1)
    return seconds(c) / (work + summed(c.weights / stages, GPUS // stages, link)), largest


def even(flops: list[int], stages: int) -> list[int]:
    """Where to cut a row of layers so that its largest run is the smallest that there is."""
    best: dict[tuple[int, int], tuple[int, list[int]]] = {}
    ends = [0]
    for f in flops:
        ends.append(ends[-1] + f)
    for n in range(1, len(flops) + 1):
        best[1, n] = (ends[n], [])
        for s in range(2, min(stages, n) + 1):
            best[s, n] = min(
                (max(best[s - 1, k][0], ends[n] - ends[k]), [*best[s - 1, k][1], k]) for k in range(s - 1, n)
            )
    return best[stages, len(flops)][1]


def kept(weights: int, zero_stage: int, gpus: int) -> int:
    """Bytes that a GPU keeps between steps."""
    return memory(weights, 0, TrainConfig(zero_stage=zero_stage), gpus)[0]


def largest_model(zero_stage: int, gpus: int) -> float:
    """Weights of the largest model that fits, with nothing left for activations."""
    low, high = 0, 10**12
    while high - low > 10**6:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle, zero_stage, gpus) <= AVAILABLE else (low, middle)
    return float(low)


def bench_counts() -> None:
    """The tables of docs/parallelism.md."""
    counted = {name: count(config) for name, config in UNETS.items()}
    print(f"\n{GPUS} GPUs, {BATCH} images of 512 px a GPU, {RATE / 1e12:.0f} TFLOP/s a GPU")
    print("\n| UNet | weights | GFLOP an image | in transformer blocks | in residual blocks | arithmetic a step |")
    print("| --- " * 6 + "|")
    for name, c in counted.items():
        print(
            f"| {name} | {c.weights / 1e9:.2f} billion | {c.flops / 1e9:,.0f} | {c.of_blocks / c.flops:.0%} | "
            f"{c.of_resnets / c.flops:.0%} | {seconds(c):.2f} s |"
        )
    for where, link in LINKS.items():
        print(f"\n{where}:\n")
        print(
            "| UNet | data, ZeRO 0-2 | the same, 4 micro-batches | ZeRO 3 | tensor, 2 | 8 | with convolutions, 2 | 8 "
            "| pipeline, 2 | 8 |"
        )
        print("| --- " * 10 + "|")
        for name, c in counted.items():
            values = [data_parallel(c, link), data_parallel(c, link, 4), zero_3(c, link)]
            values += [tensor_parallel(c, link, t, conv) for conv in (False, True) for t in (2, 8)]
            values += [pipeline(c, link, s)[0] for s in (2, 8)]
            print(f"| {name} | " + " | ".join(f"{v:.0%}" for v in values) + " |")
    print(
        "\n| UNet | a GPU sends by data parallelism | by tensor parallelism, 2 | passed between 2 stages "
        "| largest of 2, of 8 stages | kept, ZeRO 1 | ZeRO 3 |"
    )
    print("| --- " * 7 + "|")
    for name, c in counted.items():
        shares = [pipeline(c, LINKS["NVLink"], s)[1] for s in (2, 8)]
        cut = even([u.flops for u in c.units], 2)[0]
        print(
            f"| {name} | {7 / 4 * 4 * c.weights / 1e9:.1f} GB | {6 * c.blocks * 2 * 2 * BATCH / 1e9:.1f} GB | "
            f"{4 * c.units[cut - 1].passed * 2 * BATCH / 1e9:.1f} GB | {shares[0]:.0%}, {shares[1]:.0%} | "
            f"{kept(c.weights, 1, GPUS) / GIB:.1f} GiB | {kept(c.weights, 3, GPUS) / GIB:.1f} GiB |"
        )
    print(
        f"\nthe most weights that fit {GPUS} GPUs of 80 GB, without activations: "
        + ", ".join(f"ZeRO {s} {largest_model(s, GPUS) / 1e9:.1f} billion" for s in (0, 1, 2, 3))
    )


# ---- two ranks here ------------------------------------------------------------------------------------------

HERE = {
    "sample_size": 16,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,  # the number of heads, as diffusers has it
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
}


def split(unet: Any, mesh: Any) -> list[nn.Module]:
    """Split the attention and feed-forward of every transformer block over a mesh, in place; returns the blocks."""
    from diffusers.models.attention import BasicTransformerBlock
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {}
    for attention in ("attn1", "attn2"):
        plan |= {f"{attention}.{n}": ColwiseParallel() for n in ("to_q", "to_k", "to_v")}
        plan[f"{attention}.to_out.0"] = RowwiseParallel()
    plan |= {"ff.net.0.proj": ColwiseParallel(), "ff.net.2": RowwiseParallel()}
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    for block in blocks:
        proj = block.ff.net[0].proj
        order = gated_rows(proj.out_features, mesh.size())
        with torch.no_grad():
            proj.weight.copy_(proj.weight[order])
            proj.bias.copy_(proj.bias[order])
        parallelize_module(block, mesh, plan)
        for attention in (block.attn1, block.attn2):
            attention.heads //= mesh.size()
    return blocks


def gated_rows(rows: int, ranks: int) -> torch.Tensor:
    """The rows of a GEGLU's projection, values and behind them gates, so that each rank's part has both of its own."""
    return torch.arange(rows).view(2, ranks, -1).transpose(0, 1).reshape(-1)


def on_two_ranks(rank: int, port: int, turns: int, batch: int, out: Any) -> None:
    """Compare and time, in a process of its own."""
    from diffusers import UNet2DConditionModel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = UNet2DConditionModel(**HERE)
    shared, halved = copy.deepcopy(whole), copy.deepcopy(whole)
    blocks = split(shared, mesh)
    x, text = torch.randn(batch, 4, 16, 16), torch.randn(batch, CONTEXT, 64)
    t, target = torch.arange(batch) * 100, torch.randn(batch, 4, 16, 16)

    def step(unet: Any, part: slice = slice(None)) -> torch.Tensor:
        unet.zero_grad()
        found = (unet(x[part], t[part], text[part]).sample - target[part]).square().mean()
        found.backward()
        return found

    loss = float(step(whole).detach())
    with CommDebugMode() as collectives:
        other = float(step(shared).detach())
    plain, farthest = dict(whole.named_parameters()), 0.0
    for name, p in shared.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        expected = plain[name].grad
        if name.endswith(("ff.net.0.proj.weight", "ff.net.0.proj.bias")):
            expected = expected[gated_rows(len(expected), 2)]
        farthest = max(farthest, float((grad - expected).abs().max() / (expected.abs().max() + 1e-8)))

    def shared_batch() -> None:
        step(halved, slice(rank, None, 2))
        torch.distributed.all_reduce(torch.cat([p.grad.view(-1) for p in halved.parameters()]))  # in one bucket

    times: dict[str, list[float]] = {"tensor": [], "data": []}
    for _ in range(turns):
        for name, run in (("tensor", lambda: step(shared)), ("data", shared_batch)):
            torch.distributed.barrier()
            began = time.perf_counter()
            run()
            torch.distributed.barrier()
            times[name].append(time.perf_counter() - began)
    if rank == 0:
        ratios = [a / b for a, b in zip(times["data"], times["tensor"], strict=True)]
        out.put(
            {
                "loss": (loss, other),
                "gradients": farthest,
                "blocks": len(blocks),
                "collectives": sum(collectives.get_comm_counts().values()),
                "ratios": ratios,
                "seconds": {n: statistics.median(v) for n, v in times.items() if v},
            }
        )
    torch.distributed.destroy_process_group()


def measure(turns: int, batch: int = 8) -> dict[str, Any]:
    """What two ranks here find."""
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = context.SimpleQueue()
    ranks = [context.Process(target=on_two_ranks, args=(r, port, turns, batch, out)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError("a rank failed; see above")
    found: dict[str, Any] = out.get()
    return found


def bench_measure(turns: int) -> None:
    """Exactness, collectives and time of tensor parallelism on two ranks here."""
    found = measure(turns)
    print(
        f"\nloss {found['loss'][0]:.7f} on one rank, {found['loss'][1]:.7f} on two; farthest gradient "
        f"{found['gradients']:.1e} of its tensor's largest; {found['collectives']} collectives a step of "
        f"{found['blocks']} transformer blocks"
    )
    low, *_, high = sorted(found["ratios"])
    print(
        f"a step takes {found['seconds']['tensor']:.3f} s, where two ranks that share the batch take "
        f"{found['seconds']['data']:.3f} s: {statistics.median(found['ratios']):.2f} of their speed "
        f"[{low:.2f}, {high:.2f}], {len(found['ratios'])} pairs"
    )


def bench_rows() -> None:
    """Of Stable Diffusion 2's and SDXL's UNet, what the fullest rank keeps over an even share."""
    from diffusers import UNet2DConditionModel

    from benchmarks.gpu.models import SD2, SDXL

    for name, config in (("SD 2", SD2), ("SDXL", SDXL)):
        with torch.device("meta"):
            shapes = [tuple(p.shape) for p in UNet2DConditionModel(**config).parameters()]
        total = sum(math.prod(s) for s in shapes)
        for ranks in (8, 64, 512):
            share = [-(-s[0] // ranks) for s in shapes]  # rows of the first rank, which has the most
            fullest = sum(n * math.prod(s[1:]) for n, s in zip(share, shapes, strict=True)) * ranks / total
            short = sum(-(-s[0] // n) < ranks for n, s in zip(share, shapes, strict=True))
            print(
                f"{name} on {ranks} ranks: {fullest:.2f}; {short} of {len(shapes)} parameters leave ranks without any"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["counts", "measure"])
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    for name in given.what:
        {"counts": bench_counts, "measure": lambda: bench_measure(given.turns), "rows": bench_rows}[name]()


if __name__ == "__main__":
    main()
