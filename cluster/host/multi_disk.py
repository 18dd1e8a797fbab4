"""Disks of a running node: which there are, plug and unplug, and what becomes of a disk that went (cli.md 2.7, md)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Final

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import ObjectDirectory, is_object_name, make_directory
from sheepdog.cluster.host.known_disks import KnownDisks
from sheepdog.cluster.host.object_file import write_trailer
from sheepdog.cluster.host.superblock import read_disk_identity

# What the kernel says of a disk that is broken; anything else about a directory is a mistake on the command line.
_BROKEN: Final = frozenset((errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.EUCLEAN))


class Disks:
    """The disks of a store. `open_disk` puts an empty directory into service.

    `on_lost(objects, told)` gets the copies that went with a disk, and calls `told` when META/settled does not count on
    them any more; it is set by who has them restored. `forget` makes META/settled prove nothing (durably, OSError).
    """

    def __init__(
        self,
        copies: Copies,
        metadata: str,
        node: bytes,
        open_disk: Callable[[str], ObjectDirectory],
        forget: Callable[[], None],
    ) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._node = node
        self._open_disk = open_disk
        self._known = KnownDisks(copies.disk, metadata, copies.log)
        self._known.load()
        copies.disk_out = self.failed
        self._forget = forget
        self.on_lost: Callable[[list[ObjectId], Callable[[], None]], None] = lambda oids, told: None

    # At start

    def open(self, directories: Iterable[str]) -> None:
        """Puts into service what can be used and names the rest in the log; UsageError without any (cli.md 1.2)."""
        for directory in directories:
            try:
                self._open_disk(directory)
            except (UsageError, OSError) as failure:
                error = failure.__cause__ if isinstance(failure, UsageError) else failure
                if not isinstance(error, OSError) or (failure is not error and error.errno not in _BROKEN):
                    raise
                text = f"{directory}: {error.strerror or error}"
                self._copies.log(2, f"{text}: the disk cannot be used, the node starts without it")
                self._copies.on_disk_failure(directory, text, False)
        if not self._copies.homes:
            raise UsageError("no disk of this node can be used")

    def is_doubtful(self, home: ObjectDirectory) -> bool:
        """The disk was out of service: what is on it may be old."""
        return self._known.is_out(home.identity)

    def some_missing(self) -> bool:
        """The journal may have records of copies on a disk that is not here (any more, until `settle`)."""
        return self._known.in_journal() or bool(self._known.missing(home.identity for home in self._copies.homes))

    def settle(self) -> None:
        """After the replay: copies on doubtful disks have no version any more, durably, and all disks are known.

        Other nodes tell what has changed since; what has not is not fetched again. OSError.
        """
        homes = self._copies.homes
        gone = self._known.missing(home.identity for home in homes)
        if gone:
            self._copies.log(4, f"{len(gone)} disks that this node had are not here: what they held is restored")
        for home in homes:
            if home.doubtful and not home.failed:
                self._distrust(home)
        if gone or self._known.untold():  # perhaps one that failed just now; or the last start was cut off here
            self._forget()
        self._known.went(gone)
        self._known.came([home.identity for home in homes if not home.failed])
        self._known.replayed()

    def _distrust(self, home: ObjectDirectory) -> None:
        copies = [copy for copy in self._copies.by_oid.values() if copy.home is home]
        self._copies.log(5, f"{home.path} was out of service: its {len(copies)} copies are compared with the others'")
        for copy in copies:
            if copy.size < 0 or self._copies.open_now(copy) is not None:
                continue
            copy.version = copy.applied = NO_VERSION
            copy.restoring = True
            copy.trusted = False
            write_trailer(self._disk, copy, trailer.RESTORING)
            self._disk.fdatasync(copy.fd)

    # In service

    def _in_service(self) -> list[ObjectDirectory]:
        return [home for home in self._copies.homes if not home.failed]

    def listed(self) -> list[tuple[str, int, int]]:
        """(path, bytes in use by objects, bytes still free) of the disks in service, by path."""
        return sorted((home.path, home.used, home.free()) for home in self._in_service())

    def failed(self, home: ObjectDirectory, lost: list[ObjectId]) -> None:
        """A disk went out of service by an error: remembered, so that what it holds is not trusted after a restart."""
        try:
            self._known.went([home.identity])
        except OSError as error:
            self._copies.log(3, f"{home.path}: cannot note that it is out of service: {error}")
        self._tell(home, lost)

    def _tell(self, home: ObjectDirectory, lost: list[ObjectId]) -> None:
        def told() -> None:
            try:
                self._known.told([home.identity])
            except OSError as error:  # then the next start proves nothing, which is slow and safe
                self._copies.log(4, f"{home.path}: cannot note that its copies are being restored: {error}")

        self.on_lost(lost, told)

    def purge(self, directory: str) -> None:
        """Empties a directory that is to be plugged; blocks. UsageError, OSError. May run in any thread."""
        make_directory(self._disk, directory)
        identity = read_disk_identity(self._disk, directory)
        if identity is not None and identity.node != self._node:
            raise UsageError(f"{directory} belongs to the store of another node ({identity.node.hex()})")
        for name in self._disk.listdir(directory):
            if is_object_name(name) or name == ".index":
                self._disk.unlink(f"{directory}/{name}")
        self._disk.sync_directory(directory)

    def check_pluggable(self, directory: str) -> None:
        """UsageError."""
        if not directory.startswith("/"):
            raise UsageError(f"{directory} is not an absolute path")
        if any(home.path == directory for home in self._in_service()):
            raise UsageError(f"{directory} is in service already")

    def plug(self, directory: str) -> None:
        """Empties a directory and puts it into service: new objects go there by its share. Blocks."""
        self.check_pluggable(directory)
        self.purge(directory)
        self.attach(directory)

    def attach(self, directory: str) -> None:
        """Puts a purged directory into service; UsageError, OSError."""
        home = self._open_disk(directory)
        self._known.came([home.identity])
        self._copies.log(5, f"{directory}: in service")

    def unplug(self, directory: str) -> list[ObjectId]:
        """Takes a disk out of service; its files stay. Returns the copies to be restored. UsageError, OSError."""
        homes = self._in_service()
        home = next((home for home in homes if home.path == directory), None)
        if home is None:
            raise UsageError(f"{directory} is not in service")
        self._known.went([home.identity])
        lost = self._copies.remove_home(home)
        self._copies.log(5, f"{directory}: out of service, {len(lost)} objects to restore")
        if len(homes) == 1:
            self._copies.on_disk_failure(directory, "the last disk was unplugged", True)
        else:
            self._tell(home, lost)
        return lost

    def held(self, directory: str) -> list[ObjectId]:
        """What lies on a disk."""
        return [oid for oid, copy in self._copies.by_oid.items() if copy.home.path == directory]
