"""The few requests of the native protocol by which tests watch a node, laid out apart from the code under test."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<BBHIIII28s")
ADMIN_VERSION = 0x0A
GET_NODE_LIST, STAT_CLUSTER, STAT_RECOVERY = 0x82, 0x87, 0x97
NODE_RECORD, EPOCH_HEADER = 80, 48
SUCCESS = 0


@dataclass(frozen=True, slots=True)
class Answer:
    result: int
    epoch: int
    payload: bytes


def ask(address: Path | tuple[str, int], opcode: int, room: int, seconds: float = 5.0) -> Answer:
    """One request without payload on a connection of its own; OSError when nobody answers."""
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect(str(address) if isinstance(address, Path) else address)
        connection.sendall(HEADER.pack(ADMIN_VERSION, opcode, 0, 0, 1, room, 0, bytes(28)))
        head = HEADER.unpack(receive(connection, HEADER.size))
        return Answer(result=head[6], epoch=head[3], payload=receive(connection, head[5]))


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes; ConnectionError when the other side ends before."""
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("the connection ended inside an answer")
        data += piece
    return data


def member_count(address: Path | tuple[str, int]) -> int:
    """How many nodes this one knows; 0 while it does not answer."""
    try:
        answer = ask(address, GET_NODE_LIST, 6144 * NODE_RECORD)
    except OSError:
        return 0
    return len(answer.payload) // NODE_RECORD if answer.result == SUCCESS else 0


def status(address: Path | tuple[str, int]) -> int | None:
    """Result code of STAT_CLUSTER (0: running); None while the node does not answer."""
    try:
        return ask(address, STAT_CLUSTER, EPOCH_HEADER).result
    except OSError:
        return None


def recovery(address: Path | tuple[str, int]) -> tuple[int, int] | None:
    """(finished, total) objects while this node recovers; None when it does not."""
    try:
        answer = ask(address, STAT_RECOVERY, 24)
    except OSError:
        return None
    if answer.result != SUCCESS or len(answer.payload) < 24 or not answer.payload[0]:
        return None
    finished, total = struct.unpack_from("<QQ", answer.payload, 8)
    return finished, total
