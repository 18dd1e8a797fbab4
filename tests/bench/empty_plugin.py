"""The least that a python plugin of nbdkit's can be: a disk of zeros that forgets what is written (`doors`).

What nbdkit and Python take for it is the bound for every plugin in Python, so it does all that ours does around a
request: threads keep their states of Python, and stay on one processor.
"""

from __future__ import annotations

from typing import Any

import nbdkit  # type: ignore[import-not-found]  # exists inside nbdkit only

from sheepdog.frontends.nbd.placement import Placement
from sheepdog.frontends.nbd.threads import ThreadStates

API_VERSION = 2
_CONNECTION = 1  # all there is
_threads = ThreadStates()
_ready = bytes(1 << 20)
_size = 0


def config(key: str, value: str) -> None:
    global _size
    assert key == "size"
    _size = int(value)


def after_fork() -> None:
    Placement().start()


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> int:
    return _CONNECTION


def get_size(h: int) -> int:
    return _size


def can_multi_conn(h: int) -> bool:
    return True


def can_fua(h: int) -> int:
    return int(nbdkit.FUA_NATIVE)


def pread(h: int, buf: Any, offset: int, flags: int) -> None:
    _threads.keep(_CONNECTION)
    buf[:] = _ready[: len(buf)]


def pwrite(h: int, buf: Any, offset: int, flags: int) -> None:
    _threads.keep(_CONNECTION)


def flush(h: int, flags: int) -> None:
    pass
