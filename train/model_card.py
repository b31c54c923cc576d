"""The README.md of an exported model: what it is, what it saw, and how to use it, in plain words."""

from __future__ import annotations

import json
from typing import Any

from train.predictions import PREDICTIONS

_CARD = """---
library_name: diffusers
pipeline_tag: {task}
{licence_tag}---

# {title}

A latent diffusion model that was trained with Carrara. It draws images of {resolution} x {resolution} pixels{more}.

```python
from diffusers import DiffusionPipeline
{imports}
pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{trust})
pipeline("your prompt"{given}, num_inference_steps=30, guidance_scale=5.0).images[0].save("image.png")
```

{needs} There is no safety checker in it: whoever shows its images to
others decides what to let through. {licence}
{tuning}
## What it was trained on

- {samples} images with captions ({shards}), of {rows} rows in the table they came from.
{status}- The dataset's fingerprint: `{dataset}`. The same run's folders name every image in it by its key.

## How it was trained

- {objective} ({process}).
- Images seen: {images_seen}; steps of the optimizer: {steps}; batch: {batch_size}; captions dropped for
  classifier-free guidance: {caption_dropout}.
- Weights: {weights}, from the checkpoint `{checkpoint}`.

## Its parts

- VAE: `{vae_ref}`, latents times {scaling_factor}, sha256 `{vae_digest}`.
{texts}{tokenizer}

All of this, for machines: `carrara.json`.
"""

_CLEANED = """- The tokenizer is open_clip's. Captions were cleaned before training as open_clip does it: lower case,
  HTML entities resolved, broken encodings repaired. A prompt gives the same tokens if it is clean in that sense."""
_OWN_CLASS = """diffusers has no class that shows a UNet such a text encoder under a mask, so `pipeline.py` here is
one: a page of code that imports torch and diffusers alone, and that `trust_remote_code=True` allows to run. Nothing
else but diffusers and transformers is needed."""

_DC_CLASS = """diffusers' StableDiffusionPipeline cannot decode with an AutoencoderDC, so `pipeline.py` here is a class
that can: half a page of code that imports torch, transformers and diffusers alone, and that `trust_remote_code=True`
allows to run. Nothing else but diffusers and transformers is needed."""

# By the field of train that tells the model an image: task, title, how it draws, and its pipeline's arguments.
_KINDS = {
    None: ("text-to-image", "A text-to-image model", "", ""),
    "inpaint": (
        "image-to-image",
        "An inpainting model",
        ", painting anew what lies under a mask",
        ', image=load_image("image.png"), mask_image=load_image("mask.png")',
    ),
    "edit": (
        "image-to-image",
        "A model that edits images as it is told",
        ", changing one as the prompt says",
        ', image=load_image("image.png"), image_guidance_scale=1.5',
    ),
    "upscale": (
        "image-to-image",
        "A decoder for small images",
        ", from the same ones made small",
        ', image=load_image("small.png"), noise_level=20',
    ),
    "control": (
        "image-to-image",
        "A ControlNet and the text-to-image model that it steers",
        ", following a control image ({made})",
        ', image=load_image("control.png")',
    ),
}
_WEIGHTS = {"ema": "an exponential moving average over training", "raw": "as the optimizer left them"}
_LAYERS = {
    "last": "its last block after the final norm",
    "penultimate": "its last block but one after the final norm",
    "last_no_norm": "its last block before the final norm",
    "penultimate_no_norm": "its last block but one, without the final norm",
}


def model_card(provenance: dict[str, Any]) -> str:
    """Markdown from the content of carrara.json."""
    p, data, training = provenance, provenance["latents"], provenance["training"]
    lost = {k: v for k, v in data["status"].items() if k != "success" and v}
    way = next((n for n in _KINDS if n and training.get(n)), None)
    task, title, more, given = _KINDS[way]
    if way == "control":
        control = training["control"]
        more = more.format(made="brought with the images" if control["images"] else control["kind"])
    own = p["text"].get("kind") == "transformers"
    needs = _OWN_CLASS if own else "Nothing but diffusers and transformers is needed."
    if compressed := not own and p["vae"].get("kind") == "AutoencoderDC":
        needs = _DC_CLASS
    left_out = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in sorted(lost.items()))
    return _CARD.format(
        task=task,
        title=title,
        more=more,
        imports="from diffusers.utils import load_image\n" if given else "",
        given=given,
        resolution=data["resolution"],
        samples=f"{data['samples']:,}",
        shards="1 shard" if data["shards"] == 1 else f"{data['shards']:,} shards{_span(data)}",
        rows=f"{data['rows']:,}",
        status=f"- Left out: {left_out}.\n" if left_out else "",
        dataset=data["fingerprint"],
        objective=PREDICTIONS[training["prediction_type"]].sentence,
        process=_process(training),
        licence=_licence(p.get("licence")),
        licence_tag=f"license: other\nlicense_name: {json.dumps(p['licence'])}\n" if p.get("licence") else "",
        tuning=_tuning(training),
        images_seen=_number(p["images_seen"]),
        steps=_number(p["steps"]),
        batch_size=_number(training.get("batch_size")),
        caption_dropout=training.get("caption_dropout", "not recorded"),
        weights=_weights(p["weights"]),
        checkpoint=p["checkpoint"],
        vae_ref=_code(p["vae"]["ref"]),
        scaling_factor=p["vae"]["scaling_factor"],
        vae_digest=p["vae"]["digest"],
        trust=", trust_remote_code=True" if own or compressed else "",
        needs=needs,
        tokenizer="- The tokenizer is the text encoder's own; captions reach it as they are." if own else _CLEANED,
        texts="".join(_text(facts) for facts in p["text"].get("encoders", [p["text"]])),
    )


def _text(facts: dict[str, Any]) -> str:
    if facts.get("kind") == "transformers":
        return (
            f"- Text encoder: `{_code(facts['ref'])}` (transformers), sha256 `{facts['digest']}`; its last hidden "
            f"states,\n  at most {facts['context_length']} tokens of {facts['width']} values, under a mask.\n"
        )
    pad = "its end token" if facts.get("pad") == "end" else "id 0"
    return (
        f"- Text encoder: `{_code(facts['ref'])}`, sha256 `{facts['digest']}`; {_LAYERS[facts['layer']]}, "
        f"{facts['context_length']} tokens of {facts['width']} values;\n  a shorter prompt is filled up with {pad}.\n"
    )


def _span(data: dict[str, Any]) -> str:
    first, last = data.get("first_shard"), data.get("last_shard")
    return "" if first is None or last is None else f", {first:05d} to {last:05d}"


def _process(training: dict[str, Any]) -> str:
    steps = f"{training['num_train_timesteps']} steps of noise"
    if not PREDICTIONS[training["prediction_type"]].flow:
        schedule = f"`{training['beta_schedule']}` betas from {training['beta_start']} to {training['beta_end']}"
        steps = f"{steps}, {schedule}"
    if training.get("zero_terminal_snr"):
        steps += ", the last of them pure noise"
    return steps


def _licence(licence: str | None) -> str:
    if not licence:
        return "Its makers have not said under which licence it may be used."
    return f"Licence: {licence}."


def _tuning(training: dict[str, Any]) -> str:
    text = training.get("text_encoder")
    if not training.get("start_from"):
        if not text:
            return ""
        return "\nThe text encoder learned with the UNet, as a whole; it began as the one that is named above.\n"
    how, where = "All weights were fine-tuned", ""
    if training.get("control"):
        how = "Its UNet is unchanged; a ControlNet was trained beside it"
    if adapter := training.get("adapter"):
        how = f"Low-rank updates ({adapter['kind']}, rank {adapter['rank']}) were trained and merged"
        where = " They lie in `lora/` too." if adapter["kind"] in ("lora", "locon") else " They lie in `adapter/` too."
    if text:
        by = "as a whole" if text["kind"] == "full" else f"by low-rank updates (rank {text['rank']}), merged"
        how += f"; the text encoder learned too, {by}"
    if word := training.get("textual_inversion"):
        how = f"The word {_quoted(word['token'])} was learned and nothing else"
        where = " It lies in `learned_embeds.safetensors`, for `load_textual_inversion`."
    return f"\nIt began as {_quoted(training['start_from'])}. {how}.{where}\n"


def _quoted(text: str) -> str:
    return f"`{_code(text)}`"


def _weights(name: str) -> str:
    if name in _WEIGHTS:
        return _WEIGHTS[name]
    kind, _, std = name.partition(":") if ":" in name else name.partition("_")
    how = ", put together from snapshots afterwards" if kind == "posthoc" else ""
    return f"a power-function average over training of relative deviation {std}{how}"


def _number(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"


def _code(text: str) -> str:
    return text.replace("`", "'")
