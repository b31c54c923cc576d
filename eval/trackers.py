"""An evaluation's numbers and its contact sheet, for the trackers of the run (train/trackers.py).

Each protocol has curves of its own, named by its folder, since numbers of two protocols do not compare; the steps are
images seen. Checkpoints may come in any order and several times: each number is sent once. A tracker has a run of its
own for the evaluation, since it may be at work while training is.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.report import gather
from shards import storage
from shards.layout import RunPaths
from train.trackers import STATE, Name, Trackers, check

log = logging.getLogger("carrara.eval")

COLUMNS, ROWS, SIDE = 6, 4, 128  # of the contact sheet; pixels of an image at the most


def tell(names: Sequence[Name], run: RunPaths, result: dict[str, Any]) -> None:
    """Tell the trackers of one result (the content of metrics.json with its `folder`); raises nothing."""
    if not names:
        return
    try:
        if storage.is_local(run.reports):
            _tell(names, run, result, storage.local_path(run.reports))
            return
        with tempfile.TemporaryDirectory() as folder:
            _tell(names, run, result, Path(folder))
            for file in (f for f in Path(folder).rglob("*") if f.is_file() and not f.is_symlink()):
                name = file.relative_to(folder).as_posix()
                storage.write_atomic(storage.join(run.reports, name), file.read_bytes())
    except Exception as e:  # they are copies
        log.warning("the trackers did not get %s: %s: %s", result["checkpoint"], type(e).__name__, e)


def _tell(names: Sequence[Name], run: RunPaths, result: dict[str, Any], folder: Path) -> None:
    check(names, "train.trackers")  # a tool without its key would ask for it on this command's terminal
    folder.mkdir(parents=True, exist_ok=True)
    about = {result["folder"]: result["label"]}
    trackers = Trackers(names, folder, storage.join(run.reports, STATE), None, run.run, "eval", about)
    images = int(result["images_seen"] or 0)
    try:
        for name, metric in sorted(result["metrics"].items()):
            point = f"{result['folder']}/{name}"
            trackers.scalars(f"{result['checkpoint']}/{point}", images, {point: metric["value"]})
        sheet = contact_sheet(run, result)
        if sheet is not None:
            name = f"{result['folder']}/images"
            trackers.image(name, images, sheet, series=f"{result['checkpoint']}/{name}")
    finally:
        trackers.close()


def contact_sheet(run: RunPaths, result: dict[str, Any]) -> np.ndarray | None:
    """The first 24 prompts' images as one, uint8 [H,W,3], in the order of the report; None where they are not kept."""
    images = [image for _, image in gather.first_images(run, result, COLUMNS * ROWS)]
    if not images:
        return None
    side = min(SIDE, max(image.height for image in images))
    sheet = Image.new("RGB", (COLUMNS * side, -(-len(images) // COLUMNS) * side))
    for i, image in enumerate(images):
        small = image.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, ((i % COLUMNS) * side, i // COLUMNS * side))
    return np.asarray(sheet)
