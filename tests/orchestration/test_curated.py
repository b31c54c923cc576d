"""Scores, captions and rules over a whole run, by its commands: from a folder to latents, and a take-down."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import shards.stage as stage_module
from orchestration import remove
from orchestration.run_stage import main
from orchestration.status import read
from orchestration.status import table as status_table
from shards.columns import unpack_columns
from shards.commit import Folder
from shards.dataset import Dataset
from shards.fingerprint import Fingerprint
from shards.stage import Task
from tests.curate.test_captions import completion, endpoint, picture_of, serve  # noqa: F401
from tests.latents import world
from train.config import TrainConfig
from train.latent_samples import Latents

COUNT = 24


def drawn(number: int) -> bytes:
    """Noise whose contrast rises with its number, so that its entropy does."""
    rng = np.random.default_rng(number)
    pixels = 128 + rng.integers(-4 - 5 * number, 5 + 5 * number, (32, 32, 3))
    sink = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def config(tmp_path: Path, serve: Any) -> Path:  # noqa: F811
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(COUNT):
        (photos / f"{n:02d}.png").write_bytes(drawn(n))
        (photos / f"{n:02d}.txt").write_text(f"<script>alert({n})</script> number {n}")
    server = serve(lambda n, body: (200, completion(f"seen as {np.asarray(picture_of(body)).std():.6f}"), {}))
    settings = {
        "run": str(tmp_path / "run"),
        "ingest": {"table": str(photos), "samples_per_shard": 8, "image_size": 32, "encode_format": "png"},
        "autoencoder": {"pretrained": str(world.save_vae(tmp_path / "vae"))},
        "clip": {"pretrained": str(world.save_clip(tmp_path / "clip"))},
        "curate": {
            "scores": {"clip": {"kind": "clip", "device": "cpu"}, "pixels": {"kind": "pixels"}},
            "captions": {"seen": {**endpoint(server), "prompts": ["What is it?"]}},
        },
        "latents": {
            "resolution": 32,
            "batch_size": 4,
            "device": "cpu",
            "select": [{"column": "pixels.entropy", "min_quantile": 0.5}],
            "captions": ["seen"],
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def carrara(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_a_folder_to_selected_latents_with_new_captions(config: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert carrara("latents", "--config", config, "--local") == 2  # no images yet
    assert carrara("ingest", "--config", config, "--local") == 0
    assert carrara("latents", "--config", config, "--local") == 2
    assert "there is no finished score 'pixels'" in capsys.readouterr().err
    for stage in ("score", "caption"):
        assert carrara(stage, "--config", config, "--local") == 0
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
        assert carrara(stage, "--config", config, "--local") == 0
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == before
    output = status_table(read(str(run)))
    for line in ("score-clip", "score-pixels", "caption-seen"):
        assert line in output
    assert carrara("select", "--config", config, "--dry-run", "--count", "5") == 0
    funnel = capsys.readouterr().out
    assert "takes 11" in funnel  # a threshold is the lower edge of its bin
    page = (run / "reports" / "select-latents.html").read_text()
    assert page.count("<figure>") == 5
    assert "<script>" not in page
    assert html.escape("<script>alert(") in page
    assert carrara("latents", "--config", config, "--local") == 0
    manifest = Dataset.open(str(run / "latents")).manifest
    assert manifest["status"] == {"success": 13, "filtered": 11}
    # The pictures of more contrast are those of more entropy.
    latents = Dataset.open(str(run / "latents"))
    rows = [r for s in latents.shards for r in latents.sidecar(s.index).to_pylist()]
    chosen = {int(r["caption"].rpartition(" ")[2]) for r in rows if r["status"] == "success"}
    assert chosen == set(range(11, 24))
    assert {r["error"] for r in rows if r["status"] == "filtered"} == {"not_selected"}
    reader = Latents(TrainConfig(images=100, batch_size=4, captions={"caption": 1, "seen": 1}), [latents], 0)
    said = reader.captions(np.arange(13), ["caption", "seen"])
    assert all(len(new) == 1 and new[0].startswith("seen as ") for _, new in said)
    assert {c[0].rpartition(" ")[2] for c, _ in said} == {str(n) for n in range(11, 24)}
    # A take-down reaches all of it: of one that is encoded and of one that was not selected.
    url = {int(r["caption"].rpartition(" ")[2]): r["sha256"] for r in rows}
    (tmp_path / "list").write_text(f"{url[20]}\n{url[2]}\n")
    assert carrara("remove", "--config", config, "--sha256", tmp_path / "list") == 0
    gone = {r["key"] for r in rows if r["sha256"] in (url[20], url[2])}
    for folder in ("scores/clip", "scores/pixels", "captions/seen"):
        dataset = Dataset.open(str(run / folder))
        for info in dataset.shards:
            table = pq.read_table(run / folder / f"{info.name}.parquet")
            arrays, _ = unpack_columns((run / folder / f"{info.name}.safetensors").read_bytes())
            for row in table.to_pylist():
                values = [v for k, v in row.items() if k not in ("key", "column_row")]
                assert any(v is not None for v in values) == (row["key"] not in gone)
                if row["key"] in gone and "image" in arrays:
                    assert not arrays["image"][row["column_row"]].any()
    scores = Dataset.open(str(run / "scores" / "pixels")).manifest["columns"]["entropy"]["sketch"]
    assert sum(scores.values()) == COUNT - 2
    assert Dataset.open(str(run / "captions" / "seen")).manifest["fates"] == {"captioned": COUNT - 2}
    assert Dataset.open(str(run / "latents")).manifest["count"] == 12
    with pytest.MonkeyPatch.context() as patch:  # they were looked through: nothing of them is read again
        patch.setattr(remove.curate_takedown, "take_out", None)
        for stage in ("ingest", "score", "caption", "latents"):
            assert carrara(stage, "--config", config, "--local") == 0, stage
    assert Dataset.open(str(run / "latents")).manifest["count"] == 12


def test_thresholds_stay_when_the_folder_grows(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("ingest", "score", "caption", "latents"):
        assert carrara(stage, "--config", config, "--local") == 0
    made = json.loads((run / "latents" / "made_with.json").read_text())["settings"]["select"]
    before = {p.name: p.read_bytes() for p in (run / "latents").glob("0*.safetensors")}
    for n in range(30, 38):
        (tmp_path / "photos" / f"{n:02d}.png").write_bytes(drawn(n))
        (tmp_path / "photos" / f"{n:02d}.txt").write_text(f"number {n}")
    for stage in ("ingest", "score", "caption", "latents"):
        assert carrara(stage, "--config", config, "--local") == 0, stage
    assert json.loads((run / "latents" / "made_with.json").read_text())["settings"]["select"] == made
    assert Dataset.open(str(run / "latents")).manifest["status"]["success"] == 13 + 8
    after = {p.name: p.read_bytes() for p in (run / "latents").glob("0*.safetensors")}
    assert {n: after[n] for n in before} == before


def test_what_a_store_refuses_for_a_moment_is_not_made_again(
    config: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every stage over shards: the first commit of each shard fails, and no shard does."""
    monkeypatch.setattr(stage_module, "PERSIST_PAUSES_S", (0.0,))
    tried: set[tuple[str, int]] = set()
    real = Folder.commit

    def commit(self: Folder, index: int, *given: Any, **more: Any) -> dict[str, Any]:
        if (self.root, index) not in tried:
            tried.add((self.root, index))
            raise OSError(503, "slow down")
        return real(self, index, *given, **more)

    monkeypatch.setattr(Folder, "commit", commit)
    for stage in ("ingest", "score", "caption", "latents"):
        assert carrara(stage, "--config", config, "--local") == 0
    task = Task(0)
    stage_module.commit(Folder.begin(str(tmp_path / "eval"), Fingerprint("eval", 1, {}), take_over=True), task, made)
    assert len(tried) == 5 * 3 + 1
    assert not [r for r in caplog.records if "failed (1 of" in r.getMessage()]


def made() -> stage_module.Made:
    return {".tar": b"tar", ".parquet": b"parquet"}, {"rows": 1, "count": 1}
