"""Configuration errors are one sentence that names the file, the field and the nearest right name."""

from __future__ import annotations

import pytest

from shards.settings import ConfigError, Strict, load_sections, load_yaml, validate


class Fit(Strict):
    batch_size: int
    learning_rate: float = 1e-3


class Run(Strict):
    run: str
    train: Fit


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


GOOD = "run: runs/x\ntrain: {batch_size: 8}\nlatents: {anything: 1}\n"


def test_sections_of_other_stages_are_skipped_and_overrides_apply(tmp_path):
    run = load_sections(write(tmp_path, GOOD), ["train.learning_rate=2e-4", "train.batch_size=16", "eval.steps=3"], Run)
    assert (run.train.batch_size, run.train.learning_rate) == (16, 2e-4)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        (GOOD.replace("train", "trian"), [], "unknown section 'trian'; did you mean 'train'?"),
        (GOOD.replace("batch_size", "batchsize"), [], "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        (GOOD.replace("8", "eight"), [], "'train.batch_size'"),
        ("run: x\ntrain: {}\n", [], "'train.batch_size' is missing"),
        ("run: x\nrun: y\ntrain: {batch_size: 1}\n", [], "the key 'run' is given twice"),
        ("- a\n- b\n", [], "must be a mapping"),
        ("a: [1\n", [], "cannot be read as YAML"),
        (GOOD, ["train.batch_size"], "write it as section.key=value"),
        (GOOD, ["run.x=1"], "'run' is a single value"),
        (GOOD, ["train.learning_rate=.nan"], "'train.learning_rate'"),
    ],
)
def test_errors_are_one_sentence(tmp_path, text, overrides, says):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as e:
        load_sections(path, overrides, Run)
    assert says in str(e.value)
    assert "\n" not in str(e.value)
    assert (path in str(e.value)) or "override" in str(e.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_yaml(str(tmp_path / "none.yaml"))


def test_exponents_without_a_dot_are_numbers(tmp_path):
    assert validate(Fit, load_yaml(write(tmp_path, "batch_size: 1\nlearning_rate: 1e-4\n")), "f").learning_rate == 1e-4
