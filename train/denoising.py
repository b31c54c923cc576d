"""The UNet's objective: latents and text in, the loss of its prediction out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from latents.columns import FEATURES, FLIPPED
from latents.encoders import load_clip_of, load_text_of
from latents.weights import PAIR, SEQUENCE, clips_of, find_pad
from shards.dataset import Dataset
from shards.settings import ConfigError
from train import adapters, diffusion, initial, segments
from train.alignment import NAME, Alignment
from train.conditioning import Conditioning, Encoded, Joint, Learning, Stored, require_added_width
from train.config import TrainConfig
from train.data import Batch
from train.image_conditioning import LEVELS, WAYS, ByKey, Controlled, ImageConditioning, add_levels, control_net, widen
from train.inversion import Word
from train.latent_samples import Latents
from train.objective import Objective, construct, public_config
from train.order import derive_key, permute
from train.part_config import AlignmentConfig
from train.pipelines import STABLE_DIFFUSION_XL, pipeline_of, require_layer
from train.predictions import PREDICTIONS
from train.randomness import Randomness
from train.segments import History

BINS = 10  # of the loss by timestep


class Diffusion(Objective):
    """Denoising of latents under text: E w(t) |target - UNet(x_t, t, c)|^2 (Ho et al. 2020, eq. 14)."""

    bins = BINS

    def __init__(
        self, config: TrainConfig, datasets: Sequence[Dataset], seed: int, history: History | None = None
    ) -> None:
        vae, text = datasets[0].manifest["vae"], datasets[0].manifest["text"]
        require_decoder(config, vae)
        image_conditioning = ImageConditioning(config, vae, Randomness(seed)) if config.conditioned_by else None
        beside = [ByKey(d) for d in segments.image_sets(config, datasets)]
        latents = Latents(config, datasets, seed, history, beside)
        latents.require_images()
        unet = build_unet(config, latents, text["width"], seed)
        model_config = public_config(unet)
        if config.start_from and text.get("kind") != SEQUENCE:
            require_pads(config.start_from, text)
        if config.adapter:
            unet = adapters.add(unet, config.adapter, seed)
        latents.require_captions(list(config.captions or ()))
        conditioning = conditioning_of(config, latents, text, model_config, seed)
        learns = conditioning.module
        if config.adapter and config.adapter.start_from:
            adapters.load_lora(config.adapter.start_from, unet, learns)
        model = unet if learns is None else Joint(unet, learns)
        if image_conditioning and config.control:
            model = Controlled(unet, control_net(unet, image_conditioning.downscale))
        self.alignment = None
        if config.alignment:
            facts = latents.require_features()
            alignment = Alignment(config.alignment, model, unet, int(facts["width"]), seed)
        super().__init__(model, model_config, latents.placement)
        self.config, self.latents, self.random, self.conditioning = config, latents, Randomness(seed), conditioning
        self.image_conditioning = image_conditioning
        self.sized = conditioning.sized
        latents.wants = wanted_columns(config, latents, conditioning)
        if config.flip:
            latents.require_flipped()
        if config.textual_inversion:
            unet.requires_grad_(False)
        # What is frozen comes from where the training began, and is not stored with every checkpoint.
        self.saves_frozen = all(p.requires_grad for p in self.model.parameters())
        self.figures = ("mse", "vlb") if config.learned_variance else ("mse",)
        if config.alignment:
            self.alignment, self.beside = alignment, f"{NAME}."
            self.figures += alignment.figures
        self.scale, self.shift = float(vae["scaling_factor"]), float(vae.get("config", {}).get("shift_factor") or 0.0)
        for name, table in dataclasses.asdict(process_of(config)).items():
            self.register_buffer(name, table, persistent=False)
        self.facts = {"encoders": {"vae": vae, "text": text}, "resolution": latents.resolution}
        if beside:
            sets = [{"root": b.dataset.root, "fingerprint": b.dataset.fingerprint} for b in beside]
            self.facts = {**self.facts, "pictures": sets}

    @property
    def unet(self) -> Any:
        """The UNet, whatever learns beside it."""
        return self.model.unet if isinstance(self.model, Joint | Controlled) else self.model

    @property
    def process(self) -> diffusion.Process:
        """The forward process, where the objective lies."""
        return diffusion.Process(self.signal, self.noise, self.time)

    # ---- batches, on the CPU -----------------------------------------------------------------------

    def expect(self, positions: np.ndarray) -> None:
        """Begin to read these samples."""
        self.latents.expect(positions)

    def close(self) -> None:
        """Let go of what reads ahead."""
        self.latents.close()
        if self.image_conditioning:
            self.image_conditioning.close()

    def batch(self, positions: np.ndarray) -> Batch:
        """What the samples at `positions` (int64 [B]) need.

        x0 [B,C,h,w], noise [B,C,h,w], t int64 [B]; text float32 [B,context,width] or tokens int64 [B,context], a
        dropped caption being the stored empty one; with several sources, weight [B]; for a UNet that is given sizes,
        sizes [B,6] and with stored embeddings pooled [B,width]; what it is given of an image (image_conditioning.py).
        """
        flipped = self.random.uniform("flip", positions) < 0.5 if self.config.flip else None
        t = self._timesteps(positions)
        batch = self.latent_batch(self.latents, positions, t, 0, flipped, self.config.noise_candidates)
        if self.config.alignment:
            batch |= self._features(self.config.alignment, positions, flipped)
        u = self.random.uniform("caption", positions)
        dropped = u < self.config.caption_dropout
        if self.image_conditioning:
            # Of the captions that are dropped, the second half loses its image too (InstructPix2Pix's scheme).
            batch |= self.image_conditioning.batch(self.latents, positions, (u - self.config.caption_dropout / 2) % 1)
        chosen = None
        if columns := self.config.captions:
            u = self.random.uniform("choice", positions)
            found = self.latents.captions(positions, list(columns))
            chosen = [choose_caption(c, list(columns.values()), x) for c, x in zip(found, u, strict=True)]
        batch |= self.conditioning.batch(self.latents, positions, dropped, chosen, flipped)
        weights = np.array([s.loss_weight for s in self.config.all_sources], np.float32)
        if (weights != 1).any():
            batch["weight"] = torch.from_numpy(weights[self.latents.source(positions)])
        return batch

    def latent_batch(
        self,
        latents: Any,
        positions: np.ndarray,
        t: np.ndarray,
        first: int = 0,
        flipped: np.ndarray | None = None,
        candidates: int = 1,
    ) -> Batch:
        """x0 (a fresh draw of the posterior), noise and t of samples of `latents`; draws are those of place + first.

        flipped: bool [B], who is mirrored; None: nobody. candidates: draws of noise, of which the nearest is taken.
        """
        mean, logstd = latents.moments(positions, flipped)
        positions = positions + first
        if logstd is not None:
            mean += np.exp(logstd) * self.random.normal("posterior", positions, mean.shape[1:])
        x0 = (mean - np.float32(self.shift)) * np.float32(self.scale)
        if candidates == 1:
            noise = self.random.normal("noise", positions, x0.shape[1:])
        else:  # of which the first is the only one of before
            noise = diffusion.nearest_noise(self.random.normal("noise", positions, (candidates, *x0.shape[1:])), x0)
        if self.config.offset_noise:
            shift = self.random.normal("offset", positions, mean.shape[1:2])
            noise = diffusion.offset_noise(noise, shift, self.config.offset_noise)
        return {
            "x0": torch.from_numpy(x0),
            "noise": torch.from_numpy(noise),
            "t": torch.from_numpy(t),
        }

    def _features(self, config: AlignmentConfig, positions: np.ndarray, flipped: np.ndarray | None) -> Batch:
        """features float32 [B,g,g,D] of a vision tower; with an end, aligned float32 [B]: 0 from there on. Nothing
        where the whole batch lies beyond the end, from where on none are read."""
        if config.until_images is not None and self.placement.split(positions)[0].min() >= config.until_images:
            self.latents.wants = self.latents.wants - {FEATURES, FEATURES + FLIPPED}  # threads go through the old one
            return {}
        batch = {FEATURES: torch.from_numpy(self.latents.features(positions, flipped))}
        if config.until_images is not None:
            batch["aligned"] = torch.from_numpy((positions < config.until_images).astype(np.float32))
        return batch

    def keys(self, positions: np.ndarray) -> list[str]:
        """The samples' keys."""
        return self.latents.keys(positions)

    def _timesteps(self, positions: np.ndarray) -> np.ndarray:
        config, steps = self.config, self.config.num_train_timesteps
        normal = config.timestep_sampling == "logit_normal"
        if config.stratified:
            # Which stratum is whose changes from batch to batch, so that no rank keeps to one end.
            stratum, strata = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
            begins, slots = self.placement.split(positions)
            for begin in np.unique(begins).tolist():
                here = np.flatnonzero(begins == begin)
                key = derive_key("strata", self.random.seed, begin)
                strata[here] = samples = self.placement.samples(begin)
                stratum[here] = permute(slots[here], samples, key)
            u = diffusion.stratified(self.random.uniform("timestep", positions), stratum, strata)
            if not normal:
                return diffusion.uniform_timesteps(u, steps)
            z = diffusion.normal_quantile(u)
        elif not normal:
            return self.random.integers("timestep", positions, steps)
        else:
            z = self.random.normal("timestep", positions, (1,))[:, 0]
        return diffusion.logit_normal_timesteps(z, steps, config.logit_mean, config.logit_std)

    # ---- the loss, on the device -------------------------------------------------------------------

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted loss; details: the plain mean squared error, and its sums and counts by bins of t."""
        error, vlb, apart = self._judged(batch)
        t = batch["t"]
        weight = diffusion.loss_weight(
            self.process, self.config.prediction_type, t, self.config.snr_gamma, self.config.p2_gamma
        )
        each = error * weight
        if apart is not None:
            each = each - self.config.contrastive_weight * apart
        details = [error.detach().mean()[None]]
        if vlb is not None:
            # Over all timesteps L_vlb is a sum; one timestep stands for all of them (improved DDPM, eq. 16).
            each = each + self.config.vlb_weight * self.process.steps * vlb
            details.append(vlb.detach().mean()[None])
        if self.alignment is not None:
            aligned, figures = error.new_zeros(()), error.new_zeros(len(self.alignment.figures))
            if self.training:  # on samples that are never trained on there is the prediction alone
                aligned, figures = self.alignment(batch)
            each = each + aligned
            details.append(figures)
        if "weight" in batch:
            each = each * batch["weight"]
        # Summed by elements, since autocast would make a matrix product one of half precision.
        one_hot = torch.nn.functional.one_hot(t * BINS // self.process.steps, BINS).to(error.dtype)
        details += [(error.detach()[:, None] * one_hot).mean(dim=0), one_hot.mean(dim=0)]
        return each.mean(), torch.cat(details)

    def errors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean squared error of the prediction and, with a learned variance, L_vlb's term; float32 [B] each."""
        return self._judged(batch)[:2]

    def _judged(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As `errors`; and in training, with a contrastive weight, the mean squared distance from another sample's
        target (Stoica et al. 2025, arXiv:2506.05350, eq. 5)."""
        kind, t, x0, noise = self.config.prediction_type, batch["t"], batch["x0"], batch["noise"]
        process = self.process
        xt = diffusion.add_noise(process, x0, noise, t)
        output = self.predict(xt, batch).float()
        vlb = None
        if self.config.learned_variance:
            output, v = output.chunk(2, dim=1)
            # The mean learns from L_simple alone (improved DDPM, section 3.1).
            guess, _ = diffusion.to_x0_and_noise(process, kind, output.detach().double(), xt.double(), t)
            vlb = diffusion.variational_bound(process, x0, xt, guess, v, t)
        target = diffusion.target(process, kind, x0, noise, t)
        apart = None
        if self.config.contrastive_weight and self.training:
            apart = (output - diffusion.other_targets(target)).square().mean(dim=(1, 2, 3))
        return (output - target).square().mean(dim=(1, 2, 3)), vlb, apart

    def predict(self, xt: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The UNet's output at x_t [B,C,h,w]."""
        text, added = self.conditioning.condition(batch)
        more: dict[str, Any] = {}
        if self.image_conditioning:
            xt, more = self.image_conditioning.inputs(self, xt, batch, text, added)
        if self.config.channels_last:
            xt = xt.contiguous(memory_format=torch.channels_last)
        time = self.process.time[batch["t"]]
        mask = self.conditioning.mask(batch, text)
        if mask is not None:
            more["encoder_attention_mask"] = mask
        return self.unet(xt, time, text, added_cond_kwargs=added, return_dict=False, **more)[0]

    def networks(self) -> list[torch.nn.Module]:
        """The UNet, and what learns beside it: the text encoder, or the ControlNet."""
        if isinstance(self.model, Controlled):
            return [self.unet, self.model.control]
        return [self.unet, *self.conditioning.networks()]

    def checkpoint_activations(self) -> None:
        """Of the UNet and of what else learns; a frozen UNet's forward pass is kept for the word's gradient."""
        self.unet.enable_gradient_checkpointing()
        if isinstance(self.model, Controlled):
            self.model.control.enable_gradient_checkpointing()
        self.conditioning.checkpoint_activations()


def require_decoder(config: TrainConfig, vae: dict[str, Any]) -> None:
    """Raises ConfigError where the pipeline that a model would be exported as cannot decode with the latents' VAE."""
    kind, way = vae.get("kind", "AutoencoderKL"), config.conditioned_by
    if kind != "AutoencoderKL" and vae.get("config", {}).get("shift_factor"):  # export.fold_shift
        raise ConfigError(
            f"the latents are of an {kind} with a shift_factor, which no pipeline here takes away before it decodes; "
            "make them with an AutoencoderKL"
        )
    if way and (kind == "AutoencoderDC" or (kind == "AutoencoderTiny" and config.upscale)):
        raise ConfigError(
            f"train.{way}: diffusers' {WAYS[way].pipeline} cannot decode with an {kind}, of which the latents are; "
            "make them with an AutoencoderKL"
        )


def conditioning_of(
    config: TrainConfig, latents: Latents, text: dict[str, Any], unet: dict[str, Any], seed: int
) -> Conditioning:
    """How captions reach a UNet with the config `unet`; raises ConfigError where the latents do not hold what it takes.

    text: the facts of what read the latents' captions.
    """
    pipeline = pipeline_of(unet)
    if pipeline is STABLE_DIFFUSION_XL and latents.dataset.manifest["vae"].get("kind") == "AutoencoderDC":
        raise ConfigError(
            f"this UNet is given sizes, and its {pipeline.name} cannot decode with an AutoencoderDC; "
            "leave addition_embed_type text_time out, or make the latents with another VAE"
        )
    pair = text.get("kind") == PAIR
    if pair and pipeline is not STABLE_DIFFUSION_XL:
        raise ConfigError(
            f"this UNet is exported as a {pipeline.name}, which has one CLIP, and its latents were made with two "
            "(latents.text_encoder); make them without the second, and train on those"
        )
    if text.get("kind") == SEQUENCE:
        require_masked(config, unet)
        return Stored(False) if latents.has_embeddings and not config.captions else Encoded(False, load_text_of(text))
    require_layer(pipeline, text["layer"])
    sized = pipeline is STABLE_DIFFUSION_XL
    field = "train.start_from" if config.start_from else "train.unet"
    if sized and config.conditioned_by:
        raise ConfigError(
            f"train.{config.conditioned_by}: a UNet given sizes (SDXL's) cannot be given an image here; {field}"
        )
    if config.textual_inversion:
        if sized:
            raise ConfigError(
                "train.textual_inversion: this UNet is also given the captions' pooled embeddings (SDXL), through "
                "which the word cannot be learned here; choose a UNet without addition_embed_type text_time"
            )
        return Word(config.textual_inversion, load_clip_of(text), Randomness(seed))
    if not config.captions and not config.text_encoder and latents.has_embeddings:
        if sized:
            if latents.empty_pooled is None:
                raise ConfigError(
                    "train.unet: addition_embed_type text_time is given the captions' pooled embeddings, which these "
                    "latents lack; make them with latents.text_pooled true, or with latents.text tokens"
                )
            require_added_width(unet, len(latents.empty_pooled), field)
        return Stored(sized)
    encoder: Any = load_text_of(text)
    if sized:
        require_added_width(unet, encoder.pooled_width, field)
    if config.text_encoder:
        return Learning(sized, encoder, adapters.learning_text(encoder, sized, config.text_encoder, seed))
    return Encoded(sized, encoder)


def wanted_columns(config: TrainConfig, latents: Latents, conditioning: Conditioning) -> set[str]:
    """The columns of the latents that batches are made of."""
    found = {"mean", *(("logstd",) if latents.has_spread else ()), *(("micro",) if conditioning.sized else ())}
    found |= {"image"} if config.conditioned_by else set()
    found |= {FEATURES} if config.alignment else set()
    found |= {name + FLIPPED for name in found & {"mean", "logstd", "micro", FEATURES}} if config.flip else set()
    if isinstance(conditioning, Stored):
        found |= {"text_length"} & set(latents.token_names)
        return found | {"embeddings", *(("pooled",) if conditioning.sized else ())}
    if config.captions:
        return found | {f"text.{name}" for name in config.captions}
    return found if config.textual_inversion else found | set(latents.token_names)


def require_masked(config: TrainConfig, unet: dict[str, Any]) -> None:
    """Raises ConfigError where something would read the states of a transformers encoder without their mask, or asks
    for what that encoder does not give."""
    what = "latents whose text_encoder is one of transformers"
    for name in ("text_encoder", "textual_inversion", *([config.conditioned_by] if config.conditioned_by else [])):
        if getattr(config, name):
            raise ConfigError(
                f"train.{name} needs a CLIP, and these are {what}; leave it out, or make latents with a CLIP"
            )
    for name in ("addition_embed_type", "class_embed_type"):
        if unet.get(name) is not None:
            raise ConfigError(
                f"the UNet's {name} {unet[name]} cannot go with {what}: it gives captions by cross-attention alone; "
                "leave it out"
            )
    if unet.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise ConfigError(f"the UNet's encoder_hid_dim_type {unet['encoder_hid_dim_type']} cannot go with {what}")


def require_pads(start_from: str, text: dict[str, Any]) -> None:
    """As require_pad, of each CLIP that read the captions; text: the latents' facts of them."""
    if text.get("kind") != PAIR:
        require_pad(start_from, text.get("pad", "zero"))
        return
    for facts, name, field in zip(
        clips_of(text), ("tokenizer", "tokenizer_2"), ("text_pad", "text_encoder.pad"), strict=True
    ):
        require_pad(start_from, facts["pad"], (name,), field)


def require_pad(
    start_from: str, pad: str, names: Sequence[str] = ("tokenizer_2", "tokenizer"), field: str = "text_pad"
) -> None:
    """Raises ConfigError where a pipeline fills its prompts up otherwise than the latents' captions were.

    names: which of its tokenizers is asked, the first that is there; field: the setting of latents that says it.
    """
    theirs = find_pad(start_from, names)
    if theirs is not None and theirs != pad:
        words = {"zero": "id 0", "end": "its end token"}
        raise ConfigError(
            f"train.start_from: the tokenizer of {start_from} fills prompts up with {words[theirs]}, and the captions "
            f"of the latents were filled up with {words[pad]}; make the latents again with latents.{field} {theirs} "
            "(carrara latents --redo)"
        )


def choose_caption(columns: Sequence[Sequence[str]], weights: Sequence[float], u: float) -> str:
    """One caption of a sample by a uniform `u` in [0, 1): columns that have one by weight, within a column alike."""
    texts = [t for column in columns for t in column]
    if not texts:
        return ""
    share = np.array([w / len(column) for column, w in zip(columns, weights, strict=True) for _ in column])
    index = int(np.searchsorted(np.cumsum(share), u * share.sum(), side="right"))
    return texts[min(index, len(texts) - 1)]


def process_of(config: TrainConfig) -> diffusion.Process:
    """The forward process that a configuration asks for."""
    steps = config.num_train_timesteps
    if PREDICTIONS[config.prediction_type].flow:
        return diffusion.rectified_flow(steps, config.snr_shift)
    alpha_bar = diffusion.alphas_cumprod(
        diffusion.betas(config.beta_schedule, steps, config.beta_start, config.beta_end)
    )
    if config.snr_shift != 1.0:
        alpha_bar = diffusion.shift_snr(alpha_bar, config.snr_shift)
    if config.zero_terminal_snr:
        alpha_bar = diffusion.zero_terminal_snr(alpha_bar)
    return diffusion.variance_preserving(alpha_bar)


def build_unet(config: TrainConfig, latents: Latents, width: int, seed: int) -> Any:
    """A UNet2DConditionModel for these latents and text of `width`; raises ConfigError where it cannot be."""
    from diffusers import UNet2DConditionModel

    out = latents.channels * (2 if config.learned_variance else 1)
    more = WAYS[config.conditioned_by].channels(latents.channels) if config.conditioned_by else 0
    channels = latents.channels + more
    if config.start_from:
        unet = adapters.load_unet(config.start_from)
        if more and unet.config.in_channels == latents.channels and not config.adapter:
            unet = widen(unet, more)
        if config.upscale and not unet.config.num_class_embeds and not config.adapter:
            unet = add_levels(unet)
        read = "encoder_hid_dim" if unet.config.encoder_hid_dim_type == "text_proj" else "cross_attention_dim"
        for name, value in (("in_channels", channels), ("out_channels", out), (read, width)):
            if unet.config[name] != value:
                why = "make the latents with that model's own VAE and CLIP"
                beside = ""
                if more and name == "in_channels":
                    beside = f" ({latents.channels} and {more} for train.{config.conditioned_by})"
                    if unet.config.in_channels == latents.channels:
                        why = "an adapter cannot add them: leave train.adapter out, or start from a model that has them"
                if name == "cross_attention_dim" and unet.config.addition_embed_type == "text_time":
                    why += (
                        " (SDXL's base model reads two CLIPs side by side: name the second with latents.text_encoder)"
                    )
                raise ConfigError(
                    f"train.start_from: the UNet of {config.start_from} has {name} {unet.config[name]}, but the "
                    f"latents ask for {value}{beside}; {why}"
                )
        adapters.check_process(config.start_from, config)
        return unet
    given = {**({"num_class_embeds": LEVELS} if config.upscale else {}), **config.unet}
    for name, value in (("in_channels", channels), ("out_channels", out), ("sample_size", latents.side)):
        if given.setdefault(name, value) != value:
            raise ConfigError(f"train.unet.{name} is {given[name]}, but the latents ask for {value}; leave it out")
    # A UNet may bring wide rows down to what its blocks attend to by a layer of its own.
    read = "cross_attention_dim" if given.get("encoder_hid_dim") is None else "encoder_hid_dim"
    if given.setdefault(read, width) != width:
        raise ConfigError(
            f"train.unet.{read} is {given[read]}, but the text encoder of the latents has {width} values a token; "
            "leave it out, or make the latents with another one"
        )
    unet = construct(UNet2DConditionModel, given, "train.unet", seed)
    if config.initialisation == "zero":
        initial.quiet_unet(unet)
    return unet
