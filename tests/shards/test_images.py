"""Image shards: tar bytes against tarfile's and webdataset's own reading; offsets; exclusions."""

from __future__ import annotations

import io
import random
import tarfile

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given
from PIL import Image

from shards import exclusions
from shards.dataset import Dataset, commit_shard, read_stats, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, decode_rgb, is_rgb, pack_tar, pixel_size

SAMPLES = st.lists(
    st.tuples(
        st.integers(0, 10**6).map(str),
        st.dictionaries(st.sampled_from(["jpg", "txt", "json"]), st.binary(max_size=1500), min_size=1),
    ),
    max_size=8,
    unique_by=lambda s: s[0],
)


@given(SAMPLES)
def test_tar_reads_back_by_name_and_by_offset(samples):
    data, extents = pack_tar(samples)
    assert pack_tar(samples)[0] == data
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    assert members == {f"{k}.{e}": d for k, parts in samples for e, d in parts.items()}
    for (_, parts), extent in zip(samples, extents, strict=True):
        for extension, (offset, size) in extent.items():
            assert data[offset : offset + size] == parts[extension]


def test_webdataset_reads_our_tar(tmp_path):
    samples = [(f"{i:07d}", {"png": bytes([i] * 10), "txt": f"caption {i}".encode()}) for i in range(5)]
    (tmp_path / "00000.tar").write_bytes(pack_tar(samples)[0])
    read = list(wds.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [(s["__key__"], {"png": s["png"], "txt": s["txt"]}) for s in read] == samples


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_keys_that_webdataset_would_misread_are_refused(key):
    with pytest.raises(ValueError, match="neither a dot nor a slash"):
        pack_tar([(key, {"png": b""})])


def png(colour: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (3, 2), (colour, 0, 0)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    stats = []
    for shard in range(2):
        status = ["success", "failed_to_download", "success", "success"]
        live = [r for r, s in enumerate(status) if s == "success"]
        tar, extents = pack_tar((f"{shard}{r}", {"png": png(10 * shard + r)}) for r in live)
        where = {r: p["png"] for r, p in zip(live, extents, strict=True)}
        table = pa.table(
            {
                "key": [f"{shard}{r}" for r in range(4)],
                "caption": [f"caption {shard}{r}" for r in range(4)],
                "status": status,
                "image_offset": pa.array([where.get(r, (None, None))[0] for r in range(4)], pa.int64()),
                "image_size": pa.array([where.get(r, (None, None))[1] for r in range(4)], pa.int64()),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        fingerprint = Fingerprint("ingest", 1, {})
        files = {".tar": tar, ".parquet": sink.getvalue()}
        stats.append(commit_shard(str(tmp_path), shard, files, {"rows": 4, "count": 3}, fingerprint))
    write_manifest(str(tmp_path), "images", stats)
    return Dataset.open(str(tmp_path))


def test_random_access_reads_the_live_samples(dataset):
    assert dataset.counts.tolist() == [3, 3]
    shard = ImageShard(dataset, 1)
    assert shard.keys == ["10", "12", "13"]
    assert shard.captions == ["caption 10", "caption 12", "caption 13"]
    assert [decode_rgb(shard.image_bytes(i))[0, 0, 0] for i in (2, 0, 1)] == [13, 10, 12]


def test_an_excluded_sample_is_gone_and_its_shard_is_born_as_before(dataset):
    line = {"shard": [1], "row": [2], "reason": ["duplicate_url"], "winner": [exclusions.sample_id(0, 0)]}
    name = exclusions.write_exclusions(dataset.root, [pa.table(line)])
    stats = [read_stats(dataset.root, i) for i in range(2)]
    write_manifest(dataset.root, "images", stats, None, name)
    again = Dataset.open(dataset.root)
    assert [s.born for s in again.shards] == [s.born for s in dataset.shards]
    assert again.fingerprint != dataset.fingerprint
    assert again.counts.tolist() == [3, 2]
    assert ImageShard(again, 1).keys == ["10", "13"]
    assert ImageShard(dataset, 1).keys == ["10", "12", "13"], "who opened the older manifest goes on with what it says"


def test_decoding_refuses_a_bomb_before_decoding_and_what_is_no_picture():
    with pytest.raises(ValueError, match="more than 5"):
        decode_rgb(png(1), max_pixels=5)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_rgb(b"<html>no picture</html>")
    said = []
    for data in (b"", b"GIF89a" + bytes(40)):
        with pytest.raises(ValueError, match="neither JPEG, PNG nor WebP") as error:
            decode_rgb(data)
        said.append(str(error.value))
    assert said[0] == said[1], "it goes into a shard's sidecar, whose bytes are the same in every process"
    np.testing.assert_array_equal(decode_rgb(png(7))[0, 0], [7, 0, 0])


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_pictures_are_upright_whatever_their_exif_says(kind):
    """Beside the turns of the EXIF standard, written out; a damaged block counts as none."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).swapaxes(0, 1),
        8: np.rot90(pixels),
    }

    def stored(exif) -> bytes:
        out = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        Image.fromarray(pixels).save(out, kind, exif=exif, **options)
        return out.getvalue()

    for orientation, expected in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = stored(exif)
        found = decode_rgb(data)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= (8 if kind == "JPEG" else 0), orientation
        assert pixel_size(data) == found.shape[1::-1]
    for damaged in (b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00no block of any kind"):
        assert decode_rgb(stored(damaged)).shape == (16, 24, 3)
        assert pixel_size(stored(damaged)) == (24, 16)


def test_colours_that_would_be_converted_are_known():
    def encoded(mode, kind="PNG"):
        sink = io.BytesIO()
        Image.new(mode, (4, 3)).save(sink, kind)
        return sink.getvalue()

    assert [is_rgb(encoded(mode)) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")] == [True] + [False] * 5
    assert [is_rgb(encoded(mode, "JPEG")) for mode in ("RGB", "CMYK", "L")] == [True, False, False]
    with pytest.raises(ValueError, match="cannot be decoded"):
        is_rgb(b"GIF89a")


def test_a_tar_is_what_webdatasets_writer_makes() -> None:
    rng = random.Random(0)
    samples = [
        (f"{i:09d}", {"txt": b"x" * (i * 97 % 1500), "jpg": rng.randbytes(rng.randrange(3000)), "json": b"{}"})
        for i in range(60)
    ]
    sink = io.BytesIO()
    with wds.TarWriter(sink, encoder=False, mtime=0) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    assert pack_tar(samples)[0] == sink.getvalue()
    assert pack_tar([])[0] == bytes(10240)
