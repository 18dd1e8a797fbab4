"""The file of what strips need to go back (core.strip_undo): META/undo, written and synced before the journal is.

What a turn adds leaves in one write, at the latest when the journal writes its records of that turn: no strip is
changed before. So it is there after a kill -9 wherever the change is.
"""

from __future__ import annotations

import contextlib
import os
from struct import Struct
from typing import Final

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.directory import open_if_there, write_all
from sheepdog.cluster.host.disk import Disk

_HEAD = Struct("<8sI")  # magic, format
_MAGIC: Final = b"SHEEPUND"
_FORMAT: Final = (
    3  # in format 2 the records were sealed otherwise, which they tell; in format 1 nothing was before them
)
_READ: Final = (2, _FORMAT)
_NEW: Final = _HEAD.pack(_MAGIC, _FORMAT)


def read_undo(disk: Disk, path: str) -> bytes:
    """The records of undo or undo.old, as they are; UsageError for a newer format, OSError."""
    descriptor = open_if_there(disk, path)
    if descriptor is None:
        return b""
    try:
        data = bytearray(disk.info(descriptor).length)
        disk.preadv(descriptor, [data], 0)
    finally:
        disk.close(descriptor)
    if len(data) < _HEAD.size or data[:8] != _MAGIC:
        return bytes(data)
    form = _HEAD.unpack_from(data)[1]
    if form not in _READ:
        raise UsageError(f"{path}: format {form}, this version reads {_FORMAT}")
    return bytes(data[_HEAD.size :])


class UndoFile:
    """In a node's metadata directory. A disk that fails costs only the way back: it is logged."""

    def __init__(self, directory: str, disk: Disk, log: Log, nosync: bool) -> None:
        self._path = f"{directory}/undo"
        self._directory = directory
        self._disk = disk
        self._log = log
        self._nosync = nosync  # nothing waits for the disk
        self._fd = -1
        self._end = 0
        self._queue: list[bytes] = []
        self._dirty = False
        self._retired = -1  # descriptor of undo.old: it may be synced at this moment

    def append(self, record: bytes) -> None:
        """It is in the operating system's hands after the next `write_out`."""
        self._queue.append(record)

    def write_out(self) -> None:
        """One write for all that was added since the last."""
        if not self._queue:
            return
        records, self._queue = b"".join(self._queue), []
        try:
            if self._fd < 0:
                self._fd = self._disk.open(self._path, os.O_RDWR | os.O_CREAT)
                self._end = self._disk.info(self._fd).length
            if not self._end:
                records = _NEW + records
            write_all(self._disk, self._fd, records, self._end)
            self._end += len(records)
            self._dirty = True
        except OSError as error:
            self._failed(error)

    def take_to_sync(self) -> int:
        """The descriptor of what is not durable yet, -1 when all is; the caller syncs it. Valid until the next
        `replace` but one."""
        if not self._dirty:
            return -1
        self._dirty = False
        return self._fd

    def replace(self, records: bytes) -> None:
        """These are all that is needed, once what the store has now is durable."""
        self.write_out()
        descriptor = -1
        try:
            descriptor = self._disk.open(f"{self._path}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            write_all(self._disk, descriptor, _NEW + records, 0)
            if not self._nosync:
                self._disk.fdatasync(descriptor)
            # ext4 writes a file out at once that is renamed over another, so that makes way before.
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(f"{self._path}.old")
            with contextlib.suppress(FileNotFoundError):
                self._disk.rename(self._path, f"{self._path}.old")
            self._disk.rename(f"{self._path}.new", self._path)
            if not self._nosync:
                self._disk.sync_directory(self._directory)
            if self._retired >= 0:
                self._disk.close(self._retired)
            self._retired, self._fd, self._end = self._fd, descriptor, len(_NEW) + len(records)
        except OSError as error:
            if descriptor >= 0:
                self._disk.close(descriptor)
            self._failed(error)

    def load(self) -> list[bytes]:
        """What was added before the last `replace`, and since; UsageError for a newer format."""
        self.write_out()
        return [read_undo(self._disk, f"{self._path}.old"), read_undo(self._disk, self._path)]

    def _failed(self, error: OSError) -> None:
        self._log(3, f"{self._path}: {error.strerror}; a kill of all nodes may cost coded objects")
