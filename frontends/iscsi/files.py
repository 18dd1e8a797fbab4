"""The volumes of one exporting host as files: a sheepfs of its own, which holds them for the kernel's target."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from contextlib import AbstractContextManager, closing
from pathlib import Path

from sheepdog.cluster.client import exclusive
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.exclusive import Held
from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.state import node_from_key, node_key

DIRECTORY = Path("/run/sheepdog/iscsi")
START_SECONDS = 300.0  # half a second; sheepfs says itself when it serves, but an emulated, loaded machine is slow
RELEASE_SECONDS = 20.0  # the kernel closes the file of a deleted disk a moment later
_OPEN_FILES = re.compile(r"^sheepdog_volume_open_files\{.*\} (\d+)$", re.MULTILINE)


class Files:
    """The mount of `host`."""

    def __init__(self, host: str, address: tuple[str, int], directory: Path = DIRECTORY) -> None:
        self.place = directory / host
        self._address = address

    def path(self, volume: str) -> Path:
        return self.place / "volume" / volume

    def is_alive(self) -> bool:
        """sheepfs is mounted and answers."""
        try:
            return self._is_mounted() and (self.place / "vdi" / "mount").exists()
        except OSError:
            return False

    def start(self) -> None:
        """Mounts sheepfs, unless it is; a dead mount is replaced. What held its files must have let go of them."""
        if self.is_alive():
            return
        self._detach()
        self.place.mkdir(parents=True, exist_ok=True)
        host, port = self._address
        command = [sys.executable, "-m", "sheepdog.frontends.sheepfs.main", "--transport=direct"]
        try:
            done = subprocess.run(
                [*command, "-a", host, "-p", str(port), str(self.place)],
                check=False, capture_output=True, timeout=START_SECONDS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UsageError(f"sheepfs on {self.place} does not come up within {START_SECONDS:.0f} s") from None
        if done.returncode:
            raise UsageError(
                f"sheepfs cannot be mounted on {self.place}: {done.stderr.decode(errors='replace').strip()}"
            )

    def show(self, volume: str, shared: bool = False) -> int:
        """Makes the volume's file appear, or its size be looked at anew; the size in bytes."""
        order = self.place / "vdi" / ("share" if shared else "lock")
        try:
            try:
                order.write_text(volume)
            except OSError as error:
                if error.errno != errno.EBUSY or shared or not self._take_back(volume):
                    raise
                order.write_text(volume)
            if not shared:
                self._remember_lock(volume)
            return self.path(volume).stat().st_size
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise UsageError(
                    f"somebody else has it open (dog vdi lock list; dog vdi lock unlock {volume} frees it)"
                ) from error
            raise UsageError(f"volume {volume}: {error.strerror}") from error

    def is_held(self, volume: str) -> bool:
        """Somebody has the volume's file open: the kernel's disk is on this sheepfs, not on one that is gone."""
        try:
            text = (self.place / "stat" / "volume" / volume).read_text()
        except OSError:
            return False
        found = _OPEN_FILES.search(text)
        return found is not None and int(found.group(1)) > 0

    def shown(self) -> list[str]:
        try:
            return sorted(os.listdir(self.place / "volume"))
        except OSError:
            return []

    def hide(self, volume: str) -> None:
        """Takes the file away, flushed, once nobody holds it; UsageError, and it stays, if it cannot be flushed."""
        deadline = time.monotonic() + RELEASE_SECONDS
        while True:
            try:
                (self.place / "vdi" / "unmount").write_text(volume)
                return
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return  # it is gone
                if error.errno == errno.EIO:
                    raise UsageError("it cannot be flushed; what initiators wrote last may not be durable") from error
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise UsageError(f"it cannot be released: {error.strerror}") from error
            time.sleep(0.1)

    def stop(self) -> None:
        """Unmounts sheepfs, which ends; nothing if it is not there."""
        if self.is_alive():
            done = subprocess.run(["umount", str(self.place)], check=False, capture_output=True)
            if done.returncode:
                raise UsageError(done.stderr.decode(errors="replace").strip())
        else:
            self._detach()

    # -- locks that a sheepfs which died has left behind

    def _lock_record(self, volume: str) -> Path:
        """Where a restart of the host deletes it: who has the lock by then cannot be known."""
        return self.place.with_name(f"{self.place.name}.locks") / volume

    def _remember_lock(self, volume: str) -> None:
        with self._connection() as connection:
            held = exclusive.held(connection, os.fsencode(volume))
        record = self._lock_record(volume)
        if held is None:
            record.unlink(missing_ok=True)
        else:
            record.parent.mkdir(exist_ok=True)
            record.write_text(f"{node_key(held.node)} {held.epoch}")

    def _take_back(self, volume: str) -> bool:
        """Ends the lock of our sheepfs that died, if it is that which keeps us out."""
        if volume in self.shown():
            return False
        try:
            node, epoch = self._lock_record(volume).read_text().split()
        except (OSError, ValueError):
            return False
        with self._connection() as connection:
            return exclusive.release(connection, os.fsencode(volume), Held(node_from_key(node), int(epoch)))

    def _connection(self) -> AbstractContextManager[Connection]:
        return closing(Connection(self._address, 0))

    def _is_mounted(self) -> bool:
        """Also if its server is dead, when looking at the place itself fails."""
        with open("/proc/self/mountinfo") as table:
            return any(line.split()[4] == str(self.place) for line in table)

    def _detach(self) -> None:
        """A mount whose server is dead can only be taken away lazily."""
        if not self._is_mounted():
            return
        subprocess.run(["umount", "-l", str(self.place)], check=False, capture_output=True)
