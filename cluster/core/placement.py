"""Where objects live in one epoch: ring, copies of each object, and the nodes by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sheepdog.cluster.core.ids import STRIP_SHIFT, Epoch, Member, NodeId, ObjectId, plain_oid
from sheepdog.cluster.core.limits import PLACEMENT_CACHE_ENTRIES
from sheepdog.cluster.core.ring import Ring


class Placement:
    """Placement of one epoch. `copies_of` gives the redundancy of an object from the VDI table.

    Nodes are named by their index in `members` (ascending by id); the *home* of an object is its first replica:
    it numbers the object's writes and drives its recovery. The home does not depend on the number of copies.
    """

    def __init__(
        self, epoch: Epoch, members: Sequence[Member], me: NodeId, copies_of: Callable[[ObjectId], int]
    ) -> None:
        self.epoch = epoch
        self.members = tuple(members)
        self.nodes = tuple(member.id for member in members)
        self.index_of = {member.id: index for index, member in enumerate(members)}
        self.me = self.index_of.get(me, -1)
        self.ring = Ring(members)
        self._copies_of = copies_of
        self._cache: dict[ObjectId, tuple[int, ...]] = {}

    def replicas(self, oid: ObjectId) -> tuple[int, ...]:
        """Indexes of the nodes that hold the object (or strips of it), home first; empty without storing nodes."""
        if oid >> STRIP_SHIFT:
            oid = plain_oid(oid)
        found = self._cache.get(oid)
        if found is None:
            found = self.ring.replicas(oid, self._copies_of(oid))
            if len(self._cache) >= PLACEMENT_CACHE_ENTRIES:
                self._cache.clear()
            self._cache[oid] = found
        return found

    def home(self, oid: ObjectId) -> int | None:
        if oid >> STRIP_SHIFT:
            oid = plain_oid(oid)
        replicas = self._cache.get(oid)
        if replicas:
            return replicas[0]
        return self.ring.home(oid)

    def forget(self) -> None:
        """The number of copies of some VDI changed."""
        self._cache.clear()
