"""Triples from a table of edited captions: what `carrara edit` draws, killed and gone on with, ingested as two runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from eval import triples
from eval.edit import PairGenerator
from orchestration.run_stage import main
from shards.dataset import Dataset
from shards.images import ImageShard
from shards.layout import RunPaths
from shards.local import TMP_MARK

RED, BLUE, SMALL = "a red circle on white", "a blue circle on white", "a small red circle on white"
LINES = [
    {"input": RED, "edit": "make it blue", "output": BLUE},
    {"input": RED, "edit": "forget it", "output": "nothing alike"},  # no word in common
    {"input": BLUE, "edit": "make it <b>red</b>", "output": RED, "url": "more is passed over"},
]


@pytest.fixture
def command(run: RunPaths, tmp_path: Path) -> list[str]:
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    command = ["edit-table", run.run, "--table", str(table), "--out", str(tmp_path / "out"), "--seed", "7"]
    return [*command, "--count", "2", "--steps", "2"]


def test_it_is_what_edit_draws_and_a_killed_one_is_gone_on_with(
    run: RunPaths, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, drawn = tmp_path / "out", []
    monkeypatch.setattr(triples, "ROWS", 4)
    real = PairGenerator.draw

    def draw(self: PairGenerator, number: int, *given: Any) -> Any:
        if number == 5 and 5 not in drawn:
            drawn.append(5)
            raise KeyboardInterrupt
        drawn.append(number)
        return real(self, number, *given)

    monkeypatch.setattr(PairGenerator, "draw", draw)
    assert main(command) == 130
    assert sorted(p.name for p in out.iterdir()) == ["00000.parquet", "triples.json"]
    first = (out / "00000.parquet").read_bytes()
    assert main(command) == 0
    assert drawn == [0, 1, 4, 5, 4, 5]
    assert (out / "00000.parquet").read_bytes() == first
    assert main(command) == 0
    assert len(drawn) == 6
    rows = [r for name in ("00000", "00001") for r in pq.read_table(out / f"{name}.parquet").to_pylist()]
    assert [r["edit_prompt"] for r in rows] == [line["edit"] for line in LINES for _ in range(2)]
    for row in rows[2:4]:
        assert row["original_image"] is row["edited_image"] is None
        assert "no word in common" in row["error"]
    assert (
        main(
            [
                "edit",
                run.run,
                "--from",
                RED,
                "--to",
                BLUE,
                "--seed",
                "7",
                "--steps",
                "2",
                "--count",
                "2",
                "--out",
                str(tmp_path / "edit"),
            ]
        )
        == 0
    )
    for number in (0, 1):
        for name, column in (("before", "original_image"), ("after", "edited_image")):
            pixels = np.asarray(Image.open(io.BytesIO(rows[number][column])))
            assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / "edit" / f"{number:03d}-{name}.png")))
    assert rows[0]["original_image"] != rows[1]["original_image"]


def test_two_runs_over_it_have_the_same_keys(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    keys = []
    for name, column in (("after", "edited_image"), ("before", "original_image")):
        settings = {
            "run": str(tmp_path / name),
            "ingest": {
                "table": str(tmp_path / "out"),
                "source": {"kind": "parquet", "image_column": column},
                "columns": {"caption": "edit_prompt"},
                "duplicates": {"url": False, "bytes": False},
                "image_size": 32,
            },
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        assert main(["ingest", "--config", str(tmp_path / "run.yaml"), "--local"]) == 0
        shard = ImageShard(Dataset.open(str(tmp_path / name / "images")), 0)
        keys.append(dict(zip(shard.keys, shard.captions, strict=True)))
    assert keys[0] == keys[1]
    assert list(keys[0].values()) == [line["edit"] for line in (LINES[0], LINES[0], LINES[2], LINES[2])]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it has no lines"),
        ('{"input": "a", "edit": "b"}', "line 1 is no JSON object"),
        ('\n{"input": "a", "edit": "b", "output": " "}', "line 2 is no JSON object"),
        ("[]", "line 1 is no JSON object"),
        ("[" * 100_000, "line 1 is no JSON object"),
        (r'{"input": "a", "edit": "make it \ud83d", "output": "c"}', "line 1 is no JSON object"),
        (json.dumps({"input": "a", "edit": "b", "output": "c" * 10_001}), "output has more than"),
    ],
)
def test_a_bad_table_is_one_sentence(
    command: list[str], tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.jsonl").write_text(text)
    assert main(command) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--steps", "1", "--count", "1"]) == 0
    assert main(command) == 2
    assert "holds triples of another table" in capsys.readouterr().err
    about = tmp_path / "out" / "triples.json"
    for torn in (about.read_bytes()[:20], b"[]"):
        about.write_bytes(torn)
        assert main(command) == 2
        assert "holds no triples" in capsys.readouterr().err
    assert main([*command, "--out", str(about)]) == 2
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / f".triples.json{TMP_MARK}x-1-00000000").touch()  # by one that was killed
    assert main([*command, "--out", str(tmp_path / "begun")]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main([*command, "--out", str(tmp_path / "mine")]) == 2
    assert "holds no triples" in capsys.readouterr().err
    (tmp_path / "table.jsonl").write_text(json.dumps(LINES[1]))
    assert main([*command, "--out", str(tmp_path / "none")]) == 1
    assert "not one triple could be generated" in capsys.readouterr().err
