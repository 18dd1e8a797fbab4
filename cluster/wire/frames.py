"""Frames of the client protocol: 48 bytes of header and what follows them (protocol.md 1.2).

Server and clients cut their streams with these two parsers. Both are an `Intake` (wire.streams): receive into
`space()`, tell `fill(count)`, take complete frames from `next()`.
"""

from __future__ import annotations

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.limits import MAX_ADMIN_PAYLOAD_BYTES, MAX_REQUEST_BYTES
from sheepdog.cluster.core.words import read_u32
from sheepdog.cluster.wire.header import HEADER_SIZE
from sheepdog.cluster.wire.opcodes import OBJECT_IO, Flags
from sheepdog.cluster.wire.streams import Arena, Intake


def request_payload_length(header: bytes) -> int:
    """Bytes that follow the request's header: the WRITE flag decides, never the opcode.

    PeerError for more than any request of its kind can have.
    """
    if not header[2] & Flags.WRITE:  # in the lower byte of the flags
        return 0  # the length is the room that the client has for the answer
    opcode, length = header[1], read_u32(header, 12)
    if length > MAX_ADMIN_PAYLOAD_BYTES and (length > MAX_REQUEST_BYTES or opcode not in OBJECT_IO):
        raise PeerError(f"request {opcode:#04x} with a payload of {length} bytes")
    return length


def response_payload_length(header: bytes) -> int:
    """Bytes that follow the response's header, whatever its result. PeerError for more than an object."""
    length = read_u32(header, 12)
    if length > MAX_REQUEST_BYTES:
        raise PeerError(f"response with a payload of {length} bytes")
    return length


class RequestParser(Intake):
    """The server's side: requests out of any segmentation of the stream.

    Requests of unknown opcode or version are frames like any other; `opcodes.admit` refuses them afterwards.
    """

    __slots__ = ()

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena, HEADER_SIZE, request_payload_length)

    def length_of(self, header: bytes) -> int:
        return request_payload_length(header)


class ResponseParser(Intake):
    """The client's side."""

    __slots__ = ()

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena, HEADER_SIZE, response_payload_length)
