"""What the nodes that are here can know of earlier epochs."""

from __future__ import annotations

from sheepdog.cluster.core.ids import Epoch, Member, NodeId, ObjectId, Vid, data_oid
from sheepdog.cluster.core.past import Past
from sheepdog.cluster.core.placement import Placement


def member(number: int, vnodes: int = 64) -> Member:
    return Member(NodeId(bytes(15) + bytes([number]), 7000), number, vnodes, 1 << 40)


STORE, OTHER, GATEWAY, THIRD = member(1), member(2), member(3, vnodes=0), member(4)


def past(*epochs: tuple[Member, ...]) -> Past:
    """Members of epochs 1, 2, ...; the last is the present one."""
    placement = Placement(Epoch(len(epochs)), epochs[-1], STORE.id, lambda oid: 1)
    return Past(placement, lambda epoch: None, lambda epoch: epochs[epoch - 1], lambda: 1)


def test_epochs_of_gateways_alone_hide_nothing() -> None:
    """In an epoch without storing nodes nothing can have been made."""
    assert past((STORE, GATEWAY), (GATEWAY,), (STORE, GATEWAY)).knows_all([1, 1])


def test_epochs_of_gateways_alone_witness_nothing() -> None:
    """That a gateway holds all that it should hold says nothing about a node that is away."""
    assert not past((STORE, OTHER, GATEWAY), (GATEWAY,), (STORE, GATEWAY)).knows_all([0, 2])


def known(*epochs: tuple[Member, ...]) -> tuple[Past, ObjectId]:
    """As `past`, with two copies of every object and the placements of all epochs; and an object."""

    def at(epoch: int) -> Placement:
        return Placement(Epoch(epoch), epochs[epoch - 1], STORE.id, lambda oid: 2)

    return Past(at(len(epochs)), at, lambda epoch: epochs[epoch - 1], lambda: 2), data_oid(Vid(1), 0)


def test_one_replica_tells_what_happened_in_an_epoch() -> None:
    """`THIRD` has the copy of epoch 1. In epoch 2 the others had it, of whom one is here."""
    before, oid = known((STORE, OTHER, THIRD), (STORE, OTHER), (STORE, THIRD))
    assert not before.superseded(oid, 1)
    assert not before.superseded(oid, 1, blind={1: 2}), "it was no replica"


def test_a_replica_whose_copy_went_bad_tells_nothing_of_the_epochs_before() -> None:
    before, oid = known((STORE, OTHER, THIRD), (STORE, OTHER), (STORE, THIRD))
    assert before.superseded(oid, 1, blind={0: 2})
    assert not before.superseded(oid, 2, blind={0: 2}), "a copy as of that epoch is new enough"
    assert not before.superseded(oid, 1, blind={0: 1}), "it was current again afterwards"


def test_what_the_cluster_can_do_without() -> None:
    """Two copies of everything: any one member that all epochs since have another replica for."""
    lost = [OTHER.id]
    assert past((STORE, OTHER, THIRD), (STORE, OTHER, THIRD)).knows_all([1, 1, 1], 2, lost)
    assert not past((STORE, OTHER, THIRD), (STORE, OTHER, THIRD)).knows_all([1, 1, 1], 1, lost), "a single copy"
    assert not past((STORE, OTHER, THIRD), (STORE, OTHER)).knows_all([1, 1], 2, lost), "THIRD has just gone, too"
    assert past((STORE, OTHER, THIRD), (STORE, OTHER)).knows_all([1, 1], 3, lost)
    assert past((STORE, OTHER), (STORE, OTHER, THIRD)).knows_all([1, 1, 0], 2, lost), "THIRD has just joined"
    assert not past((STORE, OTHER, THIRD), (STORE, OTHER, THIRD)).knows_all([0, 1, 0], 2, [OTHER.id, THIRD.id])
    assert not past((STORE, OTHER), (STORE, OTHER)).knows_all([2, 2], 1, lost), "what the present epoch has made"
    assert past((STORE, OTHER, GATEWAY), (STORE, OTHER, GATEWAY)).knows_all([1, 1, 1], 1, [GATEWAY.id])


def test_who_did_not_restore_a_copy_in_time_does_not_tell_that_there_was_none() -> None:
    """OTHER alone was there in epoch 2. In epoch 3 THIRD was to get copies from it, and died before it had any."""
    before, _ = known((STORE, OTHER, THIRD), (OTHER,), (STORE, OTHER, THIRD), (STORE, THIRD))
    third = Placement(Epoch(3), (STORE, OTHER, THIRD), STORE.id, lambda oid: 2)

    def kept_by(*members: Member) -> ObjectId:
        names = (data_oid(Vid(1), index) for index in range(64))
        return next(oid for oid in names if {third.members[index] for index in third.replicas(oid)} == set(members))

    assert before.may_exist(kept_by(THIRD, OTHER), [3, 0])
    assert not before.may_exist(kept_by(THIRD, OTHER), [3, 3]), "it knows what it lacked"
    assert not before.may_exist(kept_by(STORE, OTHER), [3, 0])
    before.forgot(STORE.id, 3)
    assert before.may_exist(kept_by(STORE, OTHER), [3, 0]), "not with the disks that it has now"
