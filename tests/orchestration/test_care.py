"""`verify`, `why`, `status` and `serve` on what is no run, and on runs that are damaged beside their shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestration.remove import settle_curated
from orchestration.run_stage import main
from shards.dataset import MANIFEST
from shards.layout import RunPaths
from shards.stage import open_folder
from tests.orchestration.test_engine import local
from tests.orchestration.toy import ToyStage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with image shards of the toy stage, and a column beside them."""
    for root, name in (("images", "ingest"), ("scores/nice", "score-nice")):
        local(ToyStage(str(tmp_path / root), str(tmp_path / "calls"), shards=3, name=name))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    assert main([str(a) for a in arguments]) == code, capsys.readouterr()
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.out + found.err


@pytest.mark.parametrize("command", [("verify",), ("verify", "--deep"), ("why", "0"), ("status",), ("serve",)])
def test_what_is_no_run_is_not_said_to_be_well(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").write_bytes(b"x")
    (tmp_path / "carrara.yaml").write_text("run: x")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty", "photos", "carrara.yaml", "carrara.yaml/deeper"):
        name = str(tmp_path / name)
        line = said(capsys, command[0], name, *command[1:], code=2)
        assert line == (
            f"carrara: {name}: there is no run here; give the folder that 'run' names in its configuration\n"
        )


def test_verify_looks_at_columns_too_and_names_the_command_that_makes_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "scores/nice: 3 of 3 shards are as they were committed" in said(capsys, "verify", run, code=0)
    (run / "scores/nice/00001.txt").unlink()
    assert "run `carrara score` to make them again" in said(capsys, "verify", run, code=1)


def test_a_dataset_that_is_not_finished_is_looked_at_as_far_as_it_is_committed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "images" / MANIFEST).unlink()
    (run / "images/00002_stats.json").unlink()  # begun, and not committed
    line = said(capsys, "verify", run, code=0)
    assert f"{run}/images: 2 of 2 shards are as they were committed; it is not finished" in line
    (run / "images/00001.txt").write_bytes((run / "images/00001.txt").read_bytes()[::-1])
    assert "nothing is damaged" in said(capsys, "verify", run, code=0)
    assert "images/00001.txt does not have the sha256 that was committed" in said(
        capsys, "verify", run, "--deep", code=1
    )


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("made_with.json", "images/made_with.json: cannot be read; it is not a file of Carrara, or was damaged"),
        ("plan/00000.parquet", "images/plan/00000.parquet: this part of the plan is damaged"),
        (MANIFEST, f"images/{MANIFEST}: not a manifest"),
    ],
)
def test_what_is_damaged_beside_the_shards_is_told_and_no_shard_is_to_be_deleted_for_it(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, told: str
) -> None:
    (run / "images" / file).parent.mkdir(exist_ok=True)
    (run / "images" / file).write_text("{torn")
    line = said(capsys, "verify", run, code=1)
    assert told in line
    assert "--discard" not in line
    assert "00001: committed" in said(capsys, "why", run, "1", code=0)


def test_why_tells_of_a_shard_whose_sidecar_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = ToyStage(str(run / "latents"), str(run / "calls"), name="latents", data=".parquet")
    open_folder(stage).commit(7, {".parquet": b"PAR1"}, {"count": 1, "rows": 1}, None)
    (run / "latents/00007.parquet").write_bytes(b"x")
    assert "00007.parquet (1 bytes; 4 WERE COMMITTED)" in said(capsys, "why", run, "7", code=0)


@pytest.mark.parametrize("command", [("verify",), ("why", "0"), ("status",), ("serve",)])
def test_a_store_that_is_not_reached_is_one_sentence(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(capsys, command[0], "nostore://bucket/run", *command[1:], code=2)
    assert line == (
        "carrara: nostore://bucket/run: cannot be looked at (ValueError: Protocol not known: nostore); correct the URL "
        "or the credentials, of which `carrara doctor --run nostore://bucket/run` says more\n"
    )


def test_a_file_that_a_file_manager_left_among_the_scores_is_passed_by(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "scores/.DS_Store").write_bytes(b"x")
    assert "scores/nice: 3 of 3" in said(capsys, "verify", run, code=0)
    assert "score-nice 00001" in said(capsys, "why", run, "1", code=0)
    shutil.rmtree(run / "scores/nice")
    assert settle_curated(RunPaths(str(run))) == {}, "a take-down passes it by too"
