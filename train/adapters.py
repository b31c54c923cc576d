"""Fine-tuning: where a UNet comes from, and low-rank updates in place of all its weights.

LoRA: Hu et al. 2021, arXiv:2106.09685. LoHa: Hyeon-Woo et al. 2021, arXiv:2108.06098. LoKr: Yeh et al. 2023,
arXiv:2309.14859. The layers and their arithmetic are peft's, so that diffusers and peft read what is trained here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

from shards.fingerprint import digest_file, digest_json
from shards.settings import ConfigError, StageError
from train.config import TrainConfig
from train.order import derive_key
from train.part_config import AdapterConfig, TextEncoderConfig
from train.predictions import PREDICTIONS

log = logging.getLogger("carrara.train")

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
# What diffusers saves weights under: whole, in half precision as a variant, and either in several files with an index.
KINDS = {
    f"{WEIGHTS}.safetensors": None,
    f"{WEIGHTS}.safetensors.index.json": None,
    f"{WEIGHTS}.fp16.safetensors": "fp16",
    f"{WEIGHTS}.safetensors.index.fp16.json": "fp16",
}
# The convolutions of a UNet's residual blocks and of its down- and upsamplers, by the ends of their names.
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")


KOHYA = "kohya.safetensors"
# DoRA's paper and peft have a magnitude for each output; A1111 takes `dora_scale` for one of each input, and would draw
# other pictures from it without a word.
NO_DORA = "programs that read kohya's names take DoRA's magnitudes for those of inputs, and peft's are of outputs"
KOHYA_PREFIXES = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclasses.dataclass(frozen=True)
class StoredUnet:
    """A UNet on disk as diffusers saves it. variant: None, or `fp16`. files: its config and what holds its weights."""

    folder: Path
    variant: str | None
    files: tuple[Path, ...]


@functools.cache
def find_unet(ref: str) -> StoredUnet:
    """The UNet of a diffusers pipeline, or a UNet's own folder; from the hub where `ref` is no folder.

    Weights in full precision are preferred to a variant in half. Raises ConfigError where there is none, or where it
    is not whole.
    """
    root = Path(ref)
    if not root.is_dir():
        root = _from_hub(ref)
    pickled = None
    for folder in (root / "unet", root):
        if not (folder / CONFIG).is_file():
            continue
        for name, variant in KINDS.items():
            if (folder / name).is_file():
                return StoredUnet(folder, variant, (folder / CONFIG, folder / name, *_parts(folder / name)))
        pickled = next(iter(folder.glob(f"{WEIGHTS}*.bin")), pickled)
    if pickled is not None:
        raise ConfigError(
            f"train.start_from: the weights in {pickled} are pickled, and a pickle may run anything; load that "
            "pipeline with diffusers and save it with save_pretrained, which writes safetensors"
        )
    raise ConfigError(
        f"train.start_from: {ref} holds no UNet ({CONFIG} and {WEIGHTS}.safetensors, whole, in parts or as an fp16 "
        "variant, there or in unet/); name a diffusers pipeline"
    )


def _parts(index: Path) -> list[Path]:
    """The files that an index of weights names; none where the file is no index."""
    if index.suffix != ".json":
        return []
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"train.start_from: {index} is no index of weights; save the pipeline again") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ConfigError(f"train.start_from: {index} names {name}, which is not beside it; bring it back")
    return [index.parent / name for name in names]


def _from_hub(ref: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        patterns = [f"{p}{name}" for p in ("unet/", "") for name in (CONFIG, f"{WEIGHTS}*.safetensors*")]
        # A variant in half precision is left where it is as long as there are the weights themselves.
        halves = [f"{p}{WEIGHTS}*fp16*" for p in ("unet/", "")]
        wanted = [*patterns, "scheduler/*.json"]
        root = Path(snapshot_download(ref, allow_patterns=wanted, ignore_patterns=halves))
        if any((f / k).is_file() for f in (root / "unet", root) for k in KINDS):
            return root
        return Path(snapshot_download(ref, allow_patterns=wanted))
    except Exception as e:
        line = " ".join(str(e).split())[:200]
        raise ConfigError(
            f"train.start_from: '{ref}' is no folder here and cannot be had from the hub: {line}"
        ) from None


@functools.cache
def digest(ref: str) -> str:
    """What a fine-tuned model depends on: the bytes of the UNet's config and weights."""
    return digest_json([digest_file(file) for file in find_unet(ref).files])


def load_unet(ref: str) -> Any:
    """The UNet2DConditionModel, float32; raises ConfigError where it cannot be loaded."""
    from diffusers import UNet2DConditionModel

    found = find_unet(ref)
    try:
        unet = UNet2DConditionModel.from_pretrained(
            found.folder, variant=found.variant, use_safetensors=True, low_cpu_mem_usage=False
        )
        return unet.float()
    except Exception as e:
        line = " ".join(str(e).split())[:300]
        raise ConfigError(f"train.start_from: the UNet in {found.folder} cannot be loaded: {line}") from None


def check_process(ref: str, config: TrainConfig) -> None:
    """Warn where a pipeline says of itself that it predicts something else, or was trained on another process of noise,
    than it is now trained on: its output would have to be learned anew."""
    file = find_unet(ref).folder.parent / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return
    try:
        stored = json.loads(file.read_bytes())
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise ConfigError(f"train.start_from: {file} is not the configuration of a scheduler; save the pipeline again")
    flow = PREDICTIONS[config.prediction_type].flow
    zero = bool(stored.get("rescale_betas_zero_snr", False))
    # Their names in the scheduler's configuration, its defaults, and what is now asked for.
    said: list[tuple[str, Any, Any]] = [
        ("prediction_type", stored.get("prediction_type", "epsilon"), config.prediction_type)
    ]
    if not flow and said[0][1] != "flow_prediction":
        said.append(("zero_terminal_snr", zero, config.zero_terminal_snr))
        said.append(("num_train_timesteps", stored.get("num_train_timesteps", 1000), config.num_train_timesteps))
        if stored.get("trained_betas") is None:
            said.append(("beta_schedule", stored.get("beta_schedule", "linear"), config.beta_schedule))
            if stored.get("beta_schedule", "linear") != "squaredcos_cap_v2":
                said.append(("beta_start", stored.get("beta_start", 0.0001), config.beta_start))
                said.append(("beta_end", stored.get("beta_end", 0.02), config.beta_end))
    elif flow and "shift" in stored:
        said.append(("snr_shift", stored["shift"], config.snr_shift))
    for name, theirs, ours in said:
        if theirs != ours:
            log.warning(
                "train.%s is %s, but %s says that it was trained with %s; what its output means will have to be "
                "learned anew",
                name,
                ours,
                ref,
                theirs,
            )


def add(unet: Any, config: AdapterConfig, seed: int) -> Any:
    """Freeze `unet` and add trainable updates to its layers, in place; raises ConfigError where no layer matches."""
    import torch
    from peft import inject_adapter_in_model

    unet.requires_grad_(False)
    # A fork, so that a caller's generator is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key("init", "adapter", seed) >> 1)
        try:
            inject_adapter_in_model(peft_config(config), unet)
        except ValueError as e:
            raise ConfigError(f"train.adapter.targets: {' '.join(str(e).split())[:300]}") from None
    return unet


def peft_config(config: AdapterConfig) -> Any:
    """peft's own configuration of this adapter."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    convolutions = config.convolutions or config.kind == "locon"
    targets = [*config.targets, *(CONVOLUTIONS if convolutions else ())]
    alpha = config.rank if config.alpha is None else config.alpha
    if config.is_lora:
        return LoraConfig(
            r=config.rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=True, use_dora=config.dora
        )
    kind = LoHaConfig if config.kind == "loha" else LoKrConfig
    return kind(r=config.rank, alpha=alpha, target_modules=targets, init_weights=True)


def learning_text(text: Any, projected: bool, config: TextEncoderConfig, seed: int) -> Any:
    """transformers' model of a text tower (TextEncoder), which learns: all of it, or the updates of its attention.

    Of a ClipPair it is a ModuleDict of both, by their names in a pipeline.
    """
    import torch
    from peft import inject_adapter_in_model

    from latents.encoders import kept_blocks
    from latents.text import ClipPair
    from train.text_export import clip_text_model

    if isinstance(text, ClipPair):
        first = clip_text_model(text.first, first_of_two=True)
        models = {"text_encoder": first, "text_encoder_2": clip_text_model(text.second, projected=True)}
    else:
        models = {"": clip_text_model(text, projected=projected)}
    for name, model in models.items():
        if config.kind == "full":
            # The positions and words of a caption learn too, as in diffusers' script for DreamBooth.
            model.requires_grad_(True)
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_key("init", f"text adapter {name}".rstrip(), seed) >> 1)
            inject_adapter_in_model(text_peft_config(config), model)
    if not isinstance(text, ClipPair):
        return models[""]
    # Of the first, what lies behind the layer that is read has no gradient.
    inner = getattr(first, "text_model", first)
    for unread in (
        *inner.encoder.layers[len(kept_blocks(text.first.tower, text.first.layer)) :],
        inner.final_layer_norm,
    ):
        unread.requires_grad_(False)
    return torch.nn.ModuleDict(models)


def text_peft_config(config: TextEncoderConfig) -> Any:
    """peft's own configuration of a text encoder's LoRA, on the four projections that diffusers' script adapts."""
    from peft import LoraConfig

    alpha = config.rank if config.alpha is None else config.alpha
    return LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(TEXT_TARGETS), init_lora_weights=True)


def tuned_text(encoder: Any, learned: dict[str, Any], config: TextEncoderConfig, where: str) -> Any:
    """transformers' text encoder with learned updates in it, in place; StageError where it lacks what they change."""
    import torch
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what is not read, and so was not learned
        inject_adapter_in_model(text_peft_config(config), encoder)
    loaded = encoder.load_state_dict(learned, strict=False)
    if loaded.unexpected_keys:
        raise StageError(f"{where} holds {loaded.unexpected_keys[0]}, which the text encoder of the latents lacks")
    return encoder


def merge(unet: Any) -> Any:
    """The plain UNet2DConditionModel with the updates added to its weights."""
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel.from_config({k: v for k, v in dict(unet.config).items() if not k.startswith("_")})
    plain.load_state_dict(merged_weights(unet))
    return plain


def merged_weights(model: Any) -> dict[str, Any]:
    """A model's state dict as it was before updates were added to its layers, with them in its weights; unmerged then.

    The names and shapes are those of the plain model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.merge()
    weights = {}
    for name, value in model.state_dict().items():
        if ".base_layer." in name:
            weights[name.replace(".base_layer.", ".")] = value.clone()
        elif not any(part in name for part in (".lora_", ".hada_", ".lokr_")):
            weights[name] = value.clone()
    return weights


def save_lora(
    unet: dict[str, Any],
    config: AdapterConfig | None,
    texts: dict[str, dict[str, Any]],
    text_config: TextEncoderConfig | None,
    sized: bool,
    folder: Path,
) -> None:
    """`pytorch_lora_weights.safetensors`, which diffusers' load_lora_weights takes, with the alphas beside them.

    unet: its updates under peft's names; empty where there are none. texts: those of text encoders, by their names in a
    pipeline. sized: of an SDXL pipeline.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    given: dict[str, Any] = {}
    if unet:
        assert config is not None
        given |= {"unet_lora_layers": unet, "unet_lora_adapter_metadata": _metadata(peft_config(config))}
    for part, updates in texts.items():
        assert text_config is not None
        given[f"{part}_lora_layers"] = updates
        given[f"{part}_lora_adapter_metadata"] = _metadata(text_peft_config(text_config))
    (StableDiffusionXLPipeline if sized else StableDiffusionPipeline).save_lora_weights(folder, **given)
    if config and config.dora:
        log.warning("%s is not written: %s; take pytorch_lora_weights.safetensors, or the merged model", KOHYA, NO_DORA)
        return
    save_kohya(unet, config, texts, text_config, sized, folder / KOHYA)


def save_kohya(
    unet: dict[str, Any],
    config: AdapterConfig | None,
    texts: dict[str, dict[str, Any]],
    text_config: TextEncoderConfig | None,
    sized: bool,
    file: Path,
) -> None:
    """The same in the names of kohya's scripts, which AUTOMATIC1111's and most other programs read, with the alphas."""
    import torch
    from safetensors.torch import save_file

    out: dict[str, Any] = {}
    named = [(KOHYA_PREFIXES[part][-1 if sized else 0], updates, text_config) for part, updates in texts.items()]
    for prefix, values, settings in (("lora_unet", unet, config), *named):
        if not values or settings is None:
            continue
        alpha = float(settings.rank if settings.alpha is None else settings.alpha)
        for name, value in values.items():
            if prefix != "lora_unet" and not name.startswith(("text_model.", "text_projection.")):
                name = f"text_model.{name}"  # as transformers named it before its version 5
            layer, _, part = name.rpartition(".lora_")
            key = f"{prefix}_{layer.replace('.', '_')}"
            out[f"{key}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value
            out[f"{key}.alpha"] = torch.tensor(alpha, dtype=value.dtype)
    save_file(out, file, metadata={"ss_network_module": "networks.lora"})


def load_lora(file: str, unet: Any, text: Any = None) -> None:
    """Put a LoRA file's updates into a UNet, and text encoders, that have updates of that rank, in place.

    text: as learning_text gives it; one encoder alone takes those of either of a pipeline's.

    The file has kohya's, diffusers' or peft's names. Its alphas are folded in, so that it begins as what the file is.
    Raises ConfigError where it cannot be read or is of other layers or ranks.
    """
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from peft.tuners.lora import LoraLayer
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = load_file(file)
        if any(k.endswith(".dora_scale") for k in raw):
            raise ConfigError(
                f"train.adapter.start_from: {file} is a DoRA in kohya's names, which cannot be gone on from: {NO_DORA};"
                " take the file with diffusers' or peft's names"
            )
        found, _ = StableDiffusionPipeline.lora_state_dict(dict(raw), unet_config=unet.config)
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        line = " ".join(str(e).split())[:200]
        raise ConfigError(f"train.adapter.start_from: {file} cannot be read as a LoRA: {line}") from None
    kohyas = {k.removesuffix(".alpha"): float(v) for k, v in raw.items() if k.endswith(".alpha")}
    stored = _stored_alphas(file)
    if not any(k.startswith(("unet.", "text_encoder")) for k in found):
        raise ConfigError(f"train.adapter.start_from: {file} holds no LoRA of a Stable Diffusion model")
    if text is None and any(k.startswith("text_encoder") for k in found):
        raise ConfigError(
            f"train.adapter.start_from: {file} changes the text encoder too; set train.text_encoder to {{kind: lora}}"
        )
    pair = isinstance(text, torch.nn.ModuleDict)
    for part in KOHYA_PREFIXES:
        model = unet if part == "unet" else text[part] if pair else text
        convert = convert_unet_state_dict_to_peft if part == "unet" else convert_state_dict_to_peft
        mine = {k.partition(".")[2]: v for k, v in found.items() if k.partition(".")[0] == part}
        if model is None or not mine:
            continue
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        values = mine if any(".lora_A." in k for k in mine) else convert(mine)
        wanted = {}
        for name, value in values.items():
            layer, _, rest = name.rpartition(".lora_")
            known = layer if layer in layers else layer.removeprefix("text_model.")
            target = f"{known}.lora_{rest.removesuffix('.weight')}.default.weight"
            if known not in layers:
                raise ConfigError(
                    f"train.adapter.start_from: {file} changes {layer}, which train.adapter leaves as it is"
                )
            if rest.startswith("B"):
                rank = value.shape[1]
                alpha = stored.get(part, float(rank))
                if kohyas:
                    names = [f"{p}_{layer.replace('.', '_')}" for p in KOHYA_PREFIXES[part]]
                    alpha = next((kohyas[n] for n in names if n in kohyas), alpha)
                value = value.float() * (alpha / rank / layers[known].scaling["default"])
            wanted[target] = value.float()
        state = model.state_dict()
        for name, value in wanted.items():
            if name not in state or value.numel() != state[name].numel():
                has = f"of shape {tuple(state[name].shape)}" if name in state else "not there"
                raise ConfigError(
                    f"train.adapter.start_from: {name} of {file} has the shape {tuple(value.shape)}, and here it is "
                    f"{has}; set train.adapter.rank and dora as the file has them"
                )
        missing = {n for n in state if ".lora_" in n} - wanted.keys()
        if missing:
            raise ConfigError(
                f"train.adapter.start_from: {file} has no {min(missing)}, which train.adapter learns; name its layers "
                "with targets and convolutions"
            )
        model.load_state_dict({n: v.reshape(state[n].shape) for n, v in wanted.items()}, strict=False)


def _stored_alphas(file: str) -> dict[str, float]:
    """Of a file that diffusers saved: lora_alpha by part, from its metadata."""
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        text = (f.metadata() or {}).get("lora_adapter_metadata")
    try:
        stored = json.loads(text) if text else {}
    except ValueError:
        return {}
    return {k.removesuffix(".lora_alpha"): v for k, v in stored.items() if k.endswith(".lora_alpha")}


def _metadata(config: Any) -> dict[str, Any]:
    found = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return {**found, "target_modules": sorted(found["target_modules"])}


def save_peft(weights: dict[str, Any], config: AdapterConfig, folder: Path) -> None:
    """peft's own folder, for kinds that diffusers' loaders do not know: PeftModel.from_pretrained(unet, folder)."""
    from safetensors.torch import save_file

    folder.mkdir()
    peft_config(config).save_pretrained(folder)
    save_file({f"base_model.model.{k}": v for k, v in weights.items()}, folder / "adapter_model.safetensors")


def state(unet: Any) -> dict[str, Any]:
    """The updates alone under peft's names, as diffusers' save_lora_weights takes them."""
    from peft.utils import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(unet))
