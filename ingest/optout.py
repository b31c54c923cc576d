"""What a server says about the use of an image: X-Robots-Tag, the TDM reservation header, robots.txt.

X-Robots-Tag (developers.google.com/search/docs/crawling-indexing/robots-meta-tag): any number of headers,
each a list of directives, any of which may be preceded by the name of the crawler that it and those after
it are for. Some directives carry a value after a colon, and one of these, `unavailable_after`, a date
that may itself hold colons and a comma. TDM reservation: W3C TDMRep, header `tdm-reservation: 1`.
robots.txt (RFC 9309) is parsed by protego, Scrapy's parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from protego import Protego

_VALUED = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
_AGENT = re.compile(r"[a-z*][a-z0-9_*./-]*\Z")
_AGENT_LINE = re.compile(r"\s*user[- ]?agent\s*:", re.IGNORECASE)
_RULE_LINE = re.compile(r"\s*(?:dis)?allow\s*:", re.IGNORECASE)


def robots_directives(headers: Iterable[str]) -> list[tuple[str | None, str]]:
    """The (agent or None for everybody, directive) pairs of X-Robots-Tag headers, in lower case.

    Directives with a value are given without it.
    """
    pairs: list[tuple[str | None, str]] = []
    for header in headers:
        agent: str | None = None
        for item in header.lower().split(","):
            rest = item.strip()
            # A name before a colon is a crawler, unless it is a directive that takes a value. What has blanks
            # or digits in front of its colon is a piece of a date.
            while (name := rest.partition(":")[0].strip()) != rest and name not in _VALUED and _AGENT.match(name):
                agent, rest = name, rest.partition(":")[2].strip()
            name = rest.partition(":")[0].strip()
            pairs.append((agent, name if name in _VALUED else rest))
    return pairs


def robots_refusal(headers: Iterable[str], agents: Sequence[str], refused: Iterable[str]) -> str | None:
    """The first directive of X-Robots-Tag headers that refuses us; None where there is none.

    agents: the names by which we feel addressed, in any case. refused: the directives that mean no.
    """
    ours = {a.lower() for a in agents} | {"*"}
    no = {d.lower() for d in refused}
    for agent, directives in robots_directives(headers):
        if agent is None or agent.split("/")[0] in ours:
            for directive in re.split(r"[\s;\"']+", directives):  # not as specified, and yet no doubt what is meant
                if directive in no:
                    return directive
    return None


def tdm_refusal(headers: Iterable[str]) -> bool:
    """Whether text and data mining is reserved: the header's value is 1."""
    return any(value.strip() == "1" for h in headers for value in h.split(","))


def rules_in(text: str) -> int:
    """At most how many rules a parser makes of a robots.txt, where each line stands for all crawlers named above it.

    Half a megabyte may so be hundreds of millions. Lines in odd spellings, which parsers take as well, count as both.
    """
    agents = rules = 0
    closed = False  # by a rule: the next name begins anew
    for line in text.splitlines():
        line = line.partition("#")[0]
        if _RULE_LINE.match(line):
            closed = True
        elif "agent" in line.lower():
            if _AGENT_LINE.match(line) and closed:
                agents, closed = 0, False
            agents += 1 + ("*" in line)
        rules += agents * (1 + ("$" in line))
    return rules


def robots_txt_refuses(rules: Protego, url: str, agents: Sequence[str]) -> bool:
    """Whether a robots.txt forbids a URL to our own name (the first of agents) or, by their name, to the others.

    The rules for everybody (`*`) count for our own name alone: a site that lets us in expressly and shuts
    out the rest means us to come in.
    """
    ours, *others = agents
    if not rules.can_fetch(url, ours):
        return True
    everybody = rules.can_fetch(url, "a-name-that-no-crawler-has")
    return any(not rules.can_fetch(url, a) and everybody for a in others)


def product_name(user_agent: str) -> str:
    """The name by which a server would address us: `carrara` of `carrara/0.1 (...)`."""
    return re.split(r"[/\s]", user_agent, maxsplit=1)[0].lower()
