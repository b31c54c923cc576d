"""What the site has beyond the documents as they lie here: README.md as its first page, the settings of every section
as the models have them, and links to files of the checkout as their names (mkdocs.yml names this as a hook).

    make docs
    python docs/site.py > settings.md
"""

from __future__ import annotations

import functools
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pydantic  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402


@functools.cache
def settings() -> str:
    """A page with every setting: name, type, default, what it does."""
    from orchestration.config import RunConfig

    parts = [
        "# Settings",
        "One YAML describes a run; this page is made from the models that check it. On the command line a setting is "
        "`section.name=value`. `carrara schema` prints the same as JSON schema, from which editors complete. A name "
        "that is not here is refused before any work, with the nearest one that is.",
    ]
    seen: set[type] = set()

    def section(model: type[pydantic.BaseModel], where: str) -> None:
        below: list[tuple[type[pydantic.BaseModel], str]] = []
        parts.append(f"## {where or 'The run'}")
        parts.append(" ".join((model.__doc__ or "").split()))
        rows = ["| setting | type | default | |", "| --- | --- | --- | --- |"]
        for name, field in model.model_fields.items():
            path = f"{where}.{name}".lstrip(".")
            inner = [m for m in models(field.annotation) if m not in seen]
            below += [(m, path) for m in inner]
            seen.update(inner)
            cells = (f"`{name}`", kind(field.annotation), default(field), field.description or "")
            rows.append("| " + " | ".join(cell(c) for c in cells) + " |")
        parts.append("\n".join(rows))
        for m, path in below:
            section(m, path)

    section(RunConfig, "")
    return "\n\n".join(p for p in parts if p) + "\n"


def models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The models that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [m for inner in typing.get_args(annotation) for m in models(inner)]


def kind(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{v}`" for v in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(i) for i in inner))
    if origin in (list, tuple):
        return f"list of {kind(inner[0])}" if inner else "list"
    if origin is dict:
        return f"names with {kind(inner[1])}"
    if annotation is type(None):
        return "null"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "names with values"}
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return "section"
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default(field: Any) -> str:
    """A default as YAML has it; of a section, none."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or isinstance(value, pydantic.BaseModel):
        return ""
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---- mkdocs ---------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """The pages that lie nowhere as files."""
    from mkdocs.structure.files import File

    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "settings.md", content=settings()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the checkout, which the site does not have, become their names; one to nothing stays, and is
    then complained of."""

    def named(found: re.Match[str]) -> str:
        text, target = found[1], found[2].partition("#")[0]
        below = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"
        path = Path(os.path.normpath(below / target))
        if files.get_file_from_path(target) or "://" in target or not target or not path.exists():
            return found[0]
        return f"{text} (`{path.relative_to(ROOT)}`)" if text.strip("`") != target else f"`{target}`"

    return re.sub(r"(?<!!)\[([^]]+)\]\(([^)\s]+)\)", named, markdown)


if __name__ == "__main__":
    print(settings())
