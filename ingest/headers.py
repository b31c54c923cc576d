"""What the header of an image file says, read without a decoder: its size, and of a JPEG what decoding it will take."""

from __future__ import annotations

import struct
from typing import NamedTuple

PNG = b"\x89PNG\r\n\x1a\n"
JPEG_SCAN = b"\xff\xda"


class JpegHeader(NamedTuple):
    """What a JPEG says before its image. frame: the marker's second byte, 0xC0 and 0xC1 for baseline.

    before: bytes in front of the frame (profiles, EXIF, thumbnails). scans: at most; an image without any has 0.
    """

    width: int
    height: int
    components: int
    frame: int
    before: int
    scans: int


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The frame header (SOF) of a JPEG; None for what is none, or has no frame where decoders look for it."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:  # bytes between segments: decoders go on to the next marker
            at = data.find(b"\xff", at)
            if at < 0:
                return None
            continue
        kind = data[at + 1]
        if kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8:
            at += 1 if kind == 0xFF else 2
            continue
        if kind in (0xD9, 0xDA):
            return None
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            return JpegHeader(width, height, components, kind, at, _scans(data, at, kind, components))
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _scans(data: bytes, frame: int, kind: int, components: int) -> int:
    """At most how many scans follow a frame. A baseline one whose first has all components has no other."""
    at = frame
    while kind in (0xC0, 0xC1) and at + 5 < len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            if data[at + 4] == components:
                return 1  # libjpeg ends at a second one
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return data.count(JPEG_SCAN, frame)


def header_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header of a JPEG, PNG, WebP, GIF or BMP; None for what is none of these.

    TIFF and AVIF are Pillow's to open, which reads their headers alone. Its WebP reader allocates the canvas as
    soon as it opens a file. A GIF's first frame may be larger than its header says; Pillow tells that.
    """
    jpeg = jpeg_header(data)
    if jpeg is not None:
        return jpeg.width, jpeg.height
    if data.startswith(PNG) and data[12:16] == b"IHDR" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:6] in (b"GIF87a", b"GIF89a") and len(data) >= 10:
        return struct.unpack("<HH", data[6:10])
    if data[:2] == b"BM" and len(data) >= 26:
        if int.from_bytes(data[14:18], "little") == 12:  # OS/2
            return struct.unpack("<HH", data[18:22])
        width, height = struct.unpack("<ii", data[18:26])
        return abs(width), abs(height)  # from below, or from above
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
