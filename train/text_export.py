"""An open_clip text tower and its tokenizer as transformers' own.

The tower becomes a CLIPTextModel with the layer choice baked into its depth, since `clip_skip` does not work with
transformers 5; the tokenizer is built from open_clip's own merges, with nothing downloaded.
"""

from __future__ import annotations

import functools
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from latents.encoders import TextEncoder, kept_blocks
from shards.settings import ConfigError
from train.pipelines import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, require_layer

SOT, EOT = "<|startoftext|>", "<|endoftext|>"
# Where captions are filled up with id 0, as open_clip does it, that id is "!" in its vocabulary. Were "!" itself the
# pad token (as in Stable Diffusion 2's tokenizer), transformers would also turn every "!" of a prompt into it, where
# open_clip has 256 ("!" at the end of a word). So id 0 gets a second name that no prompt holds. Where they are filled
# up with the end token, as in Stable Diffusion 1, that is the pad token and id 0 stays "!".
PAD, PAD_ID = "<|pad|>", 0


def clip_text_model(text: TextEncoder, projected: bool = False, first_of_two: bool = False) -> Any:
    """transformers' CLIPTextModel with the weights of an open_clip text tower.

    Its `last_hidden_state` is what `text.encode` gives: blocks beyond the chosen layer are left out and
    the final layer norm is applied. projected: a CLIPTextModelWithProjection of all blocks, whose `text_embeds` are
    the pooled half of `text.encode_pooled` and whose `hidden_states` hold the layers without norm. first_of_two: a
    CLIPTextModel of all blocks, of which SDXL reads such a state too. Raises ConfigError where no pipeline reads that
    layer of it.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    whole = projected or first_of_two
    require_layer(STABLE_DIFFUSION_XL if whole else STABLE_DIFFUSION, text.layer)
    tower = text.tower
    blocks = list(tower.transformer.resblocks) if whole else kept_blocks(tower, text.layer)
    first = tower.transformer.resblocks[0]
    projection = getattr(tower, "text_projection", None)
    config = CLIPTextConfig(
        vocab_size=tower.token_embedding.num_embeddings,
        hidden_size=text.width,
        intermediate_size=first.mlp.c_fc.out_features,
        projection_dim=text.width if projection is None else _projection_width(projection),
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        max_position_embeddings=text.context_length,
        hidden_act=_activation_name(first.mlp.gelu),
        layer_norm_eps=tower.ln_final.eps,
        pad_token_id=text.pad_id,
        bos_token_id=text.tokenizer.sot_token_id,
        eos_token_id=text.tokenizer.eot_token_id,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    prefix = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    weights = {prefix + k: v for k, v in text_tower_weights(tower, len(blocks)).items()}
    if projected:
        if projection is None:
            weight = torch.eye(text.width)
        else:
            weight = projection.weight if isinstance(projection, torch.nn.Linear) else projection.T
        weights["text_projection.weight"] = weight.detach().float().contiguous().clone()
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def text_tower_weights(tower: Any, depth: int) -> dict[str, torch.Tensor]:
    """The first `depth` blocks of an open_clip text tower under transformers' names (without `text_model.`)."""
    source = tower.state_dict()
    out = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(depth):
        theirs, ours = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for part in ("weight", "bias"):
            stacked = source[f"{theirs}attn.in_proj_{part}"].chunk(3)  # query, key and value, one below another
            for which, tensor in zip("qkv", stacked, strict=True):
                out[f"{ours}self_attn.{which}_proj.{part}"] = tensor
            for name, new in names.items():
                out[f"{ours}{new}.{part}"] = source[f"{theirs}{name}.{part}"]
    return {k: v.detach().float().contiguous().clone() for k, v in out.items()}


def tokenizer(text: TextEncoder) -> Any:
    """transformers' CLIPTokenizer that gives open_clip's ids; raises ConfigError for another kind of tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer, _clean_lower
    from transformers import CLIPTokenizer

    if not isinstance(text.tokenizer, SimpleTokenizer) or text.tokenizer.clean_fn is not _clean_lower:
        raise ConfigError(
            f"the CLIP '{text.ref}' has a tokenizer of its own, which a Stable Diffusion pipeline cannot carry; "
            "choose a CLIP with open_clip's standard tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), text.context_length, text.pad)
        return CLIPTokenizer.from_pretrained(folder)


def write_tokenizer(folder: Path, context_length: int, pad: str = "zero") -> None:
    """vocab.json, merges.txt and the two settings files, from the merges that come with open_clip.

    pad: what it fills prompts up with, `zero` or `end`.

    The ids equal open_clip's for every caption that open_clip's cleaning leaves as it is (transformers
    does no such cleaning: it neither repairs mojibake nor unescapes HTML).
    """
    vocabulary, merges = _words()
    if pad == "zero":
        vocabulary = {**vocabulary, PAD: PAD_ID}
    special = {"bos_token": SOT, "eos_token": EOT, "unk_token": EOT, "pad_token": PAD if pad == "zero" else EOT}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")


@functools.cache
def _words() -> tuple[dict[str, int], list[str]]:
    """open_clip's vocabulary by transformers' names, and the merges in their order."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    source = SimpleTokenizer()
    names = {"<start_of_text>": SOT, "<end_of_text>": EOT}
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as f:
        merges = f.read().split("\n")[1 : len(source.bpe_ranks) + 1]  # the first line is the file's version
    return {names.get(k, k): v for k, v in source.encoder.items()}, merges


def save_text_encoder(model: Any, folder: Path) -> None:
    """Write the weights with the `text_model.` prefix, which old and new transformers both read."""
    from safetensors.torch import save_file

    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    tensors = {
        k if k.startswith("text_projection.") else "text_model." + k.removeprefix("text_model."): v.contiguous()
        for k, v in model.state_dict().items()
    }
    tensors.pop("text_model.embeddings.position_ids", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _projection_width(projection: Any) -> int:
    return int(projection.out_features if isinstance(projection, torch.nn.Linear) else projection.shape[1])


def _activation_name(module: Any) -> str:
    """transformers' name of the feed-forward activation."""
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if isinstance(module, torch.nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise ConfigError(f"the CLIP's activation {type(module).__name__} has no counterpart in transformers")
