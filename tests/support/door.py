"""A client of the native protocol, one request at a time and as crooked as a test likes."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.native import receive

from sheepdog.cluster.core.strings import padded
from sheepdog.cluster.wire.header import HEADER_SIZE, OBJECT_REQUEST, RESPONSE, VDI_REQUEST, ObjectRequest, VdiRequest
from sheepdog.cluster.wire.opcodes import ADMINISTRATION, Flags

SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Answer:
    result: int
    epoch: int
    id: int
    head: bytes
    data: bytes


class Door:
    """One connection to a node, by port of this host or by path of its socket."""

    def __init__(self, address: int | Path) -> None:
        if isinstance(address, int):
            self.socket = socket.create_connection(("127.0.0.1", address))
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(address))
        self.socket.settimeout(SECONDS)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Answer:
        head = receive(self.socket, HEADER_SIZE)
        fields = RESPONSE.unpack(head)
        assert (fields.version, fields.flags) == (0, 0)
        return Answer(fields.result, fields.epoch, fields.id, head, receive(self.socket, fields.data_length))

    def ask(self, request: bytes) -> Answer:
        self.send(request)
        return self.answer()

    def closed(self) -> bool:
        """The server has closed; waits for it."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def silent(self, seconds: float) -> bool:
        """Nothing arrives and nothing is closed for so long."""
        self.socket.settimeout(seconds)
        try:
            return self.socket.recv(1, socket.MSG_PEEK) is None
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(SECONDS)


def _version(opcode: int) -> int:
    return 0x0A if opcode >= ADMINISTRATION else 2


def plain(opcode: int, room: int = 0, payload: bytes = b"", **fields: int) -> bytes:
    """A request whose fields, if any, are those of object requests."""
    flags = fields.pop("flags", 0) | (Flags.WRITE if payload else 0)
    version = fields.pop("version", _version(opcode))
    header = ObjectRequest(version, opcode, flags, data_length=len(payload) or room)
    return OBJECT_REQUEST.pack(header._replace(**fields)) + payload


def vdi(opcode: int, names: Sequence[bytes], **fields: int) -> bytes:
    """A VDI request; the names are name and tag."""
    payload = b"".join(padded(name) for name in names)
    flags = fields.pop("flags", 0) | (Flags.WRITE if payload else 0)
    header = VdiRequest(fields.pop("version", _version(opcode)), opcode, flags, data_length=len(payload))
    return VDI_REQUEST.pack(header._replace(**fields)) + payload
