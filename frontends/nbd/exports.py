"""Volumes as NBD exports: what may be asked for by which name, and who has it open.

An export is `NAME` (the volume) or `NAME@TAG` (a snapshot: its id if TAG is a number, else its tag; read-only).
All connections to one export share one open volume, because an open volume's map in memory is the authority.

Knows nothing of nbdkit. Any number of threads may call in.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import NamedTuple

from sheepdog.cluster.client import inodes
from sheepdog.cluster.client.address import describe as describe_address
from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.connection import STALL_LIMIT_S, Connection, connect_near
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.exclusive import VolumeLock
from sheepdog.cluster.client.hyper import HyperVolume, open_volume
from sheepdog.cluster.client.operations import ZERO_CHUNK_BYTES
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.strings import NAME_SIZE
from sheepdog.frontends.nbd.parameters import Parameters

_NOBODY_THERE = (ConnectionError, TimeoutError, FileNotFoundError)  # the last one: no such socket


class Export(NamedTuple):
    """What an export name stands for; `tag` and `snap_id` empty for the volume itself."""

    name: bytes
    tag: bytes = b""
    snap_id: int = 0

    @property
    def is_snapshot(self) -> bool:
        return bool(self.tag or self.snap_id)

    def __str__(self) -> str:
        suffix = self.tag or (str(self.snap_id).encode() if self.snap_id else b"")
        return os.fsdecode(self.name + b"@" + suffix if suffix else self.name)


def readings(text: str) -> list[Export]:
    """What an export name may mean, to be tried in turn: volumes' names may contain an @ too."""
    whole = os.fsencode(text)
    found = [Export(whole)] if 0 < len(whole) < NAME_SIZE else []
    name, at, tag = whole.rpartition(b"@")
    if at and 0 < len(name) < NAME_SIZE and 0 < len(tag) < NAME_SIZE:
        snap_id = int(tag) if tag.isdigit() else 0
        found.append(Export(name, b"" if snap_id else tag, snap_id))
    return found


class Refused(OSError):
    """An export that cannot be had; the text is for the server's log."""


class _Shared:
    """An export that somebody has open, or opens or closes right now."""

    __slots__ = ("alone", "lock", "users", "volume")

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while the volume is opened, closed or looked at anew
        self.volume: BlockingVolume | HyperVolume | None = None
        self.alone: VolumeLock | None = None  # the cluster's lock, while the volume is open for writing
        self.users = 0


class Handle(NamedTuple):
    """One client connection's hold on an export."""

    export: Export
    volume: BlockingVolume | HyperVolume
    writable: bool

    def fill(self, offset: int, length: int, durable: bool) -> None:
        """Writes zeros as data: the range keeps, or gets, its space."""
        zeros = bytes(min(length, ZERO_CHUNK_BYTES))
        end = offset + length
        while offset < end:
            part = min(end - offset, len(zeros))
            self.volume.write(offset, memoryview(zeros)[:part], durable)
            offset += part


class Exports:
    """The door's volumes, as far as `parameters` let them be opened."""

    def __init__(self, parameters: Parameters) -> None:
        self._address = parameters.address
        self._names = tuple(parameters.volumes)
        self._default = parameters.default
        self.exclusive = parameters.exclusive
        self._patience_s = parameters.patience_s
        self._table = threading.Lock()
        self._shared: dict[Export, _Shared] = {}

    # -- looking

    def listing(self) -> list[tuple[str, str]]:
        """(export name, description) of everything that may be opened."""
        with_snapshots = [(_name_of(inode), describe(inode)) for inode in self._inodes()]
        if self._names:
            known = dict(with_snapshots)
            return [(name, known.get(name, "")) for name in self._names]
        return sorted(with_snapshots)

    def _inodes(self) -> list[InodeHeader]:
        """Of all volumes and snapshots that can be read."""
        try:
            connection = Connection(self._address, 0, answer_limit_s=STALL_LIMIT_S)
        except OSError as error:
            raise self._nobody(error) from error
        try:
            found = list(inodes.headers(connection, inodes.volume_ids(connection)))
        finally:
            connection.close()
        return [inode for inode in found if isinstance(inode, InodeHeader)]

    def default(self) -> str:
        """The export that a client gets which names none; empty if there is none."""
        if self._default or self._names:
            return self._default or (self._names[0] if len(self._names) == 1 else "")
        volumes = [_name_of(inode) for inode in self._inodes() if not inode.is_snapshot]
        return volumes[0] if len(volumes) == 1 else ""

    # -- opening

    def open(self, name: str, read_only: bool) -> Handle:
        """Opens an export, or joins those who have it open. Refused, or OSError when the cluster cannot be reached."""
        name = name or self.default()
        if not name:
            raise Refused(errno.ENOENT, "no export name was given, and there is no default export")
        if self._names and name not in self._names:
            raise Refused(errno.ENOENT, f"{name} is not served here")
        for export in readings(name):
            try:
                return self._join(export, read_only)
            except SheepError as error:
                if error.result not in (Result.NO_VDI, Result.NO_TAG):
                    raise _refusal(export, error) from error
            except _NOBODY_THERE as error:
                raise self._nobody(error) from error
        raise Refused(errno.ENOENT, f"there is no volume or snapshot {name}")

    def close(self, handle: Handle) -> None:
        """Ends a hold; with the last one the volume is flushed, closed and unlocked."""
        with self._table:
            shared = self._shared[handle.export]
        with shared.lock:
            try:
                with self._table:
                    last = shared.users == 1
                if last:
                    self._leave(shared)
            finally:
                self._drop(handle.export, shared)

    def close_all(self, limit_s: float) -> list[str]:
        """Flushes, closes and unlocks every volume, whoever uses it, all at once: the server ends.

        A line for each of which that did not succeed within `limit_s`.
        """
        with self._table:
            everything = list(self._shared.items())
        complaints = {export: complaint(export, f"no answer within {limit_s:g} s") for export, _ in everything}

        def leave(export: Export, shared: _Shared) -> None:
            try:
                with shared.lock:
                    self._leave(shared)
            except (OSError, PeerError) as error:
                complaints[export] = complaint(export, error)
            else:
                del complaints[export]

        threads = [threading.Thread(target=leave, args=item, daemon=True) for item in everything]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + limit_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return list(complaints.values())

    def _nobody(self, error: OSError) -> OSError:
        """The system does not say whom it could not connect to."""
        return Refused(error.errno, f"no sheep at {describe_address(self._address)}: {error.strerror}")

    def _join(self, export: Export, read_only: bool) -> Handle:
        with self._table:
            shared = self._shared.setdefault(export, _Shared())
            shared.users += 1
        with shared.lock:
            try:
                if shared.volume is None:
                    self._enter(export, shared, read_only)
                elif self.exclusive and not shared.volume.read_only and shared.users > 1:
                    raise Refused(errno.EBUSY, f"{export} is in use by another connection")
                else:
                    shared.volume.refresh()
                assert shared.volume is not None
                return Handle(export, shared.volume, not shared.volume.read_only)
            except BaseException:
                self._drop(export, shared)
                raise

    def _drop(self, export: Export, shared: _Shared) -> None:
        """Counts one user less. The caller holds `shared.lock`, so a new user waits until the old one has left."""
        with self._table:
            shared.users -= 1
            if not shared.users:
                del self._shared[export]

    def _enter(self, export: Export, shared: _Shared, read_only: bool) -> None:
        read_only = read_only or export.is_snapshot
        address, patience_s = self._address, self._patience_s
        if read_only:
            shared.volume = open_volume(
                address, export.name, export.tag, export.snap_id, read_only, patience_s, dial=connect_near
            )
            return
        lock = VolumeLock(address, export.name, patience_s)
        lock.take()
        try:
            shared.volume = open_volume(address, export.name, patience_s=patience_s, dial=lock.dial)
        except BaseException:
            lock.release()
            raise
        shared.alone = lock

    def _leave(self, shared: _Shared) -> None:
        volume, shared.volume = shared.volume, None
        if volume is None:
            return
        try:
            volume.close()
        finally:
            lock, shared.alone = shared.alone, None
            if lock is not None:
                lock.release()


def describe(inode: InodeHeader) -> str:
    """One line on a volume for `nbdinfo --list`."""
    size = inode.vdi_size
    unit = 0
    while size >= 1024 and size % 1024 == 0 and unit < 5:
        size //= 1024
        unit += 1
    redundancy = f"{inode.nr_copies} copies"
    if inode.copy_policy:
        redundancy = f"{(inode.copy_policy >> 4) * 2}:{inode.copy_policy & 15} strips"
    kind = "snapshot" if inode.is_snapshot else "volume"
    return f"Sheepdog {kind}, {size}{'BKMGTP'[unit]}, {redundancy}, vid {inode.vdi_id:x}"


def _name_of(inode: InodeHeader) -> str:
    if not inode.is_snapshot:
        return str(Export(inode.name))
    # A tag of digits would be read as an id.
    by_tag = inode.tag and not inode.tag.isdigit()
    return str(Export(inode.name, inode.tag if by_tag else b"", 0 if by_tag else inode.snap_id))


def complaint(export: Export, why: OSError | PeerError | str) -> str:
    """What is told to a log of an end that was not clean."""
    reason = getattr(why, "strerror", None) or str(why)
    return f"{export}: could not be flushed and closed: {reason}"


def _refusal(export: Export, error: SheepError) -> OSError:
    if error.result == Result.VDI_LOCKED:
        text = f"{export} is locked by another client (dog vdi lock list; dog vdi lock unlock frees it)"
        return Refused(errno.EBUSY, text)
    return error
