"""The metrics by name: which way is better, what people call each, and what exactly it is."""

from __future__ import annotations

import re

FEW = 2048  # images; with fewer a Frechet distance is mostly bias, and no headline
DISTANCES = ("fid_clean", "fid_tf", "fd_dinov2_pil", "fd_clip_unit")

# name -> (which way is better: higher, lower or "" for neither; what people call it; definition)
DEFINITIONS: dict[str, tuple[str, str, str]] = {
    "fid_clean": (
        "lower",
        "FID (clean-fid)",
        "FID as clean-fid measures it: the Inception of 2015, Pillow's bicubic resize in float32",
    ),
    "fid_tf": (
        "lower",
        "FID (torch-fidelity)",
        "FID as torch-fidelity measures it: the Inception of 2015, TensorFlow 1's resize",
    ),
    "kid_tf": ("lower", "KID", "unbiased KID of all images at once on fid_tf's features; may be negative"),
    "inception_score": (
        "higher",
        "Inception score",
        "Inception score of all images at once (one split; the published one is a mean of ten) on fid_tf's logits",
    ),
    "fd_dinov2_pil": (
        "lower",
        "Fr\u00e9chet distance (DINOv2)",
        "Frechet distance on DINOv2's class token, images stretched to 224 px by Pillow",
    ),
    "kd_dinov2_pil": (
        "lower",
        "Kernel distance (DINOv2)",
        "KID's unbiased kernel distance on fd_dinov2_pil's features; may be negative",
    ),
    "fd_clip_unit": (
        "lower",
        "Fr\u00e9chet distance (CLIP)",
        "Frechet distance between unit-length CLIP features of generated and of real images; not an FID, which is "
        "measured on Inception features",
    ),
    "cmmd": (
        "lower",
        "CMMD",
        "1000 * squared MMD (Gaussian kernel, sigma 10, biased) of unit-length CLIP features against the real images'; "
        "published values are on ViT-L/14 at 336 px",
    ),
    "clip_score": ("higher", "CLIP score", "100 * mean(max(cos, 0)) of image and prompt, no prefix"),
    "clip_cosine": ("higher", "CLIP cosine", "mean cosine of image and prompt"),
    "clip_score_control": (
        "",
        "CLIP score (other prompts)",
        "CLIP score of the same images with other prompts: what chance alone gives",
    ),
    "clip_score_real": ("", "CLIP score (real images)", "CLIP score of the real images with their own captions"),
    "retrieval": (
        "higher",
        "Prompt found from image",
        "share of images whose own prompt ranks first among distinct prompts",
    ),
    "clip_retrieval_real": (
        "",
        "Real caption found",
        "share of real images whose own caption ranks first: the CLIP's own skill",
    ),
    "diversity_clip": (
        "higher",
        "Diversity within a prompt",
        "mean of 1 - cosine of CLIP features over the pairs of images of one prompt; needs replicates",
    ),
    "vae_psnr": ("", "VAE PSNR (dB)", "mean PSNR in dB of the VAE's reconstruction of real images"),
    "near_training": (
        "",
        "Near a training image",
        "share of generated images whose nearest training image, by CLIP features, is nearer than that of 99 % of the "
        "real images; 1 % would be as novel as real images are",
    ),
    "vqa_score": (
        "higher",
        "VQAScore",
        "mean chance that the judge answers yes when asked whether the image shows the prompt",
    ),
    "soft_tifa_am": (
        "higher",
        "Soft-TIFA (atoms)",
        "mean over prompts of the arithmetic mean of the judge's chances of the right answers (GenEval 2, AM)",
    ),
    "soft_tifa_gm": (
        "higher",
        "Soft-TIFA (prompts)",
        "mean over prompts of the geometric mean of the judge's chances of the right answers (GenEval 2, GM)",
    ),
    "pickscore": ("higher", "PickScore", "PickScore_v1: logit scale times cosine of prompt and image"),
    "hps": ("higher", "HPSv2", "100 * cosine of prompt and image in HPSv2's CLIP"),
    "aesthetic": ("higher", "Aesthetic", "LAION's aesthetic predictor, 1 to 10"),
}
_SHARES = {
    "precision": ("higher", "Precision", "share of generated images within the 5th-neighbour ball of a real one"),
    "recall": ("higher", "Recall", "share of real images within the 5th-neighbour ball of a generated one"),
    "density": (
        "higher",
        "Density",
        "mean number of real images' 5th-neighbour balls that hold a generated one, over 5",
    ),
    "coverage": ("higher", "Coverage", "share of real images with a generated one within their 5th-neighbour ball"),
}
SPACES = {"inception": "fid_tf's features (not VGG's, as torch-fidelity has it)", "dinov2": "DINOv2's features"}
for _space, _where in SPACES.items():
    for _name, (_better, _title, _text) in _SHARES.items():
        DEFINITIONS[f"{_name}_{_space}"] = (
            _better,
            f"{_title} ({_space})",
            f"{_text}, on {_where}; depends on the numbers of images",
        )
SHARES = (
    "retrieval",
    "clip_retrieval_real",
    "near_training",
    *(f"{n}_{s}" for n in _SHARES for s in SPACES if n != "density"),
)


def is_free(name: object) -> bool:
    """Whether a score of one's own may have this name: small letters, digits and _, and none of the metrics'."""
    return isinstance(name, str) and bool(re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name)) and name not in DEFINITIONS
