"""`dog vm list`: images by whether somebody has them open, as the locks say. Older documentation names it."""

from __future__ import annotations

import os

from sheepdog.cluster.core.ids import format_address
from sheepdog.cluster.wire.structures import VdiState
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.locks import LOCKED, SHARED, lock_states
from sheepdog.tools.dog.output import size_text
from sheepdog.tools.dog.vdi_list import volumes

_HEADER = (
    "Name            |Vdi size |Allocated| Shared  | Status\n"
    "----------------+---------+---------+---------+------------"
)


def list_machines(context: Context) -> None:
    """Every working volume. Only a cluster that was formatted with -l knows who has one open."""
    connection = context.gateway()
    states = lock_states(connection)
    rows = []
    for row in volumes(connection):
        if not row.inode.is_snapshot:
            unit = row.inode.object_size
            hosts = _hosts(states.get(row.inode.vdi_id))
            rows.append((os.fsdecode(row.inode.name), row.inode.vdi_size, row.own * unit, row.shared * unit, hosts))
    if context.json:
        from sheepdog.tools.dog.records import print_json

        keys = ("name", "size", "allocated", "shared", "hosts")
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    if not context.raw:
        print(_HEADER)
    for name, *sizes, hosts in rows:
        where = ",".join(hosts)
        if context.raw:
            print(name, *sizes, where or "-")
        else:
            shown = "|".join(f"{size_text(size, False):>9}" for size in sizes)
            print(f"{name:<16}|{shown}| {f'running on {where}' if where else 'not running'}")


def _hosts(state: VdiState | None) -> list[str]:
    if state is None:
        return []
    if state.lock_state == LOCKED and state.owner is not None:
        return [format_address(state.owner.address)]
    return [format_address(node.address) for _, node in state.participants] if state.lock_state == SHARED else []
