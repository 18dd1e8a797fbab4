"""Room set aside in a metadata directory: a full disk must not keep a node from noting what it has to."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from sheepdog.cluster.host.directory import is_no_room
from sheepdog.cluster.host.disk import Disk

RESERVE_BYTES: Final = 128 << 10  # epochs of 200 nodes for a dozen changes: then somebody has made room, or noticed
_NAME: Final = "reserve"


class Reserve:
    """META/reserve: given up by a change that finds no other room, set aside again by the next that does."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self._disk = disk
        self._path = f"{directory}/{_NAME}"

    def with_room(self, change: Callable[[], None]) -> None:
        """Makes a change of small files, twice if need be; blocks. OSError."""
        try:
            change()
        except OSError as error:
            if not is_no_room(error):
                raise
            try:
                self._disk.unlink(self._path)
            except FileNotFoundError:
                raise error from None
            change()
        else:
            self._set_aside()

    def _set_aside(self) -> None:
        """If there is any."""
        try:
            fd = self._disk.open(self._path, os.O_RDWR | os.O_CREAT)
        except OSError:
            return
        try:
            if self._disk.info(fd).length < RESERVE_BYTES:
                self._disk.allocate(fd, RESERVE_BYTES)
        except OSError:
            pass
        finally:
            self._disk.close(fd)
