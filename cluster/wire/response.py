"""Headers of plain responses, packed for each request of a server (protocol.md 2).

Apart from `header`, which clients import too: librt is a compiled library, and the Python inside of nbdkit has none.
"""

from __future__ import annotations

from typing import Final

from librt.strings import BytesWriter

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.words import write_u32

_REST: Final = bytes(28)


def response(opcode: int, request_id: int, epoch: int, result: int = Result.SUCCESS, data_length: int = 0) -> bytes:
    """The header of a response without fields of its own: all object I/O and every error.

    `data_length` bytes must follow. It is 0 after a WRITE request (PIGGYBACK apart) and, but for STAT_CLUSTER and
    OIDS_EXIST, on error; otherwise clients lose their place in the stream (protocol.md 1.2).
    """
    header = BytesWriter()
    write_u32(header, opcode << 8)  # version and flags are 0
    write_u32(header, epoch)
    write_u32(header, request_id)
    write_u32(header, data_length)
    write_u32(header, result)
    header.write(_REST)
    return header.getvalue()
