"""`dog vdi cache info|flush|delete|purge` (docs/cache.md)."""

from __future__ import annotations

import os
from typing import Any

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, inode_oid
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import CACHED_AWAY, confirm, human_size, text
from sheepdog.tools.dog.values import snapshot_option
from sheepdog.tools.dog.volumes import find, name_of

_PURGE_QUESTION = "This operation purges the cache of all the vdi. Continue? [yes/no]: "


def info(context: Context) -> None:
    """What the node's cache holds, volume by volume."""
    try:
        found = admin.cache_info(context.gateway())
    except SheepError as error:
        raise Failure(f"failed to get cache information: {text(error.result)}") from error
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json(found | {"volumes": [_record(volume) for volume in found["volumes"]]})
        return
    print("Name\tTag\tTotal\tDirty\tClean")
    for volume in found["volumes"]:
        total, dirty = volume["total"], volume["dirty"]
        sizes = "\t".join(human_size(size) for size in (total, dirty, total - dirty))
        print(f"{_shown(volume['name'])}\t{_shown(volume['tag'])}\t{sizes}")
    direct = "directio" if found["direct_io"] else "non-directio"
    print(f"\nCache size {human_size(found['size'])}, used {human_size(found['used'])}, {direct}")


def _record(volume: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": _shown(volume["name"]),
        "tag": _shown(volume["tag"]),
        "snapshot_id": volume["id"],
        "vdi_id": f"{volume['vid']:x}",
        "total": volume["total"],
        "dirty": volume["dirty"],
    }


def _shown(name: str) -> str:
    return os.fsdecode(name.encode("latin-1"))


def flush(context: Context) -> None:
    """What is dirty in any node's cache of the volume is pushed; it is durable at the end."""
    _ask(context, Opcode.FLUSH_VDI)


def delete(context: Context) -> None:
    """As flush; then no node has anything of the volume in its cache."""
    _ask(context, Opcode.FLUSH_VDI)
    _ask(context, Opcode.FLUSH_DEL_CACHE)


def purge(context: Context) -> None:
    """What is in caches of the volume, or of all, is dropped without having been pushed."""
    if context.optional(0) is not None:
        _ask(context, Opcode.CACHE_PURGE)
        return
    confirm(_PURGE_QUESTION)
    connection = context.gateway()
    for vid in inodes.volume_ids(connection):
        try:
            _request(connection, Opcode.CACHE_PURGE, vid)
        except SheepError as error:
            if error.result != Result.NO_CACHE:
                raise Failure("failed to execute request") from error


def _ask(context: Context, opcode: Opcode) -> None:
    tag, snap_id = snapshot_option(context)
    vid = find(context.gateway(), name_of(context.argument(0)), tag, snap_id)
    try:
        _request(context.gateway(), opcode, vid)
    except SheepError as error:
        why = f": {CACHED_AWAY}" if error.result == Result.VDI_LOCKED else ""
        raise Failure(f"failed to execute request{why}") from error


def _request(connection: Connection, opcode: Opcode, vid: Vid) -> None:
    connection.call(admin.object_request(opcode, inode_oid(vid)))
