"""Pages in Chromium: hostile captions do nothing, nothing is fetched, the slider moves, votes are saved."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval import grid, human
from eval.config import EvalConfig
from eval.report import history, page
from shards.layout import RunPaths
from tests.eval import gallery
from tests.eval.browser import Tab, visit
from tests.eval.conftest import build_run, evaluate

HOSTILE = [
    '<script>document.body.dataset.owned=1</script><img src=x onerror="document.body.dataset.owned=2">',
    "\u202egnp.exe \u2066bidi\u2069 \u200f\u061c marks",
    '=HYPERLINK("http://198.51.100.7/x","A")',
    "javascript:document.body.dataset.owned=3 {{ 7*7 }} {% raw %} ]]> --> </style></title>",
    "word " * 2000,
    "",
    "e" + "\u0301" * 60 + " \x07\x1b[31m \U0001f680",
]


# Texts that are not fully visible: wider than the window, beside what scrolls, or hidden behind their own box.
CUT = """(() => [...document.querySelectorAll('.stack td, .stack th, h1, h2, h3, dd, .badge, .facts div, .note')]
  .filter(e => e.checkVisibility({checkOpacity: true}) && e.getClientRects().length)
  .filter(e => { const r = e.getBoundingClientRect(); return r.right > innerWidth + 1 || r.left < 0
    || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline'; })
  .map(e => e.className + ': ' + e.textContent.trim().slice(0, 60)))()"""
# Texts whose contrast with what is behind them is below 4.5, as WCAG 2 computes it.
FAINT = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => { const f = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3]) return c; } };
  const found = new Set();
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) || !e.checkVisibility()) continue;
    if (e.closest('.vh, .skip, script, style')) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) found.add(`${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 40)}`);
  }
  return [...found]; })()"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run whose pages have everything: two checkpoints under hostile captions, a grid, a memorisation sheet."""
    folder = tmp_path_factory.mktemp("pages")
    run = build_run(folder / "run <i>&", 30)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(HOSTILE), encoding="utf-8")
    shutil.copytree(run.heldout, run.images)
    config = EvalConfig(
        num_prompts=6,
        prompts_file=str(prompts),
        steps=1,
        batch_size=6,
        shard_size=3,
        jackknife_groups=4,
        memorisation=True,
        replicates=2,
    )
    cells = []
    for name, images, steps in (("step-00000004", 256, (1, 2)), ("step-00000008", 512, (1,))):
        facts = {"checkpoint": name, "images_seen": images}
        (Path(run.model) / "carrara.json").write_text(json.dumps(facts))
        made = [evaluate(run, config.model_copy(update={"steps": n})) for n in steps]
        cells = cells or made
    grid.record(run, cells, [grid.GivenUp("<b>x</b>", "y", "z")], {"<b>x</b>": 3})
    for name in ("step-00000004", "step-00000008"):
        page.render(run, name, cells[0].folder.rsplit("/", 1)[-1])
    return run


def folders(run: RunPaths) -> list[str]:
    """Of the first checkpoint's two results."""
    found = [r["folder"] for r in sorted(history.read_all(run, "step-00000004"), key=lambda r: r["cell"])]
    return [f"step-00000004/{f}" for f in found]


def test_hostile_captions_do_nothing_in_a_browser(two: RunPaths) -> None:
    for name in ("step-00000008.html", "step-00000004.html", "index.html"):

        async def look(tab: Tab) -> None:
            assert await tab.value("document.body.dataset.owned") is None
            assert await tab.value("document.querySelectorAll('script').length") <= 1
            strange = (
                "document.querySelectorAll('iframe, object, embed, form, link, base, [onerror], img[src=x]').length"
            )
            assert await tab.value(strange) == 0
            # What an attacker could run from the page's own context is refused by the policy.
            await tab.value(
                "(() => { const s = document.createElement('script'); s.textContent = 'document.body.dataset.owned=9';"
                " document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x'; })()"
            )
            assert await tab.value("document.body.dataset.owned") is None
            broken = "Array.from(document.images).filter(i => i.loading !== 'lazy' && !i.naturalWidth).length"
            assert await tab.value(broken) == 0
            assert tab.requests == {}
            refused = [t for t in tab.said if "Content Security Policy" in t]
            assert len(refused) == len(tab.said) == 2, tab.said  # our own two attempts above, and nothing else

        visit(Path(two.reports) / name, look)


def test_the_slider_moves_the_cut(two: RunPaths) -> None:
    async def look(tab: Tab) -> None:
        cut = "getComputedStyle(document.querySelector('.wipe .over')).clipPath"
        before = await tab.value(cut)
        await tab.value(
            "(() => { const c = document.getElementById('cut'); c.value = 80;"
            " c.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        after = await tab.value(cut)
        assert ("50%" in before, "80%" in after) == (True, True), (before, after)
        await tab.value("document.getElementById('cut').focus()")
        for kind in ("rawKeyDown", "keyUp"):
            await tab.call("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", windowsVirtualKeyCode=37)
        assert "79%" in await tab.value(cut)
        assert await tab.value("document.querySelectorAll('.wipe').length") == 6
        place = "i => JSON.stringify(i.getBoundingClientRect())"
        places = f"new Set(Array.from(document.querySelectorAll('.wipe img')).map({place})).size"
        assert await tab.value(places) == 6  # one lies over the other
        assert tab.said == []
        text = await tab.value("document.body.innerText")
        assert "Beside step-00000004" in text
        assert "Nearest training images" in text

    visit(Path(two.reports) / "step-00000008.html", look)


def test_nothing_overflows_a_narrow_window(two: RunPaths) -> None:
    async def look(tab: Tab) -> None:
        await tab.call("Emulation.setDeviceMetricsOverride", width=340, height=800, deviceScaleFactor=1, mobile=True)
        await asyncio.sleep(0.2)
        assert await tab.value("document.documentElement.scrollWidth") <= 340
        assert await tab.value(CUT) == []

    for name in ("step-00000008.html", "step-00000004.html", "index.html"):
        visit(Path(two.reports) / name, look)


@pytest.mark.slow
def test_a_run_of_thirty_checkpoints_is_readable_at_any_width_in_light_and_dark(tmp_path: Path) -> None:
    """The index, the last checkpoint and one with alarms: nothing is cut off, every text stands out from its ground."""
    run = gallery.build(tmp_path, 30)

    async def look(tab: Tab) -> None:
        alarms.append(await tab.value("document.querySelectorAll('.alarm, .alarmed').length"))
        for width in gallery.WIDTHS:
            for scheme in gallery.SCHEMES:
                await gallery.size(tab, width, 900, scheme)
                assert await tab.value("document.documentElement.scrollWidth") <= width
                assert await tab.value(CUT) == [], (width, scheme)
                assert await tab.value(FAINT) == [], (width, scheme)

    alarms: list[int] = []
    for name in ("index", gallery.name_of(29), gallery.name_of(gallery.BROKEN)):
        visit(Path(run.reports) / f"{name}.html", look)
    assert alarms == [1, 0, 1]


def test_the_grid_and_the_numbers_are_on_the_page(two: RunPaths) -> None:
    html = (Path(two.reports) / "step-00000004.html").read_text(encoding="utf-8")
    assert "Samplers, steps, guidance" in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert 'http-equiv="Content-Security-Policy"' in html
    rows = json.loads((Path(two.reports) / "history.json").read_text())
    lines = (Path(two.reports) / "history.csv").read_text().splitlines()
    assert len(lines) == len(rows) + 1 > 20
    assert lines[0].startswith("checkpoint,images_seen,cell,weights,protocol,metric,tag,n,value")


def test_formulas_are_defused_in_csv() -> None:
    row: dict[str, Any] = dict.fromkeys(history.SCHEMA.names)
    text = history.as_csv([{**row, "checkpoint": "=cmd|x", "cell": "@a", "metric": "plain", "value": -1.5}])
    assert "'=cmd|x" in text
    assert "'@a" in text
    assert ",plain," in text
    assert ",-1.5," in text


def test_votes_are_cast_and_saved_in_a_browser(two: RunPaths, tmp_path: Path) -> None:
    cells = folders(two)
    written = human.write_pack(str(tmp_path), cells, human.pairs(two, cells, 5), two)

    async def look(tab: Tab) -> None:
        assert await tab.value("document.querySelectorAll('[data-pair]:not([hidden])').length") == 1
        await tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        for choice in ("left", "right", "tie"):
            await tab.value(f"document.querySelector('[data-choice={choice}]').click()")
        assert await tab.value("document.getElementById('place').textContent") == "4 of 5"
        await tab.value("document.getElementById('voter').value = '=1+1, \"ann\"'")
        await tab.value("document.getElementById('save').click()")
        for _ in range(100):
            if list(tmp_path.glob("votes-*.csv")):
                break
            await asyncio.sleep(0.05)
        assert await tab.value("document.body.dataset.owned") is None
        assert (tab.requests, tab.said) == ({}, [])

    visit(Path(written), look)
    [saved] = tmp_path.glob("votes-*.csv")
    assert ",11 ann," in saved.read_text()  # what a spreadsheet would take for a formula is not in it
    names, votes = human.read_votes(str(tmp_path), [str(saved)])
    assert names == cells
    assert sorted(v[2] for v in votes) == [0.0, 0.5, 1.0]
