"""Arithmetic that gives the same bits on any worker: a fixed number of threads, and cuDNN's choices fixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def fixed_arithmetic(threads: int) -> Iterator[None]:
    """Fix what a result's bits depend on besides the input (threads, cuDNN's choices), and put it back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)
