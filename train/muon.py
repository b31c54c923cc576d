"""Muon over a rank's pieces of parameters: state is element by element, the direction alone needs whole matrices.

Momentum, Nesterov's blend, decay and averages are elementwise, so they live in the flat arrays that DeepSpeed gives
this rank, like AdamW's. What is not is Newton-Schulz: for it each matrix has one owner among the ranks, chosen once so
that all have about the same work; one all-to-all brings the owners their matrices, one takes the directions back. The
same for ZeRO 0 to 3, and a checkpoint has one named state less for these matrices than for AdamW's.

Jordan 2024, https://kellerjordan.github.io/posts/muon; 0.2 sqrt(max(rows, columns)) gives updates the size of AdamW's,
so that learning rate and decay keep their meaning (Liu et al. 2025, arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from train.optimizer import AdamW, is_hidden

if TYPE_CHECKING:
    from train.engine import Piece

BETA = 0.95


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A filter [out, in, h, w] as a matrix: (out, in h w)."""
    return shape[0], torch.Size(shape[1:]).numel()


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz's quintic iteration: float [..., m, n] -> the same with singular values all about 1.

    Of long matrices the iteration runs on the Gram matrix x x^T of the shorter side alone, a third of the work: each
    step multiplies x by a polynomial p of it, after which it is p^2 x x^T, and the product of all p is applied to x
    once. That needs all of float32: what a coarser format (TF32) rounds would grow by a factor of 12 a step.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315

    def polynomial(gram: torch.Tensor) -> torch.Tensor:
        p = b * gram + c * gram @ gram
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        return p

    if x.size(-1) >= 2 * x.size(-2) and torch.get_float32_matmul_precision() == "highest":
        gram = x @ x.mT
        whole = p = polynomial(gram)
        for _ in range(4):
            gram = p @ gram @ p
            p = polynomial(gram)
            whole = p @ whole
        x = whole @ x
    else:
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def direction(matrices: torch.Tensor) -> torch.Tensor:
    """Momentum [n, rows, columns] -> what the learning rate is multiplied with; root mean square about 0.2."""
    return orthogonalise(matrices) * (0.2 * max(matrices.shape[1:]) ** 0.5)


def work(shape: Sequence[int]) -> int:
    """Multiplications of Newton-Schulz, up to a factor."""
    short, long = sorted(as_matrix(shape))
    return short * short * (2 * long + short)


class Muon(AdamW):
    """The group with "muon" is updated by Muon, the others by AdamW. DeepSpeed must leave that group in one piece."""

    def begin(self, flats: Sequence[torch.Tensor], pieces: Sequence[Piece], replicated: bool) -> None:
        """As AdamW's; and who owns which matrix."""
        super().begin(flats, pieces, replicated)
        self._mine = [p for p in pieces if is_hidden(p.name, p.shape)]
        self._number = {flat: i for i, flat in enumerate(flats)}
        for i in {p.flat for p in self._mine}:
            del self.state[flats[i]]["exp_avg_sq"]
        self._all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self._all, [(p.name, p.shape, p.offset, p.length) for p in self._mine])
        rank_of: dict[str, int] = {}
        self.loads = [0] * len(self._all)
        for name, shape in sorted({p[:2] for rank in self._all for p in rank}, key=lambda x: (-work(x[1]), x[0])):
            rank_of[name] = self.loads.index(min(self.loads))
            self.loads[rank_of[name]] += work(shape)
        # Which of rank r's pieces go to owner d, and come back; without ZeRO all have all, and owners need nobody's.
        ranks = range(len(self._all))
        self._back = [[[i for i, p in enumerate(self._all[r]) if rank_of[p[0]] == d] for d in ranks] for r in ranks]
        self._there = [[to if not replicated or r == d else [] for d, to in enumerate(self._back[r])] for r in ranks]

    def update(self, group: dict[str, Any], live: list[torch.Tensor]) -> None:
        """Muon or AdamW of these arrays."""
        if not group.get("muon"):
            super().update(group, live)
            return
        gradients = [p.grad / self.scale for p in live if p.grad is not None]
        moved = [torch.lerp(self.state[p]["exp_avg"], g, 1 - BETA) for p, g in zip(live, gradients, strict=True)]
        blend = {
            self._number[p]: torch.lerp(g, m, BETA).view(-1) for p, g, m in zip(live, gradients, moved, strict=True)
        }
        along = {i: torch.zeros_like(b) for i, b in blend.items()}
        values = [blend[p.flat].narrow(0, p.start, p.length) for p in self._mine]
        for p, found in zip(self._mine, self._directions(values, gradients[0]), strict=True):
            along[p.flat].narrow(0, p.start, p.length).copy_(found)
        applied = self.veto == 0
        for flat, m in zip(live, moved, strict=True):
            # Chosen, not multiplied by 0: a vetoed gradient may not be finite.
            step = group["lr"] * along[self._number[flat]].view_as(flat)
            after = flat.data * (1 - group["lr"] * group["weight_decay"]) - step
            flat.data.copy_(torch.where(applied, after, flat.data))
            self.state[flat]["exp_avg"].copy_(torch.where(applied, m, self.state[flat]["exp_avg"]))
            self.state[flat]["step"] += applied

    def _directions(self, values: list[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
        """The directions of this rank's pieces, by way of the matrices' owners. Collective."""
        me, every = dist.get_rank(), self._all
        theirs = [[every[r][i] for i in to[me]] for r, to in enumerate(self._there)]
        given = [[values[i] for i in to] for to in self._there[me]]
        got = _exchange(given, [[p[3] for p in rank] for rank in theirs], like.view(-1))
        whole: dict[str, torch.Tensor] = {}
        for (name, shape, offset, length), part in zip((p for rank in theirs for p in rank), got, strict=True):
            if name not in whole:
                whole[name] = part.new_empty(as_matrix(shape))
            whole[name].view(-1)[offset : offset + length] = part
        alike: dict[torch.Size, list[str]] = {}
        for name, matrix in whole.items():  # those of one shape go through together
            alike.setdefault(matrix.shape, []).append(name)
        for names in alike.values():
            stacked = direction(torch.stack([whole[n] for n in names]))
            whole |= {n: d.reshape(-1) for n, d in zip(names, stacked, strict=True)}
        asked = [[every[r][i] for i in to[me]] for r, to in enumerate(self._back)]
        given = [[whole[n][offset : offset + length] for n, _, offset, length in rank] for rank in asked]
        got = _exchange(given, [[every[me][i][3] for i in to] for to in self._back[me]], like.view(-1))
        order = (i for to in self._back[me] for i in to)
        return [part for _, part in sorted(zip(order, got, strict=True), key=lambda x: x[0])]


def _exchange(send: list[list[torch.Tensor]], receive: list[list[int]], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Give rank d the flat tensors send[d]; returns those that came, of the lengths receive[r], rank after rank."""
    flat = torch.cat([t for to in send for t in to] or [like[:0]])
    got = flat.new_empty(sum(map(sum, receive)))
    dist.all_to_all_single(got, flat, [sum(r) for r in receive], [sum(map(len, to)) for to in send])
    return got.split([n for rank in receive for n in rank])
