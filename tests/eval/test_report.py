"""The report: hostile captions are text, nothing is loaded, every part of the run is on the page."""

from __future__ import annotations

import datetime
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from eval import compare
from eval.config import EvalConfig
from eval.report import charts, gather, page, verdict
from shards.layout import RunPaths
from shards.settings import StageError
from tests.eval.conftest import build_run, evaluate
from tests.train.test_select import write_scores

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>"
    + '" onmouseover="alert(3) \u202ereversed\u202c {{ 7*7 }} &lt;b&gt;'
)
NOW = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)


class Page(HTMLParser):
    """What a browser would make of a page, as far as it matters here."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    run = build_run(tmp_path_factory.mktemp("report") / "hostile <run>", 30, HOSTILE)
    config = EvalConfig(num_prompts=30, steps=1, batch_size=10, shard_size=15, scorer="demo.scorer", jackknife_groups=4)
    evaluate(run, config)
    folder = Path(run.run)
    for name in ("train", "autoencoder", "clip"):
        (folder / name).mkdir(exist_ok=True)
        lines = [
            {"images": 64 * i, "loss": 1 / i, "lr": 1e-3, "psnr": 20.0 + i, "accuracy": i / 10} for i in range(1, 9)
        ]
        (folder / name / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"images": 9')
    (folder / "images").mkdir()
    counts = {
        "rows": 100,
        "success": 70,
        "filtered": 5,
        "failed_to_download": 12,
        "failed_to_resize": 3,
        "opted_out": 1,
        "duplicate": 9,
    }
    manifest = {
        "rows": 100,
        "count": 70,
        "counts": counts,
        "errors": {"http_not_found": 12, "not_an_image": 3, "x_robots_tag": 1},
        "filtered_by": {"<i>punsafe</i>": 5},
        "duplicates_by": {"duplicate_url": 9},
    }
    (folder / "images" / "dataset.json").write_text(json.dumps(manifest))
    write_scores(folder, {0: np.linspace(0, 1, 50)}, "quality")
    return run


@pytest.fixture(scope="module")
def html(done: RunPaths) -> str:
    return Path(page.render(done, "step-00000004", now=NOW)).read_text(encoding="utf-8")


def test_a_hostile_caption_is_text(html: str) -> None:
    parsed = Page(html)
    assert not parsed.open
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "form", "base", "svg"}
    assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    shown = "".join(parsed.texts)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in shown
    assert "{{ 7*7 }} &lt;b&gt;" in shown  # neither a template nor an entity is resolved
    assert "<i>punsafe</i>" in shown
    assert "Scores of what it was trained on" in shown
    assert "quality.value" in shown
    assert "\u202e" not in html
    assert "hostile <run>" in shown


def test_nothing_is_loaded_and_the_policy_says_so(html: str) -> None:
    parsed = Page(html)
    policy = next(
        a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "img-src data:" in policy
    assert "script-src" not in policy
    sources = [a.get("src") or a.get("srcset") for t, a in parsed.tags if t in ("img", "source")]
    assert len(sources) > 60
    assert all(s is not None and s.startswith("data:image/") for s in sources)
    links = {a["href"] for t, a in parsed.tags if t == "a"}
    assert all(link is not None and (link.startswith("#") or link == "index.html") for link in links)
    assert "url(" not in html
    assert "http:" not in html
    assert "https:" not in html


def test_captions_are_isolated_and_pictures_have_words(html: str) -> None:
    parsed = Page(html)
    assert sum(t == "bdi" and a.get("dir") == "auto" for t, a in parsed.tags) >= page.SHEET
    assert all("alt" in a for t, a in parsed.tags if t == "img")
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(f'id="{i}"' in html for i in ("verdict", "images", "numbers", "curves", "data", "provenance"))


def test_the_page_tells_the_runs_numbers(html: str, done: RunPaths) -> None:
    text = " ".join(" ".join(Page(html).texts).split())
    metrics = json.loads(next(Path(done.eval).rglob("metrics.json")).read_bytes())
    assert metrics["protocol"]["id"] in text
    assert page.percent(metrics["metrics"]["shows_colour"]["value"]) in text
    assert page.spread(metrics["metrics"]["clip_score"])[0] in text
    for words in (
        "http not found",
        "were no usable image",
        "duplicate url",
        "not an FID",
        "2 January 2026, 03:04 UTC",
    ):
        assert words in text
    for title in ("UNet: loss", "UNet: learning rate", "VAE: PSNR", "CLIP: contrastive loss"):
        assert title in text


def test_the_page_is_the_same_when_rendered_again(html: str, done: RunPaths) -> None:
    assert Path(page.render(done, "step-00000004", now=NOW)).read_text(encoding="utf-8") == html


def test_history_and_index_have_every_result(html: str, done: RunPaths) -> None:
    table = pq.read_table(Path(done.reports) / "history.parquet").to_pylist()
    metrics = json.loads(next(Path(done.eval).rglob("metrics.json")).read_bytes())
    assert {r["metric"]: r["value"] for r in table if not r["tag"]} == {
        **{n: m["value"] for n, m in metrics["metrics"].items()},
        **{f"count_{n}": number for n, number in metrics["counts"].items()},
    }
    index = Page((Path(done.reports) / "index.html").read_text(encoding="utf-8"))
    assert ("a", {"href": "step-00000004.html"}) in index.tags
    assert {r["tag"] for r in table} >= {"one thing", "two things"}
    assert not index.open


def test_the_funnel_adds_up(done: RunPaths) -> None:
    steps = gather.funnel(done.images)
    assert [steps[0].kind, steps[-1].kind] == ["start", "end"]
    assert steps[0].count - sum(s.count for s in steps if s.kind == "loss") == steps[-1].count
    assert sum(s.count for s in steps if s.kind == "loss") == sum(s.count for s in steps if s.kind == "detail")


def test_a_checkpoint_without_results_is_one_sentence(done: RunPaths) -> None:
    with pytest.raises(StageError, match="run the eval stage"):
        page.render(done, "step-00000099")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("  a\tb\n c ", "a b c"),
        ("x\u202ey\u2066z\x07", "x\ufffdy\ufffdz\ufffd"),
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),
        pytest.param("e" + "\u0301" * 50, "e" + "\u0301" * 3, id="zalgo"),
    ],
)
def test_captions_are_made_safe_to_look_at(text: str, shown: str) -> None:
    assert gather.plain(text) == shown


def test_long_captions_are_cut() -> None:
    assert len(gather.plain("word " * 5000)) <= gather.CAPTION_CAP
    assert gather.plain("word " * 5000).endswith("\u2026")


def test_numbers_read_as_people_write_them() -> None:
    assert [page.percent(v) for v in (0.0, 0.004, 0.853, 0.996, 1.0)] == ["0 %", "0.4 %", "85 %", "99.6 %", "100 %"]
    assert [page.percent(v) for v in (2e-6, 0.99996)] == ["< 0.1 %", "> 99.9 %"]
    assert page.rounded(12.34567, 0.0213) == "12.346"
    assert page.rounded(-12.34567, 2.5) == "\u221212.3"
    assert [charts.count(v) for v in (950, 1200, 3_400_000, 2e9)] == ["950", "1.2k", "3.4M", "2B"]


def test_a_difference_of_shares_is_in_points_and_nothing_has_no_sign() -> None:
    def moved(value: float, share: bool) -> str:
        return page._difference(compare.Difference("x", "higher", 0, 0, value, 0.01, -1, 1, 0.5, 20, share=share))[0]

    assert [moved(v, True) for v in (0.1234, -0.05)] == ["+12.3 points", "\u22125.0 points"]
    assert [moved(v, False) for v in (0.1234, 0.0004, -0.0004)] == ["+0.123", "0.000", "0.000"]


def test_smoothing_keeps_a_straight_line_and_does_not_lag() -> None:
    line = [2.0 * i for i in range(200)]
    assert charts.smoothed(line)[20:180] == pytest.approx(line[20:180])
    assert charts.smoothed([3.0] * 50) == pytest.approx([3.0] * 50)


def test_the_value_shown_is_the_one_that_was_published(html: str, done: RunPaths) -> None:
    """A distance stands first as it is quoted, raw, with its own interval, not below zero; what is without its bias
    stands beside it, if at all."""
    estimate = {
        "value": 12.70,
        "se": 0.07,
        "low": 12.55,
        "high": 12.85,
        "bias_corrected": 11.98,
        "corrected_low": 11.83,
        "corrected_high": 12.13,
        "label": "FID",
        "better": "lower",
        "definition": "x",
        "n": 9000,
    }
    result = {"metrics": {"fid_tf": estimate}, "real": {}, "floors": {}, "counts": {}, "by_tag": {}}
    shown = page.number(result, "fid_tf", None)
    assert (shown["value"], shown["interval"]) == ("12.700", "12.550 to 12.850")
    assert shown["corrected"].startswith("11.980 without the bias")
    metrics = json.loads(next(Path(done.eval).rglob("metrics.json")).read_bytes())["metrics"]
    for name in ("fd_clip_unit", "cmmd"):
        assert metrics[name]["low"] >= 0
    assert "fewer than 2,048" in html


def test_arrows_are_of_what_is_watched_and_of_scores_of_ones_own_that_moved() -> None:
    kinds = {"clip_score": 0.0, "my_score": 0.0, "your_score": 1.0, "kid_tf": 1.0}
    found = [compare.Difference(n, "higher", 1, 1 + v, v, 0.1, v - 0.2, v + 0.2, 0.5, 20) for n, v in kinds.items()]
    shown = page._arrows(verdict.Against("before", {}, "same", "", found))
    assert [(a["metric"], a["way"]) for a in shown] == [("clip_score", "same"), ("your_score", "better")]


def test_after_a_grid_the_page_is_of_the_knee() -> None:
    results = [{"folder": f, "counts": {"images": n}} for f, n in (("a", 10), ("b", 10), ("c", 99))]
    kinds = {"a": (True, True, 3.0), "b": (False, True, 2.0), "c": (False, False, 1.0)}
    points = [{"folder": f, "knee": k, "frontier": on, "distance": [d]} for f, (k, on, d) in kinds.items()]
    assert page._shown(results, {"points": points})["folder"] == "a"
    assert page._shown(results[1:], {"points": points})["folder"] == "b"  # the frontier's nearest
    assert page._shown(results, None)["folder"] == "c"


def test_provenance_is_folded_and_says_where_and_how(html: str) -> None:
    text = " ".join(" ".join(Page(html).texts).split())
    for words in ("command", "commit", "versions.torch", "hardware", "images_per_second"):
        assert words in text, words
    assert "null" not in text
    assert html.count("<details>") >= 3


def test_the_numbers_by_tag_begin_with_the_judge_of_ones_own() -> None:
    def share(value: float) -> dict[str, object]:
        return {"value": value, "low": value, "high": value, "n": 9, "unit": "share", "definition": "d", "better": ""}

    own = {"shows_all": {**share(0.5), "label": "Shows all"}}
    known = {n: {**share(0.5), "label": n} for n in ("clip_score", "cmmd", "retrieval")}
    two = {"shows_all": {**share(0.1), "label": "Shows all"}, **known}
    table = page.tag_table({"metrics": {**known, **own}, "by_tag": {"one thing": {**known, **own}, "two things": two}})
    assert table["columns"][0] == "Shows all"
    assert [(tag, texts[0][0]) for tag, texts, _ in table["rows"]] == [("two things", "10 %"), ("one thing", "50 %")]
