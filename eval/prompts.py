"""Which captions are drawn: those of held-out pictures, distinct ones first, or the lines of a text file.

A prompt's id is a digest of its words and of how often they came before, so that its noise stays the same in any list,
of any length, in any order of shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from eval.inputs import read_lines
from shards.dataset import Dataset
from shards.fingerprint import digest_bytes, digest_json
from shards.images import ImageShard
from shards.settings import ConfigError

MAX_CHARS = 10_000  # a longer line is no caption


@dataclass(frozen=True)
class Prompt:
    """id: 16 hex digits. key: the held-out picture it is the caption of ("" from a file), at (shard, row): the position
    of its shard in the held-out dataset and its place among that shard's live samples (-1 from a file)."""

    id: str
    text: str
    key: str = ""
    shard: int = -1
    row: int = -1


def digest(prompts: Iterable[Prompt]) -> str:
    """sha256 over the ids, in order."""
    return digest_json([p.id for p in prompts])


def from_heldout(heldout: Dataset, count: int) -> list[Prompt]:
    """`count` captions (fewer where there are fewer) of held-out pictures: each distinct caption once before any twice.

    Among equals the order is that of a hash of the picture's key, so that a sorted table gives no sorted sample.
    """
    found: list[tuple[str, str, int, int]] = []
    for position in range(len(heldout.shards)):
        shard = ImageShard(heldout, position)
        for row, (key, caption) in enumerate(zip(shard.keys, shard.captions, strict=True)):
            if caption.strip():
                found.append((key, caption, position, row))
    found.sort(key=lambda f: (digest_bytes(f[0].encode()), f[0]))
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, Prompt]] = []
    for order, (key, caption, position, row) in enumerate(found):
        turn = seen[caption] = seen.get(caption, -1) + 1
        ranked.append((turn, order, Prompt(_id(caption, turn), caption, key, position, row)))
    if not ranked:
        raise ConfigError(
            f"eval: the held-out set {heldout.root} has no captions; set eval.prompt_file to a text file of prompts"
        )
    return [prompt for _, _, prompt in sorted(ranked, key=lambda r: r[:2])[:count]]


def from_file(path: str, count: int) -> list[Prompt]:
    """The first `count` non-empty lines of a UTF-8 text file; ConfigError where there are none."""
    found = read_lines(path, "eval.prompt_file", "a text file with one prompt a line")
    lines = [line.strip() for line in found]
    lines = [line for line in lines if line][:count]
    if not lines:
        raise ConfigError(f"eval.prompt_file: {path} has no prompts; write one a line")
    long = next((i for i, line in enumerate(lines, 1) if len(line) > MAX_CHARS), None)
    if long:
        raise ConfigError(f"eval.prompt_file: prompt {long} of {path} has more than {MAX_CHARS} characters; shorten it")
    seen: dict[str, int] = {}
    prompts = []
    for line in lines:
        turn = seen[line] = seen.get(line, -1) + 1
        prompts.append(Prompt(_id(line, turn), line))
    return prompts


def controls(prompts: list[Prompt]) -> list[str]:
    """For each prompt the caption of another one, with other words: what a picture is held against as a control.

    Prompt i gets that of prompt i + M/2 (round the end), or the next one with other words; "" where all are alike.
    """
    count = len(prompts)
    result = []
    for i, prompt in enumerate(prompts):
        others = (prompts[(i + count // 2 + j) % count].text for j in range(count))
        result.append(next((text for text in others if text != prompt.text), ""))
    return result


def _id(text: str, turn: int) -> str:
    return digest_json([text, turn])[:16]
