"""The directory of the local driver: the lock, and one file and one socket per member.

    lock            flock LOCK_EX around every change of the log or of this directory
    N.member        owner holds flock LOCK_EX for life; read position in the log u64, then the card
    N.sock          unix datagram socket on which member N is woken
    (N is the incarnation; ascending N is ascending age)

A member is alive as long as its file is locked: the kernel drops the lock with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from sheepdog.cluster.core.ports import Peer

_POSITION = struct.Struct("<Q")
_CARD = struct.Struct("<QIH")
_MEMBER = ".member"
_SOCKET = ".sock"
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class MemberCard:
    """What a JOIN record and a member file say. `pid` means something only in the pid namespace `namespace`."""

    peer: Peer
    pid: int
    namespace: int

    def encode(self) -> bytes:
        return _CARD.pack(self.namespace, self.pid, len(self.peer.id)) + self.peer.id + self.peer.payload

    @classmethod
    def decode(cls, incarnation: int, data: bytes) -> MemberCard:
        namespace, pid, id_length = _CARD.unpack_from(data)
        start = _CARD.size
        peer = Peer(data[start : start + id_length], incarnation, data[start + id_length :])
        return cls(peer, pid, namespace)


def pid_namespace() -> int:
    """Identity of this process's pid namespace; 0 where /proc does not tell."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class MemberDirectory:
    """FILE.d. `create` and `remove` must be called with the lock held."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._directory = -1
        self._lock = -1
        self._sender: socket.socket | None = None

    def open(self) -> None:
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = os.open("lock", _FLAGS | os.O_CREAT, 0o600, dir_fd=self._directory)
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def close(self) -> None:
        for fd in (self._directory, self._lock):
            if fd >= 0:
                os.close(fd)
        self._directory = self._lock = -1
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def try_lock(self) -> bool:
        """Never waits: the holder may be a stopped process, and the loop must go on."""
        return _flock(self._lock, fcntl.LOCK_EX)

    def unlock(self) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def touch(self) -> None:
        os.utime(self._directory)
        os.utime(self._lock)

    def in_place(self) -> bool:
        """Whether the path still names the open directory, and it the open lock."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._directory)) and os.path.samestat(
                os.stat("lock", dir_fd=self._directory), os.fstat(self._lock)
            )
        except OSError:
            return False

    def incarnations(self) -> list[int]:
        """Of all member files, oldest first; their owners may be dead."""
        names = map(os.path.splitext, os.listdir(self._directory))
        return sorted(int(stem) for stem, suffix in names if suffix == _MEMBER and stem.isdigit())

    def is_dead(self, incarnation: int) -> bool:
        """Whether nobody owns the member file; also true when there is none.

        A shared lock is tried, so that two members asking at the same time do not take each other for the owner.
        """
        try:
            fd = os.open(f"{incarnation}{_MEMBER}", _FLAGS, dir_fd=self._directory)
        except FileNotFoundError:
            return True
        try:
            return _flock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    def exists(self, incarnation: int) -> bool:
        return os.access(f"{incarnation}{_MEMBER}", os.F_OK, dir_fd=self._directory)

    def create(self, card: MemberCard, position: int) -> tuple[int, socket.socket]:
        """The locked member file (close it to be dead) and the bound socket."""
        incarnation = card.peer.incarnation
        fd = os.open(f"{incarnation}{_MEMBER}", _FLAGS | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(fd, _POSITION.pack(position) + card.encode(), 0)
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            bound.bind(self._socket_path(incarnation))
        except BaseException:
            self.remove(incarnation)
            os.close(fd)
            raise
        return fd, bound

    def remove(self, incarnation: int) -> None:
        for suffix in (_SOCKET, _MEMBER):  # the member file last: while it exists, a next one cleans up
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{incarnation}{suffix}", dir_fd=self._directory)

    def card(self, incarnation: int) -> MemberCard:
        return MemberCard.decode(incarnation, self._read(incarnation)[_POSITION.size :])

    def position(self, incarnation: int) -> int:
        """Published read position: the member needs nothing of the log below it."""
        return int(_POSITION.unpack_from(self._read(incarnation))[0])

    @staticmethod
    def publish(fd: int, position: int) -> None:
        """Replaces the read position in one's own member file."""
        os.pwrite(fd, _POSITION.pack(position), 0)

    def wake(self, incarnation: int) -> None:
        """Best effort: a member that is busy, stopped or gone is not waited for."""
        if self._sender is not None:
            with contextlib.suppress(OSError):
                self._sender.sendto(b"\1", socket.MSG_DONTWAIT, self._socket_path(incarnation))

    def _read(self, incarnation: int) -> bytes:
        fd = os.open(f"{incarnation}{_MEMBER}", _FLAGS, dir_fd=self._directory)
        try:
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)

    def _socket_path(self, incarnation: int) -> str:
        # Through the open directory: the path of a socket holds 107 bytes, a directory's may be longer.
        return f"/proc/self/fd/{self._directory}/{incarnation}{_SOCKET}"


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
