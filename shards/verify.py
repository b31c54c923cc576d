"""Whether what was committed still lies there: missing files and wrong sizes by a listing, changed bytes by sha256."""

from __future__ import annotations

from collections.abc import Iterator

from shards import storage
from shards.layout import shard_name
from shards.listing import STATS, listed
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
    when nothing else writes here: a late writer of this very shard could mix it with its own."""
    name = shard_name(index)
    try:
        stats = parse_stats(storage.read_bytes(storage.join(root, name + STATS)))
    except FileNotFoundError:
        stats = None
    storage.remove(storage.join(root, name + STATS))
    for suffix in (stats or {"files": {}})["files"]:
        storage.remove(storage.join(root, name + suffix))
