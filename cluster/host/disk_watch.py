"""Looks after the object directories: one that has gone is a failed disk, also while all its files are open."""

from __future__ import annotations

import os
from functools import partial

from sheepdog.cluster.core.limits import DISK_LOOK_NS
from sheepdog.cluster.core.ports import Clock
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.directory import ObjectDirectory


class DiskWatch:
    """Takes out of service the disks whose directory cannot be looked at."""

    def __init__(self, copies: Copies, clock: Clock) -> None:
        self._copies = copies
        self._clock = clock
        self._looking: dict[str, None] = {}

    def start(self) -> None:
        for home in self._copies.homes:
            if not home.failed and home.path not in self._looking:  # a disk that hangs is asked once
                self._looking[home.path] = None
                self._copies.workers.run(partial(self._look, home), partial(self._looked, home))
        self._clock.after(DISK_LOOK_NS, self.start)

    def _look(self, home: ObjectDirectory) -> None:
        disk = self._copies.disk
        disk.close(disk.open(f"{home.path}/.disk", os.O_RDONLY))

    def _looked(self, home: ObjectDirectory, result: OSError | None) -> None:
        self._looking.pop(home.path, None)
        if isinstance(result, OSError) and not home.failed:
            self._copies.fail(home, result)
