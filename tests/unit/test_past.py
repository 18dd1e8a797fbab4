"""What the nodes that are here can know of earlier epochs."""

from __future__ import annotations

from sheepdog.cluster.core.ids import Epoch, Member, NodeId
from sheepdog.cluster.core.past import Past
from sheepdog.cluster.core.placement import Placement


def member(number: int, vnodes: int = 64) -> Member:
    return Member(NodeId(bytes(15) + bytes([number]), 7000), number, vnodes, 1 << 40)


STORE, OTHER, GATEWAY = member(1), member(2), member(3, vnodes=0)


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
