"""The wheel beside a project that has names of ours, and the container's recipe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from orchestration import packages, submit
from tests.orchestration.head import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = {name.partition(".")[0] for name in PYPROJECT["tool"]["setuptools"]["packages"]}


def run(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what is committed to it and installed into an environment of its own, which has
    the dependencies of this one and nothing of this checkout. Returns its bin folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", ".*_cache", "tests", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=skipped)
    built = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        folder,
        source,
    )
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("carrara-*.whl")
    made = run(sys.executable, "-m", "venv", "--without-pip", environment)
    assert made.returncode == 0, made.stderr
    python = environment / "bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # A folder named by a .pth file is looked into; its own .pth files, this checkout's among them, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    put = run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert put.returncode == 0, put.stderr
    return environment / "bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's own project: modules of names that ours have, which say so where they are imported."""
    for name in ("train", "demo"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("the user\'s own module was imported")\n')
    for name in ("eval", "shards", "curate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('raise SystemExit("the user\'s own package was imported")\n')
    return tmp_path


def test_the_wheel_has_every_package_and_its_data(installed: Path) -> None:
    code = (
        "import importlib.metadata, importlib.util\n"
        f"for name in {sorted(TOP)!r}: print(importlib.util.find_spec(name).origin)\n"
        "print(importlib.metadata.version('carrara'))\n"
        "import eval.report, pathlib\n"
        "print(*sorted(p.name for p in (pathlib.Path(eval.report.__file__).parent / 'templates').iterdir()))"
    )
    done = run(installed / "python", "-c", code, cwd=installed)
    assert done.returncode == 0, done.stderr
    *origins, version, templates = done.stdout.splitlines()
    assert all(Path(o).is_relative_to(installed.parent) for o in origins), origins
    assert version == PYPROJECT["project"]["version"]
    assert templates.split() == sorted(p.name for p in (ROOT / "eval/report/templates").iterdir())


def test_the_wheels_command_works_beside_a_project_that_has_our_names(installed: Path, project: Path) -> None:
    done = run(installed / "carrara", "--version", cwd=project)
    assert (done.returncode, done.stdout) == (0, f"carrara {PYPROJECT['project']['version']}\n"), done.stderr
    (project / "mine.yaml").write_text("run: runs/x\ningest: {table: table.csv}\n")
    (project / "table.csv").write_text("url,caption\nhttp://127.0.0.1:9/x.png,a picture\n")
    done = run(installed / "carrara", "plan", "--config", "mine.yaml", cwd=project)
    assert "user's own" not in done.stdout + done.stderr
    assert done.returncode == 2, done.stderr  # there are no images yet: the whole configuration was read
    assert "has no finished image shards" in done.stderr


@pytest.mark.parametrize("way", ["path", "module"])
def test_a_project_in_front_of_ours_is_put_behind_or_named(installed: Path, project: Path, way: str) -> None:
    """PYTHONPATH, and `python -m`, have Python look in the user's folder first."""
    line = (
        [installed / "carrara", "--version"]
        if way == "path"
        else [installed / "python", "-m", "orchestration.run_stage", "--version"]
    )
    done = run(*line, cwd=project, **({"PYTHONPATH": str(project)} if way == "path" else {}))
    assert (done.returncode, done.stdout) == (0, f"carrara {PYPROJECT['project']['version']}\n"), done.stderr


def test_a_module_that_is_in_the_way_already_is_named_in_a_sentence(installed: Path, project: Path) -> None:
    (project / "curate/__init__.py").write_text("")
    code = "import curate, sys; from orchestration.run_stage import main; sys.exit(main(['--version']))"
    done = run(installed / "python", "-c", code, cwd=project)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"carrara: 'curate' is {project}/curate/__init__.py, and not Carrara's own package")
    assert len(done.stderr.splitlines()) == 1


def test_all_our_packages_are_looked_after_and_sent_with_a_job(tmp_path: Path) -> None:
    assert {*packages.NAMES, "orchestration"} == TOP
    submit.pack(tmp_path, ["status", "nowhere"], lambda _: (set(), False))
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == TOP


# ---- the container ---------------------------------------------------------------------------------------------


def test_the_dockerfile_has_nothing_that_a_linter_complains_of() -> None:
    done = run(Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_all_packages_and_nothing_that_is_ignored() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    assert copied >= TOP
    allowed = {x[1:] for x in (ROOT / ".dockerignore").read_text().splitlines() if x.startswith("!")}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.container
@pytest.mark.timeout(3000)
def test_the_image_is_built_and_its_command_runs_as_nobody_special() -> None:
    tag = "carrara:test-cpu"
    built = subprocess.run(["docker", "build", "--quiet", "--build-arg", "DEVICE=cpu", "--tag", tag, str(ROOT)])
    assert built.returncode == 0
    done = run("docker", "run", "--rm", tag, "--version")
    assert (done.returncode, done.stdout) == (0, f"carrara {PYPROJECT['project']['version']}\n"), done.stderr
    where = "for c in ray wget deepspeed g++; do command -v $c; done"
    done = run("docker", "run", "--rm", "--entrypoint", "sh", tag, "-c", f"id -u; {where}")
    assert (done.returncode, done.stdout.split()[0], len(done.stdout.split())) == (0, "1000", 5), done.stdout
