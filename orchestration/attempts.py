"""What went wrong on the way, in one place: `<run>/status/<stage>-attempts/<shard>.json`, and `ranks.json` of a fit.

The failures of one shard stand in one file, also once a later attempt has made it; a shard that nothing happened to has
none. Likewise where the ranks of a fit ran, and what they died of. `carrara why` reads it. No run hangs on it.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

from shards import storage

log = logging.getLogger("carrara.engine")

KEPT = 20  # of one shard, the newest
LONGEST = 8000  # characters of a traceback, its end
RANKS = "ranks"


def note(status: str, stage: str, name: str, what: str, error: str, traceback: str = "", **facts: Any) -> None:
    """Add an event to what is known of a shard, or of a fit's ranks. what: in a word or two what happened."""
    record = {"at": time.time(), "what": what, "error": error, "traceback": traceback[-LONGEST:], **facts}
    try:
        url = _url(status, stage, name)
        storage.write_json(url, [*read(status, stage, name), {**record, "driver": socket.gethostname()}][-KEPT:])
    except Exception as e:
        log.warning("%s: what happened to %s cannot be noted: %s: %s", stage, name, type(e).__name__, e)


def read(status: str, stage: str, name: str) -> list[dict[str, Any]]:
    """The events, oldest first; none where there are none, or where the file is torn."""
    try:
        found = storage.read_json(_url(status, stage, name))
    except ValueError:
        return []
    return [e for e in found if isinstance(e, dict) and "what" in e] if isinstance(found, list) else []


def _url(status: str, stage: str, name: str) -> str:
    return storage.join(status, f"{stage}-attempts", f"{name}.json")
