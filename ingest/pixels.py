"""From fetched bytes to the stored picture: judged by its header, decoded, upright, sRGB, resized, encoded.

Dimensions are read from the header and checked before a decoder allocates anything. What comes out has
always three channels of 8 bits: EXIF orientation applied, ICC profiles and CMYK taken to sRGB, 16 bits
scaled (v / 257), transparency laid on a stated ground, and of an animation the first frame (or it is
refused, if so configured). The same bytes in give the same bytes out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import struct
import warnings
from typing import Any, NamedTuple, get_args

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from ingest.config import Animations, EncodeFormat, Filter, Reencode, ResizeMode
from ingest.errors import Rejected

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what shards may hold
_FILTERS = {name: Image.Resampling[name.upper()] for name in get_args(Filter)}
_MAY_MOVE = ("GIF", "PNG", "WEBP", "AVIF")  # the further pages of a TIFF or MPO are other pictures
LARGEST_PROFILE = 4 << 20
QUICK_BYTES, QUICK_PIXELS = 16 << 10, 1 << 18

# Pillow's remarks on large or odd pictures; what is wrong with a picture is judged here. (At import, since the
# filters are the whole process's: to set them for a call would not be safe in several threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")

Image.init()
_OPENABLE = tuple(f for f in FORMATS if f in Image.OPEN)


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """How pictures are stored; see IngestConfig for the fields."""

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
class Picture:
    """A stored picture. Sizes in pixels; the original ones as seen upright. exif: JSON of its plain tags.

    pixel_hash: BLAKE2b (128 bits) of width, height and RGB bytes before encoding. phash: see `perceptual_hash`.
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
    """An upright RGB picture, its EXIF as JSON, its upright size as fetched.

    kept_as: the extension under which the fetched bytes can be stored as they are, None where the pixels
    had to be changed to be upright sRGB.
    """

    image: Image.Image
    exif: str
    size: tuple[int, int]
    kept_as: str | None


def process(data: bytes, settings: PixelSettings) -> Picture:
    """Fetched bytes to a Picture; raises Rejected (not_an_image, image_*, animation_refused)."""
    decoded = decode(data, settings)
    image = resize(decoded.image, settings)
    if settings.reencode == "needed" and decoded.kept_as and image is decoded.image and image.size == decoded.size:
        stored, extension = data, decoded.kept_as
    else:
        stored, extension = encode(image, settings), settings.encode_format
    return Picture(stored, extension, *image.size, *decoded.size, decoded.exif, *hashes(image))


def hashes(image: Image.Image) -> tuple[str, str]:
    """pixel_hash and phash of an RGB picture."""
    digest = hashlib.blake2b(struct.pack("<II", *image.size), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest(), perceptual_hash(image)


def decode(data: bytes, settings: PixelSettings) -> Decoded:
    """Decode fetched bytes; raises Rejected.

    A JPEG much larger than what is stored may come out at a half, quarter or eighth of its size.
    """
    size = header_size(data)
    if size is not None:
        _check_size(size, settings.max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=_OPENABLE)
        original = image.size
        _check_size(original, settings.max_pixels)
        if image.format in _MAY_MOVE and settings.animations == "refuse" and getattr(image, "is_animated", False):
            raise Rejected("animation_refused")
        _draft(image, settings)
        image.decodermaxblock = max(len(data), 1 << 16)  # in one go, as all of it is here
        reduced = image.size != original
        image.load()
        # Only now, since Pillow loads a PNG to find its EXIF block, and a failure in there would be taken
        # for a damaged block.
        orientation, tags = _exif(image)
        profile = image.info.get("icc_profile")
        kept_as = _kept_as(image, data, orientation, profile) if settings.reencode == "needed" else None
        if orientation in _TURNS and image.format != "TIFF":  # Pillow turns a TIFF by itself
            rgb = to_rgb(image.transpose(_TURNS[orientation]), settings.background, profile)
        else:
            rgb = to_rgb(image, settings.background, profile)
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected("not_an_image") from None
    except Image.DecompressionBombError:
        raise Rejected("image_too_large", f"more than {settings.max_pixels} pixels") from None
    except Exception as e:  # decoders of hostile bytes raise anything: struct.error, SyntaxError, KeyError, ...
        if "truncated" in str(e).lower() or isinstance(e, EOFError):
            raise Rejected("image_truncated") from None
        raise Rejected("image_corrupt", f"the picture cannot be decoded ({type(e).__name__})") from None
    if not reduced:
        return Decoded(rgb, tags, rgb.size, kept_as)
    return Decoded(rgb, tags, (original[1], original[0]) if orientation in (5, 6, 7, 8) else original, None)


def _kept_as(image: Image.Image, data: bytes, orientation: int, profile: bytes | None) -> str | None:
    """The extension for bytes that already are an upright still of three 8-bit sRGB channels, None for others."""
    extension = _EXTENSIONS.get(image.format or "")
    if extension is None or image.mode != "RGB" or orientation != 1 or image.has_transparency_data:
        return None
    if getattr(image, "is_animated", False) or (image.format == "PNG" and data[24:25] != b"\x08"):
        return None
    if profile and len(profile) <= LARGEST_PROFILE and _transform(profile, image.mode) is not None:
        return None
    return extension


# The first 8 rows of the 32-point DCT-II, times 2^14: in integers, so that no machine rounds otherwise.
_DCT = np.rint(2**14 * np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)).astype(np.int64)


def perceptual_hash(image: Image.Image) -> str:
    """64 bits as 16 hex digits that differ in few places between pictures that look alike.

    pHash as the imagehash library has it (and COYO's image_phash): grey, 32x32 by Lanczos, the 8x8 lowest
    coefficients of the DCT, each compared with their median. (C. Zauner, "Implementation and benchmarking
    of perceptual image hash functions", 2010.) Large pictures are averaged down to 64 pixels and more
    before, which is quicker and may turn a few bits.
    """
    grey = image.convert("L")
    if (factor := min(image.size) // 64) > 1:
        grey = grey.reduce(factor)
    pixels = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), np.int64)
    low = _DCT @ pixels @ _DCT.T
    return np.packbits(low > np.median(low)).tobytes().hex()


def header_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header of a WebP or PNG, None for what is neither.

    These two are read here since Pillow's WebP reader allocates the canvas as soon as it opens a file.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":  # 24-bit width and height, each less one
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def is_quick(data: bytes) -> bool:
    """Whether `process` surely takes no more than a few milliseconds: a small file, and a small picture in it."""
    if len(data) > QUICK_BYTES:
        return False
    size = header_size(data)
    if size is None:  # a JPEG spends bytes on every block, so a short one is small; of other formats nothing is known
        return data[:2] == b"\xff\xd8"
    return size[0] * size[1] <= QUICK_PIXELS


def to_rgb(image: Image.Image, background: tuple[int, int, int], profile: bytes | None = None) -> Image.Image:
    """Any mode that Pillow decodes to RGB, 8 bits, sRGB, on a ground; raises Rejected (image_unsupported)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise Rejected("image_unsupported", "integers of more than 16 bits")
        # (255 v + 32895) >> 16 is v / 257, rounded, for every v of 16 bits.
        image = Image.fromarray(((values.astype(np.int64) * 255 + 32895) >> 16).astype(np.uint8))
        profile = None
    if image.mode == "F":
        raise Rejected("image_unsupported", "floating point pixels")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")  # drops alpha; colours as stored
    if image.mode in ("1", "LA", "La", "P", "PA"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    if profile and len(profile) <= LARGEST_PROFILE:
        image = _to_srgb(image, profile)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, background), alpha)
    image.info = {}  # or PNG and WebP would store the profile again, that has been applied
    return image


def target_size(width: int, height: int, settings: PixelSettings) -> tuple[int, int]:
    """The size to which a picture is scaled, before any crop or border; its own where it stays as it is.

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


def resize(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """Scale with a filter of the right support (none of its input is left out), then crop or pad as the mode says."""
    wanted = settings.image_size
    width, height = target_size(image.width, image.height, settings)
    unchanged = (width, height) == image.size
    kernel = _FILTERS[settings.downscale_filter] if width < image.width else Image.Resampling.LANCZOS
    if settings.only_if_bigger and unchanged and settings.resize_mode != "no":
        return image
    if settings.resize_mode == "center_crop":
        left, top = (width - wanted) // 2, (height - wanted) // 2
        if unchanged:
            return image if image.size == (wanted, wanted) else image.crop((left, top, left + wanted, top + wanted))
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + wanted) * across, (top + wanted) * down)
        return image.resize((wanted, wanted), kernel, box)
    if not unchanged:
        image = image.resize((width, height), kernel)
    if settings.resize_mode == "border":
        ground = Image.new("RGB", (wanted, wanted), settings.background)
        ground.paste(image, ((wanted - width) // 2, (wanted - height) // 2))
        return ground
    return image


def encode(image: Image.Image, settings: PixelSettings) -> bytes:
    """The stored bytes: no metadata, 4:2:0 for JPEG as everywhere."""
    sink = io.BytesIO()
    if settings.encode_format == "jpg":
        image.save(sink, "JPEG", quality=settings.quality, subsampling="4:2:0")
    elif settings.encode_format == "webp":
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


def _draft(image: Image.Image, settings: PixelSettings) -> None:
    """Let libjpeg decode at a fraction where the picture stays at least twice as large as what is stored.

    Twice, so that the filter still has what it needs; the DCT does the rest of the averaging.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L", "YCbCr"):
        return
    width, height = target_size(image.width, image.height, settings)
    if width < image.width and height < image.height:
        image.draft(None, (2 * width, 2 * height))


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


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode not in ("RGB", "CMYK", "L", "LAB"):
        return image
    transform = _transform(profile, image.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image, transform)
    return image if converted is None else converted


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _exif(image: Image.Image) -> tuple[int, str]:
    """The orientation (1..8) and the plain tags as JSON; a damaged EXIF block counts as none.

    No GPS position, no maker's notes, no comments: a data set for pictures has no use for these.
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
