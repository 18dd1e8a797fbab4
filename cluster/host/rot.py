"""What this node found rotten since its start: each block is counted once, and again when it is right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sheepdog.cluster.core.ids import ObjectId

WHOLE: Final = -1  # in place of a block: the file cannot be read as an object
MAX_BAD: Final = 1 << 20  # blocks remembered, 100 MB: of a disk with more, nobody wants to know how many


class Rot:
    """Of a store. `bad`: blocks that are still bad, by object; empty nearly always, which is all that hot paths ask."""

    def __init__(self) -> None:
        self.found = 0
        self.repaired = 0  # or overwritten, or removed
        self.bad: dict[ObjectId, dict[int, None]] = {}
        self._count = 0

    def note(self, oid: ObjectId, blocks: Iterable[int]) -> None:
        """These do not match their hashes."""
        known = self.bad.setdefault(oid, {})
        for block in blocks:
            if block not in known and self._count < MAX_BAD:
                known[block] = None
                self._count += 1
                self.found += 1

    def mended(self) -> None:
        """Something was bad and is right again: a trailer, which the memory has."""
        self.found += 1
        self.repaired += 1

    def written(self, oid: ObjectId, first: int, count: int) -> None:
        """These blocks have new bytes."""
        known = self.bad.get(oid)
        if known is None:
            return
        for block in [block for block in known if first <= block < first + count]:
            del known[block]
            self._count -= 1
            self.repaired += 1
        if not known:
            del self.bad[oid]

    def replaced(self, oid: ObjectId) -> None:
        """The object's file is gone."""
        known = self.bad.pop(oid, {})
        self._count -= len(known)
        self.repaired += len(known)

    def counts(self) -> dict[str, int]:
        """For `dog node stat` and `dog node scrub status`."""
        return {"found": self.found, "repaired": self.repaired, "bad": self._count}
