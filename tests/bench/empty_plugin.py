"""The least that a python plugin of nbdkit's can be: a disk of zeros that forgets what is written (`doors`).

What nbdkit and Python take for it is the bound for every plugin in Python.
"""

from __future__ import annotations

from typing import Any

import nbdkit  # type: ignore[import-not-found]  # exists inside nbdkit only

API_VERSION = 2
_ready = bytes(1 << 20)
_size = 0


def config(key: str, value: str) -> None:
    global _size
    assert key == "size"
    _size = int(value)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> int:
    return 1


def get_size(h: int) -> int:
    return _size


def can_multi_conn(h: int) -> bool:
    return True


def can_fua(h: int) -> int:
    return int(nbdkit.FUA_NATIVE)


def pread(h: int, buf: Any, offset: int, flags: int) -> None:
    buf[:] = _ready[: len(buf)]


def pwrite(h: int, buf: Any, offset: int, flags: int) -> None:
    pass


def flush(h: int, flags: int) -> None:
    pass
