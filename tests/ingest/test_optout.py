"""X-Robots-Tag by its specification, beginning with the headers that are printed there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.config import OptOutConfig
from ingest.optout import product_name, robots_directives, robots_refusal

REFUSED = OptOutConfig().directives
AGENTS = ("carrara", "img2dataset")


@pytest.mark.parametrize(
    ("headers", "refusal"),
    [
        (["noindex"], "noindex"),
        (["NoAI"], "noai"),
        (["none"], "none"),
        (["noml"], "noml"),
        (["noimageindex"], "noimageindex"),
        (["noarchive", "noimageai"], "noimageai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], None),
        (["noimageindex", "unavailable_after: 25 Jun 2010 15:00:00 PST"], "noimageindex"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Sunday, 06-Nov-94 08:49:37 GMT, noai"], "noai"),
        (["unavailable_after: Sun, 06 Nov 1994 08:49:37 GMT"], None),
        (["max-snippet:20, noai"], "noai"),
        (["max-image-preview:none"], None),
        (["googlebot: nofollow", "otherbot: noindex, nofollow"], None),
        (["googlebot: nofollow, noindex"], None),
        (["BadBot: noindex, nofollow, googlebot: nofollow"], None),
        (["otherbot: noindex, carrara: noai"], "noai"),
        (["carrara: noai, otherbot: all"], "noai"),
        (["img2dataset: noai"], "noai"),
        (["carrara/0.1: noai"], "noai"),
        (["*: noai"], "noai"),
        (["otherbot: unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], None),
        (["carrara: unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["otherbot: noai", "noindex"], "noindex"),
        (["all"], None),
        (["noarchive; noindex"], "noindex"),
        (["nofollow noindex"], "noindex"),
        (['"noai"'], "noai"),
        (["nosnippet, noarchive, notranslate, nositelinkssearchbox, indexifembedded"], None),
        (["", ",", ":", " : ", "noaids", "index, noa"], None),
        ([], None),
    ],
)
def test_headers(headers: list[str], refusal: str | None) -> None:
    assert robots_refusal(headers, AGENTS, REFUSED) == refusal


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\r\n"), max_size=40), max_size=5))
def test_any_header_is_parsed(headers: list[str]) -> None:
    assert len(robots_directives(headers)) == sum(h.count(",") + 1 for h in headers)


@given(st.lists(st.sampled_from(["noarchive", "max-snippet:20", "all", "nosnippet"])), st.sampled_from(REFUSED))
def test_a_refusal_is_found_in_any_place(others: list[str], refusal: str) -> None:
    for at in range(len(others) + 1):
        items = [*others[:at], refusal, *others[at:]]
        assert robots_refusal([", ".join(items)], AGENTS, REFUSED) == refusal
        assert robots_refusal(items, AGENTS, REFUSED) == refusal


def test_product_name() -> None:
    assert product_name("Carrara/0.1 (image-text dataset builder)") == "carrara"
    assert product_name("my-bot 2") == "my-bot"
