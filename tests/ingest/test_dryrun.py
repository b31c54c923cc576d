"""The dry run says beforehand what the ingest then does, and fetches nothing."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from ingest import dryrun
from ingest.stage import IngestStage
from ingest.takedown import TakenDown, url_digest
from tests.ingest.conftest import make_config, run
from tests.ingest.site import Site, image_bytes
from tests.ingest.test_stage import FILTERS, dirty_table


def test_the_funnel_is_what_the_ingest_then_does(site: Site, tmp_path: Path) -> None:
    filters = [*FILTERS, {"column": "caption_words", "min": 3}]
    config = make_config(dirty_table(site, tmp_path), filters=filters, heldout_fraction=0.3)
    for split in ("train", "heldout"):
        stage = IngestStage(config, str(tmp_path / split), split)
        found = dryrun.funnel(stage, progress=False)
        assert not site.hits
        assert dryrun.image_cost(stage).rows_per_second is None
        manifest = run(stage)
        assert dict(found.fails) == manifest["filtered_by"]
        assert found.rows == found.looked_at == manifest["counts"]["rows"]
        assert found.to_fetch == manifest["counts"]["rows"] - manifest["counts"]["filtered"]
        cost = dryrun.image_cost(stage)
        assert cost.success * found.to_fetch == pytest.approx(
            manifest["counts"]["success"] + manifest["counts"]["duplicate"]
        )
        assert cost.bytes_fetched * found.to_fetch == pytest.approx(manifest["bytes_fetched"])
        assert f"{found.to_fetch:,}" in found.text()
        assert "requests of this run" in cost.text(found.to_fetch, 2)
        site.hits.clear()


@pytest.mark.parametrize("kind", ["csv", "jsonl.gz"])
def test_a_part_of_the_rows_is_scaled_up(tmp_path: Path, kind: str) -> None:
    rows = [(f"http://x.test/{i}.png", f"picture {i:06d}", i % 4) for i in range(30_000)]
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows([("url", "caption", "n"), *rows])
    else:
        with gzip.open(path, "wt") as f:
            f.writelines(json.dumps(dict(zip(("url", "caption", "n"), row, strict=True))) + "\n" for row in rows)
    stage = IngestStage(make_config(path, filters=[{"column": "n", "max": 0}]), str(tmp_path / "images"))
    found = dryrun.funnel(stage, 8000, progress=False)
    assert found.looked_at == 8000
    assert dict(found.fails)["n <= 0"] == 6000
    if kind == "csv":  # of a compressed text the size is a guess, and said to be one
        assert found.rows == pytest.approx(30_000, rel=0.02)
        assert found.to_fetch == pytest.approx(7500, rel=0.02)
    assert "looked at" in found.text()
    assert dryrun.funnel(stage, progress=False).rows == 30_000


def test_without_a_pilot_the_cost_says_what_it_assumes(site: Site, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"url,caption\n{site.add('/a.png', image_bytes(0))},x\n")
    stage = IngestStage(make_config(table), str(tmp_path / "run" / "images"))
    cost = dryrun.image_cost(stage)
    assert 0 < cost.cpu_seconds < 1
    text = cost.text(1_000_000_000, 16)
    assert "assumed" in text
    assert f"{1e9 * cost.bytes_fetched / 1e12:,.3f} TB" in text
    TakenDown.of(urls=[url_digest(site.url("/a.png"))]).create(stage.run)
    assert dict(dryrun.funnel(stage, progress=False).fails) == {"taken down": 1, "no caption": 0}
