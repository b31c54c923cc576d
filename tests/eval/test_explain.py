"""explain-fid: each row is that library's own number on the same pictures; broken sets are one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import explain, networks
from eval.metrics import frechet
from eval.networks import resize
from orchestration.run_stage import main
from shards.settings import ConfigError
from tests.eval.test_networks import pictures


class Small:
    """In place of the Inception (tested in test_networks.py): a fixed projection of the 299 px that it is fed."""

    def __init__(self, *_: object) -> None:
        self.matrix = torch.randn(3 * 30 * 30, 16, generator=torch.Generator().manual_seed(0)) / 50

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d((pixels - 128) / 128, 10, ceil_mode=True)
        edges = (pixels[..., ::10, ::10] - 128) / 128
        return (small + edges).flatten(1) @ self.matrix


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "Inception", Small)
    monkeypatch.setattr(explain, "WIDTH", 16)
    monkeypatch.setattr(networks, "find", lambda name, ref: ref)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("set")
        for i, p in enumerate(pictures(seed, (40, 56))[:5]):
            Image.fromarray(p).save(folder / f"{i}.png")
        made.append(folder)
    return made


def test_rows_are_the_libraries_numbers(folders: list[Path]) -> None:
    rows = {r.protocol: r for r in explain.explain(*map(str, folders), "file", 3, "cpu")}
    assert list(rows) == list(explain.PROTOCOLS)
    sets = [np.stack([np.asarray(Image.open(p)) for p in sorted(f.iterdir())]) for f in folders]
    network = Small()
    for name, resized in (("fid_tf", resize.tf), ("fid_clean", resize.clean)):
        x, y = (network.features(resized(s)).numpy() for s in sets)
        assert rows[name].value == pytest.approx(frechet.distance_of(frechet.reference_of(y), x), rel=1e-4)
    # pytorch-fid's own preprocessing, written out from its inception.py: /255, bilinear, 2 x - 1.
    features = []
    for s in sets:
        x = torch.from_numpy(s.transpose(0, 3, 1, 2)).float() / 255
        x = 2 * torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        features.append(network.features(x * 128 + 128).numpy())
    expected = frechet.distance_of(frechet.reference_of(features[1]), features[0])
    assert rows["fid_pytorch"].value == pytest.approx(expected, rel=1e-4)
    values = [r.value for r in rows.values()]
    assert len({round(v, 6) for v in values}) == len(values)  # no two protocols agree
    assert rows["fid_clean"].difference == pytest.approx(rows["fid_clean"].value - rows["fid_tf"].value)
    text = explain.table(list(rows.values()))
    assert all(library in text for library, *_ in explain.PROTOCOLS.values())


def test_bad_sets_are_one_sentence(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder of images nor finished shards"):
        explain.explain(str(tmp_path / "no"), str(folders[0]), "file")
    with pytest.raises(ConfigError, match="has 0 images"):
        explain.explain(str(tmp_path), str(folders[0]), "file")
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"a\.png: the image cannot be decoded"):
        explain.explain(str(tmp_path), str(folders[0]), "file")
    assert main(["explain-fid", str(tmp_path), str(tmp_path)]) == 2  # without --inception
