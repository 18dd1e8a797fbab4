"""`dog node md info|plug|unplug` (cli.md 2.7)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import Member
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.structures import MD_INFO_SIZE, DiskInfo, unpack_disks
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import caution, percent, size_text, text, warn


def info(context: Context) -> None:
    """The disks of the addressed node, or of all."""
    nodes = context.nodes()
    if context.json:
        _print_json(context, nodes)
        return
    if not context.raw:
        print("Id\tSize\tUsed\tAvail\tUse%\tPath")
    if not context.flag("all"):
        _print(f"{context.host}:{context.port}", _disks(context.gateway()), context.raw)
        return
    for number, node in enumerate(nodes):
        disks = _disks_of(context, node)
        if disks is None:
            continue
        if not context.raw:
            print(f"Node {number}:")
        _print(str(node.id), disks, context.raw)


def _disks(connection: Connection) -> list[DiskInfo]:
    try:
        return unpack_disks(admin.plain(connection, Opcode.MD_INFO, limit=MD_INFO_SIZE))
    except SheepError as error:
        raise Failure(f"failed to get multi-disk information: {text(error.result)}") from error


def _disks_of(context: Context, node: Member) -> list[DiskInfo] | None:
    """None for one of many that has none, or is not there; stderr says so."""
    try:
        return _disks(context.node(node.id))
    except (OSError, Unreachable):
        return None
    except Failure as failure:
        warn(failure.text)
        return None


def _print_json(context: Context, nodes: Sequence[Member]) -> None:
    from sheepdog.tools.dog.records import print_json

    if context.flag("all"):
        found = [(str(node.id), _disks_of(context, node) or []) for node in nodes]
    else:
        found = [(f"{context.host}:{context.port}", _disks(context.gateway()))]
    print_json(
        [
            {"node": name, "disk": disk.number, "path": os.fsdecode(disk.path), "used": disk.used, "free": disk.free}
            for name, disks in found
            for disk in disks
        ]
    )


def _print(node: str, disks: list[DiskInfo], raw: bool) -> None:
    for disk in disks:
        size = disk.used + disk.free
        share = percent(disk.used, size)
        sizes = [size_text(value, raw) for value in (size, disk.used, disk.free)]
        path = os.fsdecode(disk.path)
        if raw:
            print(node, disk.number, *sizes, share.strip(), path)
        else:
            print(f"{disk.number:2d}", *sizes, share, path, sep="\t")


def plug(context: Context) -> None:
    """Adds directories to a node's disks; what is in them is purged."""
    _change(context, Opcode.MD_PLUG, "Caution! The directories to be plugged will be purged.")


def unplug(context: Context) -> None:
    """Takes directories out of a node's disks; their objects are recovered from other nodes."""
    _change(context, Opcode.MD_UNPLUG, "Caution! Recovery will be triggered after unplugging.")


def _change(context: Context, opcode: Opcode, warning: str) -> None:
    paths = os.fsencode(context.argument(0))
    if not context.flag("force"):
        caution(warning)
    try:
        admin.plain(context.gateway(), opcode, paths + b"\0")
    except SheepError as error:
        raise Failure("Failed to execute request, look for sheep.log for more information") from error
