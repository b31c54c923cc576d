"""`carrara init` and `carrara schema`: what is told of every kind of path; what is written is taken as it is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from orchestration import checks, init
from orchestration.config import RunConfig, load
from orchestration.run_stage import main
from shards.dataset import Dataset
from shards.settings import ConfigError
from tests.ingest import test_own_images as own
from tests.ingest.test_sources import make_tar
from tests.latents import world
from tests.orchestration.head import ROOT
from tests.train.test_export import save_checkpoint
from tests.train.test_tuning import make_run
from train.export import export


def image(width: int, height: int, kind: str = "JPEG", seed: int = 0) -> bytes:
    sink = io.BytesIO()
    world.draw(np.random.default_rng(seed), width, height).save(sink, kind)
    return sink.getvalue()


def folder(root: Path) -> Path:
    """Ten images of 300 to 390 pixels, most of them wide; eight with captions, one with two of them."""
    (root / "deep").mkdir(parents=True)
    for n in range(10):
        path = root / ("deep" if n % 2 else ".") / f"{n}.jpg"
        path.write_bytes(image(600 if n > 2 else 300 + 10 * n, 300 + 10 * n))
        if n == 0:
            path.with_suffix(".json").write_text(json.dumps({"captions": ["a box", "a square"]}))
        elif n < 8:
            path.with_suffix(".txt").write_text(f"number {n}")
    return root


def imagefolder(root: Path) -> Path:
    root.mkdir()
    lines = []
    for n in range(3):
        (root / f"{n}.png").write_bytes(image(64, 64, "PNG", n))
        lines.append({"file_name": f"{n}.png", "text": f"number {n}"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def plain_tars(root: Path) -> Path:
    """As anybody makes them: no JSON, one sample without an image, and nothing beside the tar."""
    root.mkdir()
    members: list[tuple[str, bytes]] = [("lost.txt", b"no image")]
    for n in range(4):
        members += [(f"{n}.webp", image(520, 530, "WEBP", n)), (f"{n}.cls", b"7")]
    make_tar(root / "shard.tar", members)
    return root


def urls(root: Path) -> Path:
    table = pa.table({"URL": [f"http://photos.example/{n}.jpg" for n in range(3000)], "TEXT": ["words"] * 3000})
    pq.write_table(table, root)
    return root


def own_rows(root: Path) -> Path:
    return own.rows_of_files(root, 0, 8)


MADE: list[tuple[Callable[[Path], Path], str, dict[str, Any]]] = [
    (
        folder,
        "a folder of images; 10 images, 8 of them with 9 captions; ",
        {"image_size": 256, "resize_mode": "keep_ratio", "buckets": {"step": 64}},
    ),
    (imagefolder, "a folder of images; 3 images, 3 of them with 3 captions", {"image_size": 64}),
    (
        lambda root: own.parquet(root, 0, 8),
        "parquet or Arrow files with the images' bytes; 8 images, 8 of them with 8 captions",
        {},
    ),
    (lambda root: own.webdataset(root, 0, 8), "WebDataset tars; 8 images, 8 of them with 8 captions", {}),
    (
        plain_tars,
        "WebDataset tars; 4 images, 4 of them with 4 captions; ",
        {"image_size": 512, "resize_mode": "center_crop", "buckets": None, "heldout_fraction": 0.0},
    ),
    (
        urls,
        "a table of URLs; 1 file; the URLs are in 'URL', the captions in 'TEXT'; about 3,000 rows",
        {"heldout_fraction": 0.05},
    ),
    (own_rows, "its rows name files below", {"files_below": True}),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> list[str]:
    """Overrides: random weights in place of those on the hub, which no test can reach."""
    root = tmp_path_factory.mktemp("weights")
    run = make_run(root / "run")
    save_checkpoint(run, 10, seed=2)
    vae, clip = Path(run.autoencoder) / "model", Path(run.clip) / "model"
    return [f"autoencoder.pretrained={vae}", f"clip.pretrained={clip}", f"train.start_from={export(run.run)}"]


@pytest.mark.parametrize(("make", "told", "wanted"), MADE, ids=range(len(MADE)))
def test_what_is_written_is_loaded_and_passes_all_checks_as_it_is(
    make: Callable[[Path], Path],
    told: str,
    wanted: dict[str, Any],
    weights: Any,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    wanted = dict(wanted)
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / ("table.parquet" if make is urls else "own # \U0001f4f7: 'x'"))
    assert main(["init", str(path), "--out", "mine #1.yaml"]) == 0
    assert told in capsys.readouterr().out
    config = load("mine #1.yaml", (), str(tmp_path))
    assert (config.train.adapter is None) == (make is urls)  # few images tune a model, a table trains one
    config = load("mine #1.yaml", weights[: 2 if make is urls else 3], str(tmp_path))
    assert (config.ingest.table, config.run) == (str(path), str(tmp_path / "runs" / "mine #1"))
    for name in ("ingest", "autoencoder", "clip", "latents", "train"):
        checks.check_static(name, config)
    if make is plain_tars:  # whose captions are all the same
        with pytest.raises(ConfigError, match="no prompts"):
            checks.check_static("eval", config)
    else:
        checks.check_static("eval", config)
    assert config.latents.resolution == config.ingest.image_size
    below = wanted.pop("files_below", None)
    assert config.ingest.source.files_below == ((str(tmp_path / path.parent / "photos"),) if below else ())
    if "buckets" in wanted:
        buckets = wanted.pop("buckets")
        assert (config.latents.buckets is not None) == (buckets is not None)
    assert {k: getattr(config.ingest, k) for k in wanted} == wanted
    assert main(["init", str(path), "--out", "mine #1.yaml"]) == 2  # never over one that is there
    assert "is there already; give --out another name" in capsys.readouterr().err


@pytest.mark.parametrize("make", own.SOURCES)
def test_ingest_takes_every_source_by_the_yaml_that_was_written(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "own", 0, 6)
    assert main(["init", str(path)]) == 0
    assert main(["ingest", "--config", "carrara.yaml", "--local"]) == 0
    stored = [len(Dataset.open(f"runs/carrara/{name}")) for name in ("images", "heldout")]
    assert min(stored) > 0
    assert sum(stored) == 6


def test_images_without_captions_are_kept_and_that_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    for n in range(4):
        (tmp_path / "bare" / f"{n}.png").write_bytes(image(70, 70, "PNG", n))
    assert main(["init", "bare"]) == 0
    assert "empty_captions: keep" in Path("carrara.yaml").read_text()
    assert "# heldout_fraction" in Path("carrara.yaml").read_text()  # no two captions, so none is held out
    assert main(["ingest", "--config", "carrara.yaml", "--local"]) == 0
    assert len(Dataset.open("runs/carrara/images")) == 4


def test_rows_of_files_elsewhere_have_their_common_folder_and_no_other(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["/data/my photos/a/1.jpg", "file:///data/my%20photos/b/2.jpg", "/data/my photos/ab.jpg"]
    pq.write_table(pa.table({"url": rows, "caption": ["x"] * 3}), "table.parquet")
    assert main(["init", "table.parquet"]) == 0
    assert yaml.safe_load(Path("carrara.yaml").read_text())["ingest"]["source"] == {"files_below": ["/data/my photos"]}
    mixed = [*rows, "http://photos.example/3.jpg"]
    pq.write_table(pa.table({"url": mixed, "caption": ["x"] * 4}), "table.parquet")
    assert main(["init", "table.parquet", "--out", "mixed.yaml"]) == 0
    assert "source" not in yaml.safe_load(Path("mixed.yaml").read_text())["ingest"]


def test_what_cannot_be_used_is_one_sentence_and_leaves_no_yaml(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.md").write_text("no image")
    (tmp_path / "lost").mkdir()
    make_tar(tmp_path / "lost" / "0.tar", [("a.txt", b"no image")])
    (tmp_path / "cut.tar").write_bytes(b"\x01" * 2000)
    (tmp_path / "photos.zip").write_bytes(b"PK")
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    said = {
        "nowhere": "there is no file or folder",
        "empty": "holds neither images nor tars",
        "notes": "holds neither images nor tars",
        "lost": "there are no images in",
        "cut.tar": "no images",
        "photos.zip": "unpack it",
        "numbers.parquet": "ingest.columns.url",
        "nosuch://bucket/x": "cannot be opened",
    }
    for path, words in said.items():
        assert main(["init", path]) == 2, path
        err = capsys.readouterr().err
        assert words in err, err
        assert err.count("carrara: ") == 1
        assert "Traceback" not in err
        assert not Path("carrara.yaml").exists()
    assert main(["init", "numbers.parquet", "--out", "no/such/x.yaml"]) == 2
    assert "there is no folder no/such for --out" in capsys.readouterr().err


def test_names_of_files_in_comments_cannot_become_settings(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tars").mkdir()
    name = "x\nseed: 7\n\x01.tar"
    make_tar(tmp_path / "tars" / name, [("a.jpg", image(64, 64)), ("a.txt", b"one"), ("b.txt", b"no image")])
    assert main(["init", "tars"]) == 0
    assert "x seed: 7" in Path("carrara.yaml").read_text()
    assert load("carrara.yaml", (), str(tmp_path)).seed == 0


def test_sizes_are_of_images_from_the_whole_folder_and_of_no_more_than_200(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many").mkdir()
    for n in range(300):
        side = 32 if n < 190 else 128
        Image.new("RGB", (side, side)).save(tmp_path / "many" / f"{n:03d}.png")
    found = init._images(str(tmp_path / "many"), "folder")
    assert found.images == 300
    assert found.sizes.shape == (200, 2)
    assert 55 <= (found.sizes == 128).all(axis=1).sum() <= 95  # 110 of 300, and not the first 200's 10


@pytest.mark.slow
def test_all_runs_from_what_init_wrote(weights: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A LoRA of twenty images, with no setting changed but the weights and how long it takes."""
    monkeypatch.chdir(tmp_path)
    own.folder(tmp_path / "photos", 0, 20)
    assert main(["init", "photos"]) == 0
    shorter = ["train.images=32", "train.checkpoint_every_images=32", "eval.num_prompts=2", "eval.steps=2"]
    assert main(["all", "--config", "carrara.yaml", "--local", *weights, *shorter]) == 0
    assert main(["plan", "--config", "carrara.yaml", "--samples", "4", *weights]) == 0
    assert (tmp_path / "runs/carrara/model/lora/pytorch_lora_weights.safetensors").exists()
    assert list((tmp_path / "runs/carrara/reports").glob("*.html"))


# ---- the schema --------------------------------------------------------------------------------------------


def test_the_schema_is_one_and_takes_what_carrara_takes(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        checker.validate(yaml.safe_load(path.read_text()))
    monkeypatch.chdir(tmp_path)
    urls(tmp_path / "table.parquet")
    assert main(["init", "table.parquet"]) == 0
    checker.validate(yaml.safe_load(Path("carrara.yaml").read_text()))
    # A filter's `in` is spelled as in the YAML, and so it is in the schema.
    good = {"run": "r", "ingest": {"table": "t", "filters": [{"column": "LANGUAGE", "in": ["en"]}]}}
    checker.validate(good)
    for wrong in (
        {**good, "ingest": {}},
        {**good, "trian": {}},
        {**good, "latents": {"resolution": "many"}},
        {**good, "latents": {"batchsize": 4}},
        {**good, "curate": {"scores": {"clip": {"kind": "clop"}}}},
    ):
        assert not checker.is_valid(wrong), wrong
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(ConfigError):
            load("wrong.yaml", (), str(tmp_path), tables=False)


def test_every_setting_is_in_the_schema_with_its_description(capsys: Any) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    adopt = schema["$defs"]["ingest__config__SourceConfig"]["properties"]["adopt"]
    assert "leave the images where they lie" in adopt["description"]
    assert adopt["default"] is False
