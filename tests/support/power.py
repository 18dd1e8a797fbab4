"""A power failure for nodes on this machine: what their disk had not been told to keep is gone.

The nodes' directories lie on an ext4 of their own, on a loop device over a file. That file holds what the file system
has sent to its disk; what is still in the page cache is not in it. So after everybody was killed, a copy of the file is
the disk as a machine finds it that lost its power at that moment.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import run

SIZE = "6G"  # sparse: as much as the nodes set aside for their journals, and some data


class FragileDisk:
    """A mounted file system that can lose its power. Needs root and loop devices."""

    def __init__(self, directory: Path, size: str = SIZE) -> None:
        self.place = directory / "disk"
        self.place.mkdir()
        self._image = directory / "image"
        run(["truncate", "-s", size, self._image])
        # No writing back on its own within a test: a commit each 5 s would keep what nobody asked to be kept.
        run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=1", self._image])
        self._mount()

    def lose_power(self) -> None:
        """The nodes must have been killed; afterwards the directory holds what a new start of the machine finds."""
        after = self._image.with_name("after")
        run(["cp", "--sparse=always", self._image, after])
        run(["umount", self.place])
        after.replace(self._image)
        self._mount()

    def _mount(self) -> None:
        run(["mount", "-o", "loop,commit=300", self._image, self.place])

    def close(self) -> None:
        run(["umount", "-l", self.place], check=False)
