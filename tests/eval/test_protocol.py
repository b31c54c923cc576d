"""Protocols and prompts: what may be compared, which captions are drawn, that noise is the prompt's own."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from scipy import stats

from eval import prompts, protocol
from eval.config import EvalConfig
from eval.generate import SAMPLERS, Sample, evaluations, generator_of, seed_of, swap_sampler, to_uint8
from eval.protocol import require_comparable
from shards.dataset import Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError, validate
from tests.eval.conftest import start_noise

FIELDS: dict[str, Any] = {
    "prompts": "a" * 64,
    "num_prompts": 8,
    "replicates": 1,
    "seed_rule": "rule",
    "size": 32,
    "sampler": "ddim",
    "steps": 25,
    "guidance_scale": 3.0,
    "guidance_interval": None,
    "timestep_spacing": "trailing",
    "precision": "float32",
    "code": 2,
    "generated_with": {"torch": "2.15"},
    "reference": "f",
    "clip": "d" * 64,
}


def made(**changes: Any) -> dict[str, Any]:
    fields = {**FIELDS, **changes}
    return {"id": protocol.identity(fields), **fields}


PROTOCOL = made()


def test_unlike_protocols_are_an_error_that_names_the_fields() -> None:
    other = made(steps=50, clip="f" * 64)
    with pytest.raises(StageError, match=r"steps: 25 and 50; clip: d{12}\.\.\. and f{12}\.\.\.") as e:
        require_comparable(PROTOCOL, other)
    assert "guidance" not in str(e.value)
    require_comparable(PROTOCOL, other, vary=("steps", "clip"))
    with pytest.raises(StageError, match="surprise"):
        require_comparable(PROTOCOL, made(surprise=1))


@pytest.mark.parametrize("field", list(FIELDS))
def test_every_field_changes_the_id(field: str) -> None:
    assert made(**{field: "other"})["id"] != PROTOCOL["id"]


def test_noise_is_of_128_bits() -> None:
    """Seeds that agree in the 32 bits that torch's own manual_seed keeps give other noise; and it is normal noise."""
    seeds = {seed_of(f"{i:016x}", r) for i in range(400) for r in range(3)}
    assert len(seeds) == 1200
    assert max(seeds).bit_length() > 120
    low = 0x12345678
    noise = [torch.randn(4096, generator=generator_of(low + (k << 32))) for k in range(4)]
    assert len({n.numpy().tobytes() for n in noise}) == 4
    together = torch.cat(noise)
    assert abs(float(together.mean())) < 0.03
    assert abs(float(together.std()) - 1) < 0.03
    uniform = torch.rand(20_000, generator=generator_of(7 << 64))
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(torch.randn(9, generator=generator_of(5)), torch.randn(9, generator=generator_of(5)))


def test_noise_does_not_depend_on_its_batch() -> None:
    samples = [Sample(f"{i:016x}", 0, "words do not matter") for i in range(5)]
    together = start_noise(samples, (4, 8, 8))
    for i, draw in enumerate(samples):
        assert torch.equal(start_noise([draw._replace(text="other words")], (4, 8, 8))[0], together[i])


def test_uint8_is_rounded_and_clamped() -> None:
    levels = torch.tensor([-0.2, 0.0, 0.499 / 255, 0.501 / 255, 127.49 / 255, 127.51 / 255, 254.6 / 255, 1.0, 1.7])
    picture = to_uint8(levels.reshape(1, 1, 1, 9).expand(1, 3, 1, 9))
    assert picture.shape == (1, 1, 9, 3)
    assert picture[0, 0, :, 0].tolist() == [0, 0, 0, 1, 127, 128, 255, 255, 255]


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in ("model", "flow-euler")])
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
    kind, extra = SAMPLERS[sampler] or ("", {})
    assert type(after).__name__ == kind
    assert all(after.config[k] == v for k, v in extra.items())
    assert torch.equal(after.betas, before.betas)
    assert (after.config.prediction_type, after.config.timestep_spacing) == ("v_prediction", "trailing")


def test_distinct_captions_come_first(run: RunPaths) -> None:
    heldout = Dataset.open(run.heldout)
    chosen = prompts.from_heldout(heldout, 1000).prompts
    assert len(chosen) == 30
    distinct = len({p.text for p in chosen})
    assert len({p.text for p in chosen[:distinct]}) == distinct
    assert len({p.id for p in chosen}) == 30
    assert [p.id for p in prompts.from_heldout(heldout, 7).prompts] == [p.id for p in chosen[:7]]


def test_a_prompts_id_is_the_same_in_any_list(tmp_path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("one\n\n  two  \none\n", encoding="utf-8")
    b.write_text("three\none\ntwo", encoding="utf-8")
    first, second = (prompts.from_file(str(f), 10).prompts for f in (a, b))
    assert [p.text for p in first] == ["one", "two", "one"]
    assert len({p.id for p in first}) == 3
    assert {p.text: p.id for p in first[:2]} == {p.text: p.id for p in second[1:]}


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no prompts"), (b"\xff\xfe\x00", "UTF-8"), (b"x" * 10_001, "line 1"), (None, "not a file")],
)
def test_a_bad_prompt_file_is_one_sentence(tmp_path, content: bytes | None, says: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        prompts.from_file(str(file), 10)


def test_a_control_is_never_the_prompts_own_caption() -> None:
    texts = ["a", "a", "b", "c", "a", "c"]
    found = prompts.controls(texts)
    assert all(j is not None and texts[j] != text for j, text in zip(found, texts, strict=True))
    assert prompts.controls(["a", "a"]) == [None, None]
    assert prompts.controls(["a"] * 100_000 + ["b"])[0] == 100_000  # and in linear time


GENEVAL = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}'
GENEVAL2 = (
    '{"prompt": "four white bicycles", "atom_count": 2, "vqa_list": [["How many bicycles are in the image?", "four"], '
    '["Are the bicycles white?", "Yes"]], "skills": ["count", "attribute"]}'
)


def test_suites_open_unchanged(tmp_path) -> None:
    file = tmp_path / "suite.jsonl"
    own = '{"prompt": "x", "id": 7, "tags": ["t"], "category": "c", "questions": ["Is it?"], "note": {"kept": 1}}'
    file.write_text("\n".join([GENEVAL, GENEVAL2, own]))
    bench, bicycles, mine = prompts.from_file(str(file), 10).prompts
    assert (bench.text, bench.tags, bench.extra) == (
        "a photo of a bench",
        ("single_object",),
        json.dumps(json.loads(GENEVAL), sort_keys=True),
    )
    assert bicycles.tags == ("count", "attribute", "2 atoms")
    assert bicycles.questions[0] == ("How many bicycles are in the image?", "four")
    assert (mine.name, mine.tags, mine.questions) == ("7", ("t", "c"), (("Is it?", "yes"),))
    assert json.loads(mine.extra)["note"] == {"kept": 1}
    first = prompts.from_file(str(file), 2)
    assert first.digest == prompts.from_file(str(file), 3).digest  # more of a list is no other list
    for bad, says in (
        ("{", "line 1: it is no JSON"),
        ("[" * 100_000, "line 1: it is no JSON"),
        ('{"prompt": "half a pair: \\ud83d"}', "line 1: it is no JSON"),
        ("[]", 'needs a text "prompt"'),
        ('{"prompt": ""}', 'needs a text "prompt"'),
        ('{"prompt": "x", "questions": [["a"]]}', "pairs of a question"),
        ('{"prompt": "x", "tags": [[]]}', '"tags"'),
        ('{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}', "the id 'a' twice"),
    ):
        file.write_text(bad)
        with pytest.raises(ConfigError, match=says):
            prompts.from_file(str(file), 10)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "heun", "heun-karras", "dpm-solver++", "euler-a"])
def test_evaluations_are_counted_as_the_sampler_makes_them(sampler: str) -> None:
    pipeline = SimpleNamespace(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1))
    swap_sampler(pipeline, sampler)
    pipeline.scheduler.set_timesteps(20)
    assert evaluations(sampler, 20, 1.0) == len(pipeline.scheduler.timesteps)
    assert evaluations(sampler, 20, 3.0) == 2 * len(pipeline.scheduler.timesteps)


def test_flow_euler_is_the_straight_step() -> None:
    """One step of a rectified flow from time s to t: x + (t - s) v."""
    exported = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipeline = SimpleNamespace(scheduler=exported)
    swap_sampler(pipeline, "flow-euler")
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    rng = torch.Generator().manual_seed(0)
    x, v = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 4, 8, 8, generator=rng)
    s, t = scheduler.sigmas[0], scheduler.sigmas[1]
    found = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    assert torch.allclose(found, x + (t - s) * v, atol=1e-5)


def test_config_refuses_what_cannot_be() -> None:
    for bad, says in (
        ({"sampler": "plms"}, "sampler"),
        ({"checkpoint": "../x"}, "checkpoint"),
        ({"stepss": 3}, "steps"),
        ({"fid_statistics": {"fid_tf": "x.npz"}}, "set inception"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval"),
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
