"""What core asks of the world.

Each port has a real body (cluster.host, cluster.drivers) and a simulated one (cluster.sim).

Rules for every body:
* Calls come from one thread (the loop's) and return at once; what takes time ends in a callback on the same thread.
  A callback may come before the call returns.
* Failures arrive as values (`StoreError`), never as exceptions out of a callback.
* Buffers handed over stay unchanged until the callback has come.

Clock, Network and Store are base classes of their bodies: a write passes them a dozen times, and compiled code finds a
method of a base class at once, one of a Protocol by its name (some 350 instructions more).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from mypy_extensions import mypyc_attr

from sheepdog.cluster.core.errors import StoreError
from sheepdog.cluster.core.ids import EpochRecord, NodeId, ObjectId, Version, Vid
from sheepdog.cluster.core.messages import Message

Buffer: TypeAlias = bytes | bytearray | memoryview
Done: TypeAlias = Callable[[StoreError | None], None]
ReadDone: TypeAlias = Callable[[Buffer | StoreError], None]


class Timer(Protocol):
    """A pending call; `cancel` may be called at any time, also after it fired."""

    def cancel(self) -> None: ...


@mypyc_attr(allow_interpreted_subclasses=True)
class Clock:
    """Time, in integer nanoseconds."""

    def now_ns(self) -> int:
        """Monotonic, also across suspend (CLOCK_BOOTTIME)."""
        raise NotImplementedError

    def wall_ns(self) -> int:
        """Unix time; only for what people read (creation times)."""
        raise NotImplementedError

    def after(self, delay_ns: int, call: Callable[[], None]) -> Timer:
        """Calls back once, not before `delay_ns` has passed."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Network:
    """Messages to the other nodes: in order per peer, at most once, lost when the link breaks."""

    def send(self, node: NodeId, message: Message) -> None:
        """Queues a message; messages of one turn of the loop leave together. Unknown or dead node: dropped."""
        raise NotImplementedError

    def confirm(self, node: NodeId, fence: int, rid: int) -> None:
        """As `send` of an ANSWER that says no more than that its request succeeded."""
        raise NotImplementedError

    def confirm_later(self, node: NodeId, fence: int, rid: int) -> None:
        """As `confirm`; it may wait for the next message to that node, for limits.LATE_NS at most."""
        raise NotImplementedError

    def send_late(self, node: NodeId, message: Message) -> None:
        """As `send`; it may wait for what this turn tells the node once the store has taken this turn's writes."""
        raise NotImplementedError

    def applied(self, node: NodeId, fence: int, number: int, sequence: int) -> None:
        """Tells a gateway that the copy here has its write `number`, which its home gave this sequence (APPLIED)."""
        raise NotImplementedError

    def connect(self, nodes: Iterable[NodeId]) -> None:
        """The nodes this one talks to from now on; links to all others are closed."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Store:
    """The objects of this node (design.md 7). Sizes and offsets in bytes; a block is 4096 bytes.

    A copy of an object is its bytes, its size and its version. What `write` and `create` hand over is
    seen by every later `read` at once; `done(None)` means acknowledged: in the operating system's hands
    (survives kill -9), and with `durable` on the disk (survives power loss).
    """

    nosync: bool = False
    """Nothing waits for the disk, `durable` or not (`sheep -n`)."""

    def version(self, oid: ObjectId) -> Version | None:
        """Version of the copy here; None without one. NO_VERSION for a copy whose restore has not finished."""
        raise NotImplementedError

    def inventory(self) -> Iterable[tuple[ObjectId, Version]]:
        """All copies here, in ascending order of oid."""
        raise NotImplementedError

    def size(self, oid: ObjectId) -> int:
        """Size of the copy here; raises NoObject."""
        raise NotImplementedError

    def read(self, oid: ObjectId, offset: int, length: int, done: ReadDone) -> None:
        """`length` bytes from `offset`, hashes verified; NoObject, Corrupt, DiskError."""
        raise NotImplementedError

    def write(self, oid: ObjectId, offset: int, data: Buffer, version: Version, durable: bool, done: Done) -> bool:
        """Overwrites a range of an existing copy; NoObject, NoSpace, Corrupt (of a block's rest), DiskError.

        True: the copy has `version` now; else it has failed, or waits for what comes before.
        """
        raise NotImplementedError

    def create(
        self, oid: ObjectId, size: int, offset: int, data: Buffer, version: Version, durable: bool, done: Done
    ) -> None:
        """A new copy, zero but for `data`; replaces an existing one atomically. Its existence is durable at `done`.

        Blocks of `data` that are all zero are left as holes. NoSpace, DiskError.
        """
        raise NotImplementedError

    def punch(self, oid: ObjectId, offset: int, length: int, version: Version, durable: bool, done: Done) -> None:
        """Makes a range read as zeros; whole blocks become holes."""
        raise NotImplementedError

    def stamp(self, oid: ObjectId, version: Version, durable: bool, done: Done) -> None:
        """The copy has another version, its bytes stay (a strip whose object was written elsewhere)."""
        raise NotImplementedError

    def remove(self, oid: ObjectId, done: Done) -> None:
        """The copy is gone; without one, nothing happens. Durable at `done`."""
        raise NotImplementedError

    def flush(self, vids: frozenset[Vid] | None, done: Done) -> None:
        """Everything acknowledged so far for objects of these vids (None: of all) is durable at `done`."""
        raise NotImplementedError

    def verify(self, oid: ObjectId, offset: int, length: int, done: Done) -> None:
        """Reads whole blocks from the disk, not from memory, and checks their hashes; errors as of `read`."""
        raise NotImplementedError

    def table(self, oid: ObjectId) -> bytes:
        """Block hashes of the copy: 8 bytes little-endian a block, zero for a hole; raises NoObject."""
        raise NotImplementedError

    def restore_begin(self, oid: ObjectId, size: int) -> StoreError | None:
        """Opens the copy (or a new, empty one) for recovery; its version is NO_VERSION until the end (crashes too).

        The error if there can be no new one: then nothing has changed.
        """
        raise NotImplementedError

    def restore_write(self, oid: ObjectId, offset: int, data: Buffer, done: Done) -> None:
        """Whole blocks (the object's last one may be short) fetched from another copy."""
        raise NotImplementedError

    def restore_punch(self, oid: ObjectId, offset: int, length: int) -> None:
        """Whole blocks that are holes in the other copy."""
        raise NotImplementedError

    def restore_finish(self, oid: ObjectId, version: Version, done: Done) -> None:
        """The copy is complete, durable, and has this version."""
        raise NotImplementedError

    def usage(self) -> tuple[int, int]:
        """(bytes in use by objects, bytes still free), over all disks."""
        raise NotImplementedError

    # Of the object cache's store only

    def keep(self, oid: ObjectId, offset: int, data: Buffer) -> bool:
        """Whole blocks of what the cluster has, which may be gone again at the next start; reads see them now.

        False: nothing has changed, since the copy is not there, is in use, or takes no more.
        """
        raise NotImplementedError

    def when_answered(self, call: Callable[[], None]) -> None:
        """Calls once, soon, when what was answered before has left this node."""
        raise NotImplementedError


class Proven(NamedTuple):
    """What is proven of a node's copies, by epochs."""

    settled: int = 0  # the newest in which every copy was current
    broken: int = 0  # the newest in which a current copy went bad and was not made anew since; 0: none did
    forgotten: int = -1  # up to this one the disks do not tell all: some were lost since. -1: to be found out
    dropped: int = 0  # 1: copies that belong elsewhere now were removed since `settled`: what is not here may exist


class NodeState(Protocol):
    """The small durable state of a node: configuration and epoch log."""

    def save_config(self, config: bytes, done: Done) -> None:
        """Replaces the cluster configuration (encoded by core.state); durable at `done`."""

    def append_epoch(self, record: EpochRecord, done: Done) -> None:
        """Adds one record to the epoch log; durable at `done`."""

    def drop_epochs(self, last: int, done: Done) -> None:
        """Forgets the records after `last`, the newest first: the log is never one with a gap."""

    def clear_epochs(self, done: Done) -> None:
        """Forgets all records (format)."""

    def load_config(self) -> bytes | None: ...

    def load_epochs(self) -> list[EpochRecord]:
        """All records, ascending by epoch."""

    def save_proven(self, proven: Proven, done: Done) -> None:
        """Remembers how much is proven of this node's copies."""

    def load_proven(self) -> Proven:
        """`Proven()` if nothing was ever proven."""

    def save_scrub(self, data: bytes, done: Done) -> None:
        """Remembers how far the scrub is (core.scrub)."""

    def load_scrub(self) -> bytes | None:
        """None when nothing is remembered that can be read."""

    def save_stale(self, data: bytes, done: Done) -> None:
        """Remembers which strips are to be made anew (core.stale_strips); durable at `done`."""

    def load_stale(self) -> bytes:
        """Empty when nothing is remembered that can be read."""

    def append_undo(self, record: bytes) -> None:
        """Adds to what strips need to go back (core.strip_undo). At the return it survives a kill -9; what is handed
        to the store afterwards does not survive a power loss without it."""

    def replace_undo(self, records: bytes) -> None:
        """These are all that is needed of it, once what the store has now is durable."""

    def load_undo(self) -> list[bytes]:
        """What was added before the last replacement, and since, the older first; the end of each may be torn."""


class Engine(Protocol):
    """Ordered broadcast of the membership engine, as core sees it (cluster/drivers/base.py)."""

    def broadcast(self, data: bytes) -> None:
        """Sends to all members, itself included; delivered as `Delivery` in one order everywhere, exactly once."""

    def renew(self) -> None:
        """A `Leased` event is wanted. An engine that never sends one needs not do anything."""

    def leave(self) -> None:
        """Leaves orderly; the others see it at once."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One process attached to the membership engine. `payload` is opaque (a node's description)."""

    id: bytes
    incarnation: int
    payload: bytes


class View(NamedTuple):
    """The attached processes from this event on, oldest first; joined and left against the view before."""

    sequence: int
    members: tuple[Peer, ...]
    joined: tuple[Peer, ...]
    left: tuple[Peer, ...]
    grace_ns: int = 0
    """What left may not know it, and answer its clients for so long after this event. 0: its end is proven."""


class Delivery(NamedTuple):
    """One ordered message."""

    sequence: int
    sender: Peer
    data: bytes


class Suspended(NamedTuple):
    """The engine is out of reach: acknowledge nothing, keep waiting."""

    reason: str


class Resumed(NamedTuple):
    """The engine is back, the session survived."""


class Leased(NamedTuple):
    """This process may answer its clients before `until_ns` (Clock.now_ns): it was attached a lease before that.

    After the first of these, each answer needs a lease. Engines where death is always proven send none.
    """

    until_ns: int


class Lost(NamedTuple):
    """Expelled, in a minority or session gone: this incarnation is over."""

    reason: str


class Votes(NamedTuple):
    """How an engine counts the machines that it runs on, this one's sheep beside it."""

    own: int  # of this machine
    present: int  # of all that are in reach, and whatever else votes
    needed: int  # with fewer, nobody goes on


Event: TypeAlias = View | Delivery | Suspended | Resumed | Leased | Lost
Log: TypeAlias = Callable[[int, str], None]
"""log(level, text); levels as in syslog: 3 error, 4 warning, 5 notice, 6 info, 7 debug."""
