"""How the strips of this node can go back to where they were before writes that may not be everywhere.

A write of an erasure-coded object changes several strips. If nodes die while it is on its way, some strips have it and
others have not, and nothing can be decoded from strips of different versions. So each strip keeps the bytes that a
write replaced until the home says that all strips have it (the watermark); until then it can be taken back.
"""

from __future__ import annotations

from typing import NamedTuple

from sheepdog.cluster.core.ids import ObjectId, Version
from sheepdog.cluster.core.messages import Buffer


class Undo(NamedTuple):
    """One write of a strip: the strip was at `before`, is at `after`, and had the bytes `old` at `offset`."""

    before: Version
    after: Version
    offset: int
    old: Buffer  # empty: the write changed only the version


class UndoLog:
    """Of all strips of one node, in memory (an end of all processes at once: core.strip_peering)."""

    def __init__(self) -> None:
        self._entries: dict[ObjectId, list[Undo]] = {}

    def keep(self, strip: ObjectId, undo: Undo) -> None:
        self._entries.setdefault(strip, []).append(undo)

    def earlier(self, strip: ObjectId, version: Version | None) -> list[Version]:
        """The versions that the strip, now at `version`, can go back to, newest first."""
        found = []
        for undo in reversed(self._entries.get(strip, ())):
            if undo.after != version:
                break
            version = undo.before
            found.append(version)
        return found

    def back_to(self, strip: ObjectId, target: Version, version: Version | None) -> list[Undo] | None:
        """What is to be undone, newest first; None when the strip cannot go there."""
        steps = []
        for undo in reversed(self._entries.get(strip, ())):
            if version == target or undo.after != version:
                break
            steps.append(undo)
            version = undo.before
        return steps if version == target else None

    def forget(self, strip: ObjectId, version: Version) -> None:
        """All strips have the writes up to `version`."""
        entries = self._entries.get(strip)
        if entries is None:
            return
        while entries and entries[0].after <= version:
            del entries[0]
        if not entries:
            del self._entries[strip]

    def drop(self, strip: ObjectId) -> None:
        """The strip is new, gone, or agreed upon as it is."""
        self._entries.pop(strip, None)

    def strips(self) -> list[ObjectId]:
        return list(self._entries)

    def clear(self) -> None:
        self._entries.clear()
