"""Take-downs in latents: what the images have no more is blanked where it lies, without encoding anything again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from shards import storage
from shards.blank import blank
from shards.columns import column_rows
from shards.layout import shard_name
from shards.listing import listed

TAKEN_DOWN = "taken_down"
NOT_SELECTED = "not_selected"  # the error of an image that latents.select left out


def take_out(
    root: str, images: str, each: Callable[[int], Any] = lambda n: None, data: str = ".safetensors"
) -> dict[int, list[int]]:
    """Blank the samples of a latents dataset whose images were taken down; returns rows by shard.

    root, images: the folders of the latents and of the image shards. each: called with 1 for each shard looked at.
    data: the suffix of the large files; `.tar` where it is images that were made of images. Under the stage's lease.
    """
    changed: dict[int, list[int]] = {}
    for index in listed(root, data).committed.tolist():
        name = shard_name(index) + ".parquet"
        gone = taken_down_rows(storage.join(images, name))
        if gone:
            table = storage.read_parquet(storage.join(root, name))
            stored_rows, status = column_rows(table), table["error"].to_pylist()
            rows = [i for i in gone if (stored_rows[i] >= 0 or status[i] == NOT_SELECTED) and status[i] != TAKEN_DOWN]
            if rows:
                blank(root, index, rows, _edit(rows))
                changed[index] = rows
        each(1)
    return changed


def taken_down_rows(url: str) -> list[int]:
    """The rows of an image shard's sidecar that were taken down; none where there is no such file."""
    try:
        errors = storage.read_parquet(url, ["error"])["error"].to_pylist()
    except FileNotFoundError:
        return []
    return [i for i, error in enumerate(errors) if error == TAKEN_DOWN]


def _edit(rows: Iterable[int]) -> Any:
    gone = set(rows)

    def edit(table: pa.Table, stats: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        fates = {"status": "opted_out", "error": TAKEN_DOWN, "error_message": "its removal was asked for"}
        for column, fate in fates.items():
            if column in table.column_names:
                values = [fate if i in gone else v for i, v in enumerate(table[column].to_pylist())]
                at = table.schema.get_field_index(column)
                table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
        status = Counter(table["status"].to_pylist())
        if "not_selected" in stats:
            stats = {**stats, "not_selected": table["error"].to_pylist().count(NOT_SELECTED)}
        return table, {**stats, "status": dict(sorted(status.items())), "count": status["success"]}

    return edit
