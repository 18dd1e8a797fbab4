"""What members of the corosync driver tell each other. No I/O: values to bytes and back; corosync_order says why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ports import Peer
from sheepdog.cluster.drivers.cpg import Process

FORMAT = 1  # of messages; a later one is refused
LATER_FORMATS = range(FORMAT + 1, 16)  # of ours some day; text, which somebody else may send, begins with larger bytes
_HEADER = Struct(">BBQQQ")  # format, kind, sender's incarnation, sender's counter, origin of its order (0: pending)
REFERENCE = Struct(">QQ")  # to a message: its sender's incarnation and counter
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    JOIN = 1
    ROSTER = 2
    DATA = 3
    ACK = 4  # of a message and of all before it
    BEAT = 5  # comes back to its sender: it still is in the ring


class Parsed(NamedTuple):
    kind: Kind
    incarnation: int
    counter: int
    origin: int
    body: bytes


class Ordered(NamedTuple):
    """A message that has a place in the order."""

    kind: Kind
    process: Process
    incarnation: int
    counter: int
    body: bytes


@dataclass(slots=True)
class Seat:
    """A member. `established`: it has the roster."""

    peer: Peer
    lease_ns: int
    established: bool


def header(kind: Kind, incarnation: int, counter: int, origin: int) -> bytes:
    return _HEADER.pack(FORMAT, kind, incarnation, counter, origin)


def parse(data: bytes) -> Parsed | None:
    """None for what is not ours. PeerError for what is and is not understood: no member may go on without it."""
    if data and data[0] in LATER_FORMATS:
        raise PeerError(f"a message has format {data[0]}, this version knows {FORMAT}")
    if len(data) < HEADER_BYTES or data[0] != FORMAT:
        return None
    _, kind, incarnation, counter, origin = _HEADER.unpack_from(data)
    try:
        return Parsed(Kind(kind), incarnation, counter, origin, data[HEADER_BYTES:])
    except ValueError:
        raise PeerError(f"a message is of kind {kind}, which this version does not know") from None


def encode(values: dict[str, Any], attempt: int) -> bytes:
    """The body of a JOIN or ROSTER; `attempt` tells the joiner's announcements apart."""
    return json.dumps([values, attempt]).encode()


def decode(body: bytes) -> tuple[dict[str, Any], int]:
    values, attempt = json.loads(body)
    return values, attempt


def seat_values(seat: Seat) -> dict[str, Any]:
    peer = seat.peer
    return {
        "id": peer.id.hex(),
        "incarnation": peer.incarnation,
        "payload": peer.payload.hex(),
        "lease": seat.lease_ns,
        "established": seat.established,
    }


def seat_of(values: dict[str, Any]) -> Seat:
    peer = Peer(bytes.fromhex(values["id"]), values["incarnation"], bytes.fromhex(values["payload"]))
    return Seat(peer, values["lease"], values["established"])
