"""Measures of pixels against what was drawn, and against other libraries."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from curate import pixels


def noise(rng: np.random.Generator, side: int = 200) -> np.ndarray:
    coarse = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def test_sharpness_falls_with_blur_and_knows_no_size(rng: np.random.Generator) -> None:
    image = Image.fromarray(noise(rng, 1024))
    values = [
        pixels.sharpness(pixels.grey(np.asarray(image.filter(ImageFilter.GaussianBlur(r))))) for r in (0, 2, 4, 8)
    ]
    assert values == sorted(values, reverse=True)
    twice = np.asarray(image.resize((2048, 2048), Image.Resampling.BICUBIC))
    assert pixels.sharpness(pixels.grey(twice)) == pytest.approx(values[0], rel=0.25)


def test_sharpness_is_opencvs_variance_of_the_laplacian(rng: np.random.Generator) -> None:
    cv2 = pytest.importorskip("cv2")
    grey = pixels.grey(noise(rng))
    assert pixels.sharpness(grey) == pytest.approx(
        cv2.Laplacian(grey, cv2.CV_32F, borderType=cv2.BORDER_REFLECT).var(), rel=1e-4
    )


def test_entropy_of_known_distributions() -> None:
    assert pixels.entropy(np.full((8, 8), 7.0)) == 0
    assert pixels.entropy(np.arange(256, dtype=np.float32).reshape(16, 16)) == pytest.approx(8)
    assert pixels.entropy(np.array([[0.0, 0.0, 255.0, 255.0]])) == pytest.approx(1)


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 90, 95])
def test_jpeg_quality_is_what_the_encoder_was_told(rng: np.random.Generator, quality: int) -> None:
    sink = io.BytesIO()
    Image.fromarray(noise(rng)).save(sink, "JPEG", quality=quality)
    assert pixels.jpeg_quality(sink.getvalue()) == pytest.approx(quality, abs=1.5)


def test_other_formats_have_no_jpeg_quality(rng: np.random.Generator) -> None:
    sink = io.BytesIO()
    Image.fromarray(noise(rng)).save(sink, "PNG")
    assert np.isnan(pixels.jpeg_quality(sink.getvalue()))
    assert np.isnan(pixels.jpeg_quality(b"\xff\xd8\xff no picture"))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (30, 0), (25, 40)])
def test_border_is_the_share_of_the_frame(rng: np.random.Generator, top: int, left: int) -> None:
    picture = noise(rng)
    if top:
        picture[:top] = picture[-top:] = 0
    if left:
        picture[:, :left] = picture[:, -left:] = 0
    inner = (200 - 2 * top) * (200 - 2 * left) / 200**2
    assert pixels.border(pixels.grey(picture)) == pytest.approx(1 - inner, abs=0.03)


def test_a_blank_picture_is_all_border() -> None:
    assert pixels.border(np.full((50, 70), 200.0)) == 1


def test_text_is_found_and_pictures_without_it_are_free_of_it(rng: np.random.Generator) -> None:
    clean = noise(rng, 400)
    image = Image.fromarray(clean)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(28)
    for line in range(4):
        draw.rectangle((20, 40 + 80 * line, 380, 80 + 80 * line), fill="black")
        draw.text((26, 43 + 80 * line), "LIMITED OFFER BUY NOW", fill="white", font=font)
    written = pixels.text_free(pixels.grey(np.asarray(image)))
    assert pixels.text_free(pixels.grey(clean)) == 1
    assert written < 0.9


def test_tiny_and_thin_pictures_are_measured() -> None:
    for shape in ((1, 1, 3), (1, 500, 3), (500, 2, 3)):
        values = pixels.measure(b"", np.zeros(shape, np.uint8))
        assert len(values) == len(pixels.COLUMNS)
        assert values[3] == 1
