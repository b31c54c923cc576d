"""Which captions are prompts: those of held-out images, distinct ones first, the lines of a text file, or a suite of
prompts in JSON lines.

    {"prompt": "a photo of a bench", "id": "b1", "tags": ["single object"], "questions": [["Is it a bench?", "yes"]]}

GenEval's file (`prompt`, `tag`, `include`) and GenEval 2's (`prompt`, `vqa_list`, `skills`, `atom_count`) open as they
are; `category` is a tag as well. Every other key is kept, and comes out again with an export. A prompt's id is the
suite's, or a digest of its words and of how often they came before, so that its noise stays the same in any list, of
any length, in any order of shards.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from eval.inputs import read_lines
from shards.dataset import Dataset
from shards.fingerprint import digest_bytes, digest_json
from shards.images import ImageShard
from shards.settings import ConfigError

MAX_CHARS = 10_000  # a longer line is no caption
MAX_QUESTIONS = 100  # of one prompt


@dataclass(frozen=True)
class Prompt:
    """id: 16 hex digits. key: the held-out image it is the caption of ("" from a file), at (shard, row): the position
    of its shard in the held-out dataset and its place among that shard's live samples (-1 from a file).

    name: the suite's own id; tags: what it belongs to; questions: (question, right answer) for a judge; extra: the
    line of the suite as it stood there.
    """

    id: str
    text: str
    key: str = ""
    shard: int = -1
    row: int = -1
    name: str = ""
    tags: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    extra: str = ""


@dataclass(frozen=True)
class PromptList:
    """Prompts in order, and the digest of the whole list that they are the first of: more of a list is no other one."""

    source: str
    digest: str
    prompts: list[Prompt] = dataclasses.field(repr=False)


def from_heldout(heldout: Dataset, count: int) -> PromptList:
    """`count` captions (fewer where there are fewer) of held-out images: each distinct caption once before any twice.

    Among equals the order is that of a hash of the image's key, so that a sorted table gives no sorted sample.
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
            f"eval: the held-out set {heldout.root} has no captions; set eval.prompts_file to a file of prompts"
        )
    chosen = [prompt for _, _, prompt in sorted(ranked, key=lambda r: r[:2])[:count]]
    return PromptList("held-out captions", heldout.fingerprint, chosen)


def from_file(path: str, count: int) -> PromptList:
    """The first `count` prompts of a UTF-8 file, one a line: text, or (.jsonl) JSON objects with `prompt`.

    ConfigError, with the line, where one cannot be used, or where there are none.
    """
    option = "eval.prompts_file"
    numbered = [
        (number, line.strip())
        for number, line in enumerate(read_lines(path, option, "a file with one prompt a line"), 1)
        if line.strip()
    ]
    suite = path.endswith((".jsonl", ".json"))
    seen: dict[str, int] = {}
    found = []
    for number, line in numbered:
        where = f"{option}: {path}, line {number}"
        prompt = _of_line(line, where) if suite else Prompt("", line)
        if len(prompt.text) > MAX_CHARS:
            raise ConfigError(f"{where}: the prompt has more than {MAX_CHARS} characters; shorten it")
        turn = seen[prompt.text] = seen.get(prompt.text, -1) + 1
        found.append(dataclasses.replace(prompt, id=_id(prompt.text, turn)))
    if not found:
        raise ConfigError(f"{option}: {path} has no prompts; write one a line")
    twice = [name for name, times in Counter(p.name for p in found if p.name).items() if times > 1]
    if twice:
        raise ConfigError(f"{option}: {path} has the id '{twice[0]}' twice; give every prompt its own")
    return PromptList(path, digest_json([[p.id, p.name, p.tags, p.questions] for p in found]), found[:count])


def _of_line(line: str, where: str) -> Prompt:
    try:
        values = json.loads(line)
        extra = json.dumps(values, ensure_ascii=False, sort_keys=True)
        extra.encode()  # halves of a surrogate pair are JSON, and no text
    except (ValueError, RecursionError) as e:
        raise ConfigError(f'{where}: it is no JSON ({e}); each line is an object such as {{"prompt": ...}}') from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str) or not values["prompt"].strip():
        raise ConfigError(f'{where}: it needs a text "prompt"')
    tags = [*_texts(values.get("tags"), where, "tags"), *_texts(values.get("tag"), where, "tag")]
    tags += [*_texts(values.get("category"), where, "category"), *_texts(values.get("skills"), where, "skills")]
    if isinstance(values.get("atom_count"), int):
        tags.append(f"{values['atom_count']} atoms")
    asked = values.get("questions", values.get("vqa_list", []))
    questions = []
    for item in asked if isinstance(asked, list) else [None]:
        if isinstance(item, dict):
            item = [item.get("question"), item.get("answer", "yes")]
        elif isinstance(item, str):
            item = [item, "yes"]
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(t, str) and t for t in item)):
            raise ConfigError(f'{where}: "questions" are pairs of a question and its right answer, as texts')
        questions.append((item[0], item[1]))
    if len(questions) > MAX_QUESTIONS:
        raise ConfigError(f"{where}: it has {len(questions)} questions; {MAX_QUESTIONS} is the most")
    name = values.get("id", "")
    return Prompt(
        "",
        values["prompt"].strip(),
        name=str(name) if name != "" else "",
        tags=tuple(dict.fromkeys(tags)),
        questions=tuple(questions),
        extra=extra,
    )


def _texts(value: Any, where: str, field: str) -> list[str]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, str | int) and len(str(v)) <= 200 for v in values):
        raise ConfigError(f'{where}: "{field}" is a text, or a list of texts')
    return [str(v) for v in values if str(v)]


def controls(prompts: list[str]) -> list[int | None]:
    """For each prompt the place of another one with other words: what an image is held against as a control.

    Prompt i gets i + M/2 (round the end), or the next one with other words; None where all are alike. Linear in M.
    """
    count = len(prompts)
    steps: list[int] = [0] * (2 * count)  # how far it is from place i to the next prompt with other words
    for i in reversed(range(2 * count - 1)):
        steps[i] = steps[i + 1] + 1 if prompts[i % count] == prompts[(i + 1) % count] else 1
    result: list[int | None] = []
    alike = len(set(prompts)) < 2
    for i, text in enumerate(prompts):
        j = (i + count // 2) % count
        if alike:
            result.append(None)
        else:
            result.append(j if prompts[j] != text else (j + steps[j]) % count)
    return result


def _id(text: str, turn: int) -> str:
    return digest_json([text, turn])[:16]
