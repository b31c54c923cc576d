"""A run that commit c20ac09 made (tests/fixtures) is taken over: nothing is fetched again, nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ingest import tables
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, url_digest
from orchestration.run_stage import main
from shards import commit, plan
from shards.dataset import Dataset, read_stats
from shards.images import ImageShard
from shards.layout import RunPaths
from shards.settings import ConfigError
from shards.verify import verify
from tests.ingest.site import Site, image_bytes

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_c20ac09.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, unpacked; its paths are relative."""
    with tarfile.open(FIXTURE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage_of(split: str = "train") -> IngestStage:
    from orchestration.config import RunConfig
    from shards.settings import validate

    config = validate(RunConfig, yaml.safe_load(Path("run.yaml").read_text()), "run.yaml")
    root = RunPaths("run").images if split == "train" else RunPaths("run").heldout
    return IngestStage(config.ingest, root, split, config.seed)


def stored(root: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(root).iterdir() if p.name[0].isdigit()}


def live(root: str) -> dict[str, bytes]:
    dataset = Dataset.open(root)
    found = {}
    for position in range(len(dataset.shards)):
        shard = ImageShard(dataset, position)
        found |= {k: shard.image_bytes(i) for i, k in enumerate(shard.keys)}
    return found


def test_a_run_of_an_earlier_version_is_taken_over_whole(old: Path) -> None:
    roots = ("run/images", "run/heldout")
    before = {root: (stored(root), live(root), json.loads(Path(root, "dataset.json").read_text())) for root in roots}
    assert main(["ingest", "--config", "run.yaml", "--local"]) == 0  # no page is served: whatever is fetched would fail
    for root in roots:
        files, pictures, was = before[root]
        assert stored(root) == files
        assert live(root) == pictures
        now = json.loads(Path(root, "dataset.json").read_text())
        assert now["format_version"] == 2
        assert now["counts"] == was["counts"]
        assert now["errors"] == was["errors"]
        assert now["list"] == 1
        lines = list(plan.read(root).lines())
        assert [line.shard for line in lines] == [s["index"] for s in was["shards"]]
        assert {Path(line.file).name for line in lines} == {"part-1.csv", "part-2.csv"}
    assert main(["ingest", "--config", "run.yaml", "--local"]) == 0
    assert stored(roots[0]) == before[roots[0]][0]


def test_it_grows_is_retried_and_gives_up_pictures(old: Path) -> None:
    site = Site()
    try:
        url = site.add("/new.png", image_bytes(99, 32, 32))
        Path("table/part-0.csv").write_text(f"url,caption\n{url},a new one\n")
        before = live("run/images")
        assert main(["ingest", "--config", "run.yaml", "--local"]) == 0
        after = live("run/images")
        assert {k: after[k] for k in before} == before
        assert len(after) == len(before) + 1  # by its caption, the new row is of this split
        manifest = Dataset.open("run/images").manifest
        assert (read_stats("run/images", 5) or {})["rows"] == 1
        # Rows of old shards are taken over by new ones (the server of then is gone, so they fail again).
        assert main(["ingest", "--config", "run.yaml", "--local", "--retry", "http_server_error"]) == 0
        retried = Dataset.open("run/images").manifest
        assert retried["counts"]["rows"] == manifest["counts"]["rows"]
        assert sum(retried["errors"].values()) == sum(manifest["errors"].values())
        assert [t["rows"] for t in retried["shards"]][-1] == 1
        assert retried["counts"]["success"] == manifest["counts"]["success"]
        # Old sidecars hold no digests; what is listed is found by their texts.
        row = next(
            r
            for r in pq.read_table("run/images/00001.parquet").to_pylist()
            if r["status"] == "success" and r["key"] in before
        )
        Path("more.txt").write_text(row["url"] + "\n")
        assert main(["remove", "--config", "run.yaml", "--urls", "more.txt"]) == 0
        assert set(after) - set(live("run/images")) == {row["key"]}
        assert not any(before[row["key"]] in data for data in stored("run/images").values())
        assert pq.read_schema("run/images/00001.parquet").get_field_index("url_digest") >= 0
    finally:
        site.close()


def test_rows_that_are_added_are_held_out_by_the_hash_of_then(old: Path) -> None:
    """At the first command, which takes the run over, and at those behind it."""
    for name in ("part-3.csv", "part-4.csv"):
        captions = [f"{name} {i}" for i in range(100)]
        Path("table", name).write_text("url,caption\n" + "".join(f"http://127.0.0.1:1/{c},{c}\n" for c in captions))
        stage_of().begin()
        then = tables.blake2b(pa.array(captions), 3) < int(0.2 * 2**64)
        for split in ("train", "heldout"):
            stage = stage_of(split)
            assert "hash" not in json.loads(Path(stage.root, "made_with.json").read_text())["settings"]["split"]
            layout = stage.layout()
            lines = [line for line in plan.read(stage.root).lines() if line.file.endswith(name)]
            parts = [tables.read_range(layout, line, stage.heldout_rule(layout), split) for line in lines]
            found = [c for part in parts for c in part["caption"].to_pylist()]
            assert found == [c for c, out in zip(captions, then.tolist(), strict=True) if out == (split == "heldout")]


def test_the_list_of_then_still_holds(old: Path) -> None:
    listed = TakenDown.read("run")
    (gone,) = [line.strip() for line in Path("table/part-1.csv").read_text().splitlines() if "/12.png" in line]
    url = gone.split(",")[0]
    assert listed.has_url(url)
    assert listed.parts == 1
    assert TakenDown.of(urls=[url_digest(url)]).urls.numbers.tolist() == listed.urls.numbers.tolist()


def test_a_table_that_changed_since_is_refused(old: Path) -> None:
    files = stored("run/images")
    lines = Path("table/part-1.csv").read_text().splitlines(keepends=True)
    Path("table/part-1.csv").write_text("".join([lines[0], "http://127.0.0.1:1/x.png,a row in front\n", *lines[1:]]))
    with pytest.raises(ConfigError, match=r"shards that an earlier version made .* were made of other rows"):
        stage_of().begin()
    assert stored("run/images") == files


def test_other_settings_are_refused(old: Path) -> None:
    files = stored("run/images")
    assert main(["ingest", "--config", "run.yaml", "--local", "ingest.image_size=32"]) == 2
    assert stored("run/images") == files
    assert not os.path.exists("run/images/made_with.json")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ingest", "latents"])
def test_a_take_down_that_was_killed_in_the_latents_is_ended(
    old: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Killed before the sidecar of a latent shard was replaced: either stage ends it."""
    assert main(["latents", "--config", "run.yaml", "--local"]) == 0
    row = next(r for r in pq.read_table("run/images/00000.parquet").to_pylist() if r["status"] == "success")
    TakenDown.of(urls=[url_digest(row["url"])]).create("run")
    replace = commit.Files.replace

    def dying(files: commit.Files, name: str, data: bytes) -> None:
        if "latents" in files.root and name.endswith(".parquet"):
            raise KeyboardInterrupt
        replace(files, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(commit.Files, "replace", dying)
        with contextlib.suppress(KeyboardInterrupt):
            main(["ingest", "--config", "run.yaml", "--local"])
    assert list(verify("run/latents"))
    assert main([command, "--config", "run.yaml", "--local"]) == 0
    table = pq.read_table("run/latents/00000.parquet")
    assert table["error"][table["key"].to_pylist().index(row["key"])].as_py() == "taken_down"
    assert not list(verify("run/latents", contents=True))
