"""`dog vdi read|write`: a volume's bytes to stdout, stdin's bytes to a volume (cli.md 2.6)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.connection import connect_near
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.hyper import HyperVolume, open_volume
from sheepdog.tools.dog.context import Context, Unreachable, dial
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import parse_size, refusal
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.values import snapshot_option
from sheepdog.tools.dog.volumes import name_of, not_opened
from sheepdog.tools.dog.window import CHUNK_BYTES, buffers, in_order, standard_input


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
        with Progress("read", end - offset) as progress:
            for data in in_order(_reads(volume, offset, end)):
                out.write(data)
                progress.advance(len(data))
    except OSError as error:
        raise Failure(f"{_reason(error)}Failed to read VDI") from error
    out.flush()


def _reads(volume: BlockingVolume | HyperVolume, offset: int, end: int) -> Iterator[Callable[[], memoryview]]:
    """Reads of a range, each inside one object."""
    space = buffers()
    while offset < end:
        step = min(end, _boundary(offset, volume))
        yield partial(_read, volume, offset, next(space)[: step - offset])
        offset = step


def _read(volume: BlockingVolume | HyperVolume, offset: int, space: memoryview) -> memoryview:
    volume.read_into(offset, space)
    return space


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
    try:
        with Progress("write", _to_come(end - offset)) as progress:
            for count in in_order(_writes(volume, offset, end, durable)):
                progress.advance(count)
    except OSError as error:
        raise Failure(f"{_reason(error)}Failed to write VDI") from error


def _to_come(most: int) -> int:
    """How many bytes a write will take, if stdin can tell."""
    source = standard_input()
    if not source.seekable():
        return most
    place = source.tell()
    end = source.seek(0, os.SEEK_END)
    source.seek(place)
    return min(most, end - place) or most


def _writes(volume: BlockingVolume | HyperVolume, offset: int, end: int, durable: bool) -> Iterator[Callable[[], int]]:
    """Writes of what stdin gives, each inside one object."""
    space = buffers()
    source = standard_input()
    padded = 0  # the end of the chunk that the last bytes are in
    while offset < end:
        chunk_end = min(end, (offset // volume.object_size + 1) * volume.object_size)
        data = next(space)[: min(chunk_end - offset, CHUNK_BYTES)]
        count = source.readinto(data)
        if count:
            yield partial(_write, volume, offset, data[:count], durable)
            offset += count
            padded = chunk_end
        if count < len(data):
            if offset < padded:
                yield partial(_zero, volume, offset, padded - offset, durable)
            return


def _write(volume: BlockingVolume | HyperVolume, offset: int, data: memoryview, durable: bool) -> int:
    volume.write(offset, data, durable)
    return len(data)


def _zero(volume: BlockingVolume | HyperVolume, offset: int, length: int, durable: bool) -> int:
    volume.zero(offset, length, durable)
    return length


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
        return open_volume(address, name, tag, snap_id, patience_s=0, dial=connect_near)
    except Unreachable as error:
        raise Failure(code=1) from error
    except SheepError as error:
        raise Failure(not_opened(name, tag, snap_id, error.result)) from error


def _reason(error: OSError) -> str:
    return f"{refusal(error.result)}\n" if isinstance(error, SheepError) else ""
