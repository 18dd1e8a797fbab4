"""What the machines of one node share: the ports, and where the cluster stands now."""

from __future__ import annotations

from sheepdog.cluster.core.ids import Epoch, NodeId, ObjectId, is_attribute, vid_of
from sheepdog.cluster.core.inode import nominal_size
from sheepdog.cluster.core.limits import DEFAULT_SHIFT
from sheepdog.cluster.core.membership import ClusterMachine
from sheepdog.cluster.core.peers import Peers
from sheepdog.cluster.core.placement import Placement
from sheepdog.cluster.core.ports import Clock, Log, Network, Store
from sheepdog.cluster.core.state import ClusterState


class Context:
    """Shared by the machines of a node; `placement` and `epoch` change together, in `Node` only."""

    def __init__(self, me: NodeId, clock: Clock, network: Network, store: Store, log: Log) -> None:
        self.me = me
        self.clock = clock
        self.network = network
        self.store = store
        self.log = log
        self.peers = Peers(network)
        self.placement = Placement(Epoch(0), (), me, self.copies_of)
        self.epoch = 0  # 0: not in a running cluster
        self.probes: dict[str, int] = {}
        self._machine: ClusterMachine | None = None

    def bind(self, machine: ClusterMachine) -> None:
        self._machine = machine

    @property
    def state(self) -> ClusterState:
        assert self._machine is not None
        return self._machine.state

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

    def size_of(self, oid: ObjectId) -> int:
        """Nominal size of an object in bytes (protocol.md 6.2)."""
        record = self.state.vdis.get(vid_of(oid))
        return nominal_size(oid, record.shift if record is not None and record.shift else DEFAULT_SHIFT)

    def probe(self, name: str) -> None:
        """Counts that a rare path was taken; the simulator reports paths never reached."""
        self.probes[name] = self.probes.get(name, 0) + 1
