"""The Inception with random weights against torch-fidelity, torchmetrics, clean-fid and pytorch-fid themselves on the
same pictures; resizes against their own code and against golden values; hostile and broken weights."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import cleanfid.fid
import cleanfid.resize
import numpy as np
import pytest
import torch
import torch_fidelity
import transformers
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from eval import networks
from eval.metrics import frechet, kernel, moments, neighbours
from eval.metrics.inception_score import inception_score
from eval.networks import dinov2, resize
from shards.settings import ConfigError

COUNT = 6


def pictures(seed: int, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    """Smooth colours, so that resizes differ by a few levels as they do on photographs."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (COUNT, 9, 9, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize(size[::-1], Image.Resampling.BICUBIC)) for p in small])


@pytest.fixture(scope="module")
def ours(inception_weights: Path) -> networks.Inception:
    return networks.Inception(networks.find("inception", str(inception_weights)))


@pytest.fixture(scope="module")
def sets(ours: networks.Inception) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    both = [pictures(1), pictures(2)]
    return [(p, ours(ours.prepare(p))) for p in both]


def test_features_are_torch_fidelitys(sets, inception_weights: Path) -> None:
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_weights))
    features, logits = theirs(torch.from_numpy(sets[0][0].transpose(0, 3, 1, 2)))
    assert float(features.std()) > 1e-3  # the random network does not collapse
    assert np.array_equal(sets[0][1]["inception_tf"], features.numpy())
    np.testing.assert_allclose(sets[0][1]["inception_tf_logits"], logits.numpy(), rtol=1e-5, atol=1e-6)


def test_every_number_is_torch_fidelitys_on_the_same_pictures(sets, inception_weights: Path) -> None:
    class Pictures(torch.utils.data.Dataset):
        def __init__(self, arrays: np.ndarray) -> None:
            self.arrays = arrays

        def __len__(self) -> int:
            return len(self.arrays)

        def __getitem__(self, i: int) -> torch.Tensor:
            return torch.from_numpy(self.arrays[i].transpose(2, 0, 1))

    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(sets[0][0]),
        input2=Pictures(sets[1][0]),
        cuda=False,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        feature_extractor_weights_path=str(inception_weights),
        kid_subset_size=COUNT,
        kid_subsets=1,
        isc_splits=1,
        verbose=False,
        batch_size=COUNT,
        feature_extractor="inception-v3-compat",
    )
    (_, generated), (_, real) = sets
    x, y, groups = generated["inception_tf"], real["inception_tf"], np.arange(COUNT) % 3
    fid = frechet.distance_of(frechet.reference_of(y), x)
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)  # theirs is off by 1e-6 at n < d
    assert kernel.kid(x, y, groups).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    isc = inception_score(generated["inception_tf_logits"], groups).value
    assert isc == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    found = neighbours.prdc(y, x, k=3)
    assert (found["precision"].mean(), found["recall"].mean()) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_clean_features_are_clean_fids(sets, ours: networks.Inception, tmp_path: Path) -> None:
    """Their folder reading and resize, with our network in place of the file that they download."""
    for i, p in enumerate(sets[0][0]):
        Image.fromarray(p).save(tmp_path / f"{i:02d}.png")
    theirs = cleanfid.fid.get_folder_features(
        str(tmp_path),
        ours.features,
        num_workers=0,
        batch_size=COUNT,
        device=torch.device("cpu"),
        mode="clean",
        verbose=False,
    )
    np.testing.assert_allclose(sets[0][1]["inception_clean"], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
def test_torchmetrics_differs_by_its_resize_alone(
    antialias: bool, ours: networks.Inception, inception_weights: Path
) -> None:
    metric = FrechetInceptionDistance(feature_extractor_weights_path=str(inception_weights), antialias=antialias)
    p = pictures(7)[:3]
    theirs = metric.inception(torch.from_numpy(p.transpose(0, 3, 1, 2)))
    resized = resize.antialias(p) if antialias else resize.tf(p)
    np.testing.assert_allclose(ours.features(resized), theirs, rtol=1e-4, atol=1e-5)


def test_frechet_is_pytorch_fids_and_torch_fidelitys_on_the_same_features() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((300, 40)), rng.standard_normal((260, 40)) * 1.2 + 0.1
    theirs = calculate_frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    ours = frechet.distance(frechet.reference(moments.of(y)), moments.of(x))
    assert ours == pytest.approx(theirs, rel=1e-9)
    statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)]
    other = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(other, rel=1e-9)


def test_resizes_are_those_of_their_libraries() -> None:
    p = pictures(4, (50, 70))
    fn = cleanfid.resize.make_resizer("PIL", False, "bicubic", (299, 299))
    np.testing.assert_allclose(resize.clean(p).numpy(), np.stack([fn(x) for x in p]).transpose(0, 3, 1, 2), atol=1e-5)
    legacy = cleanfid.resize.make_resizer("PyTorch", False, "bilinear", (299, 299))
    np.testing.assert_allclose(
        resize.torch_fid(p).numpy(), np.stack([legacy(x) for x in p]).transpose(0, 3, 1, 2), atol=1e-3
    )
    assert resize.centre_uint8(p).shape == (COUNT, 3, 299, 299)


def test_resizes_differ_as_they_are_known_to() -> None:
    """Golden values: a checkerboard of 4 px to 6, one row of red. TensorFlow 1 interpolates from the corner; Pillow's
    bicubic overshoots, which float32 keeps between levels and uint8 rounds."""
    board = np.zeros((1, 4, 4, 3), np.uint8)
    board[0, ::2, ::2], board[0, 1::2, 1::2] = 200, 200
    as_tf = resize.tf(board, 6)[0, 0, 0].numpy()
    np.testing.assert_allclose(as_tf, [200, 200 / 3, 200 / 3, 200, 200 / 3, 0], rtol=1e-5)
    bilinear = resize.torch_fid(board, 6)[0, 0, 0].numpy()
    assert np.abs(bilinear - as_tf).max() > 20
    gentle = board // 4 + 100  # between the ends of the scale, where nothing is clipped on the way
    exact, rounded = resize.clean(gentle, 6)[0, 0].numpy(), resize.bicubic(gentle, 6)[0, 0].numpy()
    assert 0 < np.abs(exact - rounded).max() <= 1
    assert np.abs(resize.clean(board, 6) - resize.bicubic(board, 6)).max() > 5
    assert np.array_equal(rounded, np.round(rounded))
    assert not np.array_equal(exact, np.round(exact))
    for same in (resize.tf, resize.clean, resize.torch_fid, resize.antialias):
        np.testing.assert_allclose(same(board, 4)[0].numpy(), board[0].transpose(2, 0, 1), atol=1e-4)


class Explosive:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/nonexistent/carrara-exploded"),))


def test_weights_that_are_not_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*weights-inception-2015-12-05-6726825d"):
        networks.find("inception", str(tmp_path / "no.pth"))
    for content in (b"", b"garbage", pickle.dumps({"a": Explosive()})):
        file = tmp_path / "w.pth"
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as weights"):
            networks.load(networks.find("inception", str(file)))
    torch.save({"x": torch.zeros(2)}, file)
    with pytest.raises(ConfigError, match="is not torch-fidelity's Inception"):
        networks.load(networks.find("inception", str(file)))
    torch.save([torch.zeros(2)], file)
    with pytest.raises(ConfigError, match="other than named tensors"):
        networks.load(networks.find("inception", str(file)))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inception-2015-12-05/code/__torch__.py", "class Module(Module):\n  pass\n")
    with pytest.raises(ConfigError, match="is a TorchScript program, as clean-fid has it, and is not run"):
        networks.load(networks.find("inception", str(file)))
    with pytest.raises(ConfigError, match=r"eval\.dinov2: there is no file .*config\.json"):
        networks.find("dinov2", str(tmp_path))


def dinov2_model(side: int, **settings: object) -> Any:
    torch.manual_seed(5)
    config = transformers.Dinov2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=14,
        mlp_ratio=2,
        layerscale_value=0.5,
        **settings,
    )
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def hub_state(model: Any) -> dict[str, torch.Tensor]:
    """A transformers model's weights under the names that torch.hub's files have."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.",
        ".attention.o_proj.": ".attn.proj.",
        ".layer_scale1.lambda1": ".ls1.gamma",
        ".layer_scale2.lambda1": ".ls2.gamma",
        ".mlp.down_proj.": ".mlp.w3.",
        "layernorm.": "norm.",
    }
    state = dict(model.state_dict())
    joined = {("q_proj", "k_proj", "v_proj"): "attn.qkv", ("gate_proj", "up_proj"): "mlp.w12"}
    found = {}
    for parts, name in joined.items():
        for first in [n for n in state if f".{parts[0]}." in n]:
            together = torch.cat([state.pop(first.replace(parts[0], p)) for p in parts])
            found[re.sub(r"\.(attention|mlp)\.\w+\.", f".{name}.", first).replace("encoder.layer.", "blocks.")] = (
                together
            )
    for name, value in state.items():
        for a, b in names.items():
            name = name.replace(a, b)
        found[name] = value
    return found


def dinov2_features(ref: Path, p: np.ndarray) -> np.ndarray:
    network = networks.load(networks.find("dinov2", str(ref)))
    return network(network.prepare(p))["dinov2"]


def test_dinov2_is_transformers_class_token(tmp_path: Path) -> None:
    model = dinov2_model(224)
    model.save_pretrained(tmp_path)
    p = pictures(6, (60, 30))
    processor = transformers.BitImageProcessorPil(
        do_resize=True,
        size={"height": 224, "width": 224},
        resample=3,
        do_center_crop=False,
        do_convert_rgb=False,
        image_mean=dinov2.IMAGENET_MEAN,
        image_std=dinov2.IMAGENET_STD,
    )
    with torch.inference_mode():
        x = processor([Image.fromarray(q) for q in p], return_tensors="pt").pixel_values
        theirs = model(x).pooler_output
    np.testing.assert_allclose(dinov2_features(tmp_path, p), theirs.numpy(), atol=1e-4)
    before = networks.find("dinov2", str(tmp_path)).digest
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    assert networks.find("dinov2", str(tmp_path)).digest != before


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_is_the_same_from_either_public_layout(gated: bool, tmp_path: Path) -> None:
    """transformers' network from its folder, timm's from torch.hub's file; both are of 518 px and used at 224."""
    model = dinov2_model(518, use_swiglu_ffn=gated)
    model.save_pretrained(tmp_path / "folder")
    torch.save(hub_state(model), tmp_path / "dinov2_vitl14_pretrain.pth")
    p = pictures(8, (50, 70))
    x, y = (dinov2_features(tmp_path / n, p) for n in ("folder", "dinov2_vitl14_pretrain.pth"))
    assert x.shape == (COUNT, 128)
    assert np.abs(x - x[:1]).max() > 1e-2
    np.testing.assert_allclose(x, y, atol=2e-4)


def test_position_embeddings_are_torch_hubs() -> None:
    """37 x 37 to 16 x 16 by the factor 16.1 / 37, not by 16 / 37: the place that an output pixel reads from."""
    grid = torch.arange(37.0).reshape(37, 1).expand(37, 37)  # each place's own row
    embeddings = torch.cat([torch.zeros(1, 1), grid.reshape(-1, 1)])[None]
    found = dinov2.positions(embeddings, 14)[0, 1:, 0].reshape(16, 16)
    theirs, other = ((torch.arange(16) + 0.5) * 37 / wanted - 0.5 for wanted in (16.1, 16))
    assert (found[2:-2, 5] - theirs[2:-2]).abs().max() < 0.06  # bicubic bends a ramp by so much
    assert (found[2:-2, 5] - other[2:-2]).abs().max() > 0.15
    torch.testing.assert_close(dinov2.positions(embeddings[:, : 1 + 16 * 16], 14), embeddings[:, : 1 + 16 * 16])
    with pytest.raises(ValueError, match="no square"):
        dinov2.positions(embeddings[:, :-1], 14)


def test_what_is_no_dinov2_is_one_sentence(tmp_path: Path) -> None:
    state = hub_state(dinov2_model(224))
    for change, says in (
        ({"register_tokens": torch.zeros(1, 4, 128)}, "register tokens"),
        ({"blocks.0.norm1.weight": torch.zeros(3)}, "is not a DINOv2"),
    ):
        torch.save({**state, **change}, tmp_path / "w.pth")
        with pytest.raises(ConfigError, match=says):
            networks.load(networks.find("dinov2", str(tmp_path / "w.pth")))
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="is not a DINOv2"):
        networks.load(networks.find("dinov2", str(tmp_path / "w.pth")))
