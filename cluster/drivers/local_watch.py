"""Notices the death of members on this host: by pidfd at once, else by trying their lock a few times a second."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from sheepdog.cluster.drivers.local_members import MemberCard, MemberDirectory, pid_namespace

LOCK_POLL_S = 0.2  # without a usable pidfd (other pid namespace, old kernel): well within one second


class DeathWatch:
    """Calls back with the incarnation of a member that seems dead, on the loop's thread; proof is the caller's."""

    def __init__(self, directory: MemberDirectory, suspect: Callable[[int], None]) -> None:
        self._directory = directory
        self._suspect = suspect
        self._namespace = pid_namespace()
        self._pidfds: dict[int, int] = {}
        self._polled: dict[int, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, card: MemberCard) -> None:
        incarnation = card.peer.incarnation
        pidfd = self._open_pidfd(card)
        if pidfd < 0:
            self.poll(incarnation)
            return
        self._pidfds[incarnation] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._died, incarnation)
        if self._directory.is_dead(incarnation):  # the pid may have been another process's already
            self._died(incarnation)

    def poll(self, incarnation: int) -> None:
        """Watches a member by its lock only."""
        self._polled[incarnation] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOCK_POLL_S, self._try_locks)

    def remove(self, incarnation: int) -> None:
        self._polled.pop(incarnation, None)
        pidfd = self._pidfds.pop(incarnation, -1)
        if pidfd >= 0:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    def close(self) -> None:
        for incarnation in list(self._pidfds):
            self.remove(incarnation)
        self._polled.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _open_pidfd(self, card: MemberCard) -> int:
        if not card.namespace or card.namespace != self._namespace:
            return -1
        try:
            return os.pidfd_open(card.pid)
        except OSError:
            return -1  # dead already, or no pidfds here: its lock tells

    def _died(self, incarnation: int) -> None:
        self.remove(incarnation)
        self._suspect(incarnation)

    def _try_locks(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOCK_POLL_S, self._try_locks) if self._polled else None
        for incarnation in list(self._polled):
            if self._directory.is_dead(incarnation):
                self._died(incarnation)
