"""`dog vdi read|write`: a volume's bytes to stdout, stdin's bytes to a volume (cli.md 2.6)."""

from __future__ import annotations

import sys

from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.hyper import HyperVolume, open_volume
from sheepdog.tools.dog.context import Context, Unreachable, dial
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import parse_size, text
from sheepdog.tools.dog.values import snapshot_option
from sheepdog.tools.dog.volumes import name_of, not_opened

CHUNK_BYTES = 4 << 20  # at most one object of the usual size per request


def read(context: Context) -> None:
    """From an offset (0) for a length (to the end), clipped to the end."""
    tag, snap_id = snapshot_option(context)
    offset, length = _range(context)
    volume = _open(context, tag, snap_id)
    if offset > volume.size:
        raise Failure("Read offset is beyond the end of the VDI")
    end = volume.size if length is None else min(volume.size, offset + length)
    out = sys.stdout.buffer
    try:
        while offset < end:
            step = min(end, _boundary(offset, volume))
            out.write(volume.read(offset, step - offset))
            offset = step
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(f"{_reason(error)}Failed to read VDI") from error
    out.flush()


def write(context: Context) -> None:
    """To an offset (0) from stdin until that, the length or the volume ends.

    A short last chunk is padded with zeros up to the end of its chunk: an object's end, or that of `length`.
    """
    offset, length = _range(context)
    volume = _open(context, b"", 0)
    if offset > volume.size:
        raise Failure("Write offset is beyond the end of the VDI")
    end = volume.size if length is None else min(volume.size, offset + length)
    durable = not context.flag("writeback")
    source = sys.stdin.buffer
    try:
        while offset < end:
            begin = offset
            chunk_end = min(end, (offset // volume.object_size + 1) * volume.object_size)
            while offset < chunk_end:
                size = min(chunk_end - offset, CHUNK_BYTES)
                data = source.read(size)
                if data:
                    volume.write(offset, data, durable)
                    offset += len(data)
                if len(data) < size:
                    if offset > begin:
                        volume.zero(offset, chunk_end - offset, durable)
                    return
    except OSError as error:
        raise Failure(f"{_reason(error)}Failed to write VDI") from error


def _boundary(offset: int, volume: BlockingVolume | HyperVolume) -> int:
    """Where the next chunk ends: requests stay inside one object."""
    chunk = min(volume.object_size, CHUNK_BYTES)
    return (offset // chunk + 1) * chunk


def _range(context: Context) -> tuple[int, int | None]:
    """(offset, length) from the words after the name."""
    context.argument(0)
    offset, length = context.optional(1), context.optional(2)
    return parse_size(offset) if offset else 0, parse_size(length) if length else None


def _open(context: Context, tag: bytes, snap_id: int) -> BlockingVolume | HyperVolume:
    name = name_of(context.argument(0))
    address = (context.host, context.port)
    try:
        dial(address).close()  # says what is wrong, as often as the original does
        return open_volume(address, name, tag, snap_id, patience_s=0)
    except Unreachable as error:
        raise Failure(code=1) from error
    except SheepError as error:
        raise Failure(not_opened(name, tag, snap_id, error.result)) from error


def _reason(error: OSError) -> str:
    return f"{text(error.result)}\n" if isinstance(error, SheepError) else ""
