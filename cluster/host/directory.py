"""One directory of object files: names, the list of what is there, and the space left.

Layout: `<16 hex digits>` one file per object, `<16 hex digits>_<index>` one per strip, `.new/` files not yet in
place, `.stale/` superseded copies,
`.index` the list of copies as of an orderly end (removed before the first change, so a crash leaves none).
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from xxhash import xxh3_64_intdigest

from sheepdog.cluster.core.errors import Corrupt, UsageError
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, Version, oid_name, strip_of
from sheepdog.cluster.core.ports import Buffer, Log
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.disk import Disk

RESERVE_PART: Final = 64  # 1/64 of the disk stays free for trailers, journal and restores ...
RESERVE_MAX_BYTES: Final = 256 << 20  # ... but never more than this, which is enough for any disk
SPACE_CHECK_BYTES: Final = 16 << 20  # the file system is asked again after this much was handed out
# A larger write makes the kernel keep the file in larger pieces of its page cache (large folios), and then every later
# write of 4 KiB costs up to four times as much: ext4 walks all blocks of the piece.
WRITE_PIECE_BYTES: Final = 32 << 10

_INDEX_MAGIC: Final = b"SHEEPIDX"
_INDEX_FORMAT: Final = 2
_INDEX_HEAD = struct.Struct("<8sIIQ")  # magic, format, zero, count
_INDEX_ENTRY = struct.Struct("<QQQQQQQ")  # oid, strip + 1, size, allocated bytes, epoch, term, counter
_CHECKSUM = struct.Struct("<Q")
_NAME: Final = re.compile(r"([0-9a-f]{16})(?:_([0-9]{1,2}))?")
_NAME_LENGTH: Final = 16
_OID_MASK: Final = (1 << STRIP_SHIFT) - 1


class Listed:
    """One copy found at start; size -1 when the file is not a readable object (its version is NO_VERSION then)."""

    __slots__ = ("allocated", "oid", "size", "version")

    def __init__(self, oid: ObjectId, size: int, allocated: int, version: Version) -> None:
        self.oid = oid
        self.size = size
        self.allocated = allocated
        self.version = version


class ObjectDirectory:
    """Files of one disk. `failed` is set when the disk is out of service."""

    def __init__(self, disk: Disk, path: str, log: Log) -> None:
        self.path = path
        self.failed = False
        self.full = False  # a change found no room that had been set aside (no_room.py)
        self.doubtful = False  # it was out of service before this start: what it holds may be old
        self.used = 0  # bytes allocated by objects
        self.weight = 1  # size in bytes when first used
        self.identity = b""
        self.names_changed = False  # since the last sync of the directory began
        self._disk = disk
        self._log = log
        self._sequence = 0
        self._unreadable: dict[ObjectId, str] = {}  # found at start; why
        self._allowance = 0  # bytes that may be handed out before the file system is asked again

    def prepare(self) -> None:
        """Makes the directories and drops files that never got into place; UsageError when that is impossible."""
        for path in (self.path, f"{self.path}/.new", f"{self.path}/.stale"):
            make_directory(self._disk, path)
        for name in self._disk.listdir(f"{self.path}/.new"):
            self._disk.unlink(f"{self.path}/.new/{name}")

    def file_path(self, oid: ObjectId) -> str:
        return f"{self.path}/{oid_name(oid)}"

    def new_path(self, oid: ObjectId) -> str:
        """A name for a file that is not in place yet; a different one at every call."""
        self._sequence += 1
        return f"{self.path}/.new/{oid_name(oid)}.{self._sequence}"

    def sync(self) -> None:
        self._disk.sync_directory(self.path)

    def has_room(self, size_bytes: int) -> bool:
        """May `size_bytes` more be allocated without touching the reserve? Counts them as used when so."""
        if self.full:
            return False
        if size_bytes > self._allowance:
            try:
                room = self._room()
            except OSError:
                return True  # the directory is gone: what is done there next tells, and takes the disk out
            if size_bytes > room:
                return False
            self._allowance = max(size_bytes, min(SPACE_CHECK_BYTES, room // 8))
        self._allowance -= size_bytes
        return True

    def free(self) -> int:
        """Bytes still free for objects; none where the directory is gone."""
        try:
            return max(0, self._room())
        except OSError:
            return 0

    def _room(self) -> int:
        space = self._disk.space(self.path)
        return space.free - min(RESERVE_MAX_BYTES, space.total // RESERVE_PART)

    def load(self) -> list[Listed]:
        """What is here, from the index of an orderly end (consumed) or by reading every trailer."""
        names = self._names()
        index = self._take_index()
        if index is None:
            return [self._examine(oid) for oid in sorted(names)]
        found = [entry for entry in index if entry.oid in names]
        if len(found) < len(names):  # files put here while nobody looked
            known = {entry.oid for entry in found}
            found += [self._examine(oid) for oid in sorted(names) if oid not in known]
        return found

    def take_unreadable(self) -> dict[ObjectId, str]:
        """Copies whose headers `load` could not read, and why: the journal may make them good."""
        found, self._unreadable = self._unreadable, {}
        return found

    def save_index(self, copies: Iterable[Listed]) -> None:
        """Durable list of the copies, valid until the next `load`. Everything it names must be durable already."""
        entries = b"".join(
            _INDEX_ENTRY.pack(copy.oid & _OID_MASK, copy.oid >> STRIP_SHIFT, copy.size, copy.allocated, *copy.version)
            for copy in copies
            if copy.size >= 0
        )
        head = _INDEX_HEAD.pack(_INDEX_MAGIC, _INDEX_FORMAT, 0, len(entries) // _INDEX_ENTRY.size)
        write_file(self._disk, self.path, ".index", head + entries)

    def _names(self) -> dict[ObjectId, None]:
        names: dict[ObjectId, None] = {}
        for name in self._disk.listdir(self.path):
            match = _NAME.fullmatch(name)
            if match is not None:
                oid, strip = ObjectId(int(match[1], 16)), match[2]
                names[oid if strip is None else strip_of(oid, int(strip))] = None
            elif len(name) == _NAME_LENGTH:
                self._log(4, f"{self.path}/{name}: not an object file, ignored")
        return names

    def _take_index(self) -> list[Listed] | None:
        path = f"{self.path}/.index"
        try:
            data = read_file(self._disk, path)
            if data is None:
                return None
            entries = list(_parse_index(data))
        except Corrupt as error:
            self._log(4, f"{path}: {error}, reading all objects instead")
            entries = None
        self._disk.unlink(path)
        self._disk.sync_directory(self.path)
        return entries

    def _examine(self, oid: ObjectId) -> Listed:
        """Reads one file's header."""
        path = self.file_path(oid)
        fd = self._disk.open(path, os.O_RDONLY)
        try:
            info = self._disk.info(fd)
            try:
                header = read_header(self._disk, fd, info.length, oid)
            except Corrupt as error:
                self._unreadable[oid] = str(error)
                return Listed(oid, -1, info.allocated, NO_VERSION)
            version = NO_VERSION if header.flags & trailer.RESTORING else header.version
            return Listed(oid, header.size, info.allocated, version)
        finally:
            self._disk.close(fd)


def is_object_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def read_header(disk: Disk, fd: int, length: int, oid: ObjectId) -> trailer.Header:
    """Header of the object file `fd` of `length` bytes; Corrupt when it is none or another object's."""
    offset = trailer.offset_in_file(length)
    atom = bytearray(trailer.HEADER_SIZE)
    if offset is None or disk.preadv(fd, [atom], offset) != len(atom):
        raise Corrupt(f"no object file has {length} bytes")
    header = trailer.parse_header(atom)
    if header.oid != oid or trailer.trailer_offset(header.size) != offset:
        raise Corrupt(f"header is of object {oid_name(header.oid)} with {header.size} bytes")
    return header


def make_directory(disk: Disk, path: str) -> None:
    """Creates a directory (0750) unless it is there; UsageError as cli.md 1.2 words it."""
    try:
        disk.mkdir(path)
    except OSError as error:
        raise UsageError(f"cannot create the directory {path} ({os.strerror(error.errno or errno.EIO)})") from error


def open_if_there(disk: Disk, path: str, flags: int = os.O_RDONLY) -> int | None:
    """A descriptor of the file, None without one; OSError."""
    try:
        return disk.open(path, flags)
    except FileNotFoundError:
        return None


def read_file(disk: Disk, path: str) -> bytes | None:
    """Contents of a file sealed by `write_file`, without its seal; None without a file; Corrupt."""
    fd = open_if_there(disk, path)
    if fd is None:
        return None
    try:
        data = bytearray(disk.info(fd).length)
        count = disk.preadv(fd, [data], 0)
    finally:
        disk.close(fd)
    if count != len(data) or count < _CHECKSUM.size:
        raise Corrupt("file is too short")
    body = bytes(data[: -_CHECKSUM.size])
    if _CHECKSUM.unpack_from(data, len(body))[0] != xxh3_64_intdigest(body):
        raise Corrupt("file does not match its checksum")
    return body


def write_file(disk: Disk, directory: str, name: str, data: bytes) -> None:
    """Replaces a small file atomically and durably, sealed with a checksum."""
    temporary = f"{directory}/{name}.new"
    fd = disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        write_all(disk, fd, data + _CHECKSUM.pack(xxh3_64_intdigest(data)), 0)
        disk.fdatasync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, f"{directory}/{name}")
    disk.sync_directory(directory)


def is_no_room(error: OSError) -> bool:
    """A full disk, which is an answer; all else is a failure of the disk."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_exhausted(error: OSError) -> bool:
    """A lack of memory or of descriptors, which is not the disk's fault."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def write_all(disk: Disk, fd: int, data: Buffer, offset: int) -> None:
    """Writes everything or raises ENOSPC."""
    done, size = 0, len(data)
    view = memoryview(data)
    while done < size:
        count = disk.pwrite(fd, view[done : done + WRITE_PIECE_BYTES], offset + done)
        if count == 0:  # a short count comes before it, or from a signal
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count


def _parse_index(body: bytes) -> Iterator[Listed]:
    if len(body) < _INDEX_HEAD.size:
        raise Corrupt("index is too short")
    magic, form, _, count = _INDEX_HEAD.unpack_from(body)
    if magic != _INDEX_MAGIC or form != _INDEX_FORMAT or len(body) != _INDEX_HEAD.size + count * _INDEX_ENTRY.size:
        raise Corrupt("index of an unknown format")
    for oid, strip, size, allocated, epoch, term, counter in _INDEX_ENTRY.iter_unpack(body[_INDEX_HEAD.size :]):
        yield Listed(ObjectId(oid | strip << STRIP_SHIFT), size, allocated, Version(epoch, term, counter))
