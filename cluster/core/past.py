"""What the nodes that are here can know of earlier epochs.

An object is served in an epoch only when every copy on its replicas of that epoch is current (or none at all), and a
change is answered only when all of them have it. So one replica of an epoch that is here is witness enough: what
happened to the object in that epoch is in its copy, unless that copy went bad since. Where no replica of some epoch can
tell, anything may have happened: the object may have been written, or made, without anybody here knowing.

A node that came back without all its disks is no witness of the epochs before; but what it still holds of an object
tells of that object what it always told.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from types import MappingProxyType

from sheepdog.cluster.core.ids import Member, NodeId, ObjectId
from sheepdog.cluster.core.placement import Placement

Former = Callable[[int], Placement | None]
Members = Callable[[int], Sequence[Member] | None]


class Past:
    """As seen in the epoch of `placement`.

    `former(epoch)` and `members(epoch)` give placement and members of an earlier epoch; None if it is not known or
    an administrator said that nobody waits for it any more (`cluster recover force`). `copies()`: fewest of any VDI.
    """

    def __init__(self, placement: Placement, former: Former, members: Members, copies: Callable[[], int]) -> None:
        self._placement = placement
        self._former = former
        self._members = members
        self._copies = copies
        self._forgotten: dict[NodeId, int] = {}

    def forgot(self, node: NodeId, epoch: int) -> None:
        """Of what happened up to this epoch the node has lost something with its disks; 0: it never lost any."""
        if epoch:
            self._forgotten[node] = epoch

    def remembers(self, node: NodeId, epoch: int) -> bool:
        """What happened in the epoch to objects that the node held is in its copies, all of which are still there."""
        return self._forgotten.get(node, 0) < epoch

    def superseded(
        self,
        oid: ObjectId,
        as_of: int,
        least: int = 1,
        blind: Mapping[int, int] = MappingProxyType({}),
        copies: int = 0,
        holders: Collection[int] = (),
    ) -> bool:
        """The object may have been written after `as_of` by nodes of which fewer than `least` can tell here.

        Of a coded object D nodes are needed to be sure: a write touches P + 1 of its strips. `blind`: members whose
        copy went bad, with the epoch up to which they cannot tell. `copies`: of the object; 0: as the VDI table says.
        `holders`: members that hold it, whatever else they have lost.
        """
        return any(
            self._unseen(oid, epoch, least, blind, copies, holders) for epoch in range(as_of + 1, self._placement.epoch)
        )

    def may_exist(self, oid: ObjectId, complete: Sequence[int]) -> bool:
        """Nobody here has heard of the object, but it may exist on nodes that are away.

        It does not if one of its replicas of some epoch, which by its own inventory knows all that it should have had
        then, is here, and one of its replicas of each epoch since. `complete` as in `knows_all`.
        """
        told = list(zip(self._placement.nodes, complete, strict=True))
        for base in sorted(dict.fromkeys([*complete, 0]), reverse=True):
            witnesses = [node for node, epoch in told if epoch >= base]
            if any(self._unseen(oid, epoch) for epoch in range(base + 1, self._placement.epoch)):
                return True  # also from any earlier one on
            if not base or self._would_know(oid, base, witnesses):
                return False
        return True

    def is_deleted(self, oid: ObjectId, known: int, complete: Sequence[int]) -> bool:
        """The object existed in the epoch `known`, and nobody has it: a replica that is here, and knows all that it
        should have had in a later epoch, would."""
        told = zip(self._placement.nodes, complete, strict=True)
        return any(epoch > known and self._would_know(oid, epoch, [node]) for node, epoch in told)

    def _would_know(self, oid: ObjectId, epoch: int, witnesses: Container[NodeId]) -> bool:
        then = self._former(epoch)
        if then is None:
            return True
        nodes = [then.nodes[index] for index in then.replicas(oid)]
        return any(node in witnesses and self.remembers(node, epoch) for node in nodes)

    def _unseen(
        self,
        oid: ObjectId,
        epoch: int,
        least: int = 1,
        blind: Mapping[int, int] = MappingProxyType({}),
        copies: int = 0,
        holders: Collection[int] = (),
    ) -> bool:
        then = self._former(epoch)
        if then is None:
            return False
        replicas = then.ring.replicas(oid, copies) if copies else then.replicas(oid)
        nodes = [then.nodes[index] for index in replicas]
        here = [(node, self._placement.index_of.get(node)) for node in nodes]
        witnesses = sum(
            member is not None and blind.get(member, 0) < epoch and (self.remembers(node, epoch) or member in holders)
            for node, member in here
        )
        return len(replicas) >= least > witnesses

    def knows_all(self, complete: Sequence[int], copies: int = 0, lost: Collection[NodeId] = ()) -> bool:
        """The inventories of the members name every object that exists: what they do not name was deleted.

        `complete`: for each member the epoch up to which its own inventory names all that it should have. That holds
        from some such epoch on if in no epoch since so many zones are away that they can hold all copies of anything.
        `lost`: would it still hold in the next epoch, without these members? Then the rest has all in its last state.
        """
        told = [one for one in zip(self._placement.nodes, complete, strict=True) if one[0] not in lost]
        nodes, copies = [node for node, _ in told], copies or self._copies()
        for base in sorted(dict.fromkeys([*(epoch for _, epoch in told), 0]), reverse=True):
            witnesses = [node for node, epoch in told if epoch >= base]
            if (not base or self._covered(base, witnesses, copies)) and all(
                self._stored_nothing(epoch) or self._covered(epoch, nodes, copies)
                for epoch in range(base + 1, self._placement.epoch + bool(lost))
            ):
                return True
        return False

    def _stored_nothing(self, epoch: int) -> bool:
        """All members were gateways: no object was made or written. (Nor does such an epoch witness what there is.)"""
        members = self._members(epoch)
        return members is not None and not any(member.vnodes for member in members)

    def _covered(self, epoch: int, witnesses: Container[NodeId], copies: int) -> bool:
        """Of whatever was stored in the epoch, one of the witnesses was a replica."""
        members = self._members(epoch)
        if members is None:
            return True
        storing = [member for member in members if member.vnodes]
        away = {one.zone for one in storing if one.id not in witnesses or not self.remembers(one.id, epoch)}
        return len(away) < min(copies, len({member.zone for member in storing}))
