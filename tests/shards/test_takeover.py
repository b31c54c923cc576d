"""Folders of format 1, as commit c20ac09 made them, become folders of this one, and nothing in them is made again."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from latents.config import LatentsConfig
from latents.stage import LatentsStage
from orchestration import engine
from orchestration.config import Pool, RayConfig
from shards.columns import ColumnShard
from shards.commit import Folder
from shards.dataset import Dataset, read_stats, write_manifest
from shards.exclusions import write_exclusions
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, decode_rgb
from shards.layout import RunPaths
from shards.settings import ConfigError
from shards.takeover import is_old, old_digests
from shards.verify import verify

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_c20ac09.tar.xz"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    with tarfile.open(FIXTURE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def old_made_with(root: Path) -> Fingerprint:
    stored = json.loads((root / "00000_stats.json").read_text())["fingerprint"]
    return Fingerprint(stored["stage"], stored["version"], stored["settings"], None, stored["weights"])


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_dataset_of_format_1_is_read_as_it_is(run):
    images = Dataset.open(str(run / "images"))
    assert len(images) == 31
    for position in range(len(images.shards)):
        shard = ImageShard(images, position)
        assert len(shard) == images.counts[position]
        assert all(decode_rgb(shard.image_bytes(i)).shape == (16, 16, 3) for i in range(len(shard)))
    assert sum(len(images.excluded_rows(s.index)) for s in images.shards) == 1
    latents = Dataset.open(str(run / "latents"))
    assert [len(ColumnShard(latents, p).keys) for p in range(len(latents.shards))] == latents.counts.tolist()


def test_a_folder_is_taken_over_and_its_files_stay_as_they_are(run):
    root = run / "images"
    (root / "00009.tar").write_bytes(b"of a dead writer")
    before = content(root)
    digests = old_digests(str(root))
    assert is_old(str(root))
    folder = Folder.begin(str(root), old_made_with(root), take_over=True)
    assert not is_old(str(root))
    after = content(root)
    assert after.pop("dataset-1.json") == before["dataset.json"]
    assert after.pop(".uncommitted/00009.tar") == before.pop("00009.tar")
    assert json.loads(after.pop("made_with.json"))["taken_over_from"] == 1
    assert after == before
    assert old_digests(str(root)) == digests
    stats = [folder.adopt(i) for i in range(5)]
    assert folder.adopt(9) is None
    write_manifest(str(root), "images", [s for s in stats if s is not None])
    assert old_digests(str(root)) == digests
    assert [s.born for s in Dataset.open(str(root)).shards] != list(digests.values())
    assert list(verify(str(root), contents=True)) == []
    folder.commit(9, {".tar": b"x", ".parquet": b"y"}, {"rows": 1, "count": 1})


@pytest.mark.parametrize("kind", ["img2dataset's", "two kinds", "staged work", "other settings"])
def test_what_cannot_be_taken_over_is_refused_and_nothing_changes(run, kind):
    root = run / "images"
    made_with = old_made_with(root)
    stats = root / "00003_stats.json"
    if kind == "img2dataset's":
        stats.write_text('{"count": 1, "successes": 1}')
    elif kind == "two kinds":
        record = json.loads(stats.read_text())
        record["fingerprint"]["settings"]["image_size"] = 99
        stats.write_text(json.dumps(record))
    elif kind == "staged work":
        shutil.copy(stats, root / ".staged" / "00003_stats.json")
    else:
        made_with = Fingerprint(made_with.stage, made_with.version, {**made_with.settings, "image_size": 99})
    before = content(root)
    wanted = {
        "img2dataset's": r"00003_stats\.json is not a stats file of Carrara",
        "two kinds": r"shards 00000 and 00003 were made with different settings \(settings\.image_size: (16|99) -> ",
        "staged work": r"\.staged: an older version was rewriting shards here.*or delete \.staged",
        "other settings": r"settings\.image_size: 16 -> 99.*--redo",
    }[kind]
    with pytest.raises(ConfigError, match=wanted):
        Folder.begin(str(root), made_with, take_over=True)
    assert content(root) == before


def test_a_worker_takes_nothing_over(run):
    from shards.settings import StageError

    with pytest.raises(StageError, match="made by an older version; run the stage that makes it"):
        Folder.begin(str(run / "images"), old_made_with(run / "images"))


def latents_stage(run: Path):
    settings = yaml.safe_load((run.parent / "run.yaml").read_text())
    config = LatentsConfig(**settings["latents"])
    return LatentsStage(config, RunPaths("run"), "weights/vae", "weights/clip", settings["seed"])


def test_latents_of_before_are_taken_over_and_not_encoded_again(run):
    stage = latents_stage(run)
    before = content(run / "latents")
    arrays = {k: np.array(v) for k, v in ColumnShard(Dataset.open(stage.root), 0).arrays.items()}
    assert engine.run(stage, f"{run}/status", RayConfig(), Pool(), local=True)
    after = content(run / "latents")
    assert {n: d for n, d in after.items() if n in before and n != "dataset.json"} == {
        n: d for n, d in before.items() if n != "dataset.json"
    }
    dataset = Dataset.open(stage.root)
    assert dataset.manifest["format_version"] == 2
    assert (len(dataset), dataset.manifest["without_latents"]) == (31, 0)
    for name, array in ColumnShard(dataset, 0).arrays.items():
        np.testing.assert_array_equal(array, arrays[name])
    assert not engine.run(stage, f"{run}/status", RayConfig(), Pool(), local=True)


def test_latents_of_before_that_are_of_other_images_are_refused(run):
    manifest = json.loads((run / "images/dataset.json").read_text())
    manifest["shards"][2]["digest"] = "0" * 32
    (run / "images/dataset.json").write_text(json.dumps(manifest))
    stage = latents_stage(run)
    before = content(run / "latents")
    with pytest.raises(ConfigError, match="shard 00002 was made of other images"):
        engine.run(stage, f"{run}/status", RayConfig(), Pool(), local=True)
    assert content(run / "latents") == before
    assert read_stats(stage.root, 2) is not None


def test_latents_made_of_images_of_format_1_are_still_theirs_once_those_are_taken_over(run):
    for file in (run / "latents").glob("00004*"):
        file.unlink()
    stage = latents_stage(run)
    assert engine.run(stage, f"{run}/status", RayConfig(), Pool(), local=True)
    before = content(run / "latents")
    images = run / "images"
    folder = Folder.begin(str(images), old_made_with(images), take_over=True)
    exclusions = Dataset(str(images), json.loads((images / "dataset-1.json").read_text())).exclusions
    name = write_exclusions(str(images), exclusions.tables())
    write_manifest(str(images), "images", [folder.adopt(i) or {} for i in range(5)], None, name)
    stage = latents_stage(run)
    assert [t.input for t in stage.tasks()][4] == (read_stats(stage.root, 4) or {})["input"]
    assert engine.run(stage, f"{run}/status", RayConfig(), Pool(), local=True), "the manifest, and nothing else"
    after = content(run / "latents")
    changed = {n for n in after if after[n] != before.get(n)}
    assert changed == {"dataset.json"}
