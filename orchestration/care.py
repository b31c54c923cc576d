"""`carrara verify` and `carrara clean`: is what lies in a run what was committed, and what did the dead leave there?"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from orchestration.lease import Lease
from orchestration.runs import existing, shard_folders
from shards import plan, storage
from shards.dataset import MANIFEST, Dataset
from shards.listing import listed
from shards.local import TMP_MARK, of_dead_process
from shards.made_with import read_made_with
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
    paths = existing(run)
    damage: list[tuple[str, str]] = []  # (what is wrong, the stage that mends it)
    gone = 0
    discardable = False
    for name, root, stage in shard_folders(paths):
        faults = list(_shards(root, contents))
        damage += [(text, stage) for _, text in faults]
        discardable |= any(index is not None for index, _ in faults)
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
    otherwise = f"run {again}"
    if discardable:
        otherwise = (
            f"delete damaged shards by `carrara verify {run} {'--deep ' if contents else ''}--discard` while nothing "
            f"else runs there, and run {again} to make them again"
        )
    raise StageError(f"{run}: {len(damage)} damaged; put the files back from a copy, or {otherwise}")


def _shards(root: str, contents: bool) -> Iterator[tuple[int | None, str]]:
    """(number, what is wrong) of each damaged shard; number None: the dataset as a whole. One that is not finished is
    looked at as far as it is committed."""
    if not storage.list_names(root):
        return
    for look in (read_made_with, plan.read):
        try:
            look(root)
        except (ConfigError, StageError) as e:
            yield None, str(e)
    finished = storage.exists(storage.join(root, MANIFEST))
    if finished:
        try:
            Dataset.open(root)
        except StageError as e:
            yield None, str(e)
    faults = list(verify_shards(root, contents))
    yield from faults
    count = len(listed(root).committed)
    rest = "" if finished else "; it is not finished"
    print(f"{root}: {count - len(faults)} of {count} shards are as they were committed{rest}")


def _checkpoints(root: str, contents: bool) -> Iterator[str]:
    from train import folders

    found = folders.folders(root)
    faults = [f"{folder}: {fault}" for folder in found if (fault := folders.damage(folder, contents))]
    if found:
        print(f"{root}: {len(found) - len(faults)} of {len(found)} checkpoints are whole")
    yield from faults


def clean(run: str, dry_run: bool = False) -> None:
    """Remove temporary files and folders that dead processes left under a run's folder; prints what and how much.

    Only names that Carrara alone gives (shards/local.py): of a process of this machine that is gone, or an hour old.
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
            if TMP_MARK not in name or not name.startswith("."):
                continue
            path = Path(folder) / name
            try:
                age = time.time() - path.lstat().st_mtime
            except FileNotFoundError:
                continue
            if age > OLD_S or of_dead_process(name):
                yield path
                if name in folders:
                    folders.remove(name)
