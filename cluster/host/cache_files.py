"""The object cache on its disk: a store of its own that syncs nothing, and what its contents are called.

What was written survives the death of the process, as the page cache does, and an orderly end. A power failure may take
any of it back to an older state, so the contents then count as lost: they get another identity and begin empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.node import CacheDisk
from sheepdog.cluster.core.ports import Clock, Log
from sheepdog.cluster.host.cache_store import CacheObjects
from sheepdog.cluster.host.disk import Disk
from sheepdog.cluster.host.node_state import DirectoryLock
from sheepdog.cluster.host.pipeline import AtEnd
from sheepdog.cluster.host.store_options import StoreOptions
from sheepdog.cluster.host.workers import Workers

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MIN_JOURNAL_BYTES, _MAX_JOURNAL_BYTES = 8 << 20, 128 << 20  # two segments; they come on top of the cache's size
_JOURNAL_PART = 8
_BEFORE_IDENTITY = {"identity.new", "lock", "lost+found"}  # what may be there when nothing has been cached yet


class CacheFiles:
    """Opened with the daemon, closed with it. UsageError if the directory cannot be used."""

    def __init__(
        self,
        directory: str,
        size_bytes: int,
        disk: Disk,
        workers: Workers,
        clock: Clock,
        at_end: AtEnd,
        log: Log,
        direct_io: bool = False,
    ) -> None:
        """With `direct_io` its files leave the page cache at once."""
        self._log = log
        self._path = Path(directory)
        journal = max(_MIN_JOURNAL_BYTES, min(_MAX_JOURNAL_BYTES, size_bytes // _JOURNAL_PART))
        try:
            self._check_own()
            self._lock = DirectoryLock(directory)
            self._identity = self._identify()
            self._store = CacheObjects(
                directory,
                (f"{directory}/obj",),
                disk,
                workers,
                clock,
                at_end,
                log,
                self._failed,
                StoreOptions(nosync=True, journal_bytes=journal, direct_io=direct_io),
            )
            self._store.open()
        except OSError as error:
            raise UsageError(f"the object cache in {directory} cannot be used ({error.strerror or error})") from None
        self.disk = CacheDisk(self._store, self._identity, size_bytes, direct_io)

    def _check_own(self) -> None:
        """Makes the directory. UsageError if it is one of something else, which would be taken for contents that cannot
        be trusted: the store of a sheep, say."""
        self._path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in self._path.iterdir()}
        if "identity" not in names and not names <= _BEFORE_IDENTITY:
            raise UsageError(f"{self._path} holds something else than an object cache: it is left alone")

    def _identify(self) -> str:
        """What the contents are called; they are removed if they cannot be trusted."""
        identity, before = self._noted()
        boot = _boot_id()
        if before not in (boot, "closed"):
            if identity:
                self._log(4, f"object cache in {self._path}: the host has failed since; it begins empty")
            if (self._path / "obj").exists():  # the identity is replaced, and stays until everything else has gone
                shutil.rmtree(self._path / "obj")
            for path in self._path.glob("journal*"):
                path.unlink()
            identity = uuid.uuid4().hex
        self._note(identity, boot)
        return identity

    def _noted(self) -> tuple[str, str]:
        """The identity, and the boot in which the contents are good; empty when nothing says so."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads((self._path / "identity").read_text())
            return str(known["id"]), str(known["boot"])
        return "", ""

    def _note(self, identity: str, boot: str) -> None:
        """Durable before it counts: an older file would say that contents are good which are not."""
        path = self._path / "identity.new"
        with path.open("w") as file:
            file.write(json.dumps({"id": identity, "boot": boot}))
            file.flush()
            os.fsync(file.fileno())
        path.rename(self._path / "identity")
        directory = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _failed(self, directory: str, reason: str, last: bool) -> None:
        self._log(2, f"object cache in {directory}: {reason}; volumes with unpushed data in it answer errors")

    def close(self, done: Callable[[], None]) -> None:
        """An orderly end: brings everything into the files. Call `closed` after it."""
        self._store.close(done)

    def closed(self) -> None:
        """Puts it on the disk; the contents may be trusted even after a reboot. Blocks."""
        os.sync()
        try:
            self._note(self._identity, "closed")
        except OSError as error:
            self._log(4, f"object cache in {self._path}: {error}")

    def release(self) -> None:
        """Another sheep may use the directory; so it may when this process has ended."""
        self._lock.release()


def _boot_id() -> str:
    """Differs after every boot; each start counts as one where the kernel does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return uuid.uuid4().hex
