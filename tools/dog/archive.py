"""A directory of saved cluster states: every chunk of data once, compressed, named by its hash.

 format             "sheepdog cluster snapshots 1": what this description is of
 lock               held by whoever changes the directory, or needs that nobody does
 chunks/AB/HASH     at most 4 MiB of data as one zstd frame; HASH is BLAKE2b-256 of the data in hex, AB its beginning
 states/N           a saved state: BLAKE2b-256 of the rest as one line of hex, then a zstd frame of JSON (see `State`)

A chunk is complete before a state names it, a state appears as a whole or not at all. What was written is durable when
`add` returns.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import get_ident
from typing import Any

import zstandard

from sheepdog.cluster.core.messages import Buffer
from sheepdog.tools.dog.window import is_zero

CHUNK_BYTES = 4 << 20
FORMAT = "sheepdog cluster snapshots 1\n"
LEVEL = 3  # 300 MB/s a thread, and most of what compression can do for disk images
_PART = ".part"  # a file that is being written, or was when somebody was killed
HOLE = ""  # "hash" of a chunk of zeros
_HASH_BYTES = 32


class ArchiveError(Exception):
    """The directory is not what it should be; the text says where."""


@dataclass
class State:
    """One saved state. Times are Unix seconds; `vdis` are inode headers in base64, ascending by vid.

    `maps` gives for a vid the object map as [[index, owner vid]...]; `objects` for an object id in hex its chunks.
    """

    number: int
    tag: str
    time: int
    cluster: int  # ctime of the cluster: objects with equal ids in states of one cluster are the same
    copies: int
    policy: int
    shift: int
    vdis: list[str] = field(default_factory=list)
    maps: dict[str, list[list[int]]] = field(default_factory=dict)
    objects: dict[str, list[str]] = field(default_factory=dict)


def digest(data: Buffer) -> str:
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).hexdigest()


class Archive:
    """One directory, made when it is not there. Chunks may be put and got by many threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._chunks = path / "chunks"
        self._states = path / "states"
        self._fresh: set[Path] = set()  # directories with names that are not durable yet; never iterated in an order
        marker = path / "format"
        try:
            if not marker.exists():
                if path.exists() and not all(entry.name.endswith(_PART) for entry in path.iterdir()):
                    raise ArchiveError(f"{path} holds something else")
                path.mkdir(exist_ok=True)
                _write(marker, FORMAT.encode())
            if marker.read_text() != FORMAT:
                raise ArchiveError(f"{path} has a format that this version does not know")
            for directory in (self._chunks, self._states):  # after the mark: whoever was interrupted can go on
                directory.mkdir(exist_ok=True)
        except OSError as error:
            raise ArchiveError(f"{error.filename}: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One change at a time, and none while somebody needs what is there (`kept`)."""
        with open(self._path / "lock", "a") as file:
            self._lock(file.fileno(), fcntl.LOCK_EX)
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Nobody changes anything; also of a directory that cannot be written to."""
        with ExitStack() as stack:
            with suppress(FileNotFoundError):  # nothing was ever saved
                self._lock(stack.enter_context(open(self._path / "lock")).fileno(), fcntl.LOCK_SH)
            yield

    def _lock(self, file: int, kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            raise ArchiveError(f"somebody else uses {self._path}") from error

    # -- chunks

    def _place(self, name: str) -> Path:
        return self._chunks / name[:2] / name

    def put(self, data: Buffer) -> str:
        """Stores at most CHUNK_BYTES; their name."""
        if is_zero(data):
            return HOLE
        name = digest(data)
        place = self._place(name)
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            _write(place, zstandard.ZstdCompressor(level=LEVEL).compress(data))
            self._fresh.add(place.parent)
        return name

    def get(self, name: str) -> bytes:
        """The bytes of a chunk, proved by their hash; none for a hole."""
        if name == HOLE:
            return b""
        place = self._place(name)
        try:
            data = zstandard.ZstdDecompressor().decompress(place.read_bytes(), max_output_size=CHUNK_BYTES)
        except FileNotFoundError as error:
            raise ArchiveError(f"{place} is missing") from error
        except zstandard.ZstdError as error:
            raise ArchiveError(f"{place} is corrupt") from error
        if digest(data) != name:
            raise ArchiveError(f"{place} is corrupt")
        return data

    # -- states

    def states(self) -> list[State]:
        """All, ascending by number."""
        numbers = sorted(int(entry.name) for entry in self._states.iterdir() if entry.name.isdigit())
        return [self._read(number) for number in numbers]

    def find(self, word: str) -> State | None:
        """By number or tag."""
        return next((state for state in self.states() if word in (str(state.number), state.tag)), None)

    def _read(self, number: int) -> State:
        place = self._states / str(number)
        try:
            head, _, body = place.read_bytes().partition(b"\n")
            if head.decode() != digest(body):
                raise ArchiveError(f"{place} is corrupt")
            values: dict[str, Any] = json.loads(zstandard.ZstdDecompressor().decompressobj().decompress(body))
            return State(**values)
        except (OSError, ValueError, TypeError, zstandard.ZstdError) as error:
            raise ArchiveError(f"{place} cannot be read: {error}") from error

    def add(self, state: State) -> None:
        """Everything the state names has been put."""
        for directory in [*self._fresh, self._chunks]:
            _sync(directory)
        self._fresh.clear()
        body = zstandard.ZstdCompressor(level=LEVEL).compress(json.dumps(asdict(state)).encode())
        _write(self._states / str(state.number), digest(body).encode() + b"\n" + body)
        _sync(self._states)

    def delete(self, state: State) -> None:
        """The state, and the chunks that no other one names."""
        (self._states / str(state.number)).unlink()
        _sync(self._states)
        self.sweep()

    def sweep(self) -> None:
        """Removes what no state names, as an interrupted save leaves it too."""
        needed = {name for state in self.states() for chunks in state.objects.values() for name in chunks}
        for directory in self._chunks.iterdir():
            for entry in directory.iterdir():
                if entry.name not in needed:
                    entry.unlink()


def _write(place: Path, data: bytes) -> None:
    """A file that appears as a whole, durable but for its name."""
    part = place.with_name(f"{place.name}.{os.getpid()}.{get_ident()}{_PART}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _sync(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
