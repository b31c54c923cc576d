"""Scores of shards: against plain loops over the same networks, resumed, in any order, beside images that go."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curate.config import CurateConfig
from curate.embeddings import read_embeddings
from curate.stage import ScoreStage, histogram, score_root, score_stages
from shards import storage
from shards.commit import Folder
from shards.dataset import Dataset, write_manifest
from shards.fingerprint import Fingerprint
from shards.images import ImageShard, decode_rgb, pack_tar
from shards.layout import RunPaths, sample_key
from shards.selection import Rule, Selection
from shards.settings import ConfigError
from shards.stage import begin
from tests.latents import world
from tests.objects import bucket

CAPTIONS = ["a red circle", "ein kleiner Hund auf der Wiese", "", "word " * 120, "un chat noir dort sur le canapé"]


def write_images(run: RunPaths, shards: int = 3, rows: int = 9, broken: tuple[int, int] | None = None) -> Dataset:
    """Image shards of drawn pictures; every fifth row failed; `broken` (shard, row) is a picture cut short."""
    folder = Folder.begin(run.images, Fingerprint("ingest", 1, {}), take_over=True)
    stats = []
    for index in range(shards):
        rng = np.random.default_rng(index)
        lines, samples = [], []
        for row in range(rows):
            key, caption = sample_key(index, row, 100), CAPTIONS[(index + row) % len(CAPTIONS)]
            sink = io.BytesIO()
            world.draw(rng, 40 + row, 48).save(sink, "JPEG", quality=60 + row)
            data = sink.getvalue() if (index, row) != broken else sink.getvalue()[:200]
            ok = row % 5 != 4
            lines.append({"key": key, "caption": caption, "status": "success" if ok else "failed_to_download"})
            if ok:
                samples.append((key, {"jpg": data, "txt": caption.encode()}))
        tar, extents = pack_tar(samples)
        found = {key: extent["jpg"] for (key, _), extent in zip(samples, extents, strict=True)}
        for line in lines:
            line["image_offset"], line["image_size"] = found.get(line["key"], (None, None))
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(lines), sink)
        record = {"rows": rows, "count": len(samples)}
        stats.append(folder.commit(index, {".tar": tar, ".parquet": sink.getvalue()}, record))
    write_manifest(run.images, "images", stats)
    return Dataset.open(run.images)


def score(stage: ScoreStage, shuffle: int | None = None) -> dict:
    """Run a stage in this process to its end."""
    begin(stage)
    tasks = list(stage.tasks())
    order = list(tasks)
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
    work = stage.worker()
    made = {t.index: work(t) for t in order}
    return stage.finish(made[t.index] for t in tasks)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return str(world.save_clip(tmp_path_factory.mktemp("clip") / "model"))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(str(tmp_path / "run"))


def configuration(tmp_path: Path, **scores) -> CurateConfig:
    return CurateConfig.model_validate({"scores": scores})


def files(root: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(root).glob("0*") if not p.name.endswith("_stats.json")}


def test_clip_scores_are_the_cosines_of_the_open_clip_model(run, clip, tmp_path) -> None:
    import open_clip

    dataset = write_images(run)
    (stage,) = score_stages(configuration(tmp_path, clip={"kind": "clip", "batch_size": 4}), run, clip)
    manifest = score(stage)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}", context_length=20)
    model.eval()
    for position in range(3):
        shard = ImageShard(dataset, position)
        table = Dataset.open(stage.root).sidecar(position)
        assert table["key"].to_pylist() == shard.table["key"].to_pylist()
        found = table["similarity"].to_pylist()
        for i, row in enumerate(shard.rows.tolist()):
            with torch.inference_mode():
                x = preprocess(Image.fromarray(decode_rgb(shard.image_bytes(i))))[None]
                image = model.encode_image(x, normalize=True)
                text = model.encode_text(tokenizer([shard.captions[i]]), normalize=True)
            stored = read_embeddings(Dataset.open(stage.root), position, np.array([row]), "image")
            np.testing.assert_allclose(stored[0], image[0].numpy(), atol=2e-3)
            if shard.captions[i]:
                assert found[row] == pytest.approx(float((image * text).sum()), abs=1e-5)
            else:
                assert found[row] is None
        assert [found[r] for r in range(9) if r % 5 == 4] == [None]
    column = manifest["columns"]["similarity"]
    values = np.concatenate([Dataset.open(stage.root).sidecar(i)["similarity"].drop_null() for i in range(3)])
    assert column["quantiles"]["0.5"] == pytest.approx(np.quantile(values, 0.5, method="inverted_cdf"), rel=0.01)
    ends, counts = histogram(manifest, "similarity")
    assert counts.sum() == len(values)
    assert len(ends) == 41


def test_the_same_bytes_in_any_order_and_by_any_number_of_threads(tmp_path, clip) -> None:
    made = []
    for number, (shuffle, threads) in enumerate([(None, 1), (3, 4)]):
        run = RunPaths(str(tmp_path / str(number)))
        write_images(run, broken=(1, 2))
        settings = {"clip": {"kind": "clip", "batch_size": 3, "decode_threads": threads}, "pixels": {"kind": "pixels"}}
        stages = score_stages(configuration(tmp_path, **settings), run, clip)
        for stage in stages:
            score(stage, shuffle)
        made.append([files(stage.root) for stage in stages])
    assert made[0] == made[1]
    assert len(made[0][0]) == 6


def test_a_shard_that_is_there_is_not_scored_again_and_another_score_touches_nothing(run, clip, tmp_path) -> None:
    write_images(run)
    (first,) = score_stages(configuration(tmp_path, pixels={"kind": "pixels"}), run, clip)
    score(first)
    before = {p: p.stat().st_mtime_ns for p in Path(first.root).rglob("*")}
    work = first.worker()
    work.scorer = None  # would fail if it were asked
    for task in first.tasks():
        assert work(task)["count"]
    both = configuration(tmp_path, pixels={"kind": "pixels"}, text={"kind": "caption"})
    score(score_stages(both, run, clip)[1])
    assert {p: p.stat().st_mtime_ns for p in Path(first.root).rglob("*")} == before


def test_captions_have_a_language_and_a_length_in_tokens_uncut(run, clip, tmp_path) -> None:
    dataset = write_images(run)
    (stage,) = score_stages(configuration(tmp_path, text={"kind": "caption"}), run, clip)
    manifest = score(stage)
    by_caption = {}
    for position in range(3):
        shard, table = ImageShard(dataset, position), Dataset.open(stage.root).sidecar(position)
        by_caption |= dict(zip(shard.captions, table.take(pa.array(shard.rows)).to_pylist(), strict=True))
    assert by_caption["a red circle"]["language"] == "en"
    assert by_caption["ein kleiner Hund auf der Wiese"]["language"] == "de"
    assert by_caption["un chat noir dort sur le canapé"]["language"] == "fr"
    assert by_caption["a red circle"]["tokens"] == 3
    assert by_caption["word " * 120]["tokens"] == 120
    assert manifest["columns"]["language"]["values"]["de"] == 4
    assert manifest["columns"]["language"]["missing"] == 6


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_head_is_torchs_sequential_over_the_kept_embeddings(run, clip, tmp_path, suffix) -> None:
    from safetensors.torch import save_file

    write_images(run)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)]
    mlp = torch.nn.Sequential(*layers).eval()
    path = tmp_path / f"head{suffix}"
    state = {f"layers.{k}": v for k, v in mlp.state_dict().items()}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    head = {
        "kind": "head",
        "weights": str(path),
        "activation": "relu",
        "columns": ["nice", "safe"],
        "output": "sigmoid",
    }
    config = configuration(tmp_path, alpha=head | {"embeddings": "clip"}, clip={"kind": "clip"})
    stages = score_stages(config, run, clip)
    assert [s.score for s in stages] == ["clip", "alpha"]
    for stage in stages:
        score(stage)
    rows = np.array([0, 1, 3])
    features = read_embeddings(Dataset.open(score_root(run, "clip")), 2, rows, "image").astype(np.float32)
    with torch.inference_mode():
        expected = mlp(torch.from_numpy(features)).sigmoid().numpy()
    table = Dataset.open(score_root(run, "alpha")).sidecar(2).take(pa.array(rows))
    np.testing.assert_allclose(np.stack([table["nice"], table["safe"]], 1), expected, rtol=1e-4)


def test_a_head_with_code_in_it_is_refused(run, clip, tmp_path) -> None:
    write_images(run)
    path = tmp_path / "head.pth"
    torch.save(torch.nn.Linear(16, 1), path)
    head = {"kind": "head", "embeddings": "clip", "weights": str(path)}
    stages = score_stages(configuration(tmp_path, clip={"kind": "clip"}, bad=head), run, clip)
    score(stages[0])
    with pytest.raises(ConfigError, match="cannot be read as tensors"):
        score(stages[1])


def test_a_head_before_its_embeddings_is_one_sentence(run, clip, tmp_path) -> None:
    from safetensors.torch import save_file

    write_images(run)
    save_file({"weight": torch.zeros(1, 16)}, tmp_path / "head.safetensors")
    head = {"kind": "head", "embeddings": "clip", "weights": str(tmp_path / "head.safetensors")}
    stages = score_stages(configuration(tmp_path, clip={"kind": "clip"}, nice=head), run, clip)
    with pytest.raises(ConfigError, match="reads the score 'clip', which is not finished"):
        score(stages[1])


def test_a_transformers_classifier_gives_a_column_a_label(run, clip, tmp_path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    labels = {0: "normal", 1: "NSFW content"}
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    dataset = write_images(run, broken=(0, 1))
    settings = {"kind": "classifier", "model": str(tmp_path / "vit"), "batch_size": 4}
    (stage,) = score_stages(configuration(tmp_path, safety=settings), run, clip)
    score(stage)
    table, shard = Dataset.open(stage.root).sidecar(0), ImageShard(dataset, 0)
    assert {"normal", "nsfw_content"} <= set(table.column_names)
    for i, row in enumerate(shard.rows.tolist()):
        found = table["nsfw_content"][row].as_py()
        if row == 1:
            assert found is None
            continue
        with torch.inference_mode():
            batch = processor(images=decode_rgb(shard.image_bytes(i)), return_tensors="pt")
            expected = model(**batch).logits.softmax(-1)[0, 1]
        assert found == pytest.approx(float(expected), abs=1e-5)


def test_other_settings_or_weights_are_refused_before_anything_is_scored(run, clip, tmp_path) -> None:
    write_images(run)
    (stage,) = score_stages(configuration(tmp_path, clip={"kind": "clip"}), run, clip)
    score(stage)
    other = str(world.save_clip(tmp_path / "other", seed=1))
    (changed,) = score_stages(configuration(tmp_path, clip={"kind": "clip"}), run, other)
    with pytest.raises(ConfigError, match="was made with other settings"):
        begin(changed)


# ---- selection ---------------------------------------------------------------------------------------------


@pytest.fixture
def scored(run, clip, tmp_path) -> RunPaths:
    write_images(run)
    config = configuration(tmp_path, pixels={"kind": "pixels"}, text={"kind": "caption"})
    for stage in score_stages(config, run, clip):
        score(stage)
    return run


def test_quantiles_are_of_the_whole_score_and_select_their_share(scored) -> None:
    rule = Rule(column="pixels.sharpness", min_quantile=0.5)
    selection = Selection(scored.run, [rule])
    kept = sum(int(selection.passes(i, np.arange(9)).sum()) for i in range(3))
    assert 11 <= kept <= 13  # of 24 images
    values = np.concatenate([Dataset.open(score_root(scored, "pixels")).sidecar(i)["sharpness"] for i in range(3)])
    values = values.astype(float)
    expected = np.nanquantile(values, 0.5, method="inverted_cdf")
    assert selection.bounds[0].low == pytest.approx(expected, rel=1 / 128)


def test_rules_are_joined_and_a_missing_value_passes_none(scored) -> None:
    rules = [Rule(column="text.language", among=["de", "fr"]), Rule(column="text.tokens", max=20)]
    selection = Selection(scored.run, rules)
    table = Dataset.open(score_root(scored, "text")).sidecar(1)
    expected = [
        language in ("de", "fr") and tokens is not None and tokens <= 20
        for language, tokens in zip(table["language"].to_pylist(), table["tokens"].to_pylist(), strict=True)
    ]
    assert selection.passes(1, np.arange(9)).tolist() == expected
    assert any(expected)
    assert selection.passes(1, np.array([2, 0])).tolist() == [expected[2], expected[0]]
    everything = Selection(scored.run, [Rule(column="text.language", but_not=["xx"])]).passes(0, np.arange(9))
    languages = Dataset.open(score_root(scored, "text")).sidecar(0)["language"].to_pylist()
    assert everything.tolist() == [value is not None for value in languages]


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"column": "aesthetic.score", "min": 5}, "no finished score 'aesthetic'"),
        ({"column": "pixels.beauty", "min": 5}, "has no column 'beauty'; it has border"),
        ({"column": "text.language", "min": 5}, "holds text"),
        ({"column": "pixels.border", "among": ["a"]}, "holds numbers"),
    ],
)
def test_rules_that_fit_no_score_are_one_sentence(scored, rule, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Selection(scored.run, [Rule.model_validate(rule)])


def test_scores_of_a_run_on_an_object_store(tmp_path, clip) -> None:
    with bucket() as url:
        run = RunPaths(f"{url}/run")
        write_images(run, shards=1)
        (stage,) = score_stages(configuration(tmp_path, pixels={"kind": "pixels"}), run, clip)
        score(stage)
        assert storage.exists(storage.join(stage.root, "dataset.json"))
        assert Selection(run.run, [Rule(column="pixels.entropy", min=0)]).passes(0, np.arange(9)).sum() == 8
