"""Which strips may hold writes that no sync has reached, so that a durable write does not rest on them.

If power fails everywhere and an earlier write is then on some strips only, all later ones of the object may be taken
back with it (core.strip_peering). So a durable write takes the strips with it that earlier ones touched: they get its
version, durably. Answers come in order, so it need not look after earlier durable writes that are still on their way.
"""

from __future__ import annotations

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import LOOSE_OBJECTS
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.strip_undo import ALL_STRIPS


class LooseStrips:
    """Of one home, in one epoch. Nothing is known of an object before its first durable write."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._loose: dict[ObjectId, int] = {}  # strips, a bit each; of an object that is not named all

    def takes_along(self, oid: ObjectId, flags: int, touched: int) -> bool:
        """A change of the strips `touched` must go to others, too."""
        return bool(flags & Flag.DURABLE and self._loose.get(oid, ALL_STRIPS) & ~touched)

    def changed(self, oid: ObjectId, flags: int, touched: int) -> int:
        """A change of the strips `touched` is sent now: the strips it must go to, a bit each."""
        if flags & Flag.REMOVE:
            self._loose.pop(oid, None)
            return touched
        if not flags & Flag.DURABLE:
            if oid in self._loose:
                self._loose[oid] |= touched
            return touched
        loose = self._loose.get(oid, ALL_STRIPS)
        if len(self._loose) >= LOOSE_OBJECTS:
            self._loose.clear()
        self._loose[oid] = 0
        if loose & ~touched:
            self._context.probe("loose_strips.taken_along")
        return touched | loose
