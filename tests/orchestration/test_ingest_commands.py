"""`carrara remove`, `ingest --retry` and `ingest --dry-run` over a whole run, as they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ingest import removal
from ingest.stage import IngestStage
from ingest.takedown import TakenDown
from orchestration import remove
from orchestration.config import RunConfig
from orchestration.lease import Lease
from orchestration.run_stage import main
from shards.columns import ColumnShard, keep_rows, unpack_columns
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import validate
from tests.ingest.site import Site, image_bytes
from tests.latents import world
from tests.train import tiny
from train import segments
from train.config import TrainConfig
from train.seen import Account

ROWS = 20


@pytest.fixture
def site():
    server = Site()
    yield server
    server.close()


@pytest.fixture
def config(site: Site, tmp_path: Path) -> Path:
    """A run of three shards of 8 rows; rows 3 and 17 are one picture under two URLs and captions."""
    rows = [(site.add(f"/{i}.png", image_bytes(3 if i == 17 else i, 32, 32)), f"caption {i}") for i in range(ROWS)]
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


def keys_of(root: str) -> list[str]:
    dataset = Dataset.open(root)
    return [k for p in range(len(dataset.shards)) for k in ColumnShard(dataset, p).keys]


def test_a_picture_is_taken_out_of_the_whole_run(
    site: Site, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("ingest", "latents"):
        assert main([stage, "--config", str(config), "--local"]) == 0
    paths = RunPaths(str(tmp_path / "run"))
    keys = keys_of(paths.latents)
    assert len(keys) == ROWS
    untouched = (Path(paths.latents) / "00001.safetensors").stat().st_mtime_ns
    before = {p.name: p.read_bytes() for p in Path(paths.latents).glob("*.safetensors")}
    reports = tmp_path / "run" / "reports"
    reports.mkdir()
    (reports / "latents.html").write_text("<figcaption>000003 &middot; 32</figcaption>")
    (reports / "latents.png").write_bytes(b"sheet")
    (reports / "other.html").write_text("<figcaption>000004 &middot; 32</figcaption>")

    (tmp_path / "list.txt").write_text(f"{site.url('/3.png')}\n\nhttp://127.0.0.1:1/never-there.png\n")
    command = ["remove", "--config", str(config), "--urls", str(tmp_path / "list.txt")]
    capsys.readouterr()
    looks: list[TakenDown] = []
    real = removal.find
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "find", lambda *a, **k: looks.append(a[2]) or real(*a, **k))
        assert main(command) == 0
    assert [(len(w.urls) > 0, len(w.bytes) > 0) for w in looks] == [(True, False), (False, True)]  # then for copies
    output = capsys.readouterr().out
    assert "taken down: 2 images" in output  # and the copy, row 17
    assert "images    2 shards blanked; 2 images are out" in output
    assert "latents   2 shards blanked" in output
    assert "1 of 2 entries are not in this run: http://127.0.0.1:1/never-there.png" in output
    assert f"{reports}/latents.html shows some of them" in output
    assert f"{reports}/latents.png shows some of them" in output
    assert "other.html" not in output
    assert keys_of(paths.latents) == [k for k in keys if k not in ("000003", "000021")]
    assert (Path(paths.latents) / "00001.safetensors").stat().st_mtime_ns == untouched
    after = Dataset.open(paths.latents)
    assert after.manifest["images"] == Dataset.open(paths.images).fingerprint
    for name, data in before.items():  # only what went is another thing: zeros
        ours, then = (unpack_columns(d)[0] for d in ((Path(paths.latents) / name).read_bytes(), data))
        gone = [3] if name == "00000.safetensors" else [1] if name == "00002.safetensors" else []
        for column in ("mean", "logstd", "tokens"):
            assert not ours[column][gone].any()
            assert np.array_equal(np.delete(ours[column], gone, 0), np.delete(then[column], gone, 0))
    for stage in ("ingest", "latents"):  # nothing is left to do, and nothing is fetched
        site.hits.clear()
        assert main([stage, "--config", str(config), "--local"]) == 0
        assert not site.hits
    assert Dataset.open(paths.latents).manifest == after.manifest
    # The same command again tells the same, and the list has no further part.
    parts = sorted(p.name for p in (tmp_path / "run" / "taken_down").iterdir())
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "taken down: 2 images" in again
    assert "1 of 2 entries" in again
    assert sorted(p.name for p in (tmp_path / "run" / "taken_down").iterdir()) == parts

    # A second removal, by host, takes the rest.
    assert main(["remove", "--config", str(config), "--host", "127.0.0.1"]) == 0
    assert f"taken down: {ROWS - 2} images" in capsys.readouterr().out
    assert (
        Dataset.open(paths.images).manifest["counts"] | {"success": 0, "opted_out": ROWS}
        == Dataset.open(paths.images).manifest["counts"]
    )


def test_the_checkpoints_that_saw_a_picture_are_named(tmp_path: Path) -> None:
    """By the inverse of the order: each checkpoint knows its own; one of an older order says perhaps."""
    run = tmp_path / "run"
    tiny.make_latents(run / "latents")
    paths = RunPaths(str(run))
    dataset = Dataset.open(paths.latents)
    history = segments.begin(TrainConfig(images=200, batch_size=8, streams=4, window=4), [dataset])

    def checkpoint(images: int, **order: Any) -> str:
        folder = run / "checkpoints" / f"step-{images:08d}"
        folder.mkdir(parents=True)
        manifest = {"images": images, "fingerprint": {}, "seed": 7, **order}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return str(folder)

    early, late = checkpoint(8, order=history.to_json()), checkpoint(16, order=history.to_json())
    old = checkpoint(24)
    account = Account({"order": history.to_json(), "seed": 7, "images": 16}, dataset)
    places = {
        (s.index, row): place
        for s in dataset.shards
        for row, place in enumerate(account.first(s.index, range(s.count)))
    }
    first = next(p for p, at in places.items() if at is not None and at < 8)
    second = next(p for p, at in places.items() if at is not None and 8 <= at < 16)
    never = next(p for p, at in places.items() if at is None or at >= 16)
    given = {"pretrained": "somewhere"}
    values = {"run": str(run), "ingest": {"table": "t.csv"}, "autoencoder": given, "clip": given}
    config = validate(RunConfig, values, "run.yaml")

    def saw(*rows: tuple[int, int]) -> dict[str, int | None]:
        hits = [removal.Hit(shard, row, "k", True, None, frozenset()) for shard, row in rows]
        return {folder: line["pictures"] for folder, line in remove.checkpoints(config, paths, hits).items()}

    assert saw(first, second, never) == {early: 1, late: 2, old: None}
    assert saw(second) == {late: 1, old: None}
    assert saw(never) == {old: None}
    assert saw() == {}


def test_what_remove_counts_is_what_a_whole_finish_counts(
    site: Site, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of duplicates that are taken down with their winner, and of one caption too many."""
    table = pq.read_table(tmp_path / "table.parquet")
    texts = ["the same" if 8 <= i < 12 else t for i, t in enumerate(table["caption"].to_pylist())]
    pq.write_table(table.set_column(1, "caption", pa.array(texts)), tmp_path / "table.parquet")
    more = ["ingest.caption_repeats=2", "ingest.duplicates.perceptual=any_caption"]
    assert main(["ingest", "--config", str(config), "--local", *more]) == 0
    (tmp_path / "list.txt").write_text(f"{site.url('/17.png')}\n{site.url('/4.png')}\n{site.url('/11.png')}\n")
    assert main(["remove", "--config", str(config), "--urls", str(tmp_path / "list.txt"), *more]) == 0
    images = tmp_path / "run" / "images"
    light = json.loads((images / "dataset.json").read_text())
    (images / "dataset.json").unlink()
    assert main(["ingest", "--config", str(config), "--local", *more]) == 0
    whole = json.loads((images / "dataset.json").read_text())
    assert {k: light[k] for k in whole} == whole


def test_remove_beside_a_running_ingest_leaves_it_the_work(
    site: Site, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list has its part at once; the ingest that holds the lease takes the pictures out, also if it was asked while
    it was finishing."""
    assert main(["ingest", "--config", str(config), "--local"]) == 0
    paths = RunPaths(str(tmp_path / "run"))
    (tmp_path / "list.txt").write_text(f"{site.url('/4.png')}\n")
    command = ["remove", "--config", str(config), "--urls", str(tmp_path / "list.txt")]
    capsys.readouterr()
    asked: list[int] = []
    real = IngestStage.finish

    def finish(stage: IngestStage, stats: Any) -> Any:
        manifest = real(stage, stats)
        if not asked:  # after the last look of the finish, and while the lease is still held
            asked.append(main(command))
        return manifest

    (Path(paths.images) / "dataset.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IngestStage, "finish", finish)
        assert main(["ingest", "--config", str(config), "--local"]) == 0
    assert asked == [0]
    assert "the running ingest takes them out when it finishes; stop it first" in capsys.readouterr().out
    manifest = Dataset.open(paths.images).manifest
    assert manifest["counts"]["opted_out"] == 1
    assert manifest["list"] == 2  # the URL, and its bytes


def test_latents_are_looked_through_again_where_the_images_were_blanked_later(
    site: Site, config: Path, tmp_path: Path
) -> None:
    """`remove` beside an ingest finds nothing in the latents yet; what that ingest takes out goes there too."""
    for stage in ("ingest", "latents"):
        assert main([stage, "--config", str(config), "--local"]) == 0
    paths = RunPaths(str(tmp_path / "run"))
    (tmp_path / "list.txt").write_text(f"{site.url('/4.png')}\n")
    command = ["remove", "--config", str(config), "--urls", str(tmp_path / "list.txt")]
    with Lease(paths.status, "ingest", paths.images):
        assert main(command) == 0
    assert "000004" in keys_of(paths.latents)
    assert main(["ingest", "--config", str(config), "--local"]) == 0
    assert len(keys_of(paths.latents)) == ROWS - 1
    with pytest.MonkeyPatch.context() as patch:  # and then nothing more is read
        patch.setattr(remove.latents_takedown, "take_out", None)
        for stage in ("ingest", "latents"):
            assert main([stage, "--config", str(config), "--local"]) == 0


def test_a_dry_run_then_an_ingest_then_a_retry(
    site: Site, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "carrara")
    command = ["ingest", "--config", str(config)]
    assert main([*command, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert not site.hits
    assert not (tmp_path / "run").exists()
    assert f"{ROWS:,}   100.0 %" in output
    assert "run a pilot" in output
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
    assert "rows may come now: run ingest with --retry transient" in "".join(caplog.messages)
    site.pages["/9.png"] = whole
    site.hits.clear()
    assert main([*command, *more, "--retry", "transient"]) == 0
    assert dict(site.hits) == {"/9.png": 1}
    manifest = json.loads((tmp_path / "run" / "images" / "dataset.json").read_text())
    assert manifest["errors"] == {}
    assert manifest["counts"]["success"] == ROWS
    lines = (tmp_path / "run" / "images" / "statistics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["success"] for line in lines) == ROWS
    assert len(lines) == 5  # the three of the table, and one a retry
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
        (["train", "--retry", "transient"], "no such option: --retry"),
        (["ingest", "--host", "x.org"], "no such option: --host"),
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
