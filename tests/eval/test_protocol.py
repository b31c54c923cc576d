"""Protocols and prompts: what may be compared, which captions are drawn, that noise is the prompt's own."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from eval import prompts
from eval.config import EvalConfig
from eval.generate import SAMPLERS, Draw, seed_of, start_noise, swap_sampler, to_uint8
from eval.protocol import Protocol, require_comparable
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, validate

PROTOCOL = Protocol(
    prompts="a" * 64, prompt_count=8, replicates=1, seed_rule="rule", resolution=32, sampler="ddim", steps=25,
    guidance_scale=3.0, timestep_spacing="", dtype="float32", resize="r", reference="f", vae="b" * 64, text="c" * 64,
    features="d" * 64, unet="e" * 64, weights="ema",
)  # fmt: skip


def test_unlike_protocols_are_an_error_that_names_the_fields() -> None:
    other = dataclasses.replace(PROTOCOL, steps=50, vae="f" * 64)
    with pytest.raises(StageError, match=r"steps: 25 and 50; vae: b{12}\.\.\. and f{12}\.\.\.") as e:
        require_comparable(PROTOCOL, other)
    assert "guidance" not in str(e.value)
    require_comparable(PROTOCOL, other, vary=("steps", "vae"))


def test_another_checkpoint_is_comparable_and_shares_the_id() -> None:
    other = dataclasses.replace(PROTOCOL, unet="0" * 64)
    require_comparable(PROTOCOL, other)
    assert other.id == PROTOCOL.id


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Protocol) if f.name not in ("unet", "weights")])
def test_every_other_field_changes_the_id(field: str) -> None:
    value = getattr(PROTOCOL, field)
    assert (
        dataclasses.replace(PROTOCOL, **{field: value + 1 if not isinstance(value, str) else value + "x"}).id
        != PROTOCOL.id
    )


def test_a_protocol_survives_its_json() -> None:
    assert Protocol.from_json(PROTOCOL.to_json()) == PROTOCOL
    with pytest.raises(StageError, match="surprise"):
        Protocol.from_json({**PROTOCOL.to_json(), "surprise": 1})


def test_seeds_and_noise_are_all_different() -> None:
    seeds = {seed_of(f"{i:016x}", r, p) for i in range(200) for r in range(3) for p in ("start", "steps")}
    assert len(seeds) == 1200
    assert all(0 <= s < 2**63 for s in seeds)
    noise = start_noise([Draw(f"{i:016x}", r, "") for i in range(50) for r in range(2)], (4, 8, 8))
    assert len({n.numpy().tobytes() for n in noise}) == 100
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03


def test_noise_does_not_depend_on_its_batch() -> None:
    draws = [Draw(f"{i:016x}", 0, "words do not matter") for i in range(5)]
    together = start_noise(draws, (4, 8, 8))
    for i, draw in enumerate(draws):
        assert torch.equal(start_noise([draw._replace(text="other words")], (4, 8, 8))[0], together[i])


def test_uint8_is_rounded_and_clamped() -> None:
    levels = torch.tensor([-0.2, 0.0, 0.499 / 255, 0.501 / 255, 127.49 / 255, 127.51 / 255, 254.6 / 255, 1.0, 1.7])
    picture = to_uint8(levels.reshape(1, 1, 1, 9).expand(1, 3, 1, 9))
    assert picture.shape == (1, 1, 9, 3)
    assert picture[0, 0, :, 0].tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_keeps_the_trained_betas_and_prediction(sampler: str) -> None:
    class Pipeline:
        scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
        )

    before = Pipeline.scheduler
    pipeline = Pipeline()
    swap_sampler(pipeline, sampler)
    after = pipeline.scheduler
    assert type(after).__name__ == SAMPLERS[sampler][0]
    assert torch.equal(after.betas, before.betas)
    assert (after.config.prediction_type, after.config.timestep_spacing) == ("v_prediction", "trailing")


def test_distinct_captions_come_first(run: RunPaths) -> None:
    heldout = Dataset.open(run.heldout)
    chosen = prompts.from_heldout(heldout, 1000)
    assert len(chosen) == 30
    distinct = len({p.text for p in chosen})
    assert len({p.text for p in chosen[:distinct]}) == distinct
    assert len({p.id for p in chosen}) == 30
    assert [p.id for p in prompts.from_heldout(heldout, 7)] == [p.id for p in chosen[:7]]


def test_a_prompts_id_is_the_same_in_any_list(tmp_path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one\n\n  two  \none\n", encoding="utf-8")
    b.write_text("three\none\ntwo", encoding="utf-8")
    first, second = prompts.from_file(str(a), 10), prompts.from_file(str(b), 10)
    assert [p.text for p in first] == ["one", "two", "one"]
    assert len({p.id for p in first}) == 3
    assert {p.text: p.id for p in first[:2]} == {p.text: p.id for p in second[1:]}


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no prompts"), (b"\xff\xfe\x00", "UTF-8"), (b"x" * 10_001, "prompt 1"), (None, "not a file")],
)
def test_a_bad_prompt_file_is_one_sentence(tmp_path, content: bytes | None, says: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        prompts.from_file(str(file), 10)


def test_a_control_is_never_the_prompts_own_caption() -> None:
    texts = ["a", "a", "b", "c", "a", "c"]
    made = [prompts.Prompt(str(i), t) for i, t in enumerate(texts)]
    assert all(control and control != p.text for control, p in zip(prompts.controls(made), made, strict=True))
    assert prompts.controls(made[:2]) == ["", ""]


def test_config_refuses_what_cannot_be() -> None:
    for bad, says in (
        ({"sampler": "plms"}, "sampler"),
        ({"checkpoint": "../x"}, "checkpoint"),
        ({"stepss": 3}, "steps"),
        ({"reference": "/coco"}, "set inception or dinov2"),
    ):
        with pytest.raises(ConfigError, match=says):
            validate(EvalConfig, bad, "run.yaml")
    assert EvalConfig(sampler="dpm-solver++", steps=20, guidance_scale=7.5).cell == "dpm-solver++-20-7.5"
    assert np.isfinite(EvalConfig().guidance_scale)


@pytest.mark.parametrize(
    ("made", "right", "wrong"),
    [
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}, "unipc", "ddim"),
        ({"prediction_type": "epsilon", "variance_type": "learned_range"}, "ddpm", "dpm-solver++"),
    ],
)
def test_samplers_that_do_not_know_the_process_are_refused(made: dict[str, Any], right: str, wrong: str) -> None:
    exported = DPMSolverMultistepScheduler if "use_flow_sigmas" in made else DDPMScheduler
    pipeline = SimpleNamespace(scheduler=exported(**made))
    with pytest.raises(ConfigError, match=rf"which cannot sample .* take .*{right}"):
        swap_sampler(pipeline, wrong)
    swap_sampler(pipeline, right)
    assert all(pipeline.scheduler.config[name] == value for name, value in made.items())
