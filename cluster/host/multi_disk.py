"""Disks of a running node: which there are, plug and unplug (cli.md 2.7, md)."""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import ObjectDirectory, is_object_name, make_directory
from sheepdog.cluster.host.superblock import read_disk_identity


class Disks:
    """The disks of a store. `open_disk` puts an empty directory into service."""

    def __init__(self, copies: Copies, node: bytes, open_disk: Callable[[str], ObjectDirectory]) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._node = node
        self._open_disk = open_disk

    def _in_service(self) -> list[ObjectDirectory]:
        return [home for home in self._copies.homes if not home.failed]

    def listed(self) -> list[tuple[str, int, int]]:
        """(path, bytes in use by objects, bytes still free) of the disks in service, by path."""
        return sorted((home.path, home.used, home.free()) for home in self._in_service())

    def plug(self, directory: str) -> None:
        """Empties a directory and puts it into service: new objects go there by its share. Blocks; UsageError, OSError.

        Objects that are on other disks stay there.
        """
        if any(home.path == directory for home in self._in_service()):
            raise UsageError(f"{directory} is in service already")
        make_directory(self._disk, directory)
        identity = read_disk_identity(self._disk, directory)
        if identity is not None and identity.node != self._node:
            raise UsageError(f"{directory} belongs to the store of another node ({identity.node.hex()})")
        for name in self._disk.listdir(directory):
            if is_object_name(name) or name == ".index":
                self._disk.unlink(f"{directory}/{name}")
        self._open_disk(directory)
        self._copies.log(5, f"{directory}: in service")

    def unplug(self, directory: str) -> list[ObjectId]:
        """Takes a disk out of service; its files stay as they are. Returns the copies to be restored. UsageError."""
        homes = self._in_service()
        home = next((home for home in homes if home.path == directory), None)
        if home is None:
            raise UsageError(f"{directory} is not in service")
        lost = self._copies.remove_home(home)
        self._copies.log(5, f"{directory}: out of service, {len(lost)} objects to restore")
        if len(homes) == 1:
            self._copies.on_disk_failure(directory, "the last disk was unplugged", True)
        return lost
