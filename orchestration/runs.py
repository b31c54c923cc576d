"""What a run's folder has: whether it is one, and its folders of shards."""

from __future__ import annotations

from collections.abc import Iterator

from shards import storage
from shards.layout import RunPaths
from shards.made_with import MADE_WITH
from shards.settings import ConfigError

# What stands in a run's folder, whatever stage was begun first (shards/layout.py).
NAMES = {name for name, value in vars(RunPaths).items() if isinstance(value, property)} | {
    "scores",
    "captions",
    "controls",
}


def existing(run: str) -> RunPaths:
    """The paths of a run that is there. Raises ConfigError where nothing of a run lies at this path or URL."""
    try:
        found = storage.list_names(run)
    except NotADirectoryError:
        found = []
    except Exception as e:  # whatever a store may raise: no such protocol, no credentials, no network
        raise ConfigError(
            f"{run}: cannot be looked at ({type(e).__name__}: {' '.join(str(e).split())[:300]}); correct the URL or "
            f"the credentials, of which `carrara doctor --run {run}` says more"
        ) from e
    if NAMES.isdisjoint(found):
        raise ConfigError(f"{run}: there is no run here; give the folder that 'run' names in its configuration")
    return RunPaths(run)


def shard_folders(paths: RunPaths) -> Iterator[tuple[str, str, str]]:
    """(the stage as its status and lease are named, folder, the command that makes it) of every folder of shards, in
    the order of the stages."""
    yield "ingest", paths.images, "ingest"
    yield "heldout", paths.heldout, "ingest"
    for stage, root in curated(paths):
        yield stage, root, stage.partition("-")[0]
    yield "latents", paths.latents, "latents"
    prior = RunPaths(paths.prior)
    yield "prior", prior.images, "prior"
    yield "prior-latents", prior.latents, "prior"


def curated(paths: RunPaths) -> Iterator[tuple[str, str]]:
    """(stage, folder) of the scores, captions and control images beside the images; no file that somebody, or a file
    manager, put among them."""
    for kind, stage in (("scores", "score"), ("captions", "caption"), ("controls", "control")):
        for name in storage.list_names(storage.join(paths.run, kind)):
            root = storage.join(paths.run, kind, name)
            try:
                storage.list_names(root)
            except NotADirectoryError:
                continue
            if stage == "control":  # of `carrara control`; a run that somebody brought there has its own take-down
                for split, more in (("images", ""), ("heldout", "-heldout")):
                    if storage.read_object(storage.join(root, split, MADE_WITH)).get("stage") == "control":
                        yield f"{stage}-{name}{more}", storage.join(root, split)
            else:
                yield f"{stage}-{name}", root
