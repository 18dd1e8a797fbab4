"""The small durable state of a node in its metadata directory (cli.md 1.2; docs/format.md): lock, config, epoch log.

    lock      held exclusively while a daemon uses the directory
    config    the cluster's configuration as core encoded it
    epoch/    one file per epoch, named by its number in 8 decimal digits
    settled   the newest epoch in which every copy here was proven current
    stale     strips that are to be made anew
    undo      what strips need to go back, appended (undo_file.py)
    undo.old  the same, of some time before: what led from it to here may be durable only now
    reserve   room for all these, given up when the disk is full (reserve.py)

Every file but lock, undo and reserve is replaced atomically and sealed with a checksum. Changes become durable in call
order, also with `-n`: they are rare, and a cold start depends on them. With `-n` undo is not synced.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from sheepdog.cluster.core.errors import Corrupt, DiskError, UsageError
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId
from sheepdog.cluster.core.ports import Done, Log, Proven
from sheepdog.cluster.host.directory import make_directory, read_file, write_file
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.reserve import Reserve
from sheepdog.cluster.host.undo_file import UndoFile
from sheepdog.cluster.host.workers import Workers

_CONFIG = struct.Struct("<8sIQ")  # magic, format, bytes that follow
_CONFIG_MAGIC: Final = b"SHEEPCFG"
_SETTLED = struct.Struct("<8sIQQqQ")  # magic, format, epochs: settled, broken, forgotten; dropped
_SETTLED_2 = struct.Struct("<8sIQQ")  # of format 2, which did not know what was forgotten
_SETTLED_FORMAT: Final = 3
_SETTLED_MAGIC: Final = b"SHEEPSET"
_STALE = struct.Struct("<8sI")  # magic, format; the entries follow
_STALE_MAGIC: Final = b"SHEEPSTL"
_STALE_FORMAT: Final = 2  # in format 1 the entries had nothing before them
_EPOCH = struct.Struct("<8sIQQI")  # magic, format, epoch, began (Unix seconds), members that follow
_EPOCH_MAGIC: Final = b"SHEEPEPO"
_MEMBER = struct.Struct("<16sHIIQQ")  # address, port, zone, vnodes, space, incarnation
_FORMAT: Final = 1


class DirectoryLock:
    """Exclusive use of a metadata directory; it survives fork, and goes with the last process that holds it."""

    def __init__(self, directory: str) -> None:
        """Creates the directory when it is missing (not its parents) and locks it; UsageError."""
        try:
            os.mkdir(directory, 0o750)
        except FileExistsError:
            pass
        except OSError as error:
            raise UsageError(f"cannot create the directory {directory} ({error.strerror})") from error
        try:
            self._fd = os.open(f"{directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise UsageError(f"locking directory: {directory} failed ({error.strerror})") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise UsageError(
                f"another sheep daemon is using {directory}\nlocking directory: {directory} failed"
            ) from error

    def release(self) -> None:
        os.close(self._fd)


class NodeStateFiles:
    """`ports.NodeState` in a metadata directory."""

    def __init__(self, directory: str, disk: Disk, workers: Workers, log: Log, nosync: bool = False) -> None:
        self._directory = directory
        self._epochs = f"{directory}/epoch"
        self._disk = disk
        self._workers = workers
        self._log = log
        self._queue: deque[tuple[Callable[[], None], Done]] = deque()
        self._running = False
        self._reserve = Reserve(disk, directory)
        self.undo = UndoFile(directory, disk, log, nosync)

    def open(self) -> None:
        """Makes the directories; UsageError."""
        make_directory(self._disk, self._directory)
        make_directory(self._disk, self._epochs)

    def append_undo(self, record: bytes) -> None:
        self.undo.append(record)

    def replace_undo(self, records: bytes) -> None:
        self.undo.replace(records)

    def load_undo(self) -> list[bytes]:
        return self.undo.load()

    def save_scrub(self, data: bytes, done: Done) -> None:
        self._change(lambda: write_file(self._disk, self._directory, "scrub", data), done)

    def load_scrub(self) -> bytes | None:
        try:
            return self._read(f"{self._directory}/scrub")
        except UsageError as error:
            self._log(4, str(error))
            return None

    def save_stale(self, data: bytes, done: Done) -> None:
        head = _STALE.pack(_STALE_MAGIC, _STALE_FORMAT)
        self._change(lambda: write_file(self._disk, self._directory, "stale", head + data), done)

    def load_stale(self) -> bytes:
        """UsageError for a newer format; nothing when the file is damaged."""
        path = f"{self._directory}/stale"
        try:
            data = self._read(path) or b""
        except UsageError as error:
            self._log(4, str(error))
            return b""
        if data[:8] != _STALE_MAGIC:
            return data
        _parse_head(_STALE, _STALE_MAGIC, data, path, _STALE_FORMAT)
        return data[_STALE.size :]

    def save_config(self, config: bytes, done: Done) -> None:
        data = _CONFIG.pack(_CONFIG_MAGIC, _FORMAT, len(config)) + config
        self._change(lambda: write_file(self._disk, self._directory, "config", data), done)

    def load_config(self) -> bytes | None:
        """None when the node has never been part of a formatted cluster; UsageError when the file is damaged."""
        data = self._read(f"{self._directory}/config")
        if data is None:
            return None
        _, length = _parse_head(_CONFIG, _CONFIG_MAGIC, data, f"{self._directory}/config")
        return data[_CONFIG.size : _CONFIG.size + length]

    def append_epoch(self, record: EpochRecord, done: Done) -> None:
        data = encode_epoch(record)
        self._change(lambda: write_file(self._disk, self._epochs, f"{record.epoch:08d}", data), done)

    def drop_epochs(self, last: int, done: Done) -> None:
        def drop() -> None:
            # Newest first: what a crash leaves is a shorter history, never one with a gap.
            for number in sorted((number for number in map(int, self._epoch_names()) if number > last), reverse=True):
                self._disk.unlink(f"{self._epochs}/{number:08d}")
            self._disk.sync_directory(self._epochs)

        self._change(drop, done)

    def clear_epochs(self, done: Done) -> None:
        self.drop_epochs(0, done)

    def load_epochs(self) -> list[EpochRecord]:
        records = []
        for name in sorted(self._epoch_names()):
            path = f"{self._epochs}/{name}"
            data = self._read(path)
            if data is not None:
                records.append(decode_epoch(data, path))
        return records

    def save_proven(self, proven: Proven, done: Done) -> None:
        data = _SETTLED.pack(_SETTLED_MAGIC, _SETTLED_FORMAT, *proven)
        self._change(lambda: write_file(self._disk, self._directory, "settled", data), done)

    def forget_settled(self) -> None:
        """A disk is not here any more: nothing is proven, not all is remembered. Before the node starts; OSError."""
        data = _SETTLED.pack(_SETTLED_MAGIC, _SETTLED_FORMAT, *Proven())
        self._reserve.with_room(lambda: write_file(self._disk, self._directory, "settled", data))

    def load_proven(self) -> Proven:
        """Nothing when nothing was ever proven, or when the file is damaged: then everything is compared again."""
        path = f"{self._directory}/settled"
        try:
            data = self._read(path)
            if data is None:
                return Proven()
            if len(data) == _SETTLED_2.size:
                _, settled, broken = _parse_head(_SETTLED_2, _SETTLED_MAGIC, data, path, 2)
                return Proven(settled, broken, 0)
            return Proven(*_parse_head(_SETTLED, _SETTLED_MAGIC, data, path, _SETTLED_FORMAT)[1:])
        except UsageError as error:
            self._log(4, f"{error}; comparing all copies")
            return Proven(forgotten=0)

    def _epoch_names(self) -> list[str]:
        return [name for name in self._disk.listdir(self._epochs) if len(name) >= 8 and name.isdecimal()]

    def _read(self, path: str) -> bytes | None:
        try:
            return read_file(self._disk, path)
        except Corrupt as error:
            raise UsageError(f"{path}: {error}") from error

    def _change(self, change: Callable[[], None], done: Done) -> None:
        self._queue.append((change, done))
        if not self._running:
            self._next()

    def _next(self) -> None:
        if not self._queue:
            self._running = False
            return
        self._running = True
        change, done = self._queue.popleft()

        def finished(result: OSError | None) -> None:
            if isinstance(result, OSError):
                text = f"{self._directory}: {result.strerror or result}"
                self._log(2, f"{text}: the state of this node cannot be saved")
                done(DiskError(text))
            else:
                done(None)
            self._next()

        self._workers.run(lambda: self._reserve.with_room(change), finished)


def encode_epoch(record: EpochRecord) -> bytes:
    head = _EPOCH.pack(_EPOCH_MAGIC, _FORMAT, record.epoch, record.began_s, len(record.members))
    return head + b"".join(
        _MEMBER.pack(m.id.address, m.id.port, m.zone, m.vnodes, m.space, m.incarnation) for m in record.members
    )


def decode_epoch(data: bytes, path: str) -> EpochRecord:
    """UsageError when these are not the bytes of an epoch record."""
    _, epoch, began_s, count = _parse_head(_EPOCH, _EPOCH_MAGIC, data, path)
    if len(data) != _EPOCH.size + count * _MEMBER.size:
        raise UsageError(f"{path}: an epoch record of the wrong length")
    members = tuple(
        Member(NodeId(address, port), zone, vnodes, space, incarnation)
        for address, port, zone, vnodes, space, incarnation in _MEMBER.iter_unpack(data[_EPOCH.size :])
    )
    return EpochRecord(Epoch(epoch), began_s, members)


def _parse_head(layout: struct.Struct, magic: bytes, data: bytes, path: str, version: int = _FORMAT) -> tuple[int, ...]:
    """The fields behind the magic; the first is the format."""
    if len(data) < layout.size or data[:8] != magic:
        raise UsageError(f"{path}: not a file of this system")
    fields: tuple[int, ...] = layout.unpack_from(data)[1:]
    if fields[0] != version:
        raise UsageError(f"{path}: format {fields[0]}, this version reads {version}")
    return fields
