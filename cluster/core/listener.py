"""What the cluster's state machine tells its node."""

from __future__ import annotations

from typing import Protocol

from sheepdog.cluster.core.commands import Command
from sheepdog.cluster.core.ids import Member


class Listener(Protocol):
    """What the node does when the state has changed (core.node)."""

    def epoch_changed(self) -> None:
        """A new epoch, or the first one after a start."""

    def formatted(self) -> None: ...

    def operation_due(self, operation: Command) -> None:
        """This node executes the operation at the head of the queue."""

    def operation_ended(self, operation: Command) -> None: ...

    def state_changed(self, command: Command) -> None:
        """A one-step command was applied."""

    def refused(self, reason: str) -> None: ...

    def expelled(self, member: Member) -> None:
        """A member was struck out that may still run, and answer its clients while its lease lasts."""

    def coordinator_due(self) -> None:
        """The coordinator has something to do; `ClusterMachine.awaited` tells for how long it has not."""

    def suspended(self, suspended: bool, reason: str) -> None: ...

    def lost(self, reason: str) -> None: ...
