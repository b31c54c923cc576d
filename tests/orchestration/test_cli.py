"""The command line: every mistake is one sentence and exit code 2 before any work; status; where paths lead."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from orchestration import config as config_module
from orchestration import status
from orchestration.config import RunConfig, base_folder, find_config, load
from orchestration.demo import _headline
from orchestration.run_stage import main
from shards.settings import ConfigError
from tests.orchestration.head import ROOT

MINIMAL = {"run": "runs/x", "ingest": {"table": "table.csv"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("CARRARA_CONFIG", "CARRARA_ROOT", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "table.csv").write_text("url,caption\nhttp://127.0.0.1:9/x.png,a picture\n")
    return tmp_path


def write(path: Path, data: object = MINIMAL) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert main(arguments) == code
    err = capsys.readouterr().err
    [line] = [x for x in err.splitlines() if not x.startswith("INFO ")]
    assert line.startswith("carrara: ")
    return line


def test_mistakes_are_one_sentence_and_exit_2(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --config FILE, set CARRARA_CONFIG, or put a carrara.yaml here" in sentence(capsys, "latents")
    assert "no.yaml: there is no such configuration file" in sentence(capsys, "latents", "--config", "no.yaml")
    assert "no stage or command 'latent'; did you mean 'latents'?" in sentence(capsys, "latent")
    assert "there are ingest, autoencoder" in sentence(capsys, "zzzzzz")
    assert "required: command" in sentence(capsys)
    assert "unrecognized arguments: --lokal" in sentence(capsys, "latents", "--lokal")
    write(here / "carrara.yaml")
    line = sentence(capsys, "latents", "latents.batchsize=64")
    assert "unknown key 'latents.batchsize'; did you mean 'batch_size'?" in line
    assert "'latents.batch_size'" in sentence(capsys, "latents", "latents.batch_size=many")
    assert "did you mean 'latents'?" in sentence(capsys, "ingest", "latens.batch_size=3")
    assert "unknown key 'ray.latents.worker'; did you mean 'workers'?" in sentence(
        capsys, "latents", "ray.latents.worker=3"
    )
    line = sentence(capsys, "ingest", "ingest.table=nothing/*.parquet")
    assert f"'ingest.table': there is no file, folder or match for {here}/nothing/*.parquet" in line
    assert "run the stage 'ingest' first" in sentence(capsys, "latents")
    assert "run the stage 'latents' first" in sentence(capsys, "train")
    assert "run the stage" in sentence(capsys, "eval")
    assert "submit needs a stage" in sentence(capsys, "submit")
    assert "status needs the run's folder" in sentence(capsys, "status")
    assert "nowhere: there is no run here" in sentence(capsys, "status", "nowhere")
    (here / "carrara.yaml").write_text("run: [")
    assert "cannot be read as YAML" in sentence(capsys, "latents")
    write(here / "carrara.yaml", {"run": "x"})
    assert "'ingest' is missing" in sentence(capsys, "latents")
    assert not (here / "runs").exists()


def test_a_mistake_is_found_without_ray_and_from_any_folder(here: Path) -> None:
    write(here / "c.yaml")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'ray', 'torch'} & set(sys.modules), 'heavy imports for nothing'"
    )
    script = str(ROOT / "orchestration" / "run_stage.py")
    found = subprocess.run(
        [sys.executable, "-c", code, script, "latents", "--config", "c.yaml", "train.imges=3"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr == "carrara: c.yaml: unknown key 'train.imges'; did you mean 'images'?\n"


def test_pretrained_weights_skip_the_fit(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(here / "carrara.yaml", {**MINIMAL, "clip": {"pretrained": "ViT-B-32:laion2b_s34b_b79k"}})
    assert main(["clip"]) == 0
    assert "skipped, because the configuration names pretrained weights: ViT-B-32:" in caplog.text


def test_the_configuration_is_found_by_option_then_variable_then_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here / "carrara.yaml")
    assert find_config(None, str(here)) == "carrara.yaml"
    monkeypatch.setenv("CARRARA_CONFIG", str(write(here / "b.yaml")))
    assert find_config(None, str(here)) == str(here / "b.yaml")
    write(here / "c.yaml")
    assert find_config("c.yaml", str(here)) == "c.yaml"
    # A job's copy of the working folder lacks what .gitignore names; then it is looked for where Ray was started.
    (here / "copy").mkdir()
    monkeypatch.chdir(here / "copy")
    monkeypatch.delenv("CARRARA_CONFIG")
    assert find_config(None, str(here)) == str(here / "carrara.yaml")
    assert find_config("c.yaml", str(here)) == str(here / "c.yaml")


def test_relative_paths_become_absolute_and_names_on_a_hub_stay(here: Path) -> None:
    (here / "vae").mkdir()
    (here / "w.safetensors").touch()
    data = {
        **MINIMAL,
        "autoencoder": {"pretrained": "vae"},
        "clip": {"pretrained": "ViT-B-32:w.safetensors"},
        "eval": {"clip": "ViT-B-32:openai"},
    }
    found = load(str(write(here / "c.yaml", data)), ["run=s3://bucket/run"], str(here))
    assert found.run == "s3://bucket/run"
    assert found.ingest.table == f"{here}/table.csv"
    assert found.autoencoder.pretrained == f"{here}/vae"
    assert found.clip.pretrained == f"ViT-B-32:{here}/w.safetensors"
    assert found.eval.clip == "ViT-B-32:openai"
    assert load(str(here / "c.yaml"), [], str(here)).run == f"{here}/runs/x"


def test_what_relative_paths_are_relative_to(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_folder() == (str(here), "the current folder")
    package = here / f"{config_module.JOB_PACKAGE}0123"
    package.mkdir()
    monkeypatch.chdir(package)
    with pytest.raises(ConfigError, match="set CARRARA_ROOT"):
        base_folder()  # no Ray daemon is above this process
    monkeypatch.setenv("CARRARA_ROOT", str(here))
    assert base_folder() == (str(here), "CARRARA_ROOT")
    monkeypatch.setenv("CARRARA_ROOT", str(here / "nothing"))
    with pytest.raises(ConfigError, match="not a folder"):
        base_folder()


def test_the_demos_configuration_is_valid() -> None:
    found = load(str(ROOT / "configs/demo.yaml"), [], str(ROOT), tables=False)
    assert isinstance(found, RunConfig)
    assert found.ingest.has_heldout


def test_status_reads_the_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    base = {"unit": "shards", "began": now - 100, "figures": {"images/s": 12.345678}, "host": "h", "pid": 1}
    records = {
        "ingest": {"state": "done", "done": 8, "total": 8, "rate": 2.0, "seconds_left": None, "updated": now - 3700},
        "latents": {"state": "running", "done": 3, "total": 12, "rate": 0.5, "seconds_left": 95.0, "updated": now - 1},
        "train": {"state": "running", "done": 10, "total": 100, "rate": 0.0, "seconds_left": None, "updated": now - 90},
    }
    (tmp_path / "status/latents-failed").mkdir(parents=True)
    for name, record in records.items():
        (tmp_path / f"status/{name}.json").write_text(json.dumps({**base, **record, "stage": name}))
    (tmp_path / "status/latents-failed/00004.json").write_text("{}")
    (tmp_path / "status/clip.json").write_text("half a fi")
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert list(cells) == ["stage", "ingest", "autoencoder", "clip", "latents", "train", "eval"]
    assert cells["ingest"] == "done 8/8 shards (100 %) 2 shards/s 1 h 01 min ago images/s 12.35"
    assert cells["latents"] == "running 3/12 shards (25 %) 1 0.5 shards/s 1 min 35 s 1 s ago images/s 12.35"
    assert cells["train"].startswith("silent 10/100 shards (10 %)")
    assert cells["clip"] == cells["eval"] == "not begun"


def test_the_demo_ends_with_labelled_numbers() -> None:
    measured = {"value": 0.9, "se": 0.01, "low": 0.88, "high": 0.92, "n": 100}
    common = {"unit": "share", "better": "higher", "definition": "x"}
    metrics = {
        "metrics": {
            "shows_colour": {**measured, **common, "label": "Shows colour"},
            "retrieval": {**measured, **common, "label": "Prompt found from image"},
        },
        "by_tag": {},
    }
    assert _headline({}) == []
    lines = _headline(metrics)
    assert [line.split(":")[0] for line in lines] == ["Prompt found from image", "Shows colour"]
    assert all("90" in line for line in lines)


def test_durations() -> None:
    told = [status.duration(s) for s in (0.4, 59, 60, 3599, 3600, 47 * 3600, 72 * 3600)]
    assert told == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "47 h 00 min", "3 days"]


def test_doctor_knows_the_token_trap(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (here / "token").write_text("t" * 32)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "token"))
    line = sentence(capsys, "doctor", code=1)
    assert "export RAY_AUTH_MODE=token for the head, the submitter and the drivers alike" in line
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    write(here / "carrara.yaml")
    assert main(["doctor"]) == 0
    assert f"run          {here}/runs/x" in capsys.readouterr().out
