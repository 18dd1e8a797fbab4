"""The log of the zookeeper driver: what its entries say, and what they mean. No I/O: bytes in, events out.

Every entry is one znode; its place is the number ZooKeeper gave it, its sequence the transaction that made it. All
members fold the same entries in the same order, so they come to the same roster and the same events. An entry may
be there twice, since a create whose answer was lost is repeated: the author's counter tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from enum import IntEnum
from struct import Struct, error
from typing import NamedTuple

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ports import Delivery, Event, Peer, View

MESSAGE_BITS = 12  # of a sequence: messages of one entry have sequences of their own
MAX_ENTRY_MESSAGES = (1 << MESSAGE_BITS) - 1
FORMAT = 1  # of entries and checkpoints; a later one is refused
LATER_FORMATS = range(FORMAT + 1, 16)  # of ours some day; text, which somebody else may write, begins with larger bytes
_HEADER = Struct(">BBQQ")  # format, kind, author's incarnation, author's counter
_NAME = re.compile(r"e-(-?\d{1,10})", re.ASCII)
_LENGTH = Struct(">I")
_INCARNATION = Struct(">Q")
_JOIN = Struct(">QH")  # lease in ns, bytes of the id

HEADER_BYTES, MESSAGE_OVERHEAD_BYTES = _HEADER.size, _LENGTH.size


class EntryKind(IntEnum):
    JOIN = 1  # the author becomes a member
    MESSAGES = 2  # of the author
    LEAVE = 3  # of the author, by itself: it is over
    DEAD = 4  # of others: their sessions are over, which they may not know yet


class Entry(NamedTuple):
    """`body` as its kind says."""

    kind: EntryKind
    author: int
    counter: int
    body: bytes

    def encode(self) -> bytes:
        return _HEADER.pack(FORMAT, self.kind, self.author, self.counter) + self.body

    @classmethod
    def decode(cls, data: bytes) -> Entry | None:
        """None for what is not ours. PeerError for what is and is not understood: nobody may go on without it."""
        if data and data[0] in LATER_FORMATS:
            raise PeerError(f"an entry has format {data[0]}, this version knows {FORMAT}")
        if len(data) < _HEADER.size or data[0] != FORMAT:
            return None
        _, kind, author, counter = _HEADER.unpack_from(data)
        try:
            return cls(EntryKind(kind), author, counter, data[_HEADER.size :])
        except ValueError:
            raise PeerError(f"an entry is of kind {kind}, which this version does not know") from None


def join_entry(peer: Peer, lease_ns: int) -> Entry:
    body = _JOIN.pack(lease_ns, len(peer.id)) + peer.id + peer.payload
    return Entry(EntryKind.JOIN, peer.incarnation, 0, body)


def messages_entry(author: int, counter: int, messages: Iterable[bytes]) -> Entry:
    body = b"".join(_LENGTH.pack(len(data)) + data for data in messages)
    return Entry(EntryKind.MESSAGES, author, counter, body)


def dead_entry(author: int, counter: int, incarnations: Iterable[int]) -> Entry:
    return Entry(EntryKind.DEAD, author, counter, b"".join(map(_INCARNATION.pack, incarnations)))


def position_path(position: int) -> str:
    """The name that ZooKeeper gives to the entry at a position: its counter has 32 bits and a sign."""
    return f"e-{(position + (1 << 31)) % (1 << 32) - (1 << 31):010d}"


def distance(name: str, position: int) -> int | None:
    """How far behind `position` the entry of this name is in the log (negative: before it); None: it is no entry."""
    found = _NAME.fullmatch(name)
    return None if found is None else (int(found[1]) - position + (1 << 31)) % (1 << 32) - (1 << 31)


class Roster:
    """The members as of a place in the log, oldest first, and what is needed to go on from there."""

    def __init__(self) -> None:
        self.members: dict[int, Peer] = {}  # by incarnation, in the order of joining
        self._leases: dict[int, int] = {}
        self._counters: dict[int, int] = {}  # of each member's latest entry

    def fold(self, transaction: int, entry: Entry) -> Iterator[Event]:
        """The events that an entry makes; `transaction` is that of its creation."""
        sequence = transaction << MESSAGE_BITS
        if entry.kind == EntryKind.JOIN:
            yield from self._join(sequence, entry)
        elif entry.kind == EntryKind.DEAD:
            if len(entry.body) % _INCARNATION.size:
                raise PeerError("a list of the dead is damaged")
            gone = [number for (number,) in _INCARNATION.iter_unpack(entry.body) if number in self.members]
            grace_ns = max((self._leases[number] for number in gone), default=0)
            yield from self._remove(sequence, gone, grace_ns)
        elif entry.author not in self.members or entry.counter <= self._counters[entry.author]:
            return
        elif entry.kind == EntryKind.LEAVE:
            yield from self._remove(sequence, [entry.author], 0)
        else:
            self._counters[entry.author] = entry.counter
            sender = self.members[entry.author]
            for index, data in enumerate(_messages(entry.body), 1):
                yield Delivery(sequence + index, sender, data)

    def _join(self, sequence: int, entry: Entry) -> Iterator[Event]:
        if entry.author in self.members:
            return
        try:
            lease_ns, length = _JOIN.unpack_from(entry.body)
        except error as problem:
            raise PeerError(f"a join is damaged: {problem}") from None
        body = entry.body[_JOIN.size :]
        peer = Peer(body[:length], entry.author, body[length:])
        self.members[entry.author] = peer
        self._leases[entry.author] = lease_ns
        self._counters[entry.author] = entry.counter
        yield View(sequence, tuple(self.members.values()), (peer,), ())

    def _remove(self, sequence: int, gone: list[int], grace_ns: int) -> Iterator[Event]:
        if not gone:
            return
        left = tuple(self.members.pop(number) for number in gone)
        for number in gone:
            del self._leases[number], self._counters[number]
        yield View(sequence, tuple(self.members.values()), (), left, grace_ns)

    def encode(self, position: int) -> bytes:
        """A checkpoint: the roster before the entry at `position`."""
        rows = [
            [number, peer.id.hex(), peer.payload.hex(), self._leases[number], self._counters[number]]
            for number, peer in self.members.items()
        ]
        return json.dumps({"format": FORMAT, "position": position, "members": rows}).encode()

    @classmethod
    def decode(cls, data: bytes) -> tuple[Roster, int]:
        """The roster of a checkpoint, and the position from where to go on; PeerError."""
        roster = cls()
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise PeerError(f"the checkpoint has format {values['format']}, this version knows {FORMAT}")
            for number, name, payload, lease_ns, counter in values["members"]:
                roster.members[number] = Peer(bytes.fromhex(name), number, bytes.fromhex(payload))
                roster._leases[number] = lease_ns
                roster._counters[number] = counter
            return roster, values["position"]
        except (ValueError, KeyError, TypeError) as problem:
            raise PeerError(f"the checkpoint is damaged: {problem}") from None


def _messages(body: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(body):
        if at + _LENGTH.size > len(body):
            raise PeerError("an entry is cut short")
        end = at + _LENGTH.size + _LENGTH.unpack_from(body, at)[0]
        if end > len(body):
            raise PeerError("an entry is cut short")
        yield body[at + _LENGTH.size : end]
        at = end
