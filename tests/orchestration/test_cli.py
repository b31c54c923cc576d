"""The command line: every mistake is one sentence and exit code 2 before any work; status; where paths lead."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zoneinfo
from pathlib import Path

import pytest
import yaml

from orchestration import config as config_module
from orchestration import status, watch
from orchestration.commands import parser
from orchestration.config import RunConfig, base_folder, find_config, load, load_of_run
from orchestration.demo import _headline
from orchestration.run_stage import main
from shards import local, storage
from shards.fingerprint import Fingerprint
from shards.settings import ConfigError, load_sections
from tests.objects import bucket
from tests.orchestration.head import ROOT
from train.config import TrainConfig, TrainingSections
from train.state import differences

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
    assert "name a stage or a command" in sentence(capsys)
    assert "no such option: --lokal" in sentence(capsys, "latents", "--lokal")
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
    assert "missing argument 'COMMAND...'" in sentence(capsys, "submit")
    assert "missing argument 'RUN'; `carrara status --help`" in sentence(capsys, "status")
    assert "did you mean 'latents'?" in sentence(capsys, "submit", "latentes")
    assert "--rows 2000` gives a number of rows" in sentence(capsys, "ingest", "--dry-run", "2000")
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


def test_every_field_that_names_a_file_is_meant_from_where_the_user_stands(here: Path) -> None:
    """In a Ray job, and in its workers, the current folder is another one."""
    for name in ("base", "vae", "judge", "pick", "t5", "tower"):
        (here / name).mkdir()
    head = {"kind": "head", "weights": "head.safetensors"}
    data = {
        **MINIMAL,
        "ingest": {**MINIMAL["ingest"], "source": {"files_below": ["photos", "s3://b/photos"]}},
        "curate": {
            "scores": {"clip": {"kind": "clip", "model": "ViT-B-32:openai"}, "nice": head},
            "captions": {"long": {"model": "judge"}},
        },
        "autoencoder": {"start_from": "vae"},
        "latents": {
            **MINIMAL.get("latents", {}),
            "text_encoder": {"kind": "transformers", "pretrained": "t5"},
            "features": {"pretrained": "tower"},
        },
        "train": {
            "start_from": "base",
            "adapter": {"start_from": "style.safetensors"},
            "sources": [{"latents": None}, {"latents": "more/latents"}, {"latents": "s3://b/latents"}],
            "validation": {"latents": "held"},
        },
        "eval": {
            "judge": {"model": "judge"},
            "preference": {"pickscore": "pick", "hps": "hps.pt", "aesthetic": "a.pth"},
            "fid_statistics": {"fid_tf": "coco.npz"},
            "inception": "download",
        },
    }
    found = load(str(write(here / "c.yaml", data)), [], str(here))
    train, judged = found.train, found.eval
    assert train.adapter
    assert train.validation
    assert judged.judge
    assert judged.preference
    assert (found.autoencoder.start_from, train.start_from) == (f"{here}/vae", f"{here}/base")
    assert found.latents.text_encoder
    assert found.latents.text_encoder.pretrained == f"{here}/t5"
    assert found.latents.features
    assert found.latents.features.pretrained == f"{here}/tower"
    assert train.adapter.start_from == f"{here}/style.safetensors"
    assert [s.latents for s in train.sources] == [None, f"{here}/more/latents", "s3://b/latents"]
    assert (train.validation.latents, judged.judge.model) == (f"{here}/held", f"{here}/judge")
    preference = judged.preference
    assert preference.pickscore == f"{here}/pick"
    assert (preference.hps, preference.aesthetic) == (f"{here}/hps.pt", f"{here}/a.pth")
    assert preference.aesthetic_clip == "ViT-L-14:openai"
    assert judged.fid_statistics == {"fid_tf": f"{here}/coco.npz"}
    assert found.ingest.source.files_below == (f"{here}/photos", "s3://b/photos")
    scores, captions = found.curate.scores, found.curate.captions
    assert (scores["clip"].model, scores["nice"].weights) == ("ViT-B-32:openai", f"{here}/head.safetensors")
    assert captions["long"].model == f"{here}/judge"
    # `deepspeed train/main.py`, which knows the training sections alone, means the same.
    alone = load_sections(str(here / "c.yaml"), [], TrainingSections)
    assert (alone.run, alone.train) == (found.run, found.train)


def test_how_a_path_is_written_is_no_change_of_a_setting(here: Path) -> None:
    """Of fits whose manifests hold relative paths, as those of earlier versions do."""
    (here / "base").mkdir()
    config = TrainConfig(start_from=f"{here}/base", sources=[{"latents": f"{here}/a"}])
    wanted = Fingerprint("train", 1, config.settings(), "data")
    [source] = config.settings()["sources"]
    stored = {"settings": {**config.settings(), "start_from": "base", "sources": [{**source, "latents": "a"}]}}
    assert differences("train", config, wanted, stored) == ([], [])
    stored["settings"]["start_from"] = "other"
    assert len(differences("train", config, wanted, stored)[0]) == 1


def test_in_a_job_folders_are_meant_from_where_it_was_submitted(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "runs/x/status").mkdir(parents=True)
    package = here / f"{config_module.JOB_PACKAGE}0123"
    package.mkdir()
    monkeypatch.chdir(package)
    monkeypatch.setenv("CARRARA_SENT_FROM", str(here))
    for command in ("verify", "clean", "status"):
        assert main([command, "runs/x"]) == 0, capsys.readouterr().err
    assert f"{here}/runs/none: there is no run here" in sentence(capsys, "verify", "runs/none")
    assert f"{here}/runs/x has 0 results of m" in sentence(capsys, "compare", "runs/x:m", "runs/x:m")
    line = sentence(capsys, "export", "runs/x", code=1)
    assert f"{here}/runs/x/checkpoints" in line


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
    heldout = {**base, **records["train"], "state": "finishing", "stage": "heldout", "updated": now - 1}
    (tmp_path / "status/heldout.json").write_text(json.dumps(heldout))
    (tmp_path / "status/ingest-retry.json").write_text(json.dumps({**base, **records["ingest"], "done": 3, "total": 3}))
    (tmp_path / "status/reference-failed").mkdir()
    (tmp_path / "status/reference-failed/00000.json").write_text("{}")
    (tmp_path / "status/config.json").write_text("{}")
    (tmp_path / "status/clip.json").write_text("half a fi")
    (tmp_path / "status/eval.json").write_text(json.dumps({**base, **records["train"], "done": "\x00"}))
    (tmp_path / "status/prior.json").write_text('{"state": "running"}')
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert list(cells) == [
        "stage",
        "ingest",
        "heldout",
        "ingest-retry",
        "autoencoder",
        "clip",
        "latents",
        "prior",
        "train",
        "eval",
        "reference",
    ]
    assert cells["heldout"].startswith("finishing 10/100")
    assert cells["ingest-retry"].startswith("done 3/3")
    assert cells["reference"] == "not begun 1"
    assert cells["ingest"] == "done 8/8 shards (100 %) 2 shards/s 1 h 01 min ago images/s 12.35"
    assert cells["latents"] == "running 3/12 shards (25 %) 1 0.5 shards/s 1 min 35 s 1 s ago images/s 12.35"
    assert cells["train"].startswith("silent (running) 10/100 shards (10 %)")
    assert cells["autoencoder"] == "not begun"
    for stage in ("clip", "eval", "prior"):
        url = tmp_path / f"status/{stage}.json"
        assert cells[stage] == f"unreadable {url} is damaged or cut short; the stage's next command writes it anew"
    assert main(["status", str(tmp_path), "--json"]) == 0
    output = {r["stage"]: r for r in json.loads(capsys.readouterr().out)}
    assert output["latents"]["failed"] == 1
    assert output["heldout"]["state"] == "finishing"
    assert output["clip"]["state"] == "unreadable"


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
    output = [status.duration(s) for s in (0.4, 59, 60, 3599, 3600, 47 * 3600, 72 * 3600)]
    assert output == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "47 h 00 min", "3 days"]


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


def test_every_command_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for name in [*parser.names(), "human pack"]:
        assert main([*name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert f"Usage: carrara {name} " in text
        assert len(text.split("\n\n")[1].strip()) > 20, f"{name} says nothing of what it does"
        seen.add(text)
    assert len(seen) == len(parser.names()) + 1
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("carrara 0.")


def test_one_option_has_one_spelling_everywhere() -> None:
    groups = parser.group()
    options = {o for c in groups.commands.values() for p in c.params for o in p.opts if o.startswith("--")}
    assert "--guidance-scale" in options
    assert not options & {"--guidance", "--dtype", "--output", "--n", "--num-inference-steps"}
    for option in options:
        assert option == option.lower()
        assert "_" not in option


def test_overrides_reach_into_lists_and_numbers_are_names_where_names_are_meant(here: Path) -> None:
    filters = [{"column": "similarity", "min": 0.2}, {"column": "width", "min": 64}]
    path = str(write(here / "c.yaml", {**MINIMAL, "ingest": {**MINIMAL["ingest"], "filters": filters}}))
    found = load(path, ["ingest.filters.1.min=2", "run=20240101"], str(here))
    assert [f.min for f in found.ingest.filters] == [0.2, 2]
    assert found.run == f"{here}/20240101"
    assert load(path, ["run=2024-01-01"], str(here)).run == f"{here}/2024-01-01"
    with pytest.raises(ConfigError, match=r"'ingest.filters' is a list of 2; name one .* ingest.filters.0 to"):
        load(path, ["ingest.filters.2.min=2"], str(here))
    with pytest.raises(ConfigError, match="is a list of 2"):
        load(path, ["ingest.filters.min=2"], str(here))
    with pytest.raises(ConfigError, match="the key 'workers' is given twice"):
        load(path, ["ray.latents={workers: 1, workers: 2}"], str(here))


def test_all_says_what_is_wrong_with_any_stage_before_the_first_begins(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = {"embed_dim": 8, "vision_cfg": {"image_size": 32}, "text_cfg": {}}
    ingest = {**MINIMAL["ingest"], "image_size": 64}
    good = {"run": "runs/x", "ingest": ingest, "clip": {"model": clip}, "latents": {"resolution": 64}}
    for wrong, says in (
        ({"clip": {}}, "clip.model.embed_dim is missing"),
        ({"clip": {"pretrained": "nowhere"}}, "the CLIP 'nowhere' is not a folder"),
        ({"autoencoder": {"pretrained": "no where"}}, "the VAE 'no where' is neither a folder nor a file here"),
        ({"autoencoder": {"model": {"block_out_chanels": [32]}}}, "autoencoder.model: AutoencoderKL cannot be built"),
        ({"latents": {"resolution": 128}}, "latents.resolution is 128 and ingest.image_size 64"),
        (
            {"latents": {"resolution": 64, "more_resolutions": [96]}},
            "latents.resolution is 96 and ingest.image_size 64",
        ),
        ({"latents": {"resolution": 64, "buckets": {"step": 32}}}, "set ingest.resize_mode to keep_ratio"),
        (
            {"latents": {"resolution": 64, "crop": "random"}},
            "set ingest.resize_mode to keep_ratio, or leave latents.crop",
        ),
        ({"train": {"batch_size": 15, "ranks": 2}}, "train.batch_size is 15, which 2 ranks cannot share"),
        ({"train": {"unet": {"atention_head_dim": 8}}}, "train.unet: .* did you mean 'attention_head_dim'"),
        ({"train": {"start_from": str(here)}}, "train.start_from: .* holds no UNet"),
        ({"eval": {"prompts_file": "none.txt"}}, "eval.prompts_file: there is no "),
    ):
        write(here / "carrara.yaml", {**good, **wrong})
        line = sentence(capsys, "all", "--local")
        assert re.search(says, line), line
        assert not (here / "runs").exists(), "nothing was begun"


def test_a_run_that_cannot_be_written_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here / "carrara.yaml")
    (here / "file").write_text("mine")
    assert f"run: {here}/file: it, or a folder on its way, is a file" in sentence(
        capsys, "ingest", "run=file", "--local"
    )
    assert (here / "file").read_text() == "mine"

    def refuse(url: str, *_: object) -> None:
        raise PermissionError(13, "Permission denied", url)

    monkeypatch.setattr(storage, "write_json", refuse)
    assert "may not be written to; set 'run' to a folder" in sentence(capsys, "ingest", "--local")


def test_a_run_knows_its_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "mine.yaml", {**MINIMAL, "latents": {"batch_size": 7}, "ingest": {"table": "table.csv"}})
    assert main(["ingest", "--config", "mine.yaml", "--local"]) == 1  # its one address is not a public one
    capsys.readouterr()
    found = load_of_run("runs/x", ["latents.batch_size=9"], str(here))
    assert found is not None
    assert (found.run, found.latents.batch_size) == (f"{here}/runs/x", 9)
    assert load_of_run("runs/y", [], str(here)) is None
    assert "watch" not in sentence(capsys, "watch", "runs/y")  # no such run: a configuration is asked for
    (here / "mine.yaml").unlink()
    capsys.readouterr()
    assert main(["watch", "runs/x", "--once", "--local"]) == 0  # which finds no checkpoint
    # A copy of the run, or a run that was moved, is worked on where it lies.
    shutil.copytree(here / "runs/x", here / "copy")
    found = load_of_run("copy", [], str(here))
    assert found is not None
    assert found.run == f"{here}/copy"


def test_a_finished_stage_stays_finished_when_a_later_try_fails(tmp_path: Path) -> None:
    from orchestration.config import Pool, RayConfig
    from orchestration.engine import run
    from tests.orchestration.drive import toy

    run(toy(tmp_path), f"{tmp_path}/status", RayConfig(), Pool(), local=True)
    before = json.loads((tmp_path / "status/toy.json").read_text())
    assert (before["state"], before["done"]) == ("done", 12)
    with pytest.raises(ConfigError, match="salt"):
        run(toy(tmp_path, salt="pepper"), f"{tmp_path}/status", RayConfig(), Pool(), local=True)
    assert json.loads((tmp_path / "status/toy.json").read_text()) == before


def test_doctor_takes_overrides_and_proves_a_store(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "no-token"))
    write(here / "carrara.yaml")
    assert main(["doctor", "run=elsewhere"]) == 0
    assert f"run          {here}/elsewhere" in capsys.readouterr().out
    assert list((here / "elsewhere").iterdir()) == []
    assert main(["doctor", "--run", f"{here}/bucket"]) == 0
    assert "MB/s up" in capsys.readouterr().out
    (here / "file").write_text("mine")
    assert f"{here}/file: cannot be written to" in sentence(capsys, "doctor", "run=file", code=1)
    monkeypatch.setattr(storage, "_create", lambda url, data, _: storage.write_atomic(url, data) or True)
    assert "use one that has conditional puts" in sentence(capsys, "doctor", "--run", f"{here}/bucket", code=1)


def test_verify_names_what_is_damaged_and_clean_removes_what_the_dead_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestration.config import Pool, RayConfig
    from orchestration.engine import run
    from tests.orchestration.toy import ToyStage

    stage = ToyStage(f"{tmp_path}/images", f"{tmp_path}/calls")
    run(stage, f"{tmp_path}/status", RayConfig(), Pool(), local=True)
    assert main(["verify", str(tmp_path)]) == 0
    assert "12 of 12 shards are as they were committed" in capsys.readouterr().out
    data = (tmp_path / "images/00004.txt").read_bytes()
    (tmp_path / "images/00004.txt").write_bytes(data[::-1])
    assert main(["verify", str(tmp_path)]) == 0, "sizes alone"
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--deep"]) == 1
    output = capsys.readouterr()
    assert "00004.txt does not have the sha256" in output.out
    assert "1 damaged; put the files back from a copy, or delete" in output.err
    assert main(["verify", str(tmp_path), "--deep", "--discard"]) == 1
    assert "of which 1 shards were deleted; run `carrara ingest`" in capsys.readouterr().err
    run(stage, f"{tmp_path}/status", RayConfig(), Pool(), local=True)
    assert main(["verify", str(tmp_path), "--deep"]) == 0
    assert (tmp_path / "images/00004.txt").read_bytes() == data
    left = tmp_path / f"images/.00001.txt{local.TMP_MARK}{local._host()}-{2**22 + 1}-abcd1234"
    mine, user = (
        tmp_path / f"images/.x{local.TMP_MARK}{local._host()}-{os.getpid()}-abcd1234",
        tmp_path / "notes.tmp",
    )
    for path in (left, mine, user):
        path.write_bytes(b"x" * 1000)
    assert main(["clean", str(tmp_path), "--dry-run"]) == 0
    assert "would remove" in capsys.readouterr().out
    assert left.exists()
    assert main(["clean", str(tmp_path)]) == 0
    assert not left.exists()
    assert mine.exists()
    assert user.exists()


def test_verify_looks_at_checkpoints_on_an_object_store(capsys: pytest.CaptureFixture[str]) -> None:
    run = "memory://verified-run"
    folder = storage.join(run, "checkpoints", "step-00000010")
    files = {"weights.safetensors": {"size": 4, "sha256": hashlib.sha256(b"good").hexdigest()}}
    storage.write_atomic(storage.join(folder, "weights.safetensors"), b"good")
    storage.write_json(storage.join(folder, "manifest.json"), {"format_version": 1, "files": files})
    assert main(["verify", run, "--deep"]) == 0
    assert "1 of 1 checkpoints are whole" in capsys.readouterr().out
    storage.write_atomic(storage.join(folder, "weights.safetensors"), b"gone")
    assert main(["verify", run, "--deep"]) == 1
    assert "weights.safetensors does not have the sha256" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [["eval=3", "eval.steps=2"], ["eval.grid.samplers.0=ddim"]])
def test_any_pipelines_settings_are_read_as_a_runs_are(
    here: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    sentence(capsys, "eval", "--model", "nowhere", "--run", "out", *overrides)
    assert not (here / "out").exists()


def test_cron_moments_follow_the_clocks_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 25 October 2026 Berlin's clocks go back an hour: six in the morning stays six in the morning."""
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    at = [datetime.datetime(2026, 10, 24, 20, 0, tzinfo=berlin)]
    monkeypatch.setenv("TZ", "Europe/Berlin")
    summer, winter = datetime.datetime(2026, 7, 1), datetime.datetime(2026, 12, 1)
    offsets = {str(m): m.replace(tzinfo=watch.local_time().tzinfo).utcoffset() for m in (summer, winter)}
    assert offsets == {str(m): m.replace(tzinfo=berlin).utcoffset() for m in (summer, winter)}
    due = watch.clock("0 6 * * *", lambda: at[0])
    at[0] = datetime.datetime(2026, 10, 25, 5, 30, tzinfo=berlin)
    assert not due()
    at[0] = datetime.datetime(2026, 10, 25, 6, 0, 1, tzinfo=berlin)
    assert due()


@pytest.mark.parametrize("name", ["train.py", "eval", "demo.py"])
def test_a_users_own_module_of_our_names_does_not_take_its_place(tmp_path: Path, name: str) -> None:
    if name.endswith(".py"):
        (tmp_path / name).write_text("raise SystemExit('the user\\'s own ran')\n")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the user\\'s own ran')\n")
    code = "from orchestration.run_stage import main; import sys; sys.exit(main(['ingest', '--config', 'none.yaml']))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.yaml: there is no such configuration file" in done.stderr
    # Where it was imported already there is nothing to put in front: it is said.
    first = f"import sys, types; m = types.ModuleType('{name.removesuffix('.py')}'); " + (
        f"import importlib.machinery as i; m.__spec__ = i.ModuleSpec(m.__name__, None, origin='{tmp_path}/{name}'); "
        "sys.modules[m.__name__] = m\n"
    )
    done = subprocess.run([sys.executable, "-c", first + code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"is {tmp_path}/{name}, and not Carrara's own package" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_of_each_operation_whether_a_store_has_it(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "no-token"))
    with bucket() as store:
        for run in (f"{store}/run", str(here / "run")):
            assert main(["doctor", "--run", run]) == 0
            out = capsys.readouterr().out
            assert len(re.findall(r"^ {13}.+: yes$", out, flags=re.M)) == 5
            assert "NO" not in out
            assert re.search(r": \d+ MB/s up, \d+ MB/s down", out)
            assert re.search(r"clock: [0-4] s ahead of this machine's", out)
            assert storage.list_names(run) == []
        # What does not hold is named, and the rest is looked at all the same.
        real = storage.read_ranges
        monkeypatch.setattr(storage, "read_ranges", lambda url, ranges: [b"?" * (b - a) for a, b in ranges])
        monkeypatch.setattr(storage, "written_at", lambda url: time.time() - 3600)
        line = sentence(capsys, "doctor", "--run", f"{store}/run", code=1)
        assert "a part of a file reads as something else" in line
        assert re.search(r"its clock is 36\d\d s behind this machine's", line)
        monkeypatch.setattr(storage, "read_ranges", real)
        names = storage.list_names
        monkeypatch.setattr(storage, "list_names", lambda url: [])
        assert "is not in the listing" in sentence(capsys, "doctor", "--run", f"{store}/run", code=1)
        monkeypatch.setattr(storage, "list_names", names)
    with bucket(ignores=True) as store:
        assert "use one that has conditional puts" in sentence(capsys, "doctor", "--run", f"{store}/run", code=1)
