"""The table of everything that is not object I/O: opcode -> handler.

An opcode that is in no table, or that `wire.opcodes.admit` refuses, is answered INVALID_PARMS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.ports import Store
from sheepdog.frontends.qemu.administration import Administration, Disks, Logs
from sheepdog.frontends.qemu.caches import CacheOperations
from sheepdog.frontends.qemu.copies import Copies
from sheepdog.frontends.qemu.requests import Handler
from sheepdog.frontends.qemu.vdis import VdiOperations


def handlers(
    node: Node, logs: Logs, store: Store, disks: Disks, failed_disks: Sequence[str] = ()
) -> dict[int, Handler]:
    """For one sheep. `failed_disks` are those out of service, as they become known."""
    return {
        **VdiOperations(node).handlers(),
        **Administration(node, store, logs, disks, failed_disks).handlers(),
        **CacheOperations(node).handlers(),
        **Copies(node, store, _next_turn).handlers(),
    }


def _next_turn(call: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(call)
