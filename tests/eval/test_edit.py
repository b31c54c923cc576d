"""Prompt-to-prompt: exact where nothing is edited, the paper's formulas where something is, a sentence a mistake."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image

from eval import edit as editing
from eval.attention import Control, Edit, edit_of, invert, pairs, read_prompt
from eval.generate import Sample, generators
from eval.inputs import fitted, read_image
from eval.sample import Request
from orchestration.run_stage import main
from shards.layout import RunPaths
from shards.settings import ConfigError
from tests.eval.conftest import CONTEXT, SIDE
from tests.eval.test_sample import draw as draw_sample
from train.config import TrainConfig
from train.schedulers import scheduler as flow_scheduler

STEPS, SCALE = 4, 3.0
RED, BLUE = "a red circle on white", "a blue circle on white"


@pytest.fixture(scope="module")
def pipeline(run: RunPaths) -> Any:
    found = StableDiffusionPipeline.from_pretrained(run.model, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    for name, module in found.unet.named_modules():  # at random they say too little to be told apart
        if isinstance(module, Attention) and name.endswith("attn2"):
            module.to_q.weight.data *= 20
            module.to_v.weight.data *= 5
    return found


def noise(number: int = 0) -> torch.Generator:
    return generators([Sample("seed 7", number, "")])[0]


def plain(pipeline: Any, prompt: str, number: int = 0, **more: Any) -> torch.Tensor:
    """Latents [C,h,w] that the pipeline draws by itself."""
    with torch.inference_mode():
        found = pipeline(
            [prompt],
            generator=[noise(number)],
            output_type="latent",
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            **more,
        ).images
    return found[0]


def edited(pipeline: Any, source: str, target: str, cross: float = 1.0, own: float = 1.0, **more: Any) -> Any:
    """Latents [2,C,h,w] before and after, and the maps."""
    return draw(pipeline, edit(pipeline, source, target, cross, own, **more), source, target)


def edit(pipeline: Any, source: str, target: str, cross: float = 1.0, own: float = 1.0, **more: Any) -> Edit:
    read = [read_prompt(pipeline, text, "--from") for text in (source, target)]
    return edit_of(read[0], read[1], CONTEXT, cross, own, **more)


def draw(pipeline: Any, change: Edit, source: str, target: str) -> Any:
    control = Control(pipeline, change, (8, 8))
    texts = [pipeline.encode_prompt([t], "cpu", 1, True, [""]) for t in (source, target)]
    text, empty = (torch.cat([t[i] for t in texts]) for i in (0, 1))
    with control(), torch.inference_mode():
        found = pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=empty,
            generator=[noise(), noise()],
            output_type="latent",
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
        ).images
    return found, control.maps


# ---- exact -----------------------------------------------------------------------------------------


def test_with_equal_prompts_the_edit_is_the_plain_sample_bit_for_bit(pipeline: Any) -> None:
    found, _ = edited(pipeline, RED, RED)
    assert torch.equal(found[0], plain(pipeline, RED))
    assert torch.equal(found[1], found[0])


def test_with_nothing_taken_over_it_is_the_plain_sample_of_the_other_prompt(pipeline: Any) -> None:
    found, _ = edited(pipeline, RED, BLUE, cross=0.0, own=0.0)
    assert torch.equal(found[1], plain(pipeline, BLUE))
    assert not torch.equal(found[1], plain(pipeline, RED))


def test_what_is_taken_over_changes_the_image_after_alone(pipeline: Any) -> None:
    before = plain(pipeline, BLUE)
    for share in ({"cross": 1.0, "own": 0.0}, {"cross": 0.0, "own": 1.0}, {"cross": 0.5, "own": 0.0}):
        found, _ = edited(pipeline, RED, BLUE, **share)
        assert torch.equal(found[0], plain(pipeline, RED))
        assert (found[1] - before).abs().max() > 1e-4, share


def test_a_weight_of_one_is_no_change_and_others_are_one(pipeline: Any) -> None:
    found, _ = edited(pipeline, RED, BLUE)
    one, _ = edited(pipeline, RED, BLUE, weights={"blue": 1.0})
    more, _ = edited(pipeline, RED, BLUE, weights={"blue": 3.0})
    assert torch.equal(one, found)
    assert not torch.equal(more[1], found[1])
    assert torch.equal(more[0], found[0])


def test_weights_count_at_every_step_whatever_is_taken_over(pipeline: Any) -> None:
    found, maps = edited(pipeline, RED, RED, cross=0.0, own=0.0, weights={"red": 0.0})
    assert not torch.equal(found[1], found[0])
    assert maps.of(1)[2].abs().max() == 0
    assert maps.of(0)[2].min() > 0


def test_the_unet_is_its_own_again_afterwards(pipeline: Any) -> None:
    before = dict(pipeline.unet.attn_processors)
    control = Control(pipeline, edit(pipeline, RED, BLUE), (8, 8))
    with pytest.raises(ZeroDivisionError), control():
        _ = 1 / 0
    assert pipeline.unet.attn_processors == before
    assert pipeline.unet.forward.__func__ is UNet2DConditionModel.forward


# ---- the formulas ----------------------------------------------------------------------------------


class Textbook:
    """Attention with its softmax in sight, whose maps are exchanged within one batch as the paper's figure has it."""

    def __init__(self, change: Edit, steps: float) -> None:
        self.change, self.calls, self.steps = change, 0, steps
        self.maps: list[torch.Tensor] = []

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> torch.Tensor:
        cross = encoder_hidden_states is not None
        text = encoder_hidden_states if cross else hidden_states

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(text)), heads(attn.to_v(text))
        p = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        if cross:
            self.maps.append(p)
            early = self.calls < self.change.cross_steps * self.steps
            both = p[2] @ self.change.move + p[3] * self.change.own
            p = torch.cat([p[:3], ((both if early else p[3]) * self.change.weight)[None]])
        elif self.calls < self.change.self_steps * self.steps:
            p = torch.cat([p[:3], p[2:3]])
        self.calls += 1
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


@contextlib.contextmanager
def textbook(pipeline: Any, change: Edit) -> Iterator[list[Textbook]]:
    own = dict(pipeline.unet.attn_processors)
    books = {name: Textbook(change, STEPS) for name in own}
    pipeline.unet.set_attn_processor(dict(books))
    try:
        yield list(books.values())
    finally:
        pipeline.unet.set_attn_processor(own)


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        (BLUE, {}),
        ("a blue circle on the white", {"circle": 2.0}),
        ("a red and extraordinarily blueish circle", {"red": -0.5}),
    ],
)
def test_it_is_what_the_paper_says(pipeline: Any, target: str, weights: dict[str, float]) -> None:
    change = edit(pipeline, RED, target, 0.75, 0.5, weights=weights)
    found, _ = draw(pipeline, change, RED, target)
    with textbook(pipeline, change), torch.inference_mode():
        wanted = pipeline(
            [RED, target],
            generator=[noise(), noise()],
            output_type="latent",
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
        ).images
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_recorded_maps_are_the_softmax_and_sum_to_one(pipeline: Any) -> None:
    change = edit(pipeline, RED, BLUE, 0.0, 0.0)
    _, maps = draw(pipeline, change, RED, BLUE)
    with textbook(pipeline, change) as books, torch.inference_mode():
        pipeline([RED, BLUE], generator=[noise(), noise()], num_inference_steps=STEPS, guidance_scale=SCALE)
    for branch, row in enumerate((2, 3)):
        found = maps.of(branch)
        assert found.shape == (CONTEXT, 8, 8)
        assert (found.sum(0) - 1).abs().max() < 1e-5
        every = [p[row].mean(0).T.unflatten(1, (-1, round(p.shape[2] ** 0.5))) for b in books for p in b.maps]
        wanted = sum(torch.nn.functional.interpolate(m[None], (8, 8), mode="bilinear")[0] for m in every) / len(every)
        assert len({m.shape for m in every}) == 2, "layers of two sizes"
        assert (found - wanted).abs().max() < 1e-4


def test_maps_lie_as_the_image_does(pipeline: Any) -> None:
    """Of a layer that looks at its token in one corner alone, that corner is bright, also where sides differ."""
    maps = Control(pipeline, edit(pipeline, RED, RED), (8, 12)).maps
    for places, (h, w) in ((96, (8, 12)), (24, (4, 6)), (6, (2, 3))):
        p = torch.zeros(2, places, CONTEXT)
        p[:, :, 0], p[:, w - 1, 0], p[:, w - 1, 5] = 1, 0, 1  # the right upper corner
        maps.add(0, p)
        assert h * w == places
    found = maps.of(0)[5]
    assert found.shape == (8, 12)
    assert divmod(int(found.argmax()), 12) == (0, 11)


# ---- which word stands for which -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        ("a red cat", "a blue cat", [((0,), (0,)), ((1,), (1,)), ((2,), (2,))]),
        ("a cat", "a small black cat", [((0,), (0,)), ((), (1, 2)), ((1,), (3,))]),
        ("a small cat", "a cat", [((0,), (0,)), ((1,), ()), ((2,), (1,))]),
        ("A Cat", "a cat", [((0,), (0,)), ((1,), (1,))]),
        ("cat", "dog", [((0,), (0,))]),
        ("a cat sits", "a very large dog sits", [((0,), (0,)), ((1,), (1, 2, 3)), ((2,), (4,))]),
    ],
)
def test_words_find_their_places(source: str, target: str, wanted: list[Any]) -> None:
    assert [(tuple(a), tuple(b)) for a, b in pairs(source, target)] == wanted


def test_where_words_are_exchanged_maps_still_sum_to_one(pipeline: Any) -> None:
    for target in (BLUE, "a extraordinarily circle on white", "unbelievably blueish circles"):
        found = edit(pipeline, RED if "on" in target else "a red circle", target)
        assert (found.move.sum(1) - 1).abs().max() < 1e-6
        assert found.own.sum() == 0


def test_added_words_look_for_themselves_and_the_others_where_they_did(pipeline: Any) -> None:
    found = edit(pipeline, "a red circle", "a large red circle")
    assert found.own.nonzero().flatten().tolist() == [2]
    assert [found.move[i].nonzero().flatten().tolist() for i in range(5)] == [[0], [1], [3], [4], [5]]
    assert found.move[:, 2].sum() == 0


# ---- given images ----------------------------------------------------------------------------------


def of_velocity(pipeline: Any) -> Any:
    """The same parts, with a random UNet that tells a velocity: as a guess of the noise it could not be inverted."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    found = StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    found.set_progress_bar_config(disable=True)
    return found


def test_an_image_is_drawn_again_from_its_noise(pipeline: Any) -> None:
    """Whatever the guidance, where it leads away from the image's own prompt; fixed points come nearer."""
    wanted = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * 0.5
    own = of_velocity(pipeline)
    text, empty = own.encode_prompt([RED], "cpu", 1, True, [""])

    def again(iterations: int, negative: torch.Tensor) -> float:
        start = invert(own, wanted, text, STEPS, iterations)
        with torch.inference_mode():
            found = own(
                prompt_embeds=text,
                negative_prompt_embeds=negative,
                latents=start,
                guidance_scale=7.5,
                num_inference_steps=STEPS,
                output_type="latent",
            ).images
        return float((found - wanted).abs().max())

    errors = [again(n, text) for n in (1, 3, 10)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 1e-3
    assert again(10, empty) > 10 * errors[2]


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])  # of a velocity theirs is another first guess
def test_one_iteration_is_ddim_inversion_as_diffusers_has_it(pipeline: Any, prediction: str) -> None:
    own = of_velocity(pipeline)
    own.scheduler.register_to_config(prediction_type=prediction)
    text, _ = own.encode_prompt([RED], "cpu", 1, True, [""])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) * 0.5
    theirs, wanted = DDIMInverseScheduler.from_config(own.scheduler.config), latents
    theirs.set_timesteps(STEPS)
    with torch.inference_mode():
        for t in theirs.timesteps:
            wanted = theirs.step(own.unet(wanted, t, text).sample, t, wanted).prev_sample
    found = invert(own, latents, text, STEPS, 1)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def photo(path: Path) -> str:
    y, x = np.mgrid[:40, :60]
    Image.fromarray(np.stack([x * 4, y * 6, (x + y) * 2], axis=2).astype(np.uint8)).save(path)
    return str(path)


# ---- the command -----------------------------------------------------------------------------------


def test_from_the_command_line(run: RunPaths, tmp_path: Path) -> None:
    """The image before is `carrara sample`'s; a second call finds everything there."""
    out = tmp_path / "out"
    command = ["edit", run.run, "--from", RED, "--to", BLUE, "--seed", "7", "--steps", "2", "--count", "2"]
    command += ["--out", str(out)]
    assert main(command) == 0
    names = ["000-after.png", "000-before.png", "001-after.png", "001-before.png", "edit.json", "sheet.html"]
    assert sorted(p.name for p in out.iterdir()) == names
    drawn = draw_sample(run, tmp_path / "s", requests=[Request(prompt=RED, seed=7)], count=2, batch_size=1)
    for number in (0, 1):
        before = np.asarray(Image.open(out / f"{number:03d}-before.png"))
        assert np.array_equal(before, drawn[number])
        assert not np.array_equal(before, np.asarray(Image.open(out / f"{number:03d}-after.png")))
    page = (out / "sheet.html").read_text()
    assert page.count("data:image/png") == 2 * (2 + 5 + 5)
    assert json.loads((out / "edit.json").read_text())["settings"]["target"] == BLUE
    times = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert main(command) == 0
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == times
    (out / "sheet.html").unlink()  # as a kill leaves it
    assert main(command) == 0
    assert sorted(p.name for p in out.iterdir()) == names


@pytest.mark.parametrize("sampler", ["ddim", "flow-euler"])
def test_a_given_image_is_changed(run: RunPaths, pipeline: Any, tmp_path: Path, sampler: str) -> None:
    """By a model of diffusion, and by one of rectified flow: inverted, it is drawn as the VAE keeps it."""
    folder = tmp_path / "model"
    shutil.copytree(run.model, folder)
    flow = flow_scheduler(TrainConfig(prediction_type="flow_prediction"))
    shutil.rmtree(folder / "scheduler")
    (flow if sampler == "flow-euler" else of_velocity(pipeline).scheduler).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    if sampler == "flow-euler":
        index["scheduler"] = ["diffusers", type(flow).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    quiet = copy.deepcopy(pipeline.unet)
    quiet.conv_out.weight.data *= 0.1  # so that fixed points are near
    quiet.save_pretrained(folder / "unet")
    given = photo(tmp_path / "p.png")
    command = ["edit", str(folder), "--from", RED, "--steps", "4", "--image", given, "--inversion-iterations", "30"]
    command += ["--sampler", sampler]
    assert main([*command, "--to", RED, "--guidance-scale", "9", "--out", str(tmp_path / "a")]) == 0
    assert main([*command, "--to", BLUE, "--guidance-scale", "9", "--out", str(tmp_path / "b")]) == 0
    images = [np.asarray(Image.open(tmp_path / a / f"000-{n}.png")) for a in "ab" for n in ("before", "after")]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[2], images[3])
    pixels = np.array(fitted(read_image(given, "--image", ""), SIDE, SIDE))
    with torch.inference_mode():
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        through = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mean).sample
    wanted = ((through[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(images[0] - wanted).max() <= 1, "what the VAE makes of the given image"
    assert (tmp_path / "a" / "sheet.html").read_text().count("data:image/png") == 3 + 2 * 5


def test_any_pipelines_folder_is_edited_and_not_written_to(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run.model, folder)
    (folder / "carrara.json").unlink()
    before = sorted(p.name for p in folder.rglob("*"))
    command = ["edit", str(folder), "--from", RED, "--to", BLUE, "--steps", "1"]
    assert main(command) == 2
    assert "--out" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_only_weights_are_enough(run: RunPaths, tmp_path: Path) -> None:
    command = ["edit", run.run, "--from", RED, "--weight", "red=4", "--weight", "circle=-1", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "edit.json").read_text())["settings"]
    assert (settings["target"], settings["weight"]) == (RED, {"red": 4.0, "circle": -1.0})


def test_hostile_prompts_are_text_on_the_sheet(run: RunPaths, tmp_path: Path) -> None:
    bad = "a <script>alert(1)</script> circle"
    assert main(["edit", run.run, "--from", bad, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "sheet.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "script-src" not in page


def test_mistakes_are_one_sentence_and_nothing_is_written(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    given = photo(tmp_path / "p.png")
    for arguments, says in (
        (["--from", RED, "--to", "two dogs"], "no word in common and not as many words"),
        (["--from", RED, "--to", " "], "has no words"),
        (["--from", RED, "--to", "a " * 30 + RED], "--to: the prompt has 35 tokens, and the model reads 22"),
        (["--from", RED, "--weight", "blue=2"], "'blue' is no word of"),
        (["--from", RED, "--weight", "red"], "write it as WORD=FACTOR"),
        (["--from", RED, "--weight", "red=nan"], "weight"),
        (["--from", RED, "--weight", "red=99"], "not between -10 and 10"),
        (["--from", RED, "--cross-attention", "1.5"], "cross_attention"),
        (["--from", RED, "--image", "no.png"], "--image: there is no file no.png"),
        (["--from", RED, "--image", str(tmp_path / "bad.png")], "cannot be decoded"),
        (["--from", RED, "--image", given, "--count", "2"], "leave count out"),
        (["--from", RED, "--image", given, "--sampler", "euler"], "inverted by ddim or flow-euler"),
        (["--from", RED, "--width", "30"], "--width is 30, which the VAE does not divide"),
        (["--to", RED], "--from"),
    ):
        assert main(["edit", run.run, "--out", str(tmp_path / "out"), *arguments]) == 2, arguments
        err = [x for x in capsys.readouterr().err.splitlines() if x.startswith("carrara: ")]
        assert len(err) == 1
        assert says in err[0], err
        assert not (tmp_path / "out").exists()
    assert main(["edit", run.run, "--from", RED, "--steps", "1", "--out", str(mine)]) == 2
    assert "holds no edit" in capsys.readouterr().err
    assert [p.name for p in mine.iterdir()] == ["letter.txt"]


def test_another_edit_is_not_overwritten_unasked(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["edit", run.run, "--steps", "1", "--out", str(tmp_path / "out"), "--from"]
    assert main([*command, RED, "--count", "2"]) == 0
    (tmp_path / "out" / "001-notes.txt").write_text("mine")
    was = (tmp_path / "out" / "000-before.png").read_bytes()
    assert main([*command, BLUE]) == 2
    assert "holds another edit" in capsys.readouterr().err
    assert (tmp_path / "out" / "000-before.png").read_bytes() == was
    assert main([*command, BLUE, "--redo"]) == 0
    assert (tmp_path / "out" / "000-before.png").read_bytes() != was
    left = ["000-after.png", "000-before.png", "001-notes.txt", "edit.json", "sheet.html"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == left, "of the other edit no image, and all else"


def test_models_that_cannot_be_edited_are_refused(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape = {"sample_size": SIDE // 4, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    deaf = UNet2DConditionModel(**shape, **blocks, mid_block_type="UNetMidBlock2D", cross_attention_dim=32)
    conditioned = UNet2DConditionModel(**shape, in_channels=9, cross_attention_dim=32, **blocks)
    for name, unet, says in (("deaf", deaf, "no cross-attention"), ("conditioned", conditioned, "given an image")):
        shutil.copytree(run.model, tmp_path / name)
        shutil.rmtree(tmp_path / name / "unet")
        unet.save_pretrained(tmp_path / name / "unet")
        out = tmp_path / "out"
        assert main(["edit", str(tmp_path / name), "--from", RED, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
        assert not out.exists()


def test_a_prompt_that_is_not_read_word_by_word_is_refused(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "maybe_convert_prompt", lambda text, _: text)

    class Whole:
        model_max_length = CONTEXT

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Found", (), {"input_ids": list(text.encode())})()

    monkeypatch.setattr(pipeline, "tokenizer", Whole())
    with pytest.raises(ConfigError, match="word by word"):
        read_prompt(pipeline, "a b", "--from")


def test_the_folder_says_what_it_was_made_with(run: RunPaths) -> None:
    request = editing.EditRequest(source=RED, target=BLUE)
    one = editing.Editor(request, run.run).made_with().digest
    assert editing.Editor(request, run.run).made_with().digest == one
    for change in ({"seed": 1}, {"target": RED}, {"self_attention": 0.0}, {"weight": {"blue": 2.0}}):
        assert editing.Editor(request.model_copy(update=change), run.run).made_with().digest != one
