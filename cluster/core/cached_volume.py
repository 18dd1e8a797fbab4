"""A volume in the cache: whether it is served from here, what waits for it, how much of it is dirty."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.extents import CachedObject, Held
from sheepdog.cluster.core.ids import ObjectId, Vid


class CachedVolume:
    """States: claiming (requests go past the cache), serving, barred (requests are held), frozen (a snapshot: it is
    read only, and needs no claim), over (whatever is still under way counts for nothing)."""

    def __init__(self, vid: Vid) -> None:
        self.vid = vid
        self.objects: dict[ObjectId, CachedObject] = {}
        self.serving = False
        self.frozen = False
        self.over = False
        self.dirty_claim = False  # every node knows that writes may be here and nowhere else
        self.asking = False  # ... or is about to be told
        self.barred = False
        self.freezing: tuple[str, int] | None = None  # ... by this operation
        self.held: list[Held] = []
        self.users = 0  # requests of clients under way
        self.when_idle: list[Callable[[], None]] = []
        self.dirty_blocks = 0
        self.dirty_since_ns = 0
        self.clean_since_ns = 0
        self.changes = 1  # not durable and past the cache: a flush of this volume has to go to all nodes ...
        self.flushed_changes = 0  # ... unless it has been there since

    def enter(self) -> None:
        self.users += 1

    def leave(self) -> None:
        self.users -= 1
        if not self.users and self.when_idle:
            calls, self.when_idle = self.when_idle, []
            for call in calls:
                call()

    def bar(self, idle: Callable[[], None]) -> None:
        """Holds new requests; `idle` when none is under way."""
        self.barred = True
        if self.users:
            self.when_idle.append(idle)
        else:
            idle()

    def unbar(self) -> None:
        """Those that were held begin anew."""
        self.barred = False
        held, self.held = self.held, []
        for again, _ in held:
            again()

    def end(self, result: int) -> None:
        """The node serves no more: whoever waits is told."""
        self.over, self.serving = True, False
        waiting, self.held = self.held, []
        for entry in self.objects.values():
            waiting += entry.blocked
            entry.blocked = []
        for _, done in waiting:
            done(result, b"")
