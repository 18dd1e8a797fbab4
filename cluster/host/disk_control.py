"""What `dog node md` asks of a daemon: its disks, plug and unplug (cli.md 2.7). Failures are in the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.object_store import ObjectStore
from sheepdog.cluster.host.workers import Workers

Changed = Callable[[bool], None]
"""True if at least one of the directories could be changed."""


class DiskControl:
    """`is_only_here(object)`: without the copy on this node the object would be lost."""

    def __init__(
        self, store: ObjectStore, workers: Workers, log: Log, is_only_here: Callable[[ObjectId], bool]
    ) -> None:
        self._store = store
        self._workers = workers
        self._log = log
        self._is_only_here = is_only_here

    def listed(self) -> list[tuple[str, int, int]]:
        """(path, bytes used, bytes free) by path."""
        return self._store.disks.listed()

    def rot(self) -> dict[str, int]:
        """Blocks found bad since the start, right again, still bad (host.rot)."""
        return self._store.copies.rot.counts()

    def plug(self, paths: Sequence[str], done: Changed) -> None:
        """One directory after another: emptied, then in service; objects move there in the background."""
        left = list(paths)
        changed = False

        def next_path() -> None:
            if not left:
                if changed:
                    self._store.rebalance.begin()
                done(changed)
                return
            path = left.pop(0)
            try:
                self._store.disks.check_pluggable(path)
            except UsageError as error:
                self._log(4, str(error))
                next_path()
                return
            self._workers.run(partial(self._purge, path), partial(purged, path))

        def purged(path: str, result: UsageError | OSError | None) -> None:
            nonlocal changed
            if result is None:
                try:
                    self._store.disks.attach(path)
                    changed = True
                except (UsageError, OSError) as error:
                    result = error
            if result is not None:
                self._log(3, f"cannot plug {path}: {result}")
            next_path()

        next_path()

    def _purge(self, path: str) -> UsageError | None:
        try:
            self._store.disks.purge(path)
        except UsageError as error:
            return error
        return None

    def unplug(self, paths: Sequence[str], done: Changed) -> None:
        """Takes directories out of service; their objects are restored from other nodes to the disks that stay."""
        changed = False
        for path in paths:
            alone = next((oid for oid in self._store.disks.held(path) if self._is_only_here(oid)), None)
            if alone is not None:
                self._log(3, f"cannot unplug {path}: no other node has the object {alone:016x}")
                continue
            try:
                self._store.disks.unplug(path)
                changed = True
            except (UsageError, OSError) as error:
                self._log(3, f"cannot unplug {path}: {error}")
        done(changed)
