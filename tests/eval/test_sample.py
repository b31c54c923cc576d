"""Pictures on request: the seed decides, whatever the batch; negative prompts, image to image, inpainting, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import model as checkpoints
from eval.generate import ImageGenerator, Sample
from eval.inputs import read_image
from eval.sample import Request, SampleConfig, SampleStage, requests_of
from orchestration.run_stage import main
from shards.layout import RunPaths
from shards.settings import ConfigError, validate
from tests.eval.conftest import SIDE, drive


def draw(run: RunPaths, out: Path, **settings: object) -> list[np.ndarray]:
    values = {"requests": [Request(prompt="a red circle", seed=7)], "steps": 2, **settings}
    drive(SampleStage(validate(SampleConfig, values, "sample"), run, str(out)))
    files = json.loads((out / "samples.json").read_text())["images"]
    return [np.asarray(Image.open(out / f["file"])) for f in files]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_a_picture_depends_on_its_seed_and_number_alone(run: RunPaths, tmp_path: Path) -> None:
    together = draw(run, tmp_path / "a", count=5, batch_size=5)
    apart_ = draw(run, tmp_path / "b", count=5, batch_size=2, shard_size=3)
    assert together[0].shape == (SIDE, SIDE, 3)
    assert all(apart(x, y) <= 1 for x, y in zip(together, apart_, strict=True))
    assert all(apart(together[0], x) > 1 for x in together[1:])
    generator = ImageGenerator(checkpoints.build_pipeline(run, checkpoints.find(run)), "ddim", 2, 3.0)
    direct = generator([Sample("seed 7", 3, "a red circle")])[0][0]
    assert apart(direct, together[3]) <= 1


def test_negative_prompts_sizes_and_other_seeds_change_pictures(run: RunPaths, tmp_path: Path) -> None:
    [plain] = draw(run, tmp_path / "a")
    [negative] = draw(run, tmp_path / "b", requests=[Request(prompt="a red circle", negative="blue", seed=7)])
    [other] = draw(run, tmp_path / "c", requests=[Request(prompt="a red circle", seed=8)])
    [wide] = draw(run, tmp_path / "d", width=48)
    assert wide.shape == (SIDE, 48, 3)
    assert apart(plain, negative) > 0
    assert apart(plain, other) > 0


def test_image_to_image_stays_near_and_inpainting_keeps_the_rest(run: RunPaths, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = {"image": str(tmp_path / "photo.png"), "steps": 10}
    a = draw(run, tmp_path / "a", **given, strength=0.5, count=2)
    b = draw(run, tmp_path / "b", **given, strength=0.5, count=2, batch_size=1)
    assert all(apart(x, y) <= 1 for x, y in zip(a, b, strict=True))
    assert apart(a[0], a[1]) > 0
    painted = draw(run, tmp_path / "c", **given, strength=1.0, mask=str(tmp_path / "mask.png"), count=2)
    assert painted[0].shape == (SIDE, SIDE, 3)
    change = np.abs(painted[0].astype(float) - painted[1]).mean(axis=(0, 2))
    assert change[SIDE // 2 + 1 :].mean() > 1  # the other noise shows under the mask
    from latents.resize import resize_crop

    photo, covered = (
        resize_crop(np.asarray(Image.open(tmp_path / f).convert("RGB")), SIDE)[0] for f in ("photo.png", "mask.png")
    )
    outside = covered[..., 0] < 128
    assert 0.3 < outside.mean() < 0.7
    assert all((one[outside] == photo[outside]).all() for one in painted)  # and nothing anywhere else


def test_a_phones_photograph_is_taken_upright(tmp_path: Path) -> None:
    """As PIL's own transposition has it: lossless pixels, with an orientation that says "turn me"."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "p.png", "--image", "x"), np.rot90(pixels, -1))


def test_it_goes_on_where_it_stood(run: RunPaths, tmp_path: Path) -> None:
    config = SampleConfig(requests=[Request(prompt=p) for p in "abc"], steps=1, shard_size=1)
    stage = SampleStage(config, run, str(tmp_path))
    tasks = list(stage.tasks())
    assert len(tasks) == stage.total == 3
    assert list(stage.tasks()) == tasks
    more = config.model_copy(update={"steps": 2})
    assert SampleStage(more, run, str(tmp_path)).made_with().digest != stage.made_with().digest


def test_prompts_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "x", "negative": "y", "seed": 3}\n{"prompt": "z"}\n')
    assert [w.prompt for w in requests_of(["zero"], str(tmp_path / "a.txt"), "", 0)] == ["zero", "one", "two"]
    x, z = requests_of([], str(tmp_path / "b.jsonl"), "n", 5)
    assert (x.negative, x.seed, z.negative, z.seed) == ("y", 3, "n", 5)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 .*no JSON|line 1 .*JSON object"),
        ('{"promt": "x"}', "did you mean 'prompt'"),
        ("[]", "JSON object"),
    ],
)
def test_bad_lines_are_one_sentence(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "b.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=says):
        requests_of([], str(tmp_path / "b.jsonl"), "", 0)


def test_mistakes_on_the_command_line_are_one_sentence(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    for arguments, says in (
        ([], "nothing to generate"),
        (["--prompt", "x", "--sampler", "plms"], "sampler"),
        (["--prompt", "x", "--image", "no.png"], "--image: there is no file no.png"),
        (["--prompt", "x", "--image", str(tmp_path / "bad.png")], "cannot be decoded"),
        (["--prompt", "x", "--mask", "m.png"], "a mask needs the image"),
        (["--prompts", str(tmp_path / "bad.png")], "not UTF-8"),
        (["--prompt", "x", "--stpes", "3"], "no such option: --stpes"),
    ):
        assert main(["sample", run.run, "--out", str(tmp_path / "out"), *arguments]) == 2
        err = [x for x in capsys.readouterr().err.splitlines() if x.startswith("carrara: ")]
        assert len(err) == 1
        assert says in err[0], err


def test_from_the_command_line(run: RunPaths, tmp_path: Path) -> None:
    command = ["sample", run.run, "--prompt", "a star", "--steps", "1", "--count", "2", "--out", str(tmp_path / "o")]
    assert main(command) == 0
    assert sorted(p.name for p in (tmp_path / "o").glob("*.png")) == ["0000000.png", "0000001.png"]
    before = (tmp_path / "o" / "shards" / "00000.tar").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "o" / "shards" / "00000.tar").stat().st_mtime_ns == before
