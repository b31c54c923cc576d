"""Where an encoder's weights lie, and a digest of them, found without building the network.

A VAE is named by a diffusers folder, a single safetensors file, or a hub name; a CLIP by a folder with
open_clip_config.json (or the text_encoder of a diffusers pipeline), `MODEL:TAG`, `MODEL:/path/to/weights.safetensors`,
or `hf-hub:org/name` (with `/text_encoder` behind it, of a pipeline); any other text encoder by what transformers saved.
A name that leads nowhere is one sentence (ConfigError). A digest covers the weights' bytes and those parts of the
configuration that shape the network, so it is the same wherever the files lie.
"""

from latents.weights.clip import ClipWeights, find_clip
from latents.weights.files import HUB_NAME, file_digest, hub_folder, model_files, read_config
from latents.weights.sequence import SEQUENCE, SequenceWeights, find_sequence
from latents.weights.text import PADS, PAIR, clips_of, find_pad, text_facts
from latents.weights.vae import ARGUMENTS, VaeWeights, find_vae

__all__ = [
    "ARGUMENTS",
    "HUB_NAME",
    "PADS",
    "PAIR",
    "SEQUENCE",
    "ClipWeights",
    "SequenceWeights",
    "VaeWeights",
    "clips_of",
    "file_digest",
    "find_clip",
    "find_pad",
    "find_sequence",
    "find_vae",
    "hub_folder",
    "model_files",
    "read_config",
    "text_facts",
]
