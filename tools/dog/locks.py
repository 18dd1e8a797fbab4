"""`dog vdi lock list|unlock` (cli.md 2.6)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.wire.structures import VdiState
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import long_address, text
from sheepdog.tools.dog.values import snapshot_option
from sheepdog.tools.dog.vdi_list import Row, rows, shown_id
from sheepdog.tools.dog.volumes import name_of

UNLOCKED, LOCKED, SHARED = 1, 2, 3
_PARTICIPANT = {1: "modified", 2: "shared", 3: "invalidated"}


def lock_states(connection: Connection) -> dict[int, VdiState]:
    """`admin.vdi_states`, for a command that ends without them."""
    try:
        return admin.vdi_states(connection)
    except SheepError as error:
        raise Failure(text(error.result)) from error


def list_locks(context: Context) -> None:
    """The locked volumes and who holds them."""
    connection = context.gateway()
    states = lock_states(connection)
    if context.json:
        _print_json(connection, states)
        return
    print("  Name         Id  VDI id  Tag            Owner node(s)")
    for row, state in _locked(connection, states):
        inode = row.inode
        if state.lock_state == LOCKED:
            owners = long_address(state.owner) if state.owner else ""
        else:
            owners = " ".join(
                f"{long_address(node)}({_PARTICIPANT.get(kind, kind)})" for kind, node in state.participants
            )
        print(
            f"{row.flag} {os.fsdecode(inode.name):<8}  {shown_id(inode):5d}  {inode.vdi_id:6x}  "
            f"{os.fsdecode(inode.tag):<13}  {owners}"
        )


def _locked(connection: Connection, states: dict[int, VdiState]) -> Iterator[tuple[Row, VdiState]]:
    """The locked volumes, in ascending order of vid. No others are read: they may be thousands."""
    locked = {vid: state for vid, state in states.items() if state.lock_state != UNLOCKED}
    for row in rows(connection, [vid for vid in inodes.volume_ids(connection) if vid in locked]):
        yield row, locked[row.inode.vdi_id]


def _print_json(connection: Connection, states: dict[int, VdiState]) -> None:
    from sheepdog.tools.dog.records import print_json
    from sheepdog.tools.dog.vdi_list import record

    found = []
    for row, state in _locked(connection, states):
        owners = [{"node": str(state.owner), "state": "locked"}] if state.owner else []
        owners += [{"node": str(node), "state": _PARTICIPANT.get(kind, str(kind))} for kind, node in state.participants]
        found.append({**record(row), "shared_lock": state.lock_state == SHARED, "owners": owners})
    print_json(found)


def unlock(context: Context) -> None:
    """Breaks the lock of a volume whose owner never released it."""
    tag, snap_id = snapshot_option(context)
    word = context.argument(0)
    connection = context.gateway()
    try:
        vid = admin.find(connection, name_of(word), tag, snap_id).vid
    except SheepError as error:
        raise Failure(f"Failed to find VDI {word}: {text(error.result)}") from error
    state = lock_states(connection).get(vid)
    if state is None or state.lock_state == UNLOCKED:
        raise Failure(f"VDI {word} ({_shown(vid, tag, snap_id)}) is not locked")
    admin.release_lock(connection, vid, state.lock_state == SHARED)


def _shown(vid: Vid, tag: bytes, snap_id: int) -> str:
    if snap_id:
        return f"snapid={snap_id}, vid={vid:x}"
    return f"tag={os.fsdecode(tag)}, vid={vid:x}" if tag else f"vid={vid:x}"
