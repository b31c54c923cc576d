"""From fetched bytes to the stored image: judged by its header, decoded, upright, sRGB, resized, encoded.

Dimensions are read from the header and checked before a decoder allocates anything. What comes out has
always three channels of 8 bits: EXIF orientation applied, ICC profiles and CMYK taken to sRGB, 16 bits
scaled (v / 257), transparency laid on a stated ground, and of an animation the first frame (or it is
refused, if so configured). The same bytes in give the same bytes out.

Pillow judges and decodes; for the two steps that cost the most there are quicker hands with the same pixels:
libjpeg-turbo itself (simplejpeg) for whole JPEGs, and fast_image_resize (cykooz.resizer), which is Pillow's
resize in SIMD: across first, then down, as Pillow does it, it gives the same pixels within a level.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import struct
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import cykooz_resizer as fir
import numpy as np
import simplejpeg
import xxhash
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from ingest.config import Animations, EncodeFormat, Filter, Reencode, ResizeMode
from ingest.errors import Rejected
from ingest.headers import JPEG_SCAN, PNG, header_size, jpeg_header

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what shards may hold
_FILTERS = {name: Image.Resampling[name.upper()] for name in get_args(Filter)}
_QUICK_FILTERS: dict[Filter, fir.FilterType] = {
    "lanczos": fir.FilterType.lanczos3,
    "bicubic": fir.FilterType.catmull_rom,
}
_MARGIN: dict[Filter, float] = {"lanczos": 2.0, "bicubic": 4 / 3}  # how much larger a JPEG is decoded at least
_MAY_MOVE = ("GIF", "PNG", "WEBP", "AVIF")  # the further pages of a TIFF or MPO are other images
LARGEST_PROFILE = 4 << 20
LARGEST_JPEG = 1 << 29  # pixels that simplejpeg can count the bytes of
# What is decoded on the event loop: 20 ms at most, by the file, the image in it, and what is in front of the image.
QUICK_BYTES, QUICK_PIXELS, QUICK_WORK, QUICK_BEFORE = 2 << 20, 1 << 20, 1 << 21, 1 << 16
QUICK_STORED, LIGHT_STORED = 1 << 19, 1 << 21  # pixels of the image that is stored
LONGEST_SIDE: dict[EncodeFormat, int] = {"jpg": 65_500, "webp": 16_383, "png": (1 << 31) - 1}  # that a file can hold
SMALL = 1 << 14  # pixels up to which Pillow resizes: a third of a millisecond at most

MOST_SCANS = 500  # of a JPEG: each goes over the whole image, and may take a hundred bytes
MOST_WORK = 1_500_000_000  # pixels times scans: some two seconds
_BAND = 1 << 20  # pixels that are brought to RGB at a time
_JPEG_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_JPEG_END = b"\xff\xd9"
# libjpeg's words for image data that is missing or senseless. It goes on with grey, and Pillow with it.
_JPEG_LOSSES = ("remature end", "bad Huffman code", "bad arithmetic code", "instead of RST")

# Pillow's remarks on large or odd images; what is wrong with an image is judged here. (At import, since the
# filters are the whole process's: to set them for a call would not be safe in several threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")

Image.init()
_OPENABLE = tuple(f for f in FORMATS if f in Image.OPEN)


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How images are stored; see IngestConfig for the fields."""

    image_size: int
    resize_mode: ResizeMode
    only_if_bigger: bool
    encode_format: EncodeFormat
    quality: int
    background: tuple[int, int, int]
    max_pixels: int
    animations: Animations = "first_frame"
    reencode: Reencode = "always"
    downscale_filter: Filter = "bicubic"


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """A stored image. Sizes in pixels; the original ones as seen upright. exif: JSON of its plain tags.

    pixel_hash: XXH3 (128 bits) of width, height and RGB bytes before encoding. phash: see `perceptual_hash`.
    """

    data: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str
    pixel_hash: str
    phash: str


class Decoded(NamedTuple):
    """An upright RGB image, uint8 [H,W,3], its EXIF as JSON, its upright size (width, height) as fetched.

    kept_as: the extension under which the fetched bytes can be stored as they are, None where the pixels
    had to be changed to be upright sRGB.
    """

    pixels: np.ndarray
    exif: str
    size: tuple[int, int]
    kept_as: str | None


def process(data: bytes, settings: PixelSettings) -> EncodedImage:
    """Fetched bytes to an Image; raises Rejected (not_an_image, image_*, animation_refused)."""
    decoded = decode(data, settings)
    pixels = resize(decoded.pixels, settings)
    height, width = pixels.shape[:2]
    untouched = pixels is decoded.pixels and (width, height) == decoded.size
    if settings.reencode == "needed" and decoded.kept_as and untouched:
        stored, extension = data, decoded.kept_as
    else:
        stored, extension = encode(pixels, settings), settings.encode_format
    return EncodedImage(stored, extension, width, height, *decoded.size, decoded.exif, *hashes(pixels))


def hashes(pixels: np.ndarray) -> tuple[str, str]:
    """pixel_hash and phash of an RGB image, uint8 [H,W,3]."""
    digest = xxhash.xxh3_128(struct.pack("<II", pixels.shape[1], pixels.shape[0]))
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest(), perceptual_hash(Image.fromarray(pixels))


def decode(data: bytes, settings: PixelSettings) -> Decoded:
    """Decode fetched bytes; raises Rejected.

    A JPEG much larger than what is stored may come out at a half, quarter or eighth of its size.
    """
    try:
        return _decode(data, settings)
    except Rejected as e:
        rejected = e
    # What browsers show: a PNG with damaged or overlong texts, or with such a profile, is whole all the same.
    if data.startswith(PNG) and rejected.code in ("not_an_image", "image_corrupt"):
        for kept in (_PNG_RENDERED | {b"iCCP"}, _PNG_RENDERED):
            with contextlib.suppress(Rejected):
                return _decode(_png_chunks(data, kept), settings)._replace(kept_as=None)
    raise rejected


def _decode(data: bytes, settings: PixelSettings) -> Decoded:
    size = header_size(data)
    if size is not None:
        _check_size(size, settings.max_pixels)
    jpeg = jpeg_header(data)
    if jpeg is not None:
        if jpeg.scans > MOST_SCANS:
            raise Rejected("image_corrupt", f"more than {MOST_SCANS} scans")
        if jpeg.scans * jpeg.width * jpeg.height > MOST_WORK:
            raise Rejected("image_too_large", f"{jpeg.scans} scans of {jpeg.width}x{jpeg.height} pixels")
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses twice that by itself
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, settings.max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=_OPENABLE)
        original = image.size
        _check_size(original, settings.max_pixels)
        if image.format == "TIFF":
            _check_tiles(image, settings.max_pixels)
        if image.format in _MAY_MOVE and settings.animations == "refuse" and getattr(image, "is_animated", False):
            raise Rejected("animation_refused")
        pixels = _jpeg_pixels(data, image, settings)
        if pixels is None:
            image.decodermaxblock = max(len(data), 1 << 16)  # in one go, as all of it is here
            image.load()
        # Only now, since Pillow loads a PNG to find its EXIF block, and a failure in there would be taken
        # for a damaged block.
        orientation, tags = _exif(image)
        profile = image.info.get("icc_profile")
        kept_as = _kept_as(image, data, orientation, profile) if settings.reencode == "needed" else None
        if pixels is None:
            if image.format == "PNG":
                _mend_colour_key(image, data[24])
            pixels = _rgb_pixels(image, settings.background, profile)
            original = (pixels.shape[1], pixels.shape[0])
            if image.format == "TIFF":  # turned already: Pillow does that while it loads
                orientation = 1
        elif profile and _changes(profile, "RGB"):
            pixels = _rgb_pixels(Image.fromarray(pixels), settings.background, profile)
    except (Rejected, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Rejected("not_an_image") from None
    except Image.DecompressionBombError:
        raise Rejected("image_too_large", f"more than {settings.max_pixels} pixels") from None
    except Exception as e:  # decoders of hostile bytes raise anything: struct.error, SyntaxError, KeyError, ...
        if "truncated" in str(e).lower() or isinstance(e, EOFError):
            raise Rejected("image_truncated") from None
        raise Rejected("image_corrupt", f"the image cannot be decoded ({type(e).__name__})") from None
    if orientation in _TURNS:
        pixels = np.ascontiguousarray(_TURNS[orientation](pixels))
    return Decoded(pixels, tags, (original[1], original[0]) if orientation in (5, 6, 7, 8) else original, kept_as)


def _jpeg_pixels(data: bytes, image: Image.Image, settings: PixelSettings) -> np.ndarray | None:
    """A faultless grey or colour JPEG as RGB, uint8 [H,W,3]; None for all others, which Pillow decodes and judges.

    libjpeg decodes at a half, quarter or eighth where the image stays larger than what is stored by the
    filter's margin, so that the filter still has what it needs; the DCT does the rest of the averaging.
    """
    if image.format not in ("JPEG", "MPO") or math.prod(image.size) > LARGEST_JPEG:
        return None
    if image.mode not in _JPEG_SPACES:
        return None
    wanted, margin = target_size(*image.size, settings), _MARGIN[settings.downscale_filter]
    room = min(have / (margin * want) for have, want in zip(image.size, wanted, strict=True))
    space, part = "RGB", next((f for f in (8, 4, 2) if f <= room), 1)
    if image.mode == "CMYK" or (image.mode == "L" and image.info.get("icc_profile")):
        space, part = _JPEG_SPACES[image.mode], 8  # Pillow's to decode; here it is only seen whether all of it is there
    width, height = (-(-side // part) for side in image.size)
    # Into memory of the size that the header gave, so that no later header can ask for more.
    pixels = np.empty((height, width, {"RGB": 3, "CMYK": 4, "GRAY": 1}[space]), np.uint8)
    complaint = ""
    for ending in (b"", _JPEG_END):  # all that a file lacks may be its last two bytes
        try:
            found = simplejpeg.decode_jpeg(data + ending, space, min_height=height, min_width=width, buffer=pixels)
        except ValueError as e:  # a blemish, be it ever so little
            complaint = str(e)
            if _JPEG_LOSSES[0] not in complaint:
                break
        else:
            return pixels if space == "RGB" and found.shape == pixels.shape else None
    if any(loss in complaint for loss in _JPEG_LOSSES):
        raise Rejected("image_truncated" if _JPEG_LOSSES[0] in complaint else "image_corrupt")
    return None


def _kept_as(image: Image.Image, data: bytes, orientation: int, profile: bytes | None) -> str | None:
    """The extension for bytes that already are an upright still of three 8-bit sRGB channels, None for others."""
    extension = _EXTENSIONS.get(image.format or "")
    if extension is None or image.mode != "RGB" or orientation != 1 or image.has_transparency_data:
        return None
    if getattr(image, "is_animated", False) or (image.format == "PNG" and data[24:25] != b"\x08"):
        return None
    if image.format == "JPEG" and data.rfind(_JPEG_END) < data.rfind(JPEG_SCAN):  # without an end; not all readers cope
        return None
    return None if _changes(profile, image.mode) else extension


# The first 8 rows of the 32-point DCT-II, times 2^14: in integers, so that no machine rounds otherwise.
_DCT = np.rint(2**14 * np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)).astype(np.int64)


def perceptual_hash(image: Image.Image) -> str:
    """64 bits as 16 hex digits that differ in few places between images that look alike.

    pHash as the imagehash library has it (and COYO's image_phash): grey, 32x32 by Lanczos, the 8x8 lowest
    coefficients of the DCT, each compared with their median. (C. Zauner, "Implementation and benchmarking
    of perceptual image hash functions", 2010.) Large images are averaged down to 64 pixels and more
    before, which is quicker and may turn a few bits.
    """
    grey = image.convert("L")
    if (factor := min(image.size) // 64) > 1:
        grey = grey.reduce(factor)
    pixels = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), np.int64)
    low = _DCT @ pixels @ _DCT.T
    lower, upper = np.sort(low, axis=None)[31:33]  # the median of 64 lies between
    return np.packbits(2 * low > lower + upper).tobytes().hex()


_PNG_RENDERED = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"eXIf"}


def _png_chunks(data: bytes, kept: set[bytes]) -> bytes:
    """A PNG with its chunks of some kinds alone."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] in kept:
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def is_quick(data: bytes, settings: PixelSettings | None = None) -> bool:
    """Whether `process` takes some milliseconds: a small JPEG, a small image in it, and a small one out of it.

    Without settings it is only said of the decoding.
    """
    if len(data) > QUICK_BYTES:
        return False
    jpeg = jpeg_header(data)
    if jpeg is None or jpeg.frame > 0xC2 or jpeg.components not in (1, 3) or jpeg.before > QUICK_BEFORE:
        return False
    pixels = jpeg.width * jpeg.height
    if not 0 < pixels <= QUICK_PIXELS or pixels * jpeg.scans > QUICK_WORK:
        return False
    if settings is None:
        return True
    if settings.encode_format != "jpg":
        return False
    scaled = math.prod(target_size(jpeg.width, jpeg.height, settings))
    square = settings.image_size**2 if settings.resize_mode in ("center_crop", "border") else 0
    return max(square, scaled if settings.resize_mode != "center_crop" else 0) <= QUICK_STORED


def is_light(data: bytes, settings: PixelSettings) -> bool:
    """Whether a thread may decode an image beside the event loop: no step of it holds the interpreter for long."""
    jpeg = jpeg_header(data)
    if jpeg is None or jpeg.frame > 0xC2 or jpeg.components not in (1, 3) or jpeg.before > QUICK_BEFORE:
        return False
    return math.prod(target_size(max(jpeg.width, 1), max(jpeg.height, 1), settings)) <= LIGHT_STORED


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles or strips are larger than any image may be: a decoder allocates one whole."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    wide, high = int(tags.get(322, 0) or 0), int(tags.get(323, 0) or 0)
    if wide * high > max(max_pixels, 1 << 20) or int(tags.get(277, 1) or 1) > 8:
        raise Rejected("image_too_large", f"tiles of {wide}x{high} pixels")


def _mend_colour_key(image: Image.Image, bits: int) -> None:
    """Bring the one transparent colour of a PNG (tRNS) from its own bits to the 8 that Pillow decodes to."""
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "L":
        image.info["transparency"] = (key & (2**bits - 1)) * 255 // (2**bits - 1)
    elif isinstance(key, tuple) and bits == 16:
        image.info["transparency"] = tuple(v >> 8 for v in key)


def _rgb_pixels(image: Image.Image, background: tuple[int, int, int], profile: bytes | None) -> np.ndarray:
    """`to_rgb`, uint8 [H,W,3], band by band: the steps of a large image would take several times its memory."""
    width, height = image.size
    rows = max(1, _BAND // max(width, 1))
    if rows >= height:
        return np.array(to_rgb(image, background, profile))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(to_rgb(band, background, profile))
    return pixels


def to_rgb(image: Image.Image, background: tuple[int, int, int], profile: bytes | None = None) -> Image.Image:
    """Any mode that Pillow decodes to RGB, 8 bits, sRGB, on a ground; raises Rejected (image_unsupported)."""
    alpha = None
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise Rejected("image_unsupported", "integers of more than 16 bits")
        if isinstance(key := image.info.get("transparency"), int):
            alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        # (255 v + 32895) >> 16 is v / 257, rounded, for every v of 16 bits; it fits into 32.
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32895) >> 16).astype(np.uint8))
    if image.mode == "F":
        raise Rejected("image_unsupported", "floating point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")  # drops alpha; colours as stored
    if image.mode in ("1", "LA", "La", "P", "PA"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    if profile:
        image = _to_srgb(image, profile)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, background), alpha)
    return image


def target_size(width: int, height: int, settings: PixelSettings) -> tuple[int, int]:
    """The size to which an image is scaled, before any crop or border; its own where it stays as it is.

    img2dataset's rules: center_crop and keep_ratio make the smaller side image_size, border and
    keep_ratio_largest the larger one.
    """
    wanted = settings.image_size
    if settings.resize_mode == "no":
        return width, height
    side = min(width, height) if settings.resize_mode in ("center_crop", "keep_ratio") else max(width, height)
    if settings.only_if_bigger and side <= wanted:
        return width, height
    return max(1, round(width * (wanted / side))), max(1, round(height * (wanted / side)))


def resize(pixels: np.ndarray, settings: PixelSettings) -> np.ndarray:
    """Scale uint8 [H,W,3] with a filter of the right support, then crop or pad as the mode says.

    Raises Rejected (image_too_large) where what is to be stored has more than max_pixels pixels, as of a
    image a pixel wide whose smaller side is to be enlarged.
    """
    wanted = settings.image_size
    had = (pixels.shape[1], pixels.shape[0])
    width, height = target_size(*had, settings)
    unchanged = (width, height) == had
    kernel = settings.downscale_filter if width < had[0] else "lanczos"
    if settings.resize_mode == "no" or (settings.only_if_bigger and unchanged):
        return pixels
    if settings.resize_mode == "center_crop":
        left, top = (width - wanted) // 2, (height - wanted) // 2
        if not unchanged:
            return _scaled(pixels, (width, height), (left, top, left + wanted, top + wanted), kernel)
        return pixels if had == (wanted, wanted) else pixels[top : top + wanted, left : left + wanted]
    if width * height > settings.max_pixels:
        raise Rejected("image_too_large", f"{width}x{height} pixels once scaled")
    if not unchanged:
        pixels = _scaled(pixels, (width, height), (0, 0, width, height), kernel)
    if settings.resize_mode == "border":
        ground = np.empty((wanted, wanted, 3), np.uint8)
        ground[:] = settings.background
        left, top = (wanted - width) // 2, (wanted - height) // 2
        ground[top : top + height, left : left + width] = pixels
        return ground
    return pixels


def _scaled(pixels: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int], kernel: Filter) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of the image scaled to `size` (width, height)."""
    left, top, right, bottom = box
    part = (right - left, bottom - top)
    across, down = pixels.shape[1] / size[0], pixels.shape[0] / size[1]
    if pixels.shape[0] * pixels.shape[1] <= SMALL:
        source = (left * across, top * down, right * across, bottom * down)
        return np.asarray(Image.fromarray(pixels).resize(part, _FILTERS[kernel], source))
    # Across and then down, each rounded to 8 bits, as Pillow does it; in one go the other is first.
    wide = _fir(pixels, (part[0], pixels.shape[0]), kernel, (left * across, 0.0, part[0] * across, pixels.shape[0]))
    return _fir(wide, part, kernel, (0.0, top * down, part[0], part[1] * down))


def _fir(
    pixels: np.ndarray, size: tuple[int, int], kernel: Filter, box: tuple[float, float, float, float]
) -> np.ndarray:
    """The part `box` (left, top, width, height) of uint8 [H,W,3] scaled to `size` (width, height)."""
    height, width = pixels.shape[:2]
    if size == (width, height) and box == (0.0, 0.0, width, height):
        return pixels
    left, top = min(box[0], width), min(box[1], height)  # what was rounded may stick out by a millionth of a pixel
    crop = fir.CropBox(left, top, min(box[2], width - left), min(box[3], height - top))
    options = fir.ResizeOptions(fir.ResizeAlg.convolution(_QUICK_FILTERS[kernel]), use_alpha=False, crop_box=crop)
    scaled = fir.ImageData(*size, fir.PixelType.U8x3)
    _resizer().resize(fir.ImageData(width, height, fir.PixelType.U8x3, pixels.tobytes()), scaled, options)
    return np.frombuffer(scaled.get_buffer(), np.uint8).reshape(size[1], size[0], 3)


_local = threading.local()


def _resizer() -> fir.Resizer:
    """A thread's own resizer: it keeps its buffers from image to image."""
    found: fir.Resizer | None = getattr(_local, "resizer", None)
    if found is None:
        found = _local.resizer = fir.Resizer()
    return found


def encode(pixels: np.ndarray, settings: PixelSettings) -> bytes:
    """The stored bytes of uint8 [H,W,3]: no metadata, 4:2:0 for JPEG as everywhere.

    Raises Rejected (image_too_large) where the format has no room for such a side.
    """
    height, width = pixels.shape[:2]
    if max(height, width) > LONGEST_SIDE[settings.encode_format]:
        raise Rejected("image_too_large", f"{width}x{height} pixels do not fit into a {settings.encode_format} file")
    if settings.encode_format == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), settings.quality, "RGB", "420")
    image, sink = Image.fromarray(pixels), io.BytesIO()
    if settings.encode_format == "webp":
        image.save(sink, "WEBP", quality=settings.quality, method=4)
    else:
        image.save(sink, "PNG", compress_level=settings.quality)
    return sink.getvalue()


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise Rejected("image_corrupt", "the header gives a size of zero")
    if width * height > max_pixels:
        raise Rejected("image_too_large", f"{width}x{height} pixels")


_SRGB = ImageCms.createProfile("sRGB")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Any:
    """The transform of a profile to sRGB; None where there is nothing to do or the profile does not fit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in (ImageCms.getProfileDescription(source) or "").lower():
            return None
        return ImageCms.buildTransform(source, _SRGB, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _changes(profile: bytes | None, mode: str) -> bool:
    """Whether a profile can be applied to pixels of this mode, and is not sRGB's own."""
    return profile is not None and 0 < len(profile) <= LARGEST_PROFILE and _transform(profile, mode) is not None


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode not in ("RGB", "CMYK", "L", "LAB") or not _changes(profile, image.mode):
        return image
    converted = ImageCms.applyTransform(image, _transform(profile, image.mode))
    return image if converted is None else converted


# EXIF orientation: what makes uint8 [H,W,3] upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}


def _exif(image: Image.Image) -> tuple[int, str]:
    """The orientation (1..8) and the plain tags as JSON; a damaged EXIF block counts as none.

    No GPS position, no maker's notes, no comments: a data set for images has no use for these.
    """
    try:
        exif = image.getexif()
        tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)} if len(exif) else {}
        named = {
            ExifTags.TAGS[tag]: " ".join(str(value).split())[:200]
            for tag, value in tags.items()
            if tag in ExifTags.TAGS and (isinstance(value, (str, int, float)) or hasattr(value, "numerator"))
        }
        orientation = tags.get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a hostile block makes the parser raise
        return 1, "{}"
    for name in ("GPSInfo", "MakerNote", "ExifOffset", "UserComment"):
        named.pop(name, None)
    return (orientation if isinstance(orientation, int) else 1), json.dumps(named, sort_keys=True)
