"""Room set aside in a metadata directory: a full disk must not keep a node from noting what it has to.

Others want that room too, restores for one, which are tried again and again. So a change is given block after block, no
more than it needs, and what it has left over (the file that it replaced) is taken back at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.host.directory import is_no_room, open_if_there
from sheepdog.cluster.host.disk import Disk

RESERVE_BYTES: Final = 128 << 10  # epochs of 200 nodes for a dozen changes: then somebody has made room, or noticed
_NAME: Final = "reserve"


class Reserve:
    """META/reserve: what a change takes that finds no other room is set aside again as soon as there is any."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self._disk = disk
        self._path = f"{directory}/{_NAME}"

    def with_room(self, change: Callable[[], None]) -> None:
        """Makes a change of small files, more than once if need be; blocks. OSError."""
        try:
            while True:
                try:
                    change()
                    return
                except OSError as error:
                    if not is_no_room(error) or not self._give_up_block():
                        raise
        finally:
            self._set_aside()

    def _give_up_block(self) -> bool:
        """If there is one."""
        fd = open_if_there(self._disk, self._path, os.O_RDWR)
        if fd is None:
            return False
        try:
            length = self._disk.info(fd).length
            if length:
                self._disk.truncate(fd, max(0, length - BLOCK_SIZE))
        finally:
            self._disk.close(fd)
        return length > 0

    def _set_aside(self) -> None:
        """As much as there is room for."""
        try:
            fd = self._disk.open(self._path, os.O_RDWR | os.O_CREAT)
        except OSError:
            return
        try:
            length = self._disk.info(fd).length
            if length < RESERVE_BYTES:
                self._allocate(fd, length)
        except OSError:
            pass
        finally:
            self._disk.close(fd)

    def _allocate(self, fd: int, length: int) -> None:
        try:
            self._disk.allocate(fd, RESERVE_BYTES)
        except OSError:
            while length < RESERVE_BYTES:
                length += BLOCK_SIZE
                self._disk.allocate(fd, length)
