"""The encoders against diffusers, transformers and open_clip on the same weights; what is found and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from latents.encoders import load_text, load_vae
from latents.moments import quantise_logstd
from latents.weights import find_clip, find_vae
from shards.settings import ConfigError, StageError
from tests.latents import world


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (3, 32, 32, 3), np.uint8)


def test_vae_moments_are_diffusers_own(vae_folder, pixels):
    mean, logstd = load_vae(str(vae_folder)).encode(pixels)
    reference = AutoencoderKL.from_pretrained(vae_folder).eval()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        single = reference.encode(x).latent_dist
        double = reference.double().encode(x.double()).latent_dist
    assert torch.equal(mean, single.mean)
    assert torch.equal(logstd.exp(), single.std)
    assert mean.shape == (3, 4, 16, 16)
    torch.testing.assert_close(mean.double(), double.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logstd.double(), double.std.log(), rtol=1e-4, atol=1e-5)


def test_vae_decode_is_diffusers_own(vae_folder, pixels):
    vae = load_vae(str(vae_folder))
    mean, _ = vae.encode(pixels)
    with torch.no_grad():
        x = AutoencoderKL.from_pretrained(vae_folder).eval().decode(mean).sample
    expected = DiffusionPipeline.numpy_to_pil(((x / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy())
    assert (vae.decode(mean.numpy()) == np.stack([np.asarray(p) for p in expected])).all()


def test_a_half_precision_vae_falls_back_to_its_stored_weights(vae_folder, pixels):
    exact = load_vae(str(vae_folder)).encode(pixels)
    half = load_vae(str(vae_folder), precision="bfloat16")
    rounded = half.encode(pixels)
    assert not torch.equal(rounded[0], exact[0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.1, atol=0.1)
    again = half.encode_exact(pixels)
    assert torch.equal(again[0], exact[0])
    assert torch.equal(again[1], exact[1])


@pytest.mark.parametrize("names", ["diffusers", "old diffusers", "original"])
def test_a_single_vae_file_gives_the_same_moments(vae_folder, tmp_path, pixels, names):
    tensors = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    if names == "old diffusers":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = {_replaced(k, old): v for k, v in tensors.items()}
    if names == "original":
        tensors = {_original_name(k): v for k, v in tensors.items()}
        tensors = {
            k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in tensors.items()
        }  # the original has 1x1 convolutions there
    save_file(tensors, tmp_path / "vae.safetensors")
    shutil.copy(vae_folder / "config.json", tmp_path / "vae.json")
    found = load_vae(str(tmp_path / "vae.safetensors"))
    assert found.scaling_factor == 0.7
    assert torch.equal(found.encode(pixels)[0], load_vae(str(vae_folder)).encode(pixels)[0])


def _replaced(key: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def _original_name(key: str) -> str:
    """diffusers' name -> that of the CompVis code, for a VAE of two levels."""
    pairs = [
        ("encoder.down_blocks.", "encoder.down."),
        (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."),
        (".conv_shortcut.", ".nin_shortcut."),
        ("conv_norm_out", "norm_out"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
        ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ]
    for i in range(2):
        pairs.append((f"decoder.up_blocks.{i}.", f"decoder.up.{1 - i}."))
    pairs.append((".resnets.", ".block."))
    for a, b in pairs:
        key = key.replace(a, b)
    return key


def test_a_single_file_of_standard_widths_needs_no_config(tmp_path):
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    save_file(vae.state_dict(), tmp_path / "x.safetensors")
    found = load_vae(str(tmp_path / "x.safetensors"))
    assert (found.downscale, found.channels, found.scaling_factor) == (4, 3, 0.18215)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


# Shapes of the VAEs that people bring, at a fraction of their widths.
KINDS = {
    "Stable Diffusion 1": {"latent_channels": 4},
    "XL": {"latent_channels": 4, "scaling_factor": 0.13025},
    "3": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def vae_like(kind: str) -> AutoencoderKL:
    torch.manual_seed(5)
    return AutoencoderKL(
        **KINDS[kind],
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_vae_in_several_files_or_in_half_precision_is_found(tmp_path, pixels, kind):
    vae = vae_like(kind)
    vae.save_pretrained(tmp_path / "whole")
    vae.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    whole, parts = load_vae(str(tmp_path / "whole")), load_vae(str(tmp_path / "parts"))
    assert torch.equal(whole.encode(pixels)[0], parts.encode(pixels)[0])
    assert parts.channels == KINDS[kind]["latent_channels"]
    next((tmp_path / "parts").glob("*-00001-of-*")).unlink()
    with pytest.raises(ConfigError, match=r"names diffusion_pytorch_model-00001-of-.*which is not there"):
        find_vae(str(tmp_path / "parts"))
    vae.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert [p.name for p in (tmp_path / "half").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    torch.testing.assert_close(
        load_vae(str(tmp_path / "half")).encode(pixels)[0], whole.encode(pixels)[0], rtol=0.1, atol=0.02
    )


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("Stable Diffusion 1", "cond_stage_model.transformer.text_model.final_layer_norm.weight"),
        ("XL", "conditioner.embedders.1.model.ln_final.weight"),
        ("3", "model.diffusion_model.joint_blocks.0.context_block.attn.proj.weight"),
    ],
)
def test_a_whole_checkpoint_gives_its_vae_and_what_it_is_scaled_by(tmp_path, pixels, kind, beside):
    vae = vae_like(kind).eval()
    tensors = {f"first_stage_model.{_original_name(k)}": v for k, v in vae.state_dict().items()}
    save_file({**tensors, beside: torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')  # of something else
    found = load_vae(str(tmp_path / "model.safetensors"))
    assert found.scaling_factor == vae.config.scaling_factor
    assert found.config["shift_factor"] == vae.config.shift_factor
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        assert torch.equal(found.encode(pixels)[0], vae.encode(x).latent_dist.mean)


def test_sixteen_channels_alone_do_not_say_their_scaling(tmp_path):
    vae = vae_like("3")
    save_file(vae.state_dict(), tmp_path / "ae.safetensors")
    with pytest.raises(ConfigError, match=r"has 16 latent channels.*put its config.json beside it"):
        find_vae(str(tmp_path / "ae.safetensors"))
    vae.save_config(tmp_path)
    assert find_vae(str(tmp_path / "ae.safetensors")).scaling_factor == 1.5305


def test_weights_exchanged_while_they_are_in_use_are_refused(tmp_path, vae_folder, pixels):
    """The second network, for what is not finite, is loaded when it is needed: it has to be the first one's."""
    folder = tmp_path / "vae"
    shutil.copytree(vae_folder, folder)
    vae = load_vae(str(folder), precision="bfloat16")
    world.save_vae(folder, seed=9)
    with pytest.raises(StageError, match="is not the one the latents were made with"):
        vae.encode_exact(pixels)


def test_digests_follow_the_weights_not_the_place(vae_folder, clip_folder, tmp_path):
    for find, folder in ((find_vae, vae_folder), (find_clip, clip_folder)):
        copy = tmp_path / folder.parent.name
        shutil.copytree(folder, copy)
        assert find(str(copy)).digest == find(str(folder)).digest
        file = next(copy.glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert find(str(copy)).digest != find(str(folder)).digest
    config = json.loads((vae_folder / "config.json").read_text())
    other = tmp_path / "scaled"
    shutil.copytree(vae_folder, other)
    (other / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert find_vae(str(other)).digest != find_vae(str(vae_folder)).digest
    (other / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    assert find_vae(str(other)).digest == find_vae(str(vae_folder)).digest


def test_clip_named_by_model_and_file(tmp_path, clip_folder):
    model_cfg = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps(model_cfg))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny-test-clip", pretrained=None).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    text = load_text(f"tiny-test-clip:{tmp_path}/w.safetensors", "last")
    tokens = text.tokenize(["a cat"])
    assert (text.context_length, text.width) == (20, 32)
    with torch.no_grad():
        expected = model.encode_text(tokens)
        pooled = text.encode(tokens)[0, tokens[0].argmax()] @ model.text_projection
    torch.testing.assert_close(pooled, expected[0], rtol=1e-5, atol=1e-5)


def transformers_text(text, layers):
    """transformers' own model with the weights of an open_clip text tower, and its projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from train.text_export import text_tower_weights

    block = text.tower.transformer.resblocks[0]
    config = CLIPTextConfig(
        vocab_size=text.tower.vocab_size,
        hidden_size=text.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=layers,
        num_attention_heads=block.attn.num_heads,
        max_position_embeddings=text.context_length,
        hidden_act="quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu",
        projection_dim=text.tower.text_projection.shape[1],
        eos_token_id=49407,
    )
    model = CLIPTextModelWithProjection(config)
    weights = {f"text_model.{k}": v for k, v in text_tower_weights(text.tower, layers).items()}
    model.load_state_dict({**weights, "text_projection.weight": text.tower.text_projection.T})
    return model.eval()


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("layer", ["last", "penultimate", "last_no_norm", "penultimate_no_norm"])
def test_every_text_layer_is_that_of_transformers(tmp_path, layer, quick_gelu):
    folder = world.save_clip(tmp_path / "clip", layers=3, quick_gelu=quick_gelu)
    text = load_text(str(folder), layer)
    tokens = text.tokenize(world.CAPTIONS)
    reference = transformers_text(text, 3)
    with torch.no_grad():
        found = reference(tokens, output_hidden_states=True)
        # hidden_states[k] is what block k gives; the first one is the embedding. SDXL takes hidden_states[-2].
        raw = found.hidden_states[-1 if layer.startswith("last") else -2]
        expected = raw if layer.endswith("no_norm") else reference.text_model.final_layer_norm(raw)
        if layer == "last":
            torch.testing.assert_close(expected, found.last_hidden_state)
    rows, pooled = text.encode_pooled(tokens)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(pooled, found.text_embeds, rtol=1e-4, atol=2e-5)
    assert torch.equal(text.encode(tokens), rows)
    assert pooled.shape == (len(world.CAPTIONS), text.pooled_width)


def save_tiny(folder: Path) -> Path:
    from diffusers import AutoencoderTiny

    torch.manual_seed(3)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder)
    return folder


def test_a_tiny_autoencoder_gives_diffusers_own_latents(tmp_path, pixels):
    from diffusers import AutoencoderTiny

    folder = save_tiny(tmp_path / "tiny")
    vae = load_vae(str(folder))
    assert (vae.has_posterior, vae.downscale, vae.channels, vae.scaling_factor) == (False, 2, 4, 1.0)
    reference = AutoencoderTiny.from_pretrained(folder).eval()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = reference.encode(x).latents
        decoded = reference.decode(expected).sample
    mean, logstd = vae.encode(pixels)
    assert torch.equal(mean, expected)
    assert (logstd == -torch.inf).all()
    stored = vae.encode_stored(pixels)()
    assert stored.codes is None
    assert stored.finite.all()
    assert (stored.mean == expected.numpy().astype(np.float16)).all()
    shown = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert (vae.decode(expected) == shown).all()


def save_dc(folder: Path) -> Path:
    """A random AutoencoderDC that shrinks by 8, with a block of each kind, and settings as Sana's has them."""
    from diffusers import AutoencoderDC

    torch.manual_seed(4)
    levels = (8, 8, 16, 16)
    kinds = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=levels,
        decoder_block_out_channels=levels,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    ).save_pretrained(folder)
    return folder


def test_an_autoencoder_dc_gives_diffusers_own_latents(tmp_path, pixels):
    from diffusers import AutoencoderDC

    vae = load_vae(str(save_dc(tmp_path / "dc")))
    assert (vae.has_posterior, vae.downscale, vae.channels, vae.scaling_factor) == (False, 8, 8, 0.41407)
    reference = AutoencoderDC.from_pretrained(tmp_path / "dc").eval()
    assert vae.downscale == reference.spatial_compression_ratio
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = reference.encode(x).latent
        decoded = reference.decode(expected).sample
    mean, logstd = vae.encode(pixels)
    assert torch.equal(mean, expected)
    assert (logstd == -torch.inf).all()
    stored = vae.encode_stored(pixels)()
    assert stored.codes is None
    assert (stored.mean == expected.numpy().astype(np.float16)).all()
    shown = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert (vae.decode(expected) == shown).all()


def test_other_autoencoders_are_refused_by_name(tmp_path, vae_folder):
    folder = Path(shutil.copytree(vae_folder, tmp_path / "vae"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLWan"}))
    with pytest.raises(
        ConfigError, match="describes a AutoencoderKLWan, where an AutoencoderKL or AutoencoderTiny or AutoencoderDC"
    ):
        find_vae(str(folder))


def test_a_single_tiny_file_is_known_by_its_names(tmp_path):
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny()
    save_file(model.state_dict(), tmp_path / "taesd.safetensors")
    found = find_vae(str(tmp_path / "taesd.safetensors"))
    assert (found.kind, found.downscale) == ("AutoencoderTiny", 8)
    built = load_vae(str(tmp_path / "taesd.safetensors")).model.state_dict()
    assert all(torch.equal(built[k], v) for k, v in model.state_dict().items())


def test_what_is_stored_is_the_posterior_in_half_and_eight_bits(vae_folder, pixels):
    vae = load_vae(str(vae_folder))
    mean, logstd = (x.numpy() for x in vae.encode(pixels))
    stored = vae.encode_stored(pixels)()
    assert (stored.mean == mean.astype(np.float16)).all()
    assert (stored.codes == quantise_logstd(logstd)).all()
    assert stored.finite.tolist() == [True] * 3


def test_memory_layout_changes_rounding_alone(vae_folder, pixels):
    mean, _ = load_vae(str(vae_folder)).encode(pixels)
    vae = load_vae(str(vae_folder), channels_last=True)
    assert vae.model.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(vae.encode(pixels)[0], mean, rtol=1e-4, atol=1e-4)


def test_compilation_is_of_the_encoder(vae_folder):
    """What is compiled, before anything is: torch compiles at the first call."""
    from torch._dynamo import OptimizedModule

    assert isinstance(load_vae(str(vae_folder), compile=True).model.encoder, OptimizedModule)
    assert not isinstance(load_vae(str(vae_folder)).model.encoder, OptimizedModule)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compilation_changes_rounding_alone(vae_folder, pixels):
    from torch._dynamo.utils import counters

    mean, logstd = load_vae(str(vae_folder)).encode(pixels)
    torch._dynamo.reset()
    counters.clear()
    vae = load_vae(str(vae_folder), compile=True)
    found, spread = vae.encode(pixels)
    assert counters["stats"]["unique_graphs"] > 0, "it was compiled"
    vae.encode(pixels)
    graphs = counters["stats"]["unique_graphs"]
    vae.encode(pixels)
    assert counters["stats"]["unique_graphs"] == graphs, "once for a shape"
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spread, logstd, rtol=1e-3, atol=1e-3)
    # What is encoded exactly is encoded by the network as it was, in the same names.
    exact, _ = vae.encode_exact(pixels)
    torch.testing.assert_close(exact, mean, rtol=0, atol=0)
    torch._dynamo.reset()


def test_a_single_file_says_by_its_tensors_what_it_lacks(tmp_path):
    vae = AutoencoderKL(
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    save_file(vae.state_dict(), tmp_path / "x.safetensors")
    found = load_vae(str(tmp_path / "x.safetensors")).model.state_dict()
    assert found.keys() == vae.state_dict().keys()


def test_weights_trained_with_quick_gelu_get_it(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(file))
    # OpenAI's weights know no other activation, but the plain model name's configuration says GELU.
    assert find_clip("ViT-L-14:openai").quick_gelu
    assert not find_clip("ViT-L-14:laion2b_s32b_b82k").quick_gelu


def test_joint_embeddings_are_open_clips_own(clip_folder, rng):
    from PIL import Image

    text = load_text(str(clip_folder))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    pixels = rng.integers(0, 256, (3, 40, 52, 3), np.uint8)
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(Image.fromarray(p)) for p in pixels]), True)
        words = model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip_folder}")(world.CAPTIONS), True)
    torch.testing.assert_close(text.encode_images(pixels), images, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(text.encode_captions(world.CAPTIONS, batch_size=4), words, rtol=1e-5, atol=1e-6)


BAD = [
    (find_vae, "/nowhere/at/all", "neither a folder nor a file"),
    (find_vae, "{tmp}/empty", "no config.json"),
    (find_vae, "{tmp}/vae.ckpt", "must be .safetensors"),
    (find_vae, "{tmp}/junk.safetensors", "cannot be read as safetensors"),
    (find_vae, "{tmp}/other", "describes a UNet2DModel"),
    (find_clip, "/nowhere/at/all", "not a folder with open_clip_config.json"),
    (find_clip, "{tmp}/empty", "no open_clip_config.json"),
    (find_clip, "ViT-Z-99:laion2b", "has no model 'ViT-Z-99'"),
    (find_clip, "ViT-B-32:no_such_tag", "neither a file nor a tag of ViT-B-32"),
    (find_clip, "ViT-B-32:{tmp}/w.npz", "weights must be one of"),
    (find_clip, "roberta-ViT-B-32:laion2b_s12b_b32k", "is roberta-base, not open_clip's own"),
    (find_clip, "ViT-B-16-SigLIP:webli", "reads the tokens of timm/ViT-B-16-SigLIP"),
    (find_clip, "coca_ViT-B-32:laion2b_s13b_b90k", "appends a class token"),
    (find_clip, "MobileCLIP-S1:datacompdr", "is not causal"),
    (find_clip, "hf-hub:nobody/nothing", "cannot be had from the hub"),
    (find_vae, "nobody/nothing", "cannot be had from the hub"),
]


@pytest.mark.parametrize(("find", "ref", "said"), BAD)
def test_a_wrong_name_is_one_sentence(tmp_path, find, ref, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing is asked for over a network
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name in ("vae.ckpt", "junk.safetensors", "w.npz"):
        (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ConfigError, match=said) as error:
        find(ref.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


def test_pickled_weights_run_nothing(clip_folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = tmp_path / "clip"
    folder.mkdir()
    shutil.copy(clip_folder / "open_clip_config.json", folder)
    torch.save({"x": Bomb()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_text(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def test_the_arguments_that_are_known_without_diffusers_are_its_own(kind) -> None:
    import inspect

    import diffusers

    from latents.weights import ARGUMENTS

    names = [n for n in inspect.signature(getattr(diffusers, kind).__init__).parameters if n != "self"]
    assert names == list(ARGUMENTS[kind])


def test_asking_what_there_is_to_do_loads_no_torch(vae_folder: Path) -> None:
    code = (
        "import sys; import latents.stage, train.state, orchestration.stages; "
        f"from latents.weights import find_vae; find_vae({str(vae_folder)!r}).digest; "
        "assert not {'torch', 'diffusers', 'open_clip', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
