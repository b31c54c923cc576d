"""The parser: what a command line says, whether a command is there, and the command that sends another to a cluster."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from orchestration.commands import machines, models, runs, stages
from shards.settings import ConfigError

app = typer.Typer(
    name="carrara",
    help="From a table of image URLs and captions to a text-to-image latent diffusion model, on Ray and DeepSpeed.",
    epilog="Killed at any moment, the same command goes on from where it was. Exit codes: 0 done, 1 failed, 2 the "
    "configuration or an input cannot be used, 75 stopped and to be resumed by the same command, 130 Ctrl-C.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for group_ in (stages, runs, models, machines):
    app.add_typer(group_.app)

# typer brings a click of its own, in which the base of all these errors has no public name.
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
INTERRUPTED = 130  # what typer makes of Ctrl-C
RENAMED = {"judge": "human"}  # commands that had another name


def run(arguments: Sequence[str]) -> None:
    """Run what the arguments say. Raises ConfigError where they cannot be understood, else as the command does."""
    refuse_unknown(arguments)
    try:
        if group().main(list(arguments), prog_name="carrara", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    except USAGE_ERROR as e:
        where = e.ctx.command_path if e.ctx else "carrara"
        text = e.format_message().rstrip(".")
        raise ConfigError(f"{text[:1].lower()}{text[1:]}; `{where} --help` shows how it is called") from None
    except typer.Abort:
        raise KeyboardInterrupt from None


def names() -> list[str]:
    """The commands there are."""
    return list(group().commands)


@functools.cache
def group() -> Any:
    """All commands, as the library that parses them has them."""
    return typer.main.get_command(app)


def read_here(arguments: Sequence[str]) -> tuple[set[int], bool]:
    """What a command reads of the folder where it is given: the positions of the words that name files (`--option FILE`
    or `--option=FILE`), and whether it would look for a configuration by itself, since it takes one and names neither
    one nor what stands for it (a run, a model)."""
    command, at = group(), 0
    while at < len(arguments) and hasattr(command, "commands"):
        command, at = command.commands.get(arguments[at]), at + 1
    if command is None or hasattr(command, "commands"):
        return set(), False
    options = {name: p for p in command.params for name in p.opts if name.startswith("-")}
    placed = [p for p in command.params if p not in options.values()]
    found, count, option = set(), 0, None
    for i, word in enumerate(arguments[at:], at):
        if option is None and (named := options.get(word.partition("=")[0])) is not None:
            if "=" in word and _is_read(named):
                found.add(i)
            option = None if "=" in word or named.is_flag else named
            continue
        if option is None and placed:
            option, count = placed[min(count, len(placed) - 1)], count + 1
        if option is not None and _is_read(option):
            found.add(i)
        option = None
    if all(p.name != "config" for p in command.params):
        return found, False
    given = command.make_context(arguments[at - 1], list(arguments[at:]), resilient_parsing=True).params
    stands_for_it = given.get("model") or any("=" not in word for word in given.get("rest") or ())
    return found, not given["config"] and not stands_for_it


def _is_read(parameter: Any) -> bool:
    """Whether it is a file to be read; one to be written, or a run, is meant from the folder itself (`from_base`)."""
    return (parameter.metavar or "").startswith("FILE") and parameter.callback is None


def refuse_unknown(arguments: Sequence[str]) -> None:
    """Raises ConfigError where a command line names a command that is not there, with the nearest that is."""
    name = next((a for a in arguments if not a.startswith("-")), None)
    if name is None or name in names():
        return
    near = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names())}"
    raise ConfigError(f"there is no stage or command '{name}'; {hint}")


@app.callback(invoke_without_command=True)
def _carrara(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="say which version this is")] = False,
) -> None:
    if version:
        print(f"carrara {importlib.metadata.version('carrara')}")
    elif context.invoked_subcommand is None:
        raise ConfigError("name a stage or a command; `carrara --help` shows them")


@machines.app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": ["--help"]}
)
def submit(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="any command, with its arguments")],
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="URL", help="the cluster's dashboard (else RAY_API_SERVER_ADDRESS, else here)"
        ),
    ] = None,
) -> None:
    """Run any command as a Ray job, follow its log, and end as it ends.

    \b
    carrara submit --address http://127.0.0.1:8265 ingest --config mine.yaml --retry transient

    The configuration and other files that the arguments name are sent with it, and so is this Carrara.
    """
    from orchestration.submit import submit as work

    refuse_unknown(command)
    work(command, address, read_here)
