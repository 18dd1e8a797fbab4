"""The cluster's replicated state: equal on all joined nodes, changed only by ordered events.

This module holds the values and what can be said of them; `membership` decides when they change.
"""

from __future__ import annotations

import enum
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId
from sheepdog.cluster.core.limits import DEFAULT_COPIES, DEFAULT_SHIFT
from sheepdog.cluster.core.ring import auto_vnodes
from sheepdog.cluster.core.vdi import VdiTable

PROTOCOL_VERSION = 0x0A  # as clients are told (protocol.md 14.3)
STORE_NAMES = ("plain", "tree", "farm", "simple")  # names that format accepts; all mean our one store


class Status(enum.IntEnum):
    """protocol.md 12.2."""

    RUNNING = 1
    WAITING = 2
    SHUTDOWN = 3
    KILLED = 4


# Every request asks for these: to look up a member of an enum takes five times as long as to compare it.
_RUNNING: Final = Status.RUNNING
_SUCCESS: Final = Result.SUCCESS


class ClusterFlag:
    """protocol.md 12.1. Plain integers, since every write looks at them: an IntFlag costs as much as half a message."""

    STRICT: Final = 0x01
    DISK_MODE: Final = 0x02
    AUTO_VNODES: Final = 0x04
    LOCKS: Final = 0x08
    RECYCLE: Final = 0x10
    AVOID_DISKFULL: Final = 0x20


@dataclass
class ClusterState:
    """See the module. `members` are the nodes of the current epoch, or the present ones while waiting."""

    status: Status = Status.WAITING
    ctime: int = 0  # 0: never formatted
    copies: int = DEFAULT_COPIES
    policy: int = 0
    shift: int = DEFAULT_SHIFT
    flags: int = ClusterFlag.AUTO_VNODES
    store_name: str = ""
    disable_recovery: bool = False
    recovery_delay_s: int = 0  # so long a node that left may come back before others take over what it held
    era: int = 0  # counts formats: epochs begin again at 1 with each
    forced: int = 0  # epochs before this one are not waited for any more (cluster recover force)
    term: int = 0  # raised at every start of the cluster
    members: tuple[Member, ...] = ()
    epochs: list[EpochRecord] = field(default_factory=list)
    vdis: VdiTable = field(default_factory=VdiTable)
    loaded: bool = False  # the VDI table has been collected since the start
    partial: int = 0  # in this epoch it was, but nodes that are away may have inodes that nobody else has
    fewest: int = 0  # copies that any VDI has or had lately; 0: the default
    expelled: list[list[Any]] = field(default_factory=list)  # [node, incarnation] of those that must not be heard
    queue: list[dict[str, Any]] = field(default_factory=list)  # ordered operations; the first one runs
    sweeps: int = 0  # wishes for one: something may have been left behind (core.sweep)
    swept: int = 0  # ... that have been fulfilled
    doubtful: list[list[int]] = field(default_factory=list)  # snapshots to be undone: [frozen vid, new vid]
    away: list[list[Any]] = field(default_factory=list)  # [node, Unix time of its leave] of those that may come back
    logs: dict[str, list[Any]] = field(default_factory=dict)  # by member that told its epoch log when it came:
    # [the epoch from which on that has all it recorded, the newest record's epoch, its digest] (core.void_epochs)

    @property
    def epoch(self) -> Epoch:
        return self.epochs[-1].epoch if self.epochs else Epoch(0)

    def result(self) -> Result:
        """What an operation is told that needs a running cluster (protocol.md 12.2)."""
        if self.status == _RUNNING:
            return _SUCCESS
        if self.status == Status.SHUTDOWN:
            return Result.SHUTDOWN
        if self.status == Status.KILLED:
            return Result.KILLED
        return Result.WAIT_FOR_JOIN if self.ctime else Result.WAIT_FOR_FORMAT

    def fewest_copies(self) -> int:
        """All copies of some object may be gone once so many zones are."""
        return min(self.copies, self.fewest or self.copies)

    def note_copies(self, copies: int) -> None:
        """Some VDI has so many; 0: the default."""
        if copies:
            self.fewest = min(copies, self.fewest or copies)

    def count_copies(self) -> None:
        """The table is whole: what no VDI has any more, nor had in an epoch that may matter, does not count."""
        self.fewest = 0
        for record in self.vdis.records():
            for copies in (record.copies, *(former for _, former in record.former_copies)):
                self.note_copies(copies)

    def unknown(self, result: Result) -> Result:
        """What is told of something that the table does not have: it may be there (`result` if it cannot)."""
        return Result.WAIT_FOR_JOIN if self.partial and result in (Result.NO_VDI, Result.NO_TAG) else result

    def record(self, epoch: int) -> EpochRecord | None:
        """The membership of an epoch, if its record is known."""
        for record in reversed(self.epochs):
            if record.epoch == epoch:
                return record
        return None

    def missing_members(self) -> list[NodeId]:
        """Members of the latest epoch that are not present."""
        present = {member.id for member in self.members}
        return [member.id for member in self.epochs[-1].members if member.id not in present] if self.epochs else []

    def note_leave(self, members: Sequence[Member], time_s: int) -> None:
        """Storing members left; recovery waits for them as long as it was told to when the cluster was formatted."""
        left = [[node_key(member.id), time_s] for member in members if member.vnodes]
        names = [key for key, _ in left]
        known = [one for one in self.away if one[0] not in names and one[1] + self.recovery_delay_s > time_s]
        self.away = [*known, *left] if self.recovery_delay_s else []

    def note_return(self, node: NodeId) -> None:
        self.away = [one for one in self.away if one[0] != node_key(node)]

    def recovery_wait_ns(self, wall_ns: int) -> int:
        """So long recovery still waits for nodes that are away; `wall_ns` is Unix time."""
        ends_s = max((time_s + self.recovery_delay_s for _, time_s in self.away), default=0)
        return min(max(0, ends_s * 1_000_000_000 - wall_ns), self.recovery_delay_s * 1_000_000_000)

    def away_nodes(self) -> list[NodeId]:
        return [node_from_key(key) for key, _ in self.away]

    def weighted(self, members: Sequence[Member]) -> tuple[Member, ...]:
        """The members with the vnodes that the strategy gives them, ascending by id (protocol.md 10.2)."""
        ordered = sorted(members, key=lambda member: member.id)
        if not self.ctime or not self.flags & ClusterFlag.AUTO_VNODES:
            return tuple(ordered)  # as they were started
        storing = [member for member in ordered if member.vnodes]
        vnodes = dict(zip([m.id for m in storing], auto_vnodes([member.space for member in storing]), strict=True))
        return tuple(replace(member, vnodes=vnodes.get(member.id, 0)) for member in ordered)

    def config(self) -> bytes:
        """The durable configuration of a node (ports.NodeState.save_config)."""
        return json.dumps(
            {
                "ctime": self.ctime,
                "copies": self.copies,
                "policy": self.policy,
                "shift": self.shift,
                "flags": int(self.flags),
                "store_name": self.store_name,
                "disable_recovery": self.disable_recovery,
                "recovery_delay_s": self.recovery_delay_s,
                "era": self.era,
                "term": self.term,
                "forced": self.forced,
                "fewest": self.fewest,
            }
        ).encode()

    @classmethod
    def from_disk(cls, config: bytes | None, epochs: list[EpochRecord]) -> ClusterState:
        """What a node knows when it starts."""
        return cls(epochs=list(epochs), **json.loads(config)) if config else cls()

    def encode(self) -> str:
        """The whole state as text for a joining node."""
        values = {
            **json.loads(self.config()),
            "status": int(self.status),
            "members": [member_to_json(member) for member in self.members],
            "epochs": [record_to_json(record) for record in self.epochs],
            "vdis": self.vdis.to_json(),
            "loaded": self.loaded,
            "partial": self.partial,
            "expelled": self.expelled,
            "queue": self.queue,
            "away": self.away,
            "logs": self.logs,
            "sweeps": self.sweeps,
            "swept": self.swept,
            "doubtful": self.doubtful,
        }
        return zlib.compress(json.dumps(values).encode()).decode("latin-1")

    @classmethod
    def decode(cls, text: str) -> ClusterState:
        values = json.loads(zlib.decompress(text.encode("latin-1")))
        values["status"] = Status(values["status"])
        values["members"] = tuple(member_from_json(value) for value in values["members"])
        values["epochs"] = [record_from_json(value) for value in values["epochs"]]
        values["vdis"] = VdiTable.from_json(values["vdis"])
        return cls(**values)


def node_key(node: NodeId) -> str:
    """A node in ordered messages: hex of address and port."""
    return node.address.hex() + f"{node.port:04x}"


def node_from_key(key: str) -> NodeId:
    return NodeId(bytes.fromhex(key[:32]), int(key[32:], 16))


def member_to_json(member: Member) -> list[Any]:
    return [node_key(member.id), member.zone, member.vnodes, member.space, member.incarnation]


def member_from_json(values: list[Any]) -> Member:
    key, zone, vnodes, space, incarnation = values
    return Member(node_from_key(key), zone, vnodes, space, incarnation)


def record_to_json(record: EpochRecord) -> list[Any]:
    return [record.epoch, record.began_s, [member_to_json(member) for member in record.members]]


def record_from_json(values: list[Any]) -> EpochRecord:
    epoch, began_s, members = values
    return EpochRecord(Epoch(epoch), began_s, tuple(member_from_json(value) for value in members))
