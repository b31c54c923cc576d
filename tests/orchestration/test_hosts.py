"""The ledger of hosts on a real Ray: workers in processes of their own share the places of a host."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray
from aiohttp import web

from ingest.config import FetchConfig, OptOutConfig
from ingest.errors import Rejected
from ingest.fetch import Fetcher
from ingest.stage import IngestStage
from orchestration import hosts
from tests.ingest.conftest import make_config
from tests.ingest.site import Site

CONFIG = {"allow_addresses": ["127.0.0.1/32"], "retries": 0, "host_concurrency": 3}


@ray.remote(num_cpus=0.1)
def ask(exchange: Any, name: str, urls: list[str]) -> list[str]:
    """A worker: a client of its own in a process of its own."""

    async def one(fetcher: Fetcher, url: str) -> str:
        try:
            async with fetcher.fetch(url):
                return "ok"
        except Rejected as e:
            return e.code

    async def every() -> list[str]:
        fetcher = Fetcher(FetchConfig.model_validate(CONFIG), OptOutConfig(), exchange, name)
        try:
            return await asyncio.gather(*(one(fetcher, u) for u in urls))
        finally:
            await fetcher.close()

    return asyncio.run(every())


@pytest.mark.slow
def test_workers_on_ray_share_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.2)
        return web.Response(body=b"x")

    monkeypatch.setattr(hosts, "CPUS", 1)  # several ledgers, each with its part of the hosts
    site = Site()
    for i in range(30):
        site.pages[f"/{i}"] = slow
    stage = IngestStage(make_config("t.csv", fetch=CONFIG), "/nowhere/images")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with hosts.shared(stage) as shared_stage:
            assert shared_stage.hosts is not None
            assert len(shared_stage.hosts.actors) == 3
            urls = [[site.url(f"/{i}") for i in range(w, 30, 3)] for w in range(3)]
            found = ray.get([ask.remote(shared_stage.hosts, f"w{w}", urls[w]) for w in range(3)], timeout=120)
            assert found == [["ok"] * 10] * 3
            assert 1 < site.most_busy <= 3
            actor = shared_stage.hosts.actors[0]
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.exchange.remote("late", None), timeout=30)
        assert stage.hosts is None
        with hosts.shared("a stage of another kind") as other:
            assert other == "a stage of another kind"
    finally:
        ray.shutdown()
        site.close()
