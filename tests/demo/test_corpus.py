"""The corpus on disk: its counts recomputed from the files alone, its bytes, its split, its commit."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from demo.corpus import CorpusError, CorpusSummary, draw_corpus, load_summary
from demo.scenes import parse, split

COLUMNS = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "aesthetic", "LANGUAGE", "WRONG"]


def ending(row: dict, folder: Path, behaviours: dict, seen: set) -> tuple[str, str]:
    """What becomes of a row, told from the table and the files alone: (status, reason)."""
    if not (row["TEXT"] or "").strip():
        return "filtered", "caption"
    if row["WIDTH"] < 48:
        return "filtered", "width"
    if row["HEIGHT"] < 48:
        return "filtered", "height"
    if row["punsafe"] > 0.5:
        return "filtered", "punsafe"
    if row["LANGUAGE"] != "en":
        return "filtered", "language"
    url = urlsplit(row["URL"])
    if url.port != 8090:
        return "failed_to_download", "connect_refused"
    behaviour = behaviours.get(url.path, {})
    path = url.path
    if behaviour.get("status") == 302:
        path = behaviour["headers"]["Location"]
        behaviour = behaviours.get(path, {})
    file = folder / path[1:]
    if behaviour.get("status") == 410 or not file.exists():
        return "failed_to_download", "http_not_found"
    if behaviour.get("short"):
        return "failed_to_download", "body_truncated"
    if "noai" in behaviour.get("headers", {}).get("X-Robots-Tag", ""):
        return "opted_out", "x_robots_tag"
    data = file.read_bytes()
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        return "failed_to_resize", "not_an_image"
    except OSError:
        return "failed_to_resize", "image_truncated"
    size = image.size if image.getexif().get(0x0112) != 6 else image.size[::-1]
    assert size == (row["WIDTH"], row["HEIGHT"])
    for kind, key in (("duplicate_url", row["URL"]), ("duplicate_bytes", hashlib.sha256(data).hexdigest())):
        if (kind, key, row["TEXT"]) in seen:
            return "duplicate", kind
    seen |= {("duplicate_url", row["URL"], row["TEXT"])}
    seen |= {("duplicate_bytes", hashlib.sha256(data).hexdigest(), row["TEXT"])}
    return "success", ""


def test_stated_counts_are_what_the_files_give(corpus: CorpusSummary) -> None:
    folder = Path(corpus.folder)
    behaviours = json.loads((folder / "server.json").read_text())
    table = pq.read_table(corpus.table)
    assert table.column_names == COLUMNS
    seen: set = set()
    endings = [ending(row, folder, behaviours, seen) for row in table.to_pylist()]
    expected = corpus.expected
    assert len(endings) == expected["rows"]
    assert Counter(status for status, _ in endings) == expected["status"]
    reasons = Counter(reason for _, reason in endings if reason)
    assert reasons == expected["errors"] | expected["filtered_by"] | expected["duplicates_by"]
    assert sum(expected["status"].values()) == expected["rows"]
    assert expected["status"]["success"] == 300
    assert len(expected["status"]) == 6
    assert len(reasons) == 13


def test_every_format_is_there_and_named_rightly(tmp_path: Path) -> None:
    summary = draw_corpus(tmp_path / "c", "http://127.0.0.1:8090", images=400, heldout=1, seed=2, progress=False)
    assert len(summary.formats) == 9
    found = Counter()
    for row in pq.read_table(summary.table).to_pylist():
        file = Path(summary.folder, urlsplit(row["URL"]).path[1:])
        try:
            with Image.open(file) as image:
                found[image.format, image.mode] += 1
                assert file.suffix == {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[image.format or ""]
        except (FileNotFoundError, UnidentifiedImageError):
            continue
    png = {("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA")}
    assert set(found) == png | {("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB")}


def test_heldout_combinations_are_never_trained_on(corpus: CorpusSummary) -> None:
    heldout = pq.read_table(corpus.heldout_table)
    assert heldout.column_names == COLUMNS
    assert heldout.num_rows == 60 == corpus.heldout["rows"]
    assert len(set(heldout["TEXT"].to_pylist())) == corpus.heldout["captions"] > 50
    held_scenes = {parse(text) for text in heldout["TEXT"].to_pylist()}
    assert {split(scene) for scene in held_scenes} == {"heldout"}
    train_scenes, others = set(), []
    for row in pq.read_table(corpus.table).to_pylist():
        try:
            train_scenes.add(parse(row["TEXT"] or ""))
        except ValueError:
            others.append(row["TEXT"])
    assert {split(scene) for scene in train_scenes} == {"train"}
    assert not train_scenes & held_scenes
    planted = corpus.planted
    assert len(others) == planted["wordless"] + planted["foreign"] + planted["hostile"]
    texts = [text or "" for text in pq.read_table(corpus.table)["TEXT"].to_pylist()]
    assert sum("&amp;" in text for text in texts) == planted["escaped"]


def test_urls_do_not_overlap_between_the_splits(corpus: CorpusSummary) -> None:
    train, heldout = (set(pq.read_table(t)["URL"].to_pylist()) for t in (corpus.table, corpus.heldout_table))
    assert not train & heldout


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> dict[str, bytes]:
        summary = draw_corpus(tmp_path / name, "http://127.0.0.1:8090", 30, 5, seed, progress=False)
        root = Path(summary.folder)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    first, again, other = drawn("a", 7), drawn("b", 7), drawn("c", 8)
    assert first == again
    assert len(first) > 40
    assert first["table.parquet"] != other["table.parquet"]
    assert not {p for p in tmp_path.iterdir() if p.name.startswith(".")}


def test_a_second_call_does_nothing_and_other_settings_are_refused(corpus: CorpusSummary, tmp_path: Path) -> None:
    root = Path(corpus.folder)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    again = draw_corpus(root, "http://127.0.0.1:8090", images=300, heldout=60, seed=1)
    assert again == corpus == load_summary(root)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    with pytest.raises(CorpusError, match="seed 1 and not 2"):
        draw_corpus(root, "http://127.0.0.1:8090", images=300, heldout=60, seed=2)
    with pytest.raises(CorpusError, match="holds no corpus"):
        draw_corpus(tmp_path, "http://127.0.0.1:8090")
    with pytest.raises(CorpusError, match="at least 10 images"):
        draw_corpus(tmp_path / "x", "http://127.0.0.1:8090", images=3)
    moved = shutil.copytree(root, tmp_path / "moved")
    assert load_summary(moved).table == moved / "table.parquet"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".c.4194305.partial"  # above the largest process id of Linux
    dead.mkdir()
    (dead / "half").write_text("")
    draw_corpus(tmp_path / "c", "http://127.0.0.1:8090", images=10, heldout=1, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_stated_digests_are_those_of_the_files(corpus: CorpusSummary) -> None:
    assert set(corpus.sha256) == {"table.parquet", "heldout.parquet", "server.json"}
    for name, digest in corpus.sha256.items():
        assert hashlib.sha256(Path(corpus.folder, name).read_bytes()).hexdigest() == digest
