"""Mounts that a test makes: sheepfs, a filesystem on one of its volumes, and their teardown.

Order: unmount the filesystem, wait until the loop device has let go of the file, then unmount sheepfs. Every step has a
bound; what refuses is unmounted lazily, so that no test leaves a mount behind.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.cluster import Cluster
from tests.support.processes import BIN, end, having_argument, run, wait_ended, wait_until

MOUNT_SECONDS = 20.0


def mounted(place: Path) -> bool:
    """True for a mount point, also for one whose server is dead."""
    escaped = str(place).replace(" ", "\\040")
    with open("/proc/self/mountinfo") as table:
        return any(line.split()[4] == escaped for line in table)


class SheepFs:
    """sheepfs of a cluster on a directory."""

    def __init__(self, cluster: Cluster, place: Path, node: int = 0, *options: str) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        run([*cluster.prefix, BIN / "sheepfs", "-p", str(cluster.port(node)), *options, place])
        wait_until(lambda: mounted(place), MOUNT_SECONDS, f"sheepfs on {place}")

    def volume(self, name: str) -> Path:
        """Makes a volume appear, as `echo NAME > vdi/mount` does."""
        (self.place / "vdi" / "mount").write_text(f"{name}\n")
        return self.place / "vdi" / "volume" / name

    def release(self, name: str) -> None:
        (self.place / "vdi" / "unmount").write_text(f"{name}\n")

    def unmount(self) -> None:
        """As a user does it; CommandFailed when it is busy. The server ends by itself."""
        pids = having_argument(str(self.place))
        run(["umount", self.place] if os.geteuid() == 0 else ["fusermount3", "-u", self.place])
        wait_ended(pids, MOUNT_SECONDS, "sheepfs")

    def close(self) -> None:
        if mounted(self.place):
            lazily = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            run([*lazily, self.place], check=False)
        end(having_argument(str(self.place)))


class LoopMount:
    """A file mounted through a loop device, as `mount -o loop FILE PLACE` does it."""

    def __init__(self, file: Path, place: Path, *options: str) -> None:
        self.file = file
        self.place = place
        place.mkdir(exist_ok=True)
        run(["mount", "-o", ",".join(("loop", *options)), file, place])

    def unmount(self) -> None:
        """Returns when the loop device is gone too: only then may sheepfs be asked to release the volume."""
        run(["umount", self.place])
        self._wait_released()

    def close(self) -> None:
        if mounted(self.place):
            run(["umount", "-l", self.place], check=False)
            run(["sync", "-f", "/"], check=False)
        for device in self._devices():
            run(["losetup", "-d", device], check=False)
        self._wait_released()

    def _devices(self) -> list[str]:
        listing = run(["losetup", "-n", "-O", "NAME,BACK-FILE", "-l"]).stdout.decode().splitlines()
        rows = (line.split(None, 1) for line in listing if line.strip())
        names = {str(self.file), os.path.realpath(self.file)}
        return [row[0] for row in rows if len(row) == 2 and row[1].strip().removesuffix(" (deleted)") in names]

    def _wait_released(self) -> None:
        wait_until(lambda: not self._devices(), MOUNT_SECONDS, f"loop device on {self.file} gone", step=0.05)
