"""An image changed by changing its prompt, for people: prompt-to-prompt (attention.py), and a sheet of what it did.

    carrara edit runs/demo --from "a red circle on the left" --to "a blue circle on the left"
    carrara edit runs/demo --from "a red circle" --to "a red circle on a white ground"
    carrara edit runs/demo --from "a large red circle" --weight large=0.2
    carrara edit runs/demo --from "a red circle" --to "a blue circle" --image photo.png
    carrara edit path/to/stable-diffusion --from "..." --to "..." --out edited

The image before is, to the bit, what `carrara sample` draws of --from with the same seed, sampler and steps; with
--image it is the given one, inverted: DDIM inversion given --from, and then negative-prompt inversion (Miyake et al.
2023, arXiv:2305.16807), where guidance leads away from --from in place of the empty prompt. So the given image is drawn
again whatever the guidance scale, and nothing is optimised as null-text inversion does.

OUT has NNN-before.png and NNN-after.png, sheet.html with the maps of all words, and edit.json with what was asked, by
which the folder is known again: the same command finishes it, and does nothing where it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, field_validator, model_validator

from eval import model as models
from eval.attention import Control, Maps, Prompt, edit_of, invert, pairs, read_prompt, require_attention
from eval.generate import ImageGenerator, Sample, generators, to_uint8
from eval.inputs import fitted, read_image, require_size
from eval.prompts import MAX_CHARS
from eval.sample import ADVICE, GenerationConfig
from eval.shardwork import png
from shards import storage
from shards.fingerprint import Fingerprint, digest_bytes
from shards.layout import RunPaths
from shards.progress import Progress
from shards.settings import ConfigError, StageError

VERSION = 1
ABOUT, SHEET = "edit.json", "sheet.html"
NAMES = ("before", "after")
INVERTIBLE = ("ddim", "flow-euler")  # deterministic, and of first order
PIPELINE = "StableDiffusionPipeline"


class DrawnPairs(GenerationConfig):
    """How images before and after are generated."""

    cross_attention: float = Field(
        default=0.8, ge=0, le=1, description="share of the steps in which the words' maps are those of the image before"
    )
    self_attention: float = Field(
        default=0.4, ge=0, le=1, description="the same of the maps between places of the image"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    count: int = Field(default=1, ge=1, le=1000, description="pairs of each two prompts, each from another noise")


class EditRequest(DrawnPairs):
    """What is changed."""

    source: str = Field(max_length=MAX_CHARS, description="the prompt of the image before (--from)")
    target: str = Field(max_length=MAX_CHARS, description="the prompt of the image after (--to)")
    weight: dict[str, float] = Field(default_factory=dict, description="of words of `target`: times their maps")
    image: str | None = Field(default=None, description="an image to change, which `source` describes")
    inversion_iterations: int = Field(
        default=3, ge=1, le=100, description="for each step of an image's inversion; 1: plain DDIM inversion"
    )

    @field_validator("weight")
    @classmethod
    def _weights_in_reach(cls, value: dict[str, float]) -> dict[str, float]:
        if wild := [w for w, factor in value.items() if not -10 <= factor <= 10]:
            raise ValueError(f"the weight of '{wild[0]}' is not between -10 and 10")
        return value

    @model_validator(mode="after")
    def _together(self) -> EditRequest:
        if self.image and self.count > 1:
            raise ValueError("one image is changed in one way; leave count out")
        if self.image and self.sampler not in INVERTIBLE:
            raise ValueError(f"an image is inverted by {' or '.join(INVERTIBLE)}; the sampler is {self.sampler}")
        return self


def weights_of(given: list[str]) -> dict[str, float]:
    """--weight WORD=FACTOR, several times; ConfigError where one is not so."""
    found = {}
    for text in given:
        word, _, factor = text.rpartition("=")
        try:
            found[word] = float(factor)
        except ValueError:
            word = ""
        if not word:
            raise ConfigError(f"--weight {text}: write it as WORD=FACTOR, such as red=2")
    return found


class Editor:
    """One request, checked whole before anything is generated. Raises ConfigError where it cannot be done."""

    def __init__(self, request: EditRequest, ref: str) -> None:
        """ref: a run, or a diffusers pipeline's folder."""
        self.request, self.run = request, RunPaths(ref)
        pairs(request.source, request.target)
        self.given = None if request.image is None else read_image(request.image, "--image", ADVICE)
        self.of_pipeline = storage.exists(storage.join(ref, "model_index.json"))
        self.model = models.of_pipeline(ref) if self.of_pipeline else self._of_run()

    def _of_run(self) -> models.Model:
        return models.find(self.run, self.request.checkpoint, self.request.weights)

    def made_with(self) -> Fingerprint:
        """Settings, weights, and what is changed."""
        settings = self.request.model_dump(mode="json", exclude={"device", "checkpoint", "image"})
        settings["image"] = None if self.given is None else digest_bytes(self.given.tobytes())
        return Fingerprint("edit", VERSION, settings, "", {"model": self.model.digest})

    def default_folder(self) -> str:
        """Where the result goes if nothing is said; a model's own folder is not written to."""
        if self.of_pipeline:
            raise ConfigError(f"{self.run.run} is a model's folder; say with --out where the images go")
        return storage.join(self.run.run, "edits", self.made_with().digest[:10])

    def draw(self, out: str, redo: bool = False) -> bool:
        """Draw everything into `out`; False where it was all there. ConfigError where `out` holds something else."""
        before = storage.read_json(storage.join(out, ABOUT))
        digest = self.made_with().digest
        if before is None and storage.list_names(out):
            raise ConfigError(f"{out} is there and holds no edit of Carrara's; name a folder that is not there yet")
        if before is not None and before.get("fingerprint", {}).get("digest") != digest and not redo:
            raise ConfigError(f"{out} holds another edit; name another folder with --out, or give --redo")
        if before is not None and not redo and storage.exists(storage.join(out, SHEET)):
            return False
        from latents.arithmetic import fixed_arithmetic

        with fixed_arithmetic(self.request.threads):
            self._draw(out, 0 if before is None else int(before["settings"]["count"]))
        return True

    def _draw(self, out: str, were: int) -> None:
        """were: how many pairs of images another edit may have left there."""
        c = self.request
        generator = PairGenerator(c, self.model, self.run, self.given)
        generator.ask(c.source, c.target, c.weight)
        storage.remove(storage.join(out, SHEET))
        for number in range(c.count, were):
            for name in NAMES:
                storage.remove(storage.join(out, f"{number:03d}-{name}.png"))
        about = {"fingerprint": self.made_with().to_json(), "checkpoint": self.model.name}
        storage.write_json(storage.join(out, ABOUT), {**about, "settings": c.model_dump(mode="json")})
        rows = []
        bar = Progress("edit", c.steps * (c.count + (self.given is not None)), "steps")
        for number in range(c.count):
            images, maps = generator.draw(number, bar.update)
            for name, pixels in zip(NAMES, images, strict=True):
                storage.write_atomic(storage.join(out, f"{number:03d}-{name}.png"), png(pixels))
            rows.append(_row(number, images, maps, generator.prompts))
        bar.close()
        storage.write_atomic(storage.join(out, SHEET), self._sheet(rows, generator).encode())

    def _sheet(self, rows: list[dict[str, Any]], generator: PairGenerator) -> str:
        """The page: images before and after, and where each of their tokens looks."""
        from eval.report.gather import data_uri
        from eval.report.page import environment

        c = self.request
        facts = {
            "steps": f"{c.sampler}, {c.steps}",
            "guidance_scale": f"{c.guidance_scale:g}",
            "seed": str(c.seed),
            "cross_attention": f"{c.cross_attention:g}",
            "self_attention": f"{c.self_attention:g}",
            **{f"weight of {word}": f"{factor:g}" for word, factor in c.weight.items()},
        }
        given = None if generator.given is None else data_uri(np.asarray(generator.given))
        return (
            environment()
            .get_template("edit.html.j2")
            .render(checkpoint=self.model.name, source=c.source, target=c.target, facts=facts, rows=rows, given=given)
        )


class PairGenerator:
    """The pipeline, what it is given, and the noise of a given image."""

    def __init__(
        self, request: DrawnPairs, model: models.Model, run: RunPaths, given: np.ndarray | None = None
    ) -> None:
        from latents.encoders import pick_device

        c = self.request = request
        pipeline = models.build_pipeline(run, model)
        if models.takes_image(pipeline):
            raise ConfigError("edit: this model is given an image beside each prompt; use `carrara sample --image`")
        pipeline = models.from_prompts(pipeline)
        if type(pipeline).__name__ != PIPELINE:
            raise ConfigError(f"edit: the model is a {type(pipeline).__name__}, and what is edited is a {PIPELINE}")
        require_attention(pipeline.unet)
        self.width, self.height = (side or model.size for side in (c.width, c.height))
        require_size(self.width, self.height, int(pipeline.vae_scale_factor))
        self.given = None if given is None else fitted(given, self.width, self.height)
        self.device = pick_device(c.device)
        made = ImageGenerator(pipeline, c.sampler, c.steps, c.guidance_scale, precision=c.precision, device=self.device)
        self.pipeline = made.pipeline
        self.pipeline.vae.enable_slicing()  # one image after the other, as where it is drawn alone
        self.noise: Any = None

    def ask(
        self,
        source: str,
        target: str,
        weight: Mapping[str, float] | None = None,
        names: tuple[str, str] = ("--from", "--to"),
    ) -> None:
        """What the next images are of. weight: of words of `target`. names: of the prompts, for what is said of them.

        Raises ConfigError where they cannot be exchanged."""
        import torch

        c, pipeline = self.request, self.pipeline
        self.prompts = (read_prompt(pipeline, source, names[0]), read_prompt(pipeline, target, names[1]))
        length = pipeline.tokenizer.model_max_length
        self.edit = edit_of(*self.prompts, length, c.cross_attention, c.self_attention, weight)
        with torch.inference_mode():
            texts = [pipeline.encode_prompt([t], self.device, 1, True, [""]) for t in (source, target)]
        self.text, self.empty = (torch.cat([t[i] for t in texts]) for i in (0, 1))

    def _inverted(self, image: Image.Image, tick: Callable[[], None]) -> Any:
        """The noise [1,C,h,w] that the given image is drawn from."""
        import torch

        pipeline = self.pipeline
        if getattr(pipeline.scheduler.config, "clip_sample", False):
            pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, clip_sample=False)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            found = pipeline.vae.encode(pixels.to(pipeline.vae.device))
        mean = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latents  # of an AutoencoderTiny
        latents = mean * pipeline.vae.config.scaling_factor
        self.empty = torch.cat([self.text[:1]] * 2)  # negative-prompt inversion
        assert isinstance(self.request, EditRequest)
        return invert(pipeline, latents, self.text[:1], self.request.steps, self.request.inversion_iterations, tick)

    def draw(self, number: int, tick: Callable[[], None] = lambda: None) -> tuple[np.ndarray, Maps]:
        """Images before and after, uint8 [2,H,W,3], and where their tokens look. StageError where they are not finite.

        tick: called at every step, also those of the inversion.
        """
        import torch

        def at_step(_pipeline: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
            tick()
            return given

        c = self.request
        if self.given is not None and self.noise is None:
            self.noise = self._inverted(self.given, tick)
        factor = int(self.pipeline.vae_scale_factor)
        control = Control(self.pipeline, self.edit, (self.height // factor, self.width // factor))
        noise = [Sample(f"seed {c.seed}", number, prompt.text) for prompt in self.prompts]
        with control(), torch.inference_mode():
            pixels = self.pipeline(
                prompt_embeds=self.text,
                negative_prompt_embeds=self.empty,
                generator=generators(noise),
                latents=None if self.noise is None else torch.cat([self.noise] * 2),
                num_inference_steps=c.steps,
                guidance_scale=c.guidance_scale,
                height=self.height,
                width=self.width,
                output_type="pt",
                callback_on_step_end=at_step,
            ).images.float()
        if not torch.isfinite(pixels).all():
            raise StageError(f"edit: image {number} is not finite; try float32, or a lower guidance scale or weight")
        return to_uint8(pixels), control.maps


def _row(number: int, images: np.ndarray, maps: Maps, prompts: tuple[Prompt, Prompt]) -> dict[str, Any]:
    """What the sheet shows of one pair of images."""
    from eval.report.gather import data_uri

    def shown(branch: int) -> list[dict[str, str]]:
        found = maps.of(branch)
        height, width = images.shape[1:3]
        tiles = []
        for position, token in enumerate(prompts[branch].tokens, 1):
            grey = (found[position] / found[position].max().clamp(min=1e-12)).clamp(0, 1) * 255
            image = Image.fromarray(grey.round().byte().numpy()).resize((width, height), Image.Resampling.BILINEAR)
            tiles.append({"token": token, "map": data_uri(np.repeat(np.asarray(image)[..., None], 3, axis=2))})
        return tiles

    return {
        "number": number,
        "before": data_uri(images[0]),
        "after": data_uri(images[1]),
        "source": shown(0),
        "target": shown(1),
        "pixelated": max(images.shape[1:3]) <= 64,
    }
