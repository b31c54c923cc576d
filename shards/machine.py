"""Whether an error says that something is wrong with this machine: then the shard in hand is not to blame."""

from __future__ import annotations

import errno
import socket

import psutil

SHORT_OF_MEMORY = 0.03  # of the machine's that is still to be had

_OWN = {
    errno.EMFILE: "this process is out of file descriptors (raise the limit: ulimit -n)",
    errno.ENFILE: "this machine is out of file descriptors",
    errno.ENOBUFS: "this machine is out of network buffers",
    errno.ENOMEM: "this machine is out of memory",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk cannot be written to",
}


def own_fault(error: BaseException | None) -> str:
    """What is wrong with this machine by an error or one of those behind it; empty where that is not said."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        e = todo.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, OSError) and e.errno in _OWN and not isinstance(e, socket.gaierror):
            return _OWN[e.errno]
        if isinstance(e, RuntimeError) and "start new thread" in str(e):
            return "no further thread can be started here"
        if isinstance(e, MemoryError) and short_of_memory():
            return _OWN[errno.ENOMEM]
        todo += [getattr(e, "os_error", None), e.__cause__, e.__context__, *getattr(e, "exceptions", ())]
    return ""


def short_of_memory() -> bool:
    """Whether the machine has next to none left."""
    memory = psutil.virtual_memory()
    return memory.available < SHORT_OF_MEMORY * memory.total
