"""Pipelined object I/O against running sheep: IOPS, MB/s, and the servers' CPU time per operation.

    python -m tests.bench.load --address 127.0.0.1:7000 --pid PID --pid PID --pid PID

The generator speaks the native protocol from prepared bytes and does little per request, so that the figures are the
servers'. It makes a volume of its own (the cluster must be formatted; `--format COPIES` formats an empty one).
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid, inode_oid
from sheepdog.cluster.core.strings import padded
from sheepdog.cluster.wire.header import (
    CLUSTER_REQUEST,
    HEADER_SIZE,
    OBJECT_REQUEST,
    RESPONSE,
    VDI_REQUEST,
    VDI_RESPONSE,
    ClusterRequest,
    ObjectRequest,
    VdiRequest,
)
from sheepdog.cluster.wire.opcodes import ADMIN_VERSION, Flags, Opcode

OBJECT_BYTES = 4 << 20
PREPARED = 4096  # different requests made before the clock runs
WRITE_TIMEOUT_S = 30.0
CELLS = ((4096, 1), (4096, 16), (4096, 64), (65_536, 16), (1 << 20, 4))  # (bytes, depth)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured cell."""

    operations: int
    seconds: float
    size: int
    server_cpu_s: float

    def row(self) -> str:
        rate = self.operations / self.seconds
        return (
            f"{rate:10,.0f} IOPS {rate * self.size / 1e6:10,.1f} MB/s"
            f" {self.server_cpu_s / max(self.operations, 1) * 1e6:10,.1f} us CPU/op"
        )


def connect(address: str) -> socket.socket:
    """`host:port`, or the path of a UNIX socket."""
    if "/" in address:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
    else:
        host, _, port = address.rpartition(":")
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(WRITE_TIMEOUT_S)
    return sock


def receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("the server closed the connection")
        data += piece
    return bytes(data)


def ask(sock: socket.socket, request: bytes) -> bytes:
    """Header of the answer; RuntimeError for an error."""
    sock.sendall(request)
    head = receive(sock, HEADER_SIZE)
    answer = RESPONSE.unpack(head)
    receive(sock, answer.data_length)
    if answer.result:
        raise RuntimeError(f"request {answer.opcode:#04x}: {Result(answer.result).name}")
    return head


def format_cluster(sock: socket.socket, copies: int) -> None:
    payload = b"plain\0"
    fields = ClusterRequest(
        ADMIN_VERSION,
        Opcode.MAKE_FS,
        Flags.WRITE,
        data_length=len(payload),
        ctime=int(time.time()) << 32,
        copies=copies,
        cluster_flags=0x04,
    )
    ask(sock, CLUSTER_REQUEST.pack(fields) + payload)


def new_volume(sock: socket.socket, objects: int) -> Vid:
    name = padded(f"load-{os.getpid()}-{time.monotonic_ns()}".encode())
    fields = VdiRequest(2, Opcode.NEW_VDI, Flags.WRITE, data_length=len(name), vdi_size=objects * OBJECT_BYTES)
    vid = Vid(VDI_RESPONSE.unpack(ask(sock, VDI_REQUEST.pack(fields) + name)).vdi_id)
    for index in range(objects):  # whole, so that no cell measures allocation
        request = _object_request(Opcode.CREATE_AND_WRITE_OBJ, data_oid(vid, index), 0, OBJECT_BYTES, Flags.CACHE)
        ask(sock, request + random.Random(index).randbytes(OBJECT_BYTES))
    ask(sock, _object_request(Opcode.FLUSH_VDI, inode_oid(vid), 0, 0, 0))
    return vid


def _object_request(opcode: int, oid: int, offset: int, length: int, flags: int, number: int = 0) -> bytes:
    if opcode in (Opcode.WRITE_OBJ, Opcode.CREATE_AND_WRITE_OBJ):
        flags |= Flags.WRITE
    return OBJECT_REQUEST.pack(ObjectRequest(2, opcode, flags, 0, number, length, oid, offset=offset))


def prepare(vid: Vid, objects: int, writing: bool, size: int, flags: int) -> list[bytes]:
    """Requests at random places, each a multiple of its size."""
    numbers = random.Random(size)
    opcode = Opcode.WRITE_OBJ if writing else Opcode.READ_OBJ
    payload = numbers.randbytes(size) if writing else b""
    count = max(min(PREPARED, (64 << 20) // (size if writing else 48)), 16)
    return [
        _object_request(
            opcode,
            data_oid(vid, numbers.randrange(objects)),
            numbers.randrange(OBJECT_BYTES // size) * size,
            size,
            flags,
            n,
        )
        + payload
        for n in range(count)
    ]


def drive(
    sock: socket.socket, requests: Sequence[bytes], answer_size: int, depth: int, seconds: float
) -> tuple[int, float]:
    """Keeps `depth` requests under way; how many were answered in how many seconds. RuntimeError for an error."""
    buffer = bytearray(max(depth * answer_size, 1 << 16))
    view = memoryview(buffer)
    have = done = sent = 0
    source = _endless(requests)
    sock.sendall(b"".join(next(source) for _ in range(depth)))
    sent = depth
    begin = time.monotonic()
    end = begin + seconds
    while done < sent:
        count = sock.recv_into(view[have:])
        if not count:
            raise ConnectionError("the server closed the connection")
        have += count
        ready, rest = divmod(have, answer_size)
        for start in range(0, ready * answer_size, answer_size):
            if buffer[start + 16] or buffer[start + 17]:
                raise RuntimeError(f"result {buffer[start + 16]:#x}")
        if rest and ready:
            view[:rest] = view[ready * answer_size : have]
        have = rest
        done += ready
        if ready and time.monotonic() < end:
            sock.sendall(b"".join([next(source) for _ in range(ready)]) if ready > 1 else next(source))
            sent += ready
    return done, time.monotonic() - begin


def _endless(requests: Sequence[bytes]) -> Iterator[bytes]:
    while True:
        yield from requests


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of the processes so far, all their threads."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    sock: socket.socket,
    vid: Vid,
    objects: int,
    writing: bool,
    size: int,
    depth: int,
    flags: int,
    seconds: float,
    pids: Sequence[int],
) -> Figure:
    requests = prepare(vid, objects, writing, size, flags)
    answer_size = HEADER_SIZE if writing else HEADER_SIZE + size
    drive(sock, requests, answer_size, depth, min(seconds / 4, 0.5))  # warm
    before = cpu_seconds(pids)
    operations, elapsed = drive(sock, requests, answer_size, depth, seconds)
    return Figure(operations, elapsed, size, cpu_seconds(pids) - before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--address", default="127.0.0.1:7000", help="host:port, or the path of a UNIX socket")
    parser.add_argument("--pid", type=int, action="append", default=[], help="a sheep whose CPU time counts")
    parser.add_argument("--objects", type=int, default=16, help="objects of 4 MiB in the volume")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell")
    parser.add_argument("--cell", action="append", help="write|durable|read:BYTES:DEPTH; all by default")
    parser.add_argument("--format", type=int, metavar="COPIES", help="format the cluster first")
    options = parser.parse_args(arguments)
    sock = connect(options.address)
    if options.format:
        format_cluster(sock, options.format)
    vid = new_volume(sock, options.objects)
    cells = (
        [cell.split(":") for cell in options.cell]
        if options.cell
        else [[kind, str(size), str(depth)] for kind in ("write", "durable", "read") for size, depth in CELLS]
    )
    for kind, size, depth in cells:
        flags = Flags.CACHE if kind == "write" else Flags.DIRECT if kind == "durable" else 0
        figure = measure(
            sock, vid, options.objects, kind != "read", int(size), int(depth), flags, options.seconds, options.pid
        )
        print(f"{kind:>8} {int(size) // 1024:5} KiB depth {depth:>3} {figure.row()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
