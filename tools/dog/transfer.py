"""`dog vdi export|import`: a volume's bytes to and from a raw or qcow2 file.

Holes stay holes. qcow2 goes through qemu-img and a sparse raw file beside the target.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.blocking import BlockingVolume
from sheepdog.cluster.client.connection import connect_near
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.hyper import HyperVolume, open_volume
from sheepdog.cluster.core.messages import Buffer
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import text
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.values import parse_redundancy, parse_shift, snapshot_option
from sheepdog.tools.dog.volumes import name_of, not_opened
from sheepdog.tools.dog.window import CHUNK_BYTES, buffers, in_order, is_zero, run_all, standard_input

FORMATS = ("raw", "qcow2")
STREAM = "-"
SECTOR = 512


def _format(context: Context, path: str) -> str:
    given = context.value("format")
    kind = given or ("qcow2" if path.endswith(".qcow2") else "raw")
    if kind not in FORMATS:
        raise Failure(f"Unknown format '{kind}': raw and qcow2 are known")
    if kind != "raw" and path == STREAM:
        raise Failure("Only raw data goes through a pipe")
    return kind


# -- export


def export(context: Context) -> None:
    """All bytes of a volume or snapshot, to a file, a device or stdout."""
    word, path = context.argument(0), context.argument(1, "Please specify the file")
    kind = _format(context, path)
    tag, snap_id = snapshot_option(context)
    context.gateway()
    volume = _open_any(context, name_of(word), tag, snap_id)
    if path == STREAM:
        _copy_out(volume, sys.stdout.buffer, sparse=False)
        sys.stdout.buffer.flush()
        return
    target = Path(path).resolve()
    try:
        if target.exists() and not target.is_file():
            _export_to_device(volume, target, kind)
        else:
            _export_to_file(volume, target, kind)
    except OSError as error:
        raise Failure(f"Failed to export {word}: {_reason(error)}") from error


def _export_to_device(volume: BlockingVolume | HyperVolume, target: Path, kind: str) -> None:
    """Into what is there and stays there: a block device, a named pipe."""
    if kind != "raw":
        raise Failure("Only raw data goes to a device or a pipe")
    with target.open("wb", buffering=0) as out:
        _copy_out(volume, out, sparse=False)
        try:
            os.fsync(out.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # a pipe has nothing to make durable
                raise


def _export_to_file(volume: BlockingVolume | HyperVolume, target: Path, kind: str) -> None:
    """A file made anew, and not there at all if that fails; with the permissions of the one that it replaces."""
    with _beside(target) as part:
        with part.open("wb") as out:
            _copy_out(volume, out, sparse=True)
            out.truncate(volume.size)
            out.flush()
            os.fsync(out.fileno())
        if kind == "raw":
            _put_in_place(part, target)
            return
        with _beside(target) as converted:
            _qemu_img("convert", "-f", "raw", "-O", "qcow2", str(part), str(converted))
            _put_in_place(converted, target)


def _put_in_place(part: Path, target: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    part.chmod(target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~mask)
    part.replace(target)


def _copy_out(volume: BlockingVolume | HyperVolume, out: BinaryIO, sparse: bool) -> None:
    with Progress("export", volume.size) as progress:
        for length, data in in_order(_reads(volume, sparse)):
            if data is None:
                out.seek(length, os.SEEK_CUR)
            else:
                _write_all(out, data)
            progress.advance(length)


def _write_all(out: BinaryIO, data: Buffer) -> None:
    """A device may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _reads(volume: BlockingVolume | HyperVolume, sparse: bool) -> Iterator[Callable[[], tuple[int, Buffer | None]]]:
    """The volume's bytes in order: how many, and which unless they are a hole that stays one (`sparse`)."""
    space = buffers()
    for extent in volume.extents(0, volume.size):
        if sparse and not extent.allocated:
            yield partial(_hole, extent.length)
            continue
        for start in range(extent.offset, extent.offset + extent.length, CHUNK_BYTES):
            length = min(CHUNK_BYTES, extent.offset + extent.length - start)
            yield partial(_read, volume, start, next(space)[:length])


def _hole(length: int) -> tuple[int, Buffer | None]:
    return length, None


def _read(volume: BlockingVolume | HyperVolume, offset: int, space: memoryview) -> tuple[int, Buffer | None]:
    return volume.read_into(offset, space), space


# -- import


def import_file(context: Context) -> None:
    """A new volume with the bytes of a file, or of stdin; it is deleted again if that fails."""
    word, path = context.argument(0), context.argument(1, "Please specify the file")
    kind = _format(context, path)
    name = name_of(word)
    copies, policy = parse_redundancy(context.value("copies")) if context.flag("copies") else (0, 0)
    shift = parse_shift(context.value("block_size_shift")) if context.flag("block_size_shift") else 0
    with _opened(path, kind) as source:
        size = 0 if path == STREAM else source.seek(0, os.SEEK_END)
        connection = context.gateway()
        try:
            admin.new_volume(connection, name, _sectors(size), copies=copies, policy=policy, shift=shift)
        except SheepError as error:
            raise Failure(f"Failed to create VDI {word}: {text(error.result)}") from error
        try:
            if path == STREAM:
                _fill_from_pipe(context, name, source)
            else:
                _fill(context, name, source, size)
        except BaseException as error:
            admin.delete_volume(connection, name)
            if isinstance(error, OSError):
                raise Failure(f"Failed to import {word}: {_reason(error)}") from error
            raise


@contextmanager
def _opened(path: str, kind: str) -> Iterator[BufferedIOBase]:
    """`_source`, with words for a file that cannot be read."""
    with ExitStack() as stack:
        try:
            source = stack.enter_context(_source(path, kind))
        except OSError as error:
            raise Failure(f"Failed to read {path}: {error.strerror}", 2) from error
        yield source


@contextmanager
def _source(path: str, kind: str) -> Iterator[BufferedIOBase]:
    """The raw bytes to import."""
    if path == STREAM:
        yield standard_input()
    elif kind == "raw":
        with open(path, "rb") as file:
            yield file
    else:
        with _beside(Path(tempfile.gettempdir()) / "import") as raw:
            _qemu_img("convert", "-f", kind, "-O", "raw", path, str(raw))
            with raw.open("rb") as file:
                yield file


def _sectors(size: int) -> int:
    """Volumes are whole sectors, as every guest thinks."""
    return -(-size // SECTOR) * SECTOR


def _fill(context: Context, name: bytes, source: BufferedIOBase, size: int) -> None:
    """Only what the file holds: its holes, and whole chunks of zeros, stay holes."""
    volume = _open(context, name)
    with Progress("import", size) as progress:
        for length in in_order(_writes(volume, source, size)):
            progress.advance(length)
    volume.close()


def _writes(volume: BlockingVolume, source: BufferedIOBase, size: int) -> Iterator[Callable[[], int]]:
    space = buffers()
    for start, end in _data(source, size):
        source.seek(start)
        for offset in range(start, end, CHUNK_BYTES):
            data = next(space)[: min(CHUNK_BYTES, end - offset)]
            yield partial(_write, volume, offset, data[: source.readinto(data)])


def _write(volume: BlockingVolume, offset: int, data: memoryview) -> int:
    if not is_zero(data):
        volume.write(offset, data)
    return len(data)


def _data(source: BufferedIOBase, size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are no holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(source.fileno(), position, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        end = os.lseek(source.fileno(), start, os.SEEK_HOLE)
        yield start, min(end, size)
        position = end


def _fill_from_pipe(context: Context, name: bytes, source: BufferedIOBase) -> None:
    """The volume grows with what comes."""
    volume = _open(context, name)
    run_all(_growing_writes(volume, source))
    volume.close()


def _growing_writes(volume: BlockingVolume, source: BufferedIOBase) -> Iterator[Callable[[], int]]:
    space = buffers()
    offset = 0
    while count := source.readinto(data := next(space)):
        volume.resize(_sectors(offset + count))
        yield partial(_write, volume, offset, data[:count])
        offset += count


# -- both


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name in the target's directory for a file that is not there yet; removed at the end if it still is."""
    number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(number)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _qemu_img(*words: str) -> None:
    progress = ["-p"] if sys.stderr.isatty() else []
    command = ["qemu-img", words[0], *progress, *words[1:]]
    try:
        done = subprocess.run(command, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError as error:
        raise Failure("qcow2 needs the program qemu-img (Debian: qemu-utils)", 2) from error
    if done.returncode:
        raise Failure(done.stderr.strip() or "qemu-img failed")


def _open(context: Context, name: bytes) -> BlockingVolume:
    """A volume that was just made."""
    return BlockingVolume.open((context.host, context.port), name, patience_s=0, dial=connect_near)


def _open_any(context: Context, name: bytes, tag: bytes, snap_id: int) -> BlockingVolume | HyperVolume:
    try:
        return open_volume((context.host, context.port), name, tag, snap_id, patience_s=0, dial=connect_near)
    except SheepError as error:
        raise Failure(not_opened(name, tag, snap_id, error.result)) from error


def _reason(error: OSError) -> str:
    return text(error.result) if isinstance(error, SheepError) else error.strerror or str(error)
