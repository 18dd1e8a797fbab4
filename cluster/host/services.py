"""What the doors ask of the daemon around the node: log level, disks, throttle, counters."""

from __future__ import annotations

from collections.abc import Sequence

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.ports import Store
from sheepdog.cluster.host.logs import Logs
from sheepdog.cluster.wire.structures import DiskInfo, RecoveryThrottle, Statistics

_NS_PER_MS = 1_000_000


class HostServices:
    """Of one sheep."""

    def __init__(self, context: Context, logs: Logs, store: Store, object_directory: str) -> None:
        self._context = context
        self._logs = logs
        self._store = store
        self._object_directory = object_directory

    def log_level(self) -> int:
        return self._logs.level

    def set_log_level(self, level: int) -> None:
        self._logs.level = level

    def disks(self) -> Sequence[DiskInfo]:
        used, free = self._store.usage()
        return [DiskInfo(0, free, used, self._object_directory.encode())]

    def throttle(self) -> RecoveryThrottle:
        most, interval_ns = self._context.throttle
        return RecoveryThrottle(most, interval_ns // _NS_PER_MS, int(most > 0))

    def set_throttle(self, throttle: RecoveryThrottle) -> None:
        self._context.throttle = (throttle.max_exec, throttle.interval_ms * _NS_PER_MS)

    def statistics(self) -> Statistics:
        counters = self._context.counters
        clients = counters.reads + counters.writes + counters.removes + counters.flushes
        peers = counters.peer_reads + counters.peer_writes + counters.peer_removes
        return Statistics(
            gateway_active=self._context.active_requests(),
            peer_active=0,  # a replica applies at once
            gateway_total=clients,
            peer_total=peers,
            gateway_rx_bytes=counters.rx,
            gateway_tx_bytes=counters.tx,
            peer_rx_bytes=counters.peer_rx,
            peer_tx_bytes=counters.peer_tx,
            gateway_remove=counters.removes,
            gateway_read=counters.reads,
            gateway_write=counters.writes,
            gateway_flush=counters.flushes,
            peer_remove=counters.peer_removes,
            peer_read=counters.peer_reads,
            peer_write=counters.peer_writes,
        )
