"""Command lines of documents and manifests, read by Carrara's own parser: nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestration.commands import options, parser
from shards.settings import ConfigError

AT_ONCE = {"--help", "-h", "--version", "--install-completion", "--show-completion"}  # are done as they are read


def parse(arguments: Sequence[str], mentioned: bool = False) -> None:
    """Read what stands behind `carrara`; raises ConfigError where the command line would be refused as it stands.

    mentioned: it is named in a sentence, and its arguments may be left out there.
    """
    words = [w for w in arguments if w not in AT_ONCE]
    if not words or words == ["submit", "COMMAND"]:
        return
    parser.refuse_unknown(words)
    command = parser.group()
    try:
        while True:
            context = command.make_context(command.name, words)
            if not hasattr(command, "commands") or not (rest := [*context._protected_args, *context.args]):
                break
            _, command, words = command.resolve_command(context, rest)
    except parser.USAGE_ERROR as e:
        if mentioned and re.match(r"Missing argument|Option .* requires an argument", e.format_message()):
            return
        raise ConfigError(f"carrara {shlex.join(arguments)}: {e.format_message()}") from None
    named = context.params
    settings = [*(named.get("overrides") or ()), *(w for w in named.get("rest") or () if "=" in w)]
    for setting in settings:
        options.overrides_of([setting])
    if (name := getattr(command, "name", "")) == "submit":
        parse(named["command"])
    elif name == "watch" and named.get("once") and named.get("forever"):
        raise ConfigError("watch: --once and --forever")


def code(document: Path) -> Iterator[tuple[int, str, bool]]:
    """(line number, text, whether in a block) of what stands in code blocks, fenced or indented, and between single
    backquotes; lines that end in a backslash or between quotes are joined with the next."""
    fenced, before, number = False, "", 0
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            text = before + line.strip()
            quoted = text.count('"') % 2 == 1  # what is between quotes may go over several lines
            before = text[:-1] if text.endswith("\\") else f"{text} " if quoted else ""
            if not before:
                yield number, text, True
        else:
            for part in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
                yield number, part, False


def commands_of(document: Path, word: str = "carrara") -> Iterator[tuple[int, list[str], bool]]:
    """(line number, words, whether in a block of code) of each command line of a document that calls `word`; comments
    and what a shell does to the output are left out, and what stands in [brackets] is taken as given."""
    for number, text, block in code(document):
        parts = text.split("; ")
        for line in [text] if any(part.count('"') % 2 for part in parts) else parts:  # between quotes it ends nothing
            line = re.sub(r"^\$\s+", "", line)
            if not re.match(rf"{re.escape(word)}(\s|$)", line):
                continue
            line = re.split(r"\s{3,}|\s[|>&]+\s|\s#\s", line)[0]  # explanations begin after three blanks
            line = re.sub(r"\[([^]|]+)(\|[^]]*)?\]", r"\1", line).replace(" ...", "")
            yield number, shlex.split(line), block
