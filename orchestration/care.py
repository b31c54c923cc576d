"""`carrara verify` and `carrara clean`: is what lies in a run what was committed, and what did the dead leave there?"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from orchestration.lease import Lease
from shards import storage
from shards.dataset import MANIFEST, Dataset
from shards.layout import RunPaths
from shards.settings import ConfigError, StageError
from shards.verify import discard as discard_shard
from shards.verify import verify as verify_shards

log = logging.getLogger("carrara")

SHOWN = 20
OLD_S = 3600.0  # a temporary file of another machine goes once it is so old


def verify(run: str, contents: bool = False, discard: bool = False) -> None:
    """Compare every shard with its stats and every checkpoint with its manifest, by size or (contents) by sha256.

    discard: delete damaged shards, so that their stage makes them again; while nothing else works on the run. Prints
    what was looked at; raises StageError that names what is damaged and the commands that mend it.
    """
    paths = RunPaths(run)
    if not storage.list_names(run):
        raise ConfigError(f"{run}: there is no run here; give the folder that 'run' names in its configuration")
    damage: list[tuple[str, str]] = []  # (what is wrong, the stage that mends it)
    gone = 0
    for name, root in (("ingest", paths.images), ("heldout", paths.heldout), ("latents", paths.latents)):
        stage, faults = "latents" if name == "latents" else "ingest", list(_shards(root, contents))
        damage += [(text, stage) for _, text in faults]
        if discard and any(index is not None for index, _ in faults):
            with Lease(paths.status, name, root):
                for index, _ in faults:
                    if index is not None:
                        discard_shard(root, index)
                        gone += 1
    for stage, root in (("autoencoder", paths.autoencoder), ("clip", paths.clip), ("train", paths.run)):
        damage += [(text, stage) for text in _checkpoints(storage.join(root, "checkpoints"), contents)]
    if not damage:
        print("nothing is damaged")
        return
    for text, _ in damage[:SHOWN]:
        print(text)
    if len(damage) > SHOWN:
        print(f"and {len(damage) - SHOWN} more")
    again = ", then ".join(f"`carrara {s}`" for s in dict.fromkeys(stage for _, stage in damage))
    if discard:
        raise StageError(f"{run}: {len(damage)} damaged, of which {gone} shards were deleted; run {again}")
    raise StageError(
        f"{run}: {len(damage)} damaged; put the files back from a copy, or delete damaged shards by "
        f"`carrara verify {run} {'--deep ' if contents else ''}--discard` while nothing else runs there, "
        f"and run {again} to make them again"
    )


def _shards(root: str, contents: bool) -> Iterator[tuple[int | None, str]]:
    """(number, what is wrong) of each damaged shard; number None: the dataset as a whole."""
    try:
        dataset = Dataset.open(root)
    except StageError as e:
        if storage.exists(storage.join(root, MANIFEST)):
            yield None, str(e)
        elif storage.list_names(root):
            print(f"{root}: not finished, so it is not looked at")
        return
    faults = list(verify_shards(root, contents))
    yield from faults
    print(f"{root}: {len(dataset.shards) - len(faults)} of {len(dataset.shards)} shards are as they were committed")


def _checkpoints(root: str, contents: bool) -> Iterator[str]:
    from train import folders

    found = folders.folders(root)
    faults = [f"{folder}: {fault}" for folder in found if (fault := folders.damage(folder, contents))]
    if found:
        print(f"{root}: {len(found) - len(faults)} of {len(found)} checkpoints are whole")
    yield from faults


def clean(run: str, dry_run: bool = False) -> None:
    """Remove temporary files and folders that dead processes left under a run's folder; prints what and how much.

    Only names that Carrara alone gives (shards/storage.py): of a process of this machine that is gone, or an hour old.
    """
    if not storage.is_local(run):
        raise ConfigError(
            f"{run}: on an object store nothing is left behind but parts of uploads; give the bucket a "
            "lifecycle rule that ends incomplete multipart uploads"
        )
    root = storage.local_path(run)
    if not root.is_dir():
        raise ConfigError(f"{run}: there is no run here; give the folder that 'run' names in its configuration")
    count = freed = 0
    for path in sorted(left_behind(root)):
        size = sum(p.lstat().st_size for p in (path.rglob("*") if path.is_dir() else (path,)) if not p.is_dir())
        print(f"{'would remove' if dry_run else 'removed'} {path} ({size / 1e6:.1f} MB)")
        if not dry_run:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        count, freed = count + 1, freed + size
    would = "would be freed; nothing was removed" if dry_run else "freed"
    print(f"{count} left behind, {freed / 1e6:.1f} MB {would}" if count else "nothing was left behind")


def left_behind(root: Path) -> Iterator[Path]:
    """Temporary files and folders of dead processes anywhere under a folder."""
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            if storage.TMP_MARK not in name or not name.startswith("."):
                continue
            path = Path(folder) / name
            try:
                age = time.time() - path.lstat().st_mtime
            except FileNotFoundError:
                continue
            if age > OLD_S or storage.of_dead_process(name):
                yield path
                if name in folders:
                    folders.remove(name)
