"""Pictures fitted to squares and buckets, against Pillow."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latents.resize import fit_cover, prefetch, resize_crop


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([8, 32, 256]))
def test_the_crop_lies_in_the_scaled_picture_and_in_its_middle(width, height, side):
    fit = fit_cover(width, height, side, side)
    assert min(fit.scaled_width, fit.scaled_height) == side
    for scaled, crop, original in ((fit.scaled_width, fit.crop_left, width), (fit.scaled_height, fit.crop_top, height)):
        assert 0 <= crop <= scaled - side
        assert abs((scaled - side - crop) - crop) <= 1
        assert abs(scaled - original * side / min(width, height)) <= 0.5 + 1e-9 or scaled == side


def test_a_picture_of_the_right_size_is_left_alone(rng):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    same, fit = resize_crop(pixels, 16)
    assert (same == pixels).all()
    assert (fit.crop_left, fit.crop_top) == (0, 0)


def test_resizing_is_antialiased(rng):
    # One-pixel stripes averaged away, where point sampling would keep them or alias.
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, ::2] = 255
    small, fit = resize_crop(pixels, 16)
    assert small.shape == (16, 16, 3)
    assert fit == fit_cover(128, 64, 16, 16)
    assert np.abs(small.astype(int) - 127).max() <= 2
    noise = rng.integers(0, 256, (40, 64, 3), np.uint8)
    whole = np.asarray(Image.fromarray(noise).resize((51, 32), Image.Resampling.LANCZOS))
    assert (resize_crop(noise, 32)[0] == whole[:, 9:41]).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_ahead_keeps_the_order_and_the_window(threads):
    running, most, done = 0, 0, 0
    lock = threading.Lock()

    def load(i: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running - done)
        time.sleep(0.002 * ((i * 7) % 3))
        return i * i

    found = []
    for value in prefetch(load, 20, threads, window=4):
        with lock:
            done += 1
        found.append(value)
    assert found == [i * i for i in range(20)]
    assert most <= 4


def test_ahead_raises_at_the_item():
    def load(i: int) -> int:
        if i == 3:
            raise OSError("gone")
        return i

    items = prefetch(load, 10, 2, window=4)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(items)


@pytest.mark.parametrize(("width", "height"), [(4000, 1), (1, 4000), (3000, 2)])
def test_a_strip_is_scaled_no_further_than_it_is_kept(width, height, monkeypatch):
    across = np.linspace(0, 255, width)[None, :, None]
    pixels = np.broadcast_to(
        across if width > height else np.linspace(0, 255, height)[:, None, None], (height, width, 3)
    )
    pixels = np.ascontiguousarray(pixels.astype(np.uint8))
    whole, fit = resize_crop(pixels, 32)
    monkeypatch.setattr("latents.resize.MAX_SCALED", 0)
    calls: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: calls.append(size) or resize(self, size, *a))
    cut, same = resize_crop(pixels, 32)
    assert calls == [(32, 32)]
    assert same == fit
    assert np.abs(cut.astype(int) - whole).max() <= 1
