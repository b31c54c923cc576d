"""`carrara remove`, `ingest --retry` and `ingest --dry-run` over a whole run, as they are called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from orchestration import remove
from orchestration.run_stage import main
from shards.columns import ColumnShard, keep_rows, unpack_columns
from shards.dataset import Dataset
from shards.layout import RunPaths
from tests.ingest.site import Site, picture
from tests.latents import world
from train.order import Order

ROWS = 20


@pytest.fixture
def site():
    server = Site()
    yield server
    server.close()


@pytest.fixture
def config(site: Site, tmp_path: Path) -> Path:
    """A run of three shards of 8 rows; rows 3 and 17 are one picture under two URLs and captions."""
    rows = [(site.add(f"/{i}.png", picture(3 if i == 17 else i, 32, 32)), f"caption {i}") for i in range(ROWS)]
    urls, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"url": urls, "caption": texts}), tmp_path / "table.parquet")
    settings = {
        "run": str(tmp_path / "run"),
        "ingest": {
            "table": str(tmp_path / "table.parquet"),
            "samples_per_shard": 8,
            "image_size": 32,
            "encode_format": "png",
            "fetch": {"allow_addresses": ["127.0.0.1/32"]},
        },
        "autoencoder": {"pretrained": str(world.save_vae(tmp_path / "vae"))},
        "clip": {"pretrained": str(world.save_clip(tmp_path / "clip"))},
        "latents": {"resolution": 32, "batch_size": 4, "text": "embeddings", "device": "cpu"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def fake_checkpoint(paths: RunPaths, step: int, images: int, data: str) -> str:
    """A checkpoint as far as its manifest goes, which is all that is read here."""
    folder = Path(paths.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = {"images": images, "fingerprint": {"input": data, "settings": {"seed": 5, "shuffle_window": 2}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def test_a_picture_is_taken_out_of_the_whole_run(
    site: Site, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("ingest", "latents"):
        assert main([stage, "--config", str(config), "--local"]) == 0
    paths = RunPaths(str(tmp_path / "run"))
    before = Dataset.open(paths.latents)
    keys = [k for p in range(3) for k in ColumnShard(before, p).keys]
    assert len(keys) == ROWS
    untouched = (Path(paths.latents) / "00001.safetensors").stat().st_mtime_ns
    # Which of the two comes when, by the definition of the order: one position after another.
    order = Order(before.counts, before.fingerprint, 5, 2)
    place = [(int(s), int(r)) for s, r in zip(*order.locate(np.arange(ROWS)), strict=True)]
    first, second = sorted((place.index((0, 3)), place.index((2, 1))))
    assert remove.first_positions(order, [(2, 1), (0, 3)]) == [first, second]
    folders = [
        fake_checkpoint(paths, 1, first, before.fingerprint),  # saw neither: positions 0 .. first - 1
        fake_checkpoint(paths, 2, first + 1, before.fingerprint),
        fake_checkpoint(paths, 3, 1000, before.fingerprint),
        fake_checkpoint(paths, 4, 10, "another state"),
    ]

    (tmp_path / "list.txt").write_text(f"{site.url('/3.png')}\n\nhttp://127.0.0.1:1/never-there.png\n")
    command = ["remove", "--config", str(config), "--urls", str(tmp_path / "list.txt")]
    capsys.readouterr()
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "taken down: 2 pictures" in told
    assert f"{folders[1]}: 1 of them" in told
    assert f"{folders[2]}: 2 of them" in told
    assert f"{folders[3]}: perhaps" in told
    assert folders[0] not in told
    assert "latents   2 shards rewritten" in told
    after = Dataset.open(paths.latents)
    assert [k for p in range(3) for k in ColumnShard(after, p).keys] == [
        k for k in keys if k not in ("000003", "000021")
    ]
    assert (Path(paths.latents) / "00001.safetensors").stat().st_mtime_ns == untouched
    for stage in ("ingest", "latents"):  # nothing is left to do, and nothing is fetched
        site.hits.clear()
        assert main([stage, "--config", str(config), "--local"]) == 0
        assert not site.hits
    assert Dataset.open(paths.latents).manifest == after.manifest
    # The same command again tells the same of the checkpoints, though nothing can be computed any more.
    assert main(command) == 0
    assert capsys.readouterr().out.split("checkpoints")[1] == told.split("checkpoints")[1]

    # Encoding the rewritten image shards from the start gives these very latents.
    cut = {p.name: p.read_bytes() for p in Path(paths.latents).glob("*.safetensors")}
    rows = {p.name: pq.read_table(p) for p in Path(paths.latents).glob("*.parquet")}
    for file in Path(paths.latents).iterdir():
        file.unlink()
    assert main(["latents", "--config", str(config), "--local"]) == 0
    for name, data in cut.items():
        ours, again = unpack_columns(data)[0], unpack_columns((Path(paths.latents) / name).read_bytes())[0]
        assert ours.keys() == again.keys()
        for column, values in ours.items():
            np.testing.assert_allclose(values.astype(float), again[column].astype(float), atol=2e-3, err_msg=column)
    for name, table in rows.items():
        assert pq.read_table(Path(paths.latents) / name).equals(table)


def test_a_dry_run_then_an_ingest_then_a_retry(
    site: Site, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ingest", "--config", str(config)]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert not site.hits
    assert not (tmp_path / "run").exists()
    assert f"{ROWS:,}   100.0 %" in told
    assert "run a pilot" in told
    whole = site.pages["/9.png"]
    site.add("/9.png", b"", 503)
    more = ["ingest.fetch.retries=0", "--local"]
    assert main([*command, *more]) == 0
    manifest = json.loads((tmp_path / "run" / "images" / "dataset.json").read_text())
    assert manifest["errors"] == {"http_server_error": 1}
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0
    assert f"measured on {ROWS} requests of this run" in capsys.readouterr().out
    # Still down: nothing is lost. Up again: the row is there, and only it was asked for.
    assert main([*command, *more, "--retry", "transient"]) == 0
    assert json.loads((tmp_path / "run" / "images" / "dataset.json").read_text())["errors"] == manifest["errors"]
    site.pages["/9.png"] = whole
    site.hits.clear()
    assert main([*command, *more, "--retry", "transient"]) == 0
    assert dict(site.hits) == {"/9.png": 1}
    manifest = json.loads((tmp_path / "run" / "images" / "dataset.json").read_text())
    assert manifest["errors"] == {}
    assert manifest["counts"]["success"] == ROWS
    lines = (tmp_path / "run" / "images" / "statistics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["success"] for line in lines) == ROWS
    for again in ([], ["--retry", "transient"]):
        site.hits.clear()
        assert main([*command, *more, *again]) == 0
        assert not site.hits
    # Other rules for duplicates change no shard, but the pass over them is done again.
    assert main([*command, *more, "ingest.duplicates.perceptual=any_caption"]) == 0
    assert not site.hits
    manifest = json.loads((tmp_path / "run" / "images" / "dataset.json").read_text())
    assert manifest["duplicates_by"] == {"duplicate_picture": 1}


def test_options_belong_to_their_commands(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["all", "--dry-run"], "no such option: --dry-run; `carrara all --help`"),
        (["train", "--retry", "transient"], "no such option: --retry; `carrara train --help`"),
        (["ingest", "--host", "x.org"], "no such option: --host; `carrara ingest --help`"),
        (["ingest", "--dry-run", "--retry", "transient"], "does not go with --retry"),
        (["remove"], "remove needs --urls FILE, --sha256 FILE or --host NAME"),
        (["ingest", "--retry", "nonsense"], "--retry 'nonsense'"),
        (["ingest", "--retry", "transient", "--local"], "run ingest without --retry first"),
    ):
        assert main([*arguments, "--config", str(config)]) == 2
        assert sentence in capsys.readouterr().err


def test_columns_keep_the_rows_they_are_told() -> None:
    arrays = {
        "mean": np.arange(8, dtype=np.float16).reshape(4, 2),
        "embeddings": np.array([[10.0], [20.0], [30.0]], np.float16),
        "embedding_index": np.array([2, 0, 1, 2], np.int32),
        "empty_tokens": np.arange(5, dtype=np.uint16),
    }
    found = keep_rows(arrays, np.array([0, 3]), 4)
    assert found["mean"].tolist() == [[0, 1], [6, 7]]
    assert found["embeddings"].tolist() == [[30.0]]
    assert found["embedding_index"].tolist() == [0, 0]
    assert found["embedding_index"].dtype == np.int32
    assert found["empty_tokens"] is arrays["empty_tokens"]
    with pytest.raises(ValueError, match="'mean' has 4 rows where there are 5"):
        keep_rows(arrays, np.array([0]), 5)
