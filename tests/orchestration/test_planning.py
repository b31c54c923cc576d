"""The walk through a table on Ray gives the plan of a walk in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingest import tables
from ingest.config import ColumnsConfig
from ingest.tables import HeldoutRule, TableSource
from orchestration import planning
from shards import plan


@pytest.mark.slow
def test_the_walk_on_ray_gives_the_same_plan(tmp_path: Path) -> None:
    import ray

    table = tmp_path / "table"
    table.mkdir()
    for i in range(9):
        lines = [f"http://a/{i}/{j}.jpg,caption {i * j}\n" for j in range(700 + i)]
        (table / f"part-{i}.csv").write_text("url,caption\n" + "".join(lines))
    layout = tables.read_layout(str(table), ColumnsConfig(), [])
    source = TableSource(layout, 100, HeldoutRule(0.2, 0, ("whitespace",)))

    def roots(name: str) -> dict[str, str]:
        return {split: str(tmp_path / name / split) for split in ("train", "heldout")}

    plan.grow(roots("here"), source)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        plan.grow(roots("there"), source, each=planning.on_ray)
    finally:
        ray.shutdown()
    for split, root in roots("here").items():
        assert list(plan.read(root).lines()) == list(plan.read(roots("there")[split]).lines())
        assert len(plan.read(root)) > 9
