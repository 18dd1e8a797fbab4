"""Failures of a gateway's answers, as OSError for everything that ends in a system call's result."""

from __future__ import annotations

import errno
import os
from typing import Final

from sheepdog.cluster.core.errors import Result

_ERRNO: Final[dict[int, int]] = {
    Result.NO_OBJ: errno.EIO,  # an object that a map names: lost data, not a missing file
    Result.VDI_EXIST: errno.EEXIST,
    Result.INVALID_PARMS: errno.EINVAL,
    Result.VDI_LOCKED: errno.EBUSY,
    Result.NO_VDI: errno.ENOENT,
    Result.NO_BASE_VDI: errno.ENOENT,
    Result.NO_TAG: errno.ENOENT,
    Result.NO_MEM: errno.ENOMEM,
    Result.FULL_VDI: errno.ENOSPC,
    Result.NO_SPACE: errno.ENOSPC,
    Result.READONLY: errno.EROFS,
    Result.NO_SUPPORT: errno.EOPNOTSUPP,
}


class ShutOutError(OSError):
    """No gateway will do any more for this client: to try again is of no use."""


class SheepError(OSError):
    """An answer other than SUCCESS. `result` is its code, `errno` what a system call would say."""

    def __init__(self, result: int, text: str = "") -> None:
        number = _ERRNO.get(result, errno.EIO)
        super().__init__(number, text or f"{os.strerror(number)} (sheep answered {result:#04x})")
        self.result = result
