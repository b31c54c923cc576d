"""Whether what was committed still lies there: missing files and wrong sizes by a listing, changed bytes by sha256."""

from __future__ import annotations

from collections.abc import Iterator

from shards import storage
from shards.layout import shard_name
from shards.listing import STATS, listed
from shards.made_with import read_made_with
from shards.stats import parse_stats, read_stats, read_stats_of


def verify(root: str, contents: bool = False) -> Iterator[tuple[int, str]]:
    """(number, what is wrong) of each damaged shard of a folder, in order. contents: compare sha256 too.

    A shard that was begun and not committed is not damaged: the stage's next run ends it.
    """
    there = listed(root, sizes=True)
    for index, stats in read_stats_of(root, (int(i) for i in there.committed)):
        name = shard_name(index)
        if stats is None:
            yield index, f"{root}/{name}{STATS} is not a complete stats file of Carrara"
            continue
        for suffix, file in stats["files"].items():
            found = there.sizes.get(suffix, {}).get(index)
            if found != file["size"]:
                lies = "no file" if found is None else f"{found} bytes"
                yield index, f"{root}/{name}{suffix} has {lies} where {file['size']} were committed"
                break
        else:
            if contents and (problem := verify_shard(root, index)):
                yield index, problem


def verify_shard(root: str, index: int, contents: bool = True) -> str:
    """What is wrong with one committed shard, an empty string where all is well. contents: by sha256, else by size."""
    stats = read_stats(root, index)
    name = shard_name(index)
    if stats is None:
        return f"{root}/{name}: not committed"
    for suffix, file in stats["files"].items():
        url = storage.join(root, name + suffix)
        found = storage.size(url)
        if found != file["size"]:
            return f"{url} has {'no file' if found is None else f'{found} bytes'} where {file['size']} were committed"
        if contents and storage.digest(url) != file["sha256"]:
            return f"{url} does not have the sha256 that was committed"
    return ""


def discard(root: str, index: int) -> None:
    """Delete a damaged shard of a stage that can make it again from its input, the commit first; under the lease, and
    when nothing else writes here: a late writer of this very shard could mix it with its own.

    A sidecar that is whole is set aside until the shard is made anew: not all that it says can be made again.
    """
    name = shard_name(index)
    try:
        stats = parse_stats(storage.read_bytes(storage.join(root, name + STATS)))
    except FileNotFoundError:
        stats = None
    files = (stats or {"files": {}})["files"]
    sidecar, aside = storage.join(root, name + ".parquet"), _aside(root, index)
    if aside is not None and ".parquet" in files and storage.digest(sidecar) == files[".parquet"]["sha256"]:
        storage.write_atomic(aside, storage.read_bytes(sidecar))
    storage.remove(storage.join(root, name + STATS))
    for suffix in files:
        storage.remove(storage.join(root, name + suffix))


def discarded(root: str, index: int) -> bytes | None:
    """The sidecar of a shard that was discarded and is to be made anew; None where none was set aside."""
    aside = _aside(root, index)
    try:
        return None if aside is None else storage.read_bytes(aside)
    except FileNotFoundError:
        return None


def _aside(root: str, index: int) -> str | None:
    """Beside what is being committed, from where it is swept once the shard is."""
    known = read_made_with(root)
    return (
        None if known is None else storage.join(root, f".new-{known['id']}", f"{shard_name(index)}-discarded.parquet")
    )
