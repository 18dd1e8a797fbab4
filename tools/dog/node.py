"""`dog node list|info|stat|kill|vnodes|format` (cli.md 2.7)."""

from __future__ import annotations

import errno
import os
import time
from pathlib import PurePath

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.hashing import node_hash
from sheepdog.cluster.core.ids import Member
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.structures import STATISTICS, Statistics
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import percent, request_failed, size_text, warn

STORES = ("plain", "tree")
CONFIG_SIZE = 16
_WATCH_S = 1


def list_nodes(context: Context) -> None:
    """All nodes in ascending order of address and port; Id is the position."""
    nodes = context.nodes()
    wide = context.verbose
    asked = _asked(context) if wide or context.json else ""
    if context.json:
        from sheepdog.tools.dog.records import node_record, print_json

        print_json(
            [
                node_record(number, node) | {"node_id": f"{node_hash(node.id):016x}", "asked": str(node.id) == asked}
                for number, node in enumerate(nodes)
            ]
        )
        return
    if not context.raw:
        print("  Id   Host:Port         V-Nodes       Zone" + ("             Node id" if wide else ""))
    for number, node in enumerate(nodes):
        mark = " *" if str(node.id) == asked else ""
        if context.raw:
            row = f"{number} {node.id} {node.vnodes} {node.zone}"
            print(f"{row} {node_hash(node.id):016x}{mark}" if wide else row)
        else:
            row = f"{number:4d}   {node.id!s:<20}\t{node.vnodes:2d}{node.zone:11d}"
            print(f"{row}    {node_hash(node.id):016x}{mark}" if wide else row)


def _asked(context: Context) -> str:
    """Address and port of the node that -a and -p lead to, as the others know it: seldom 127.0.0.1."""
    return str(admin.node_details(context.gateway()).get("node", f"{context.host}:{context.port}"))


def info(context: Context) -> None:
    """Space of every node that answers, the sum, and how much all working volumes would take."""
    rows: list[tuple[Member, admin.Disk]] = []
    for node in context.nodes():
        try:
            rows.append((node, admin.disk_usage(context.node(node.id))))
        except SheepError as error:
            warn(request_failed(error.result))
        except (OSError, Unreachable):
            continue
    if not rows:
        raise Failure("Cannot get information from any nodes", 2)
    virtual = _virtual_size(context)
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json(
            {
                "nodes": [
                    {"node": str(node.id), "size": disk.size, "free": disk.free, "coder": _coder(context, node)}
                    for node, disk in rows
                ],
                "virtual_size": virtual,
            }
        )
        return
    raw = context.raw
    separator = " " if raw else "\t"
    if not raw:
        print("Id\tSize\tUsed\tAvail\tUse%")
    for number, (_, disk) in enumerate(rows):
        print(str(number) if raw else f"{number:2d}", _space(disk, raw), sep=separator)
    total = admin.Disk(sum(disk.size for _, disk in rows), sum(disk.free for _, disk in rows))
    if raw:
        print("Total", _space(total, raw), virtual)
    else:
        print("Total", _space(total, raw), sep="\t")
        print(f"\nTotal virtual image size\t{size_text(virtual, raw)}")
    if context.verbose:
        print("\nErasure coding by")
        for node, _ in rows:
            print(f"{node.id}\t{_coder(context, node)}")


def _coder(context: Context, node: Member) -> str:
    """What encodes and decodes on the node; - for a daemon that does not say."""
    return str(admin.node_details(context.node(node.id)).get("coder", "-"))


def _space(disk: admin.Disk, raw: bool) -> str:
    used = disk.size - disk.free
    share = percent(used, disk.size)
    columns = [size_text(size, raw) for size in (disk.size, used, disk.free)]
    return " ".join([*columns, share.strip()]) if raw else "\t".join([*columns, share])


def _virtual_size(context: Context) -> int:
    connection = context.gateway()
    found = inodes.headers(connection, inodes.volume_ids(connection))
    return sum(one.vdi_size for one in found if not isinstance(one, inodes.Unread) and not one.is_snapshot)


def kill(context: Context) -> None:
    """Ends one daemon: the addressed one, or that with an id."""
    wanted = context.optional(0)
    if context.flag("local"):
        if wanted is not None:
            raise Failure("don't use -l option and specify node id at the same time", USAGE_ERROR)
        connection = context.gateway()
    else:
        if wanted is None:
            raise Failure("please specify -l option or node id", USAGE_ERROR)
        if not (wanted.isascii() and wanted.isdigit()):
            raise Failure(f"Invalid node id '{wanted}', please specify a numeric value", USAGE_ERROR)
        nodes = context.nodes()
        if int(wanted) >= len(nodes):
            raise Failure(f"Invalid node id '{wanted}'", USAGE_ERROR)
        connection = context.node(nodes[int(wanted)].id)
    try:
        admin.plain(connection, Opcode.KILL_NODE)
    except SheepError as error:
        raise Failure(request_failed(error.result), 2) from error
    except ConnectionError as error:
        if error.errno == errno.EPROTO:
            raise  # something else listens there
        # else it was faster at dying than at answering


def stat(context: Context) -> None:
    """Request counters. The order of the values differs from the words above them, and parsers depend on it."""
    connection = context.gateway()
    watch = context.flag("watch")
    before: Statistics | None = None
    if context.json:
        import json

        from sheepdog.tools.dog.records import print_json
        from sheepdog.tools.dog.scrub import STATUS_SIZE

        counters = _counters(connection)
        scrub = json.loads(bytes(admin.plain(connection, Opcode.SCRUB_STATUS, limit=STATUS_SIZE)))
        print_json(counters._asdict() | {f"rot_{name}": count for name, count in scrub["rot"].items()})
        return
    if not context.raw:
        print("Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD" + "\tWRBW\tRDBW\tRPS" * watch)
    while True:
        now = _counters(connection)
        _print_counters(now, before, context.raw, watch)
        if not watch:
            return
        before = now
        time.sleep(_WATCH_S)


def _counters(connection: Connection) -> Statistics:
    try:
        return STATISTICS.unpack(admin.plain(connection, Opcode.STAT, limit=STATISTICS.size))
    except SheepError as error:
        raise Failure(request_failed(error.result)) from error


def _print_counters(now: object, before: object, raw: bool, watch: bool) -> None:
    for label, kind, has_flush in (("Client", "gateway", True), ("Peer", "peer", False)):

        def value(name: str, kind: str = kind, source: object = now) -> int:
            return int(getattr(source, f"{kind}_{name}"))

        counts = [value("read"), value("write")]
        if watch:
            counts.reverse()
        row = [value("active"), value("total"), *counts, value("remove"), value("flush") if has_flush else 0]
        columns = [str(number) for number in row]
        columns += [size_text(value(name), raw) for name in ("rx_bytes", "tx_bytes")]
        if watch:
            for name in ("rx_bytes", "tx_bytes"):
                rate = value(name) - value(name, kind, before) if before else 0
                columns.append(size_text(rate, raw))
            columns.append(str(value("total") - value("total", kind, before) if before else 0))
        if not raw:
            columns.insert(0, label)
        print("\t".join(columns), flush=watch)


def set_vnodes(context: Context) -> None:
    """A new number of virtual nodes for the addressed node of a cluster with fixed numbers."""
    text = context.argument(0)
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise Failure(f"Invalid number of vnodes '{text}': must be an integer between 1 and 65535", USAGE_ERROR)
    try:
        admin.plain(context.gateway(), Opcode.SET_VNODES, int(text).to_bytes(8, "little"))
    except SheepError as error:
        raise Failure("Failed to execute request", 255) from error


def format_directory(context: Context) -> None:
    """Writes the name of a store into a directory that no daemon uses yet."""
    directory = context.argument(0)
    store = context.optional(1)
    if store is None:
        raise UsageFailure("specify store format")
    if store not in STORES:
        raise Failure(f"expected store format: {', '.join(STORES)}", 2)
    path = str(PurePath(directory, "node_config"))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(handle, store.encode().ljust(CONFIG_SIZE, b"\0"))
            os.fsync(handle)
        finally:
            os.close(handle)
    except FileExistsError as error:
        raise Failure(f"config file already exists: {path}", 2) from error
    except OSError as error:
        raise Failure(f"failed to write {path}: {error.strerror}", 2) from error
