"""Image shards: WebDataset tars with reproducible bytes, read by offset rather than from the start.

The tar is what img2dataset writes (members `key.jpg`, `key.txt`, `key.json` side by side, successes
only), the parquet beside it has one row per input row and, beyond img2dataset's columns, where in the
tar each image lies. So a reader takes any sample at once, and resuming never reads a shard to skip it.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from shards import storage

if TYPE_CHECKING:
    from shards.dataset import Dataset

# What became of an input row. The first three are img2dataset's own words; both failed_* count as failed.
STATUSES = ("success", "failed_to_download", "failed_to_resize", "filtered", "duplicate", "opted_out")

MAX_PIXELS = 64_000_000
LOCATION = ("image_offset", "image_size", "image_file")  # of the sidecar: where an image lies
_GAP = 16 << 10  # what may lie between two images that are read at once: headers, a caption, its JSON


def pack_tar(samples: Iterable[tuple[str, dict[str, bytes]]]) -> tuple[bytes, list[dict[str, tuple[int, int]]]]:
    """A tar whose bytes depend on its samples alone, and where each member's data lies in it.

    samples: (key, {extension: data}) in the order they are to lie. A key has no dot and no slash, since
    WebDataset takes everything up to the first dot for it. Returns the bytes and, for each sample, its
    members' (offset, size) by extension.
    """
    pieces: list[bytes] = []
    extents: list[dict[str, tuple[int, int]]] = []
    offset = 0
    for key, members in samples:
        if "." in key or "/" in key or not key:
            raise ValueError(f"the key '{key}' may have neither a dot nor a slash")
        extent = {}
        for extension in sorted(members):  # the order in which webdataset writes them
            data = members[extension]
            padding = -len(data) % tarfile.BLOCKSIZE
            pieces += (_tar_header(f"{key}.{extension}", len(data)), data, bytes(padding))
            extent[extension] = (offset + tarfile.BLOCKSIZE, len(data))
            offset += tarfile.BLOCKSIZE + len(data) + padding
        extents.append(extent)
    end = 2 * tarfile.BLOCKSIZE
    pieces.append(bytes(end + -(offset + end) % tarfile.RECORDSIZE))
    return b"".join(pieces), extents


def _tar_header(name: str, size: int) -> bytes:
    """A member's header, to the byte what webdataset's TarWriter makes of it by Python's tarfile."""
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > 100 or size >= 1 << 33:
        return _tar_info(name, size).tobuf(tarfile.USTAR_FORMAT)
    begin, between, rest = _BLANK_HEADER[100:124], _BLANK_HEADER[136:148], _BLANK_HEADER[156:]
    header = b"".join((raw.ljust(100, b"\0"), begin, b"%011o\0" % size, between, b"        ", rest))
    return b"".join((header[:148], b"%06o\0 " % sum(header), header[156:]))


def _tar_info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname, info.gname = size, 0, 0o444, "bigdata", "bigdata"
    return info


_BLANK_HEADER = _tar_info("", 0).tobuf(tarfile.USTAR_FORMAT)


class ImageShard:
    """One image shard: captions and keys from the sidecar, images by offset from the tar.

    Positions 0 .. len-1 run over the samples that can be used: success, and not excluded since. Safe to
    read from several threads. columns: of the sidecar, where not all are wanted; status and the tar's among them.
    """

    def __init__(self, dataset: Dataset, position: int, columns: Sequence[str] | None = None) -> None:
        self.info = dataset.shards[position]
        self.url = storage.join(dataset.root, self.info.name + ".tar")
        self.table: pa.Table = dataset.sidecar(self.info.index)
        if columns is not None:
            self.table = self.table.select([c for c in columns if c in self.table.column_names])
        live = np.array([s == "success" for s in self.table["status"].to_pylist()], bool)
        live[dataset.excluded_rows(self.info.index)] = False
        self.rows: np.ndarray = np.flatnonzero(live)
        self._offsets = self.table["image_offset"].fill_null(-1).to_numpy()[self.rows]
        self._sizes = self.table["image_size"].fill_null(-1).to_numpy()[self.rows]
        # Images that were adopted lie in tars of others, which are only read.
        files = self.table["image_file"].to_pylist() if "image_file" in self.table.column_names else None
        self._elsewhere = None if files is None else np.array(files, object)[self.rows]
        self._fetched: dict[int, bytes] = {}
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, passes: np.ndarray) -> None:
        """Go on with some of the samples alone. passes: bool [len(self)]."""
        self.rows, self._offsets, self._sizes = self.rows[passes], self._offsets[passes], self._sizes[passes]
        self._elsewhere = None if self._elsewhere is None else self._elsewhere[passes]

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, in order."""
        return list(self.table["key"].take(pa.array(self.rows)).to_pylist())

    @property
    def captions(self) -> list[str]:
        """Captions of the samples, in order; an absent one is an empty string."""
        return [c or "" for c in self.values("caption", np.arange(len(self)))]

    def values(self, name: str, samples: np.ndarray) -> list[Any]:
        """A column of the sidecar for some of the samples; None where there is no such column."""
        if name not in self.table.column_names:
            return [None] * len(samples)
        return list(self.table[name].take(pa.array(self.rows[samples])).to_pylist())

    def encoded_images(self, samples: np.ndarray) -> list[bytes]:
        """The encoded images of these samples; where they lie together, by one read."""
        if len(samples) == 0:
            return []
        if self._elsewhere is not None:
            return self._from_elsewhere(samples)
        return _read(self.url, self._offsets[samples], self._sizes[samples])

    def _from_elsewhere(self, samples: np.ndarray) -> list[bytes]:
        """Images that lie in others' tars; one read a tar where they lie together."""
        assert self._elsewhere is not None
        found: list[bytes] = [b""] * len(samples)
        files = self._elsewhere[samples]
        for file in dict.fromkeys(files.tolist()):
            mine = np.flatnonzero(files == file)
            data = _read(file, self._offsets[samples[mine]], self._sizes[samples[mine]])
            for i, one in zip(mine.tolist(), data, strict=True):
                found[i] = one
        return found

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample `i`."""
        if self._elsewhere is not None:
            with self._lock:
                fetched = self._fetched.pop(i, None)
            return fetched if fetched is not None else self._from_elsewhere(np.array([i]))[0]
        offset, size = int(self._offsets[i]), int(self._sizes[i])
        if self._file is None and not storage.is_local(self.url):
            # A file object of an object store reads ahead by many times an image.
            return storage.read_ranges(self.url, [(offset, offset + size)])[0]
        with self._lock:
            if self._file is None:
                self._file = storage.open_read(self.url)
            if storage.is_local(self.url):
                data = os.pread(self._file.fileno(), size, offset)
            else:
                self._file.seek(offset)
                data = self._file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.url}: ends before the image of sample {self.keys[i]}")
        return data

    def fetch(self) -> None:
        """From an object store, read the tar as a whole: for whoever wants every image, in any order."""
        if self._elsewhere is not None:
            if any(not storage.is_local(f) for f in set(self._elsewhere.tolist())):
                found = self._from_elsewhere(np.arange(len(self)))
                with self._lock:
                    self._fetched = dict(enumerate(found))
            return
        if not storage.is_local(self.url):
            data = storage.read_bytes(self.url)
            with self._lock:
                self._file = io.BytesIO(data)

    def close(self) -> None:
        """Close the tar; it is opened again when needed."""
        with self._lock:
            self._fetched = {}
            if self._file is not None:
                self._file.close()
                self._file = None


def png_bytes(pixels: np.ndarray, level: int = 6) -> bytes:
    """uint8 [H,W,3] or [H,W] as PNG; level: of zlib."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=level)
    return sink.getvalue()


def _read(url: str, offsets: np.ndarray, sizes: np.ndarray) -> list[bytes]:
    """Pieces of one file; where they lie together, by one read."""
    first, end = int(offsets.min()), int((offsets + sizes).max())
    if end - first > 2 * int(sizes.sum()) + _GAP * len(sizes):
        return storage.read_ranges(url, [(int(o), int(o + n)) for o, n in zip(offsets, sizes, strict=True)])
    (data,) = storage.read_ranges(url, [(first, end)])
    return [data[o - first : o - first + n] for o, n in zip(offsets.tolist(), sizes.tolist(), strict=True)]


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image to uint8 [H,W,3], upright; raises ValueError where that is not possible.

    The size is read from the header and checked before anything is decoded. What ingest stores is upright; what is
    adopted where it lies, or given by hand, is turned as its EXIF orientation says.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"the image has {image.width}x{image.height} pixels, more than {max_pixels}")
            return np.asarray((image if _orientation(image) == 1 else ImageOps.exif_transpose(image)).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(_undecodable(e)) from None


def is_image(data: bytes) -> bool:
    """Whether this begins as JPEG, PNG and WebP do. An image that is taken down is a comment of the tar, or zeros."""
    return data.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF"))


def is_rgb(data: bytes) -> bool:
    """Whether an image is stored as plain 8-bit RGB, so that `decode_rgb` converts no colours; reads the header."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            return image.mode == "RGB"
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(_undecodable(e)) from None


def pixel_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image as `decode_rgb` gives it, from its header; raises ValueError where it has none."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            lying = _orientation(image) >= 5  # a quarter turn
            return (image.height, image.width) if lying else (image.width, image.height)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(_undecodable(e)) from None


def _orientation(image: Image.Image) -> int:
    """1 (upright) to 8, of an EXIF block in the header; 1 where there is none, or one that cannot be read."""
    if "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a hostile block makes the parser raise
        return 1
    return found if found in range(1, 9) else 1


def _undecodable(error: Exception) -> str:
    """Why, in words that are the same in every process: Pillow's own may hold an address in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "the image cannot be decoded: it is neither JPEG, PNG nor WebP"
    return f"the image cannot be decoded: {error}"
