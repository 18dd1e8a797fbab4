"""What the machines of one node share: the ports, and where the cluster stands now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from sheepdog.cluster.core.erasure import Coder, PlainCoder, Policy, policy_of
from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import Epoch, NodeId, ObjectId, is_attribute, vid_of
from sheepdog.cluster.core.inode import nominal_size
from sheepdog.cluster.core.limits import DEFAULT_SHIFT
from sheepdog.cluster.core.membership import ClusterMachine
from sheepdog.cluster.core.messages import Buffer, Message
from sheepdog.cluster.core.origins import Origins
from sheepdog.cluster.core.peers import Peers
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.ports import Clock, Log, Network, Store
from sheepdog.cluster.core.state import ClusterState

_KIND_SHIFT: Final = 59
_PLAIN_KINDS: Final = 0b10111  # of the bits from there on: inodes, attributes, B-tree nodes, ledgers


class Counters:
    """Requests and bytes since the start, as `dog node stat` shows them."""

    __slots__ = (
        "flushes",
        "peer_reads",
        "peer_removes",
        "peer_requests",
        "peer_rx",
        "peer_tx",
        "peer_writes",
        "reads",
        "removes",
        "rx",
        "tx",
        "writes",
    )

    def __init__(self) -> None:
        self.reads = self.writes = self.removes = self.flushes = self.rx = self.tx = 0  # of clients
        self.peer_reads = self.peer_writes = self.peer_removes = self.peer_rx = self.peer_tx = (
            0  # of this node's copies
        )
        self.peer_requests = 0  # of other gateways' clients, to this node as home

    def work(self) -> int:
        """Grows with whatever is done here for clients, not with recovery."""
        own = self.reads + self.writes + self.removes + self.flushes
        return own + self.peer_writes + self.peer_removes + self.peer_requests


class Context:
    """Shared by the machines of a node; `placement` and `epoch` change together, in `Node` only."""

    def __init__(
        self, me: NodeId, clock: Clock, network: Network, store: Store, log: Log, renew: Callable[[], None]
    ) -> None:
        self.me = me
        self.clock = clock
        self.network = network
        self.store = store
        self.log = log
        self.renew = renew  # asks the membership engine for a lease (core.gate)
        self.peers = Peers(network)
        self.placement = Placement(Epoch(0), (), me, self.copies_of)
        self.epoch = 0  # 0: not in a running cluster
        self.fence = 0  # era << 32 | epoch: what messages are checked by
        self.origins = Origins()
        self.counters = Counters()
        self.throttle = (0, 0)  # restores at most so many objects in so many ns; (0, 0): as fast as it goes
        self.active_requests: Callable[[], int] = lambda: 0  # of clients, under way; set by the gateway
        self.submitted: Callable[[int], Buffer] = lambda number: b""  # bytes of a change under way; set by the gateway
        self.applied: Callable[[int, int, int], None] = lambda number, sequence, replicas: None
        """Of a write that was submitted here: the copy here has it; that many have to. Set by the gateway."""
        self.spoilt: dict[ObjectId, StoreError] = {}
        """Strips here that could not take a write, and why: they take no more until they are restored."""
        self.doubts: dict[ObjectId, int] = {}
        """How often in this epoch a copy here turned out bad: what was being read of it then is not to be trusted."""
        self.probes: dict[str, int] = {}
        self.coder: Coder = PlainCoder()
        self._machine: ClusterMachine | None = None

    def bind(self, machine: ClusterMachine) -> None:
        self._machine = machine

    def retire(self) -> None:
        """This incarnation of the node is over: what its machines still do reaches nobody, no late answer counts."""
        self.fence = -1
        self.network = self.peers.network = _Nowhere()

    @property
    def state(self) -> ClusterState:
        assert self._machine is not None
        return self._machine.state

    def current_state(self) -> ClusterState:
        """As `state`, to be handed on."""
        return self.state

    def current_epoch(self) -> int:
        """The latest epoch of the cluster, also while it waits for members; what answers to clients carry."""
        return self.state.epoch

    @property
    def machine(self) -> ClusterMachine:
        assert self._machine is not None
        return self._machine

    def copies_of(self, oid: ObjectId) -> int:
        """Copies that an object shall have: its VDI's, or the cluster's default."""
        if not is_attribute(oid):
            record = self.state.vdis.get(vid_of(oid))
            if record is not None and record.copies:
                return record.copies
        return self.state.copies

    def copies_at(self, oid: ObjectId, epoch: int) -> int:
        """Copies that an object had in an earlier epoch."""
        record = None if is_attribute(oid) else self.state.vdis.get(vid_of(oid))
        return record.copies_at(epoch) or self.state.copies if record is not None else self.state.copies

    def knows(self, oid: ObjectId) -> bool:
        """The VDI table here says how the object is kept."""
        return bool(oid >> _KIND_SHIFT & _PLAIN_KINDS) or self.state.vdis.get(vid_of(oid)) is not None

    def copies_told(self, oid: ObjectId) -> int:
        """Copies of an inode or the like, for a home whose VDI table may not have it yet; 0: the table says it."""
        told = oid >> _KIND_SHIFT & _PLAIN_KINDS and not is_attribute(oid)
        record = self.state.vdis.get(vid_of(oid)) if told else None
        return 0 if record is None else record.copies

    def policy_of(self, oid: ObjectId) -> Policy | None:
        """How an object is coded: data and vmstate of a coded VDI; None for what is kept as whole copies."""
        if oid >> _KIND_SHIFT & _PLAIN_KINDS:
            return None
        record = self.state.vdis.get(vid_of(oid))
        return policy_of(record.policy) if record is not None and record.policy else None

    def size_of(self, oid: ObjectId) -> int:
        """Nominal size of an object in bytes (protocol.md 6.2)."""
        record = self.state.vdis.get(vid_of(oid))
        return nominal_size(oid, record.shift if record is not None and record.shift else DEFAULT_SHIFT)

    def probe(self, name: str) -> None:
        """Counts that a rare path was taken; the simulator reports paths never reached."""
        self.probes[name] = self.probes.get(name, 0) + 1


class _Nowhere(Network):
    """The network of a node whose incarnation is over."""

    def send(self, node: NodeId, message: Message) -> None:
        pass

    def confirm(self, node: NodeId, fence: int, rid: int) -> None:
        pass

    def confirm_later(self, node: NodeId, fence: int, rid: int) -> None:
        pass

    def send_late(self, node: NodeId, message: Message) -> None:
        pass

    def applied(self, node: NodeId, fence: int, number: int, sequence: int) -> None:
        pass

    def connect(self, nodes: Iterable[NodeId]) -> None:
        pass
