"""The two frozen networks of a latent diffusion model, loaded and ready to encode.

Both run in eval mode without gradients. Their arithmetic follows diffusers and open_clip exactly; the
tests compare with diffusers' own `encode` and with transformers' CLIPTextModel on the same weights.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from latents.moments import LOGSTD_MIN, LOGSTD_STEP
from latents.text import ClipPair, Features, SequenceEncoder, Text
from latents.weights import PADS, PAIR, SEQUENCE, ClipWeights, VaeWeights, clips_of, find_clip, find_sequence, find_vae
from shards.settings import ConfigError, StageError

TEXT_LAYERS = ("last", "penultimate", "last_no_norm", "penultimate_no_norm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> str:
    """`auto` is the GPU where there is one; raises ConfigError where `cuda` is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("latents.device is cuda, but PyTorch finds no GPU here; set it to auto or cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Moments as they are stored. mean: float16 [B,C,h,w]; codes: uint8 [B,C,h,w], None without a posterior;
    finite: bool [B], whether all of an image's moments are finite in half precision."""

    mean: np.ndarray
    codes: np.ndarray | None
    finite: np.ndarray


class Vae:
    """A diffusers AutoencoderKL, AutoencoderTiny or AutoencoderDC: `model`, `digest`, `scaling_factor`, `config`,
    `channels`, `downscale`; `has_posterior` is False for the latter two. channels_last, compile: how the encoder
    runs."""

    def __init__(
        self,
        weights: VaeWeights,
        device: str = "cpu",
        precision: str = "float32",
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        self.weights = weights
        self.ref, self.digest, self.config = weights.ref, weights.digest, weights.config
        self.scaling_factor, self.downscale = weights.scaling_factor, weights.downscale
        self.channels = int(weights.config["latent_channels"])
        self.has_posterior = weights.has_posterior
        self.device, self.precision = device, precision
        self.model: Any = _moved(_build_vae(weights), device, precision)
        require_digest("the VAE", weights.digest, self.digest, self.ref)  # it may have been exchanged meanwhile
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if compile:
            self.model.encoder = torch.compile(self.model.encoder, dynamic=False)
        self._exact: Any = self.model if precision == "float32" and not compile else None

    def encode(self, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [B,H,W,3] -> mean and log-std of the posterior, float32 [B,C,H/f,W/f] on the CPU, unscaled.

        Without a posterior the log-std is minus infinity, that of a point.
        """
        mean, logstd = self._moments(self.model, pixels)
        return mean.cpu(), logstd.cpu()

    def encode_exact(self, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode`, in float32 from the weights as stored; that network is loaded when first needed."""
        if self._exact is None:
            self._exact = _build_vae(self.weights).to(self.device)
            require_digest("the VAE", self.weights.digest, self.digest, self.ref)
        mean, logstd = self._moments(self._exact, pixels)
        return mean.cpu(), logstd.cpu()

    def encode_stored(self, pixels: np.ndarray) -> Callable[[], Stored]:
        """Begin to encode uint8 [B,H,W,3]; the result, once it is called for, is what a shard holds.

        On a GPU the arithmetic goes on meanwhile: the caller gives it the next batch before it asks for this one,
        so that the GPU never waits for what the CPU does in between.
        """
        with torch.inference_mode():
            x = torch.from_numpy(pixels)
            if self.device == "cuda":
                x = x.pin_memory().to("cuda", non_blocking=True)
            mean, logstd = self._moments(self.model, x)
            half = mean.to(torch.float16)
            finite = torch.isfinite(half).flatten(1).all(dim=1)
            found = [half, finite]
            if self.has_posterior:
                found[1] &= torch.isfinite(logstd).flatten(1).all(dim=1)
                # As moments.quantise_logstd: to the nearest code in float64; halves go to the even one.
                codes = ((torch.nan_to_num(logstd).double() - LOGSTD_MIN) / LOGSTD_STEP).round()
                found.append(codes.clamp(0, 255).to(torch.uint8))
            if self.device != "cuda":
                arrays = [t.numpy() for t in found]
                return lambda: Stored(arrays[0], arrays[2] if len(arrays) > 2 else None, arrays[1])
            host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in found]
            done = torch.cuda.Event()
            done.record()

        def result() -> Stored:
            done.synchronize()
            return Stored(host[0].numpy(), host[2].numpy() if len(host) > 2 else None, host[1].numpy())

        return result

    def posterior(self, pixels: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels float [B,3,H,W] in -1..1 -> mean and log-std of the posterior, float32 [B,C,H/f,W/f], unscaled, where
        the pixels lie and in arithmetic of `dtype`, without a gradient.

        The encoder moves there and to that type at the first call, and stays; the decoder is let go.
        """
        model = self.model
        if hasattr(pixels, "fake_mode"):  # memory and FLOPs are counted, and the weights stay as they are
            model = _as_fake(model, pixels, dtype)
        elif (weight := next(model.encoder.parameters())).device != pixels.device or weight.dtype != dtype:
            model.decoder = torch.nn.Identity()
            torch.nn.Module.to(model, pixels.device, dtype)
            self.device, self._exact = str(pixels.device), None
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return self._split(model.encode(pixels.to(dtype)))

    def decode(self, latents: np.ndarray | torch.Tensor) -> np.ndarray:
        """Unscaled latents [B,C,h,w] -> uint8 [B,H,W,3]."""
        with torch.inference_mode():
            z = torch.as_tensor(latents).to(self.device, self.model.dtype)
            pixels = self.model.decode(z).sample.float()
            return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _moments(self, model: Any, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-std in float32, where the model lies."""
        with torch.inference_mode():
            x = torch.as_tensor(pixels).to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
            return self._split(model.encode(x.to(model.dtype)))

    def _split(self, found: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.has_posterior:
            mean = (found.latents if self.weights.kind == "AutoencoderTiny" else found.latent).float()
            return mean, torch.full_like(mean, -torch.inf)
        return found.latent_dist.mean.float(), 0.5 * found.latent_dist.logvar.float()


class TextEncoder:
    """An open_clip CLIP. `model`, `digest`, `context_length`, `width`, `layer`, `pad`, `ref`; a Text (text.py) too.

    pad: what follows a caption's end token, `zero` or `end` (weights.PADS). UNets attend to all places without a mask,
    so it is as much a part of what they learn as the layer is.
    """

    def __init__(
        self, weights: ClipWeights, layer: str, device: str = "cpu", precision: str = "float32", pad: str = "zero"
    ) -> None:
        import open_clip

        if layer not in TEXT_LAYERS:
            raise ConfigError(f"the text layer is one of {', '.join(TEXT_LAYERS)}, not '{layer}'")
        if pad not in PADS:
            raise ConfigError(f"captions are padded with one of {', '.join(PADS)}, not '{pad}'")
        self.weights, self.layer, self.pad = weights, layer, pad
        self.ref, self.digest = weights.ref, weights.digest
        self.device, self.precision = device, precision
        self.model: Any = _moved(build_clip(weights), device, precision)
        require_digest("the CLIP", weights.digest, self.digest, self.ref)
        self.tower: Any = plain_text_tower(self.model, weights.ref)
        self._exact: Any = self.tower if precision == "float32" else None
        self.context_length = int(self.tower.context_length)
        self.width = int(self.tower.ln_final.weight.shape[0])
        self.vocabulary = int(self.tower.token_embedding.num_embeddings)
        name = "ViT-L-14" if weights.text_alone else weights.name  # whose tokenizer all of CLIP's own have
        self.tokenizer: Any = open_clip.get_tokenizer(name, context_length=self.context_length)
        if getattr(self.tokenizer, "reduction_fn", None) is not None:
            raise ConfigError(f"the CLIP '{weights.ref}' drops words of long captions at random and cannot be used")
        self._preprocess: Callable[[Image.Image], torch.Tensor] | None = None

    called = "the CLIP"
    names: tuple[str, ...] = ("tokens",)

    def tokens_of(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """`tokenize`, by the name of the column."""
        return {"tokens": self.tokenize(captions).numpy()}

    def encode_tokens(
        self, tokens: Mapping[str, np.ndarray], pooled: bool = False, exact: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode`, `encode_pooled` or `encode_exact` of a batch of `tokens_of`; the second is [B,0] if not pooled."""
        if exact:
            rows, end = self.encode_exact(tokens["tokens"])
            return rows, end if pooled else end[:, :0]
        return self._encode(self.tower, tokens["tokens"], pooled)

    def features_of(self, batch: Mapping[str, torch.Tensor], dtype: torch.dtype, pooled: bool = False) -> Features:
        """`features` of a batch with the columns of `tokens_of`."""
        rows, end = self.features(batch["tokens"], dtype, pooled)
        return Features(rows, end)

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Captions -> token ids, int64 [B,context_length]; open_clip cleans and truncates, `pad` says what follows."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        ids = torch.as_tensor(self.tokenizer(list(captions)))
        if self.pad == "end":
            end = int(self.tokenizer.eot_token_id)
            after = (ids == end).cumsum(dim=1) > 0
            ids = ids.masked_fill(after, end)
        return ids

    @property
    def pad_id(self) -> int:
        """The id that fills a caption up behind its end token."""
        return int(self.tokenizer.eot_token_id) if self.pad == "end" else 0

    def encode(self, tokens: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Token ids [B,context_length] -> float32 [B,context_length,width] on the CPU.

        The output of the last block, or of the one before, after the final layer norm (Stable Diffusion 1 and 2)
        or without it (SDXL).
        """
        return self._encode(self.tower, tokens, pooled=False)[0]

    def features(
        self, tokens: torch.Tensor, dtype: torch.dtype, pooled: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `encode` and `encode_pooled`, where the tokens lie and in arithmetic of `dtype`, without a gradient.

        The tower moves there and to that type at the first call, and stays; the CLIP's other half is let go.
        """
        tower, weight = self.tower, self.tower.token_embedding.weight
        if hasattr(tokens, "fake_mode"):  # memory and FLOPs are counted, and the weights stay as they are
            tower = _as_fake(tower, tokens, dtype)
        elif weight.device != tokens.device or weight.dtype != dtype:
            self.model.visual = torch.nn.Identity()  # it would take more of a GPU's memory than the text tower
            torch.nn.Module.to(self.model, tokens.device, dtype)
            self.device, self._exact = str(tokens.device), None
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            rows, end = self._run(tower, tokens, pooled)
        return rows, end if pooled else None

    def encode_pooled(self, tokens: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode`, and the text embedding, float32 [B,D]: the last block's output at the end token, after the
        final norm and the projection; not of unit length. What SDXL is given beside the time."""
        return self._encode(self.tower, tokens, pooled=True)

    def encode_exact(self, tokens: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode_pooled`, in float32 from the weights as stored; that network is loaded when first needed."""
        if self._exact is None:
            self._exact = plain_text_tower(build_clip(self.weights).to(self.device), self.ref)
            require_digest("the CLIP", self.weights.digest, self.digest, self.ref)
        return self._encode(self._exact, tokens, pooled=True)

    @property
    def pooled_width(self) -> int:
        """Width of the text embedding that `encode_pooled` gives."""
        projection = self.tower.text_projection
        if projection is None:
            return self.width
        return int(projection.out_features if isinstance(projection, torch.nn.Linear) else projection.shape[1])

    def _encode(self, tower: Any, tokens: np.ndarray | torch.Tensor, pooled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            rows, end = self._run(tower, torch.as_tensor(np.asarray(tokens, np.int64)).to(self.device), pooled)
            return rows.float().cpu(), end.float().cpu()

    def _run(self, tower: Any, ids: torch.Tensor, pooled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        from open_clip.transformer import text_global_pool

        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        mask = tower.attn_mask.to(x.dtype)
        blocks = list(tower.transformer.resblocks)
        depth = len(kept_blocks(tower, self.layer))
        for block in blocks[:depth]:
            x = block(x, attn_mask=mask)
        rows = tower.ln_final(x) if has_final_norm(self.layer) else x
        if not pooled:
            return rows, x.new_empty(len(ids), 0)
        for block in blocks[depth:]:
            x = block(x, attn_mask=mask)
        pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "argmax")
        end = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None)
        x = text_global_pool(tower.ln_final(x), ids, pool, eos_token_id=end)
        projection = tower.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
        return rows, x

    def encode_captions(self, captions: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Captions -> the CLIP's joint embedding, float32 [B,D] on the CPU, of unit length. Raises ConfigError where it
        has no image encoder."""
        self.weights.require_image_encoder()
        tokens = self.tokenize(captions)
        with torch.inference_mode():
            parts = [
                self.model.encode_text(tokens[i : i + batch_size].to(self.device)).float().cpu()
                for i in range(0, len(tokens), batch_size)
            ]
            return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def encode_images(self, pixels: Sequence[np.ndarray] | np.ndarray, batch_size: int = 64) -> torch.Tensor:
        """uint8 [B,H,W,3], or images of several sizes -> the CLIP's joint embedding, float32 [B,D] of unit length.

        Resized, cropped and normalised as the CLIP's own configuration says. Raises ConfigError where it has no image
        encoder.
        """
        self.weights.require_image_encoder()
        if self._preprocess is None:
            from open_clip.transform import PreprocessCfg, image_transform_v2

            self._preprocess = image_transform_v2(PreprocessCfg(**self.model.visual.preprocess_cfg), is_train=False)
        parts = []
        with torch.inference_mode():
            for i in range(0, len(pixels), batch_size):
                x = torch.stack([self._preprocess(Image.fromarray(p)) for p in pixels[i : i + batch_size]])
                parts.append(self.model.encode_image(x.to(self.device, DTYPES[self.precision])).float().cpu())
            return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def load_vae(ref: str, device: str = "cpu", precision: str = "float32", **how: bool) -> Vae:
    """Load the VAE named `ref` (folder, safetensors file or hub name); raises ConfigError with one sentence.

    how: channels_last, compile.
    """
    return Vae(find_vae(ref), device, precision, **how)


def load_text(
    ref: str, layer: str = "penultimate", device: str = "cpu", precision: str = "float32", pad: str = "zero"
) -> TextEncoder:
    """Load the CLIP named `ref` (folder, MODEL:TAG, MODEL:/file, hf-hub:NAME); raises ConfigError with one sentence."""
    return TextEncoder(find_clip(ref), layer, device, precision, pad)


def load_text_of(facts: Mapping[str, Any], device: str = "cpu", precision: str = "float32") -> Text:
    """What read the captions of latents, by the facts of their manifest; StageError where it is another one now."""
    if facts.get("kind") == PAIR:
        first, second = (load_clip_of(one, device, precision) for one in facts["encoders"])
        return ClipPair(first, second)
    if facts.get("kind") == SEQUENCE:
        weights = find_sequence(facts["ref"])
        require_digest("the text encoder", weights.digest, facts["digest"], facts["ref"])
        return SequenceEncoder(weights, int(facts["context_length"]), device, DTYPES[precision])
    return load_clip_of(facts, device, precision)


def load_clip_of(facts: Mapping[str, Any], device: str = "cpu", precision: str = "float32") -> TextEncoder:
    """A CLIP that latents were made with, by its facts (weights.clips_of); StageError where it is another one now."""
    text = load_text(facts["ref"], facts["layer"], device, precision, facts.get("pad", "zero"))
    require_digest("the CLIP", text.digest, facts["digest"], facts["ref"])
    return text


def other_encoder(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What differs between the encoders of two datasets, by the facts of their manifests; None where nothing does.

    one, other: with `vae` and `text`. What is compared is all that decides what a latent or a caption becomes.
    """
    for what, name, fact, default in (
        ("vae", "VAE", "digest", None),
        ("vae", "scaling_factor of the VAE", "scaling_factor", None),
        ("text", "CLIP", "digest", None),
        ("text", "text_layer", "layer", None),
        ("text", "text_pad", "pad", "zero"),
        ("text", "max_length of text_encoder", "context_length", None),
    ):
        if one[what].get(fact, default) != other[what].get(fact, default):
            return name
    pads = [[clip.get("pad", "zero") for clip in clips_of(facts["text"])] for facts in (one, other)]
    return "text_encoder.pad" if pads[0] != pads[1] else None  # of a pair, the first one's is the pad of both


def _as_fake(module: Any, like: Any, dtype: torch.dtype) -> Any:
    """A copy of a module with fake tensors of `like`'s mode and device for its own, which it never holds twice."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        found = like.fake_mode.from_tensor(tensor).to(like.device, dtype)
        return torch.nn.Parameter(found, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else found

    return copy.deepcopy(module, {id(t): fake(t) for t in (*module.parameters(), *module.buffers())})


def kept_blocks(tower: Any, layer: str) -> list[Any]:
    """The transformer blocks that `layer` runs: all of them, or all but the last."""
    blocks = list(tower.transformer.resblocks)
    return blocks if layer.startswith("last") else blocks[:-1]


def has_final_norm(layer: str) -> bool:
    """Whether the tower's final layer norm is applied to what `layer` gives."""
    return not layer.endswith("_no_norm")


def plain_text_tower(model: Any, ref: str) -> Any:
    """The CLIP's causal text tower; raises ConfigError for towers that a CLIPTextModel cannot express."""
    tower = getattr(model, "text", model)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    odd = None
    if blocks is None or not hasattr(tower, "ln_final"):
        odd = "is not open_clip's own text transformer"
    elif getattr(tower, "attn_mask", None) is None:
        odd = "is not causal"
    elif getattr(tower, "cls_emb", None) is not None:
        odd = "appends a class token (CoCa)"
    elif any(type(b).__name__ != "ResidualAttentionBlock" for b in blocks) or any(
        not isinstance(b.ls_1, torch.nn.Identity) for b in blocks
    ):
        odd = "has blocks other than CLIP's"
    if odd:
        raise ConfigError(f"the CLIP '{ref}' cannot condition a Stable Diffusion pipeline: its text tower {odd}")
    return tower


def require_digest(what: str, found: str, expected: str, ref: str) -> None:
    """Refuse weights that are not those a dataset was made with; raises StageError with one sentence."""
    if found != expected:
        raise StageError(
            f"{what} at '{ref}' is not the one the latents were made with (its digest is {found[:12]}, "
            f"theirs {expected[:12]}); bring those weights back, or make the latents again with --redo"
        )


# Files written before diffusers 0.16 (sd-vae-ft-mse among them) have other names for the mid block's attention.
_OLD_ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _build_vae(weights: VaeWeights) -> Any:
    import diffusers

    try:
        model = getattr(diffusers, weights.kind)(**weights.config)
        tensors: dict[str, torch.Tensor] = {}
        for file in weights.files:
            tensors |= _tensors(file, weights.prefix)
        if weights.layout == "ldm":
            from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

            tensors = convert_ldm_vae_checkpoint(tensors, weights.config)
        model.load_state_dict({_OLD_ATTENTION.sub(lambda m: _NEW_NAMES[m[1]], k): v for k, v in tensors.items()})
    except Exception as e:
        first = " ".join(str(e).split())[:200]
        raise ConfigError(f"the VAE '{weights.ref}': {weights.file} does not hold its weights: {first}") from None
    return model.eval().requires_grad_(False)


def _tensors(file: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names begin so, under the rest of their names; of a whole checkpoint no others."""
    if file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", weights_only=True)
    with safe_open(file, "pt") as f:
        return {k.removeprefix(prefix): f.get_tensor(k) for k in f.keys() if k.startswith(prefix)}  # noqa: SIM118


def _moved(model: Any, device: str, precision: str) -> Any:
    model = model.to(device)
    # Not diffusers' own `to`, which warns of modules to be kept in float32 even where there are none.
    return model if precision == "float32" else torch.nn.Module.to(model, dtype=DTYPES[precision])


def _build_text_alone(weights: ClipWeights) -> Any:
    """open_clip's text tower with the weights of transformers' CLIPTextModel, or CLIPTextModelWithProjection."""
    from open_clip.transformer import QuickGELU, TextTransformer

    tower = TextTransformer(
        **weights.model_cfg["text_cfg"],
        output_dim=weights.model_cfg["embed_dim"],
        act_layer=QuickGELU if weights.quick_gelu else torch.nn.GELU,
    )
    theirs = {k.removeprefix("text_model."): v for k, v in _tensors(weights.file, "").items()}
    found = {
        "token_embedding.weight": theirs["embeddings.token_embedding.weight"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
    }
    for part in ("weight", "bias"):
        found[f"ln_final.{part}"] = theirs[f"final_layer_norm.{part}"]
        for i in range(weights.model_cfg["text_cfg"]["layers"]):
            layer, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            found[f"{block}attn.in_proj_{part}"] = torch.cat(
                [theirs[f"{layer}self_attn.{n}_proj.{part}"] for n in "qkv"]
            )
            for ours, name in _TEXT_LAYER.items():
                found[f"{block}{ours}.{part}"] = theirs[f"{layer}{name}.{part}"]
    if weights.model_cfg["embed_dim"] is not None:
        found["text_projection"] = theirs["text_projection.weight"].T
    tower.load_state_dict({k: v.float() for k, v in found.items()})
    model = torch.nn.Module()
    model.text = tower
    return model


# Of a block, open_clip's names and transformers'.
_TEXT_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def build_clip(weights: ClipWeights) -> Any:
    """The whole open_clip model, frozen, float32 on the CPU; raises ConfigError where the file does not hold it."""
    import open_clip

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if weights.text_alone:
                model = _build_text_alone(weights)
            else:
                model = open_clip.create_model(
                    weights.name, pretrained=weights.pretrained, force_quick_gelu=weights.quick_gelu, weights_only=True
                )
    except Exception as e:
        first = " ".join(str(e).split())[:200]
        raise ConfigError(f"the CLIP '{weights.ref}': {weights.file} cannot be loaded: {first}") from None
    return model.eval().requires_grad_(False)
