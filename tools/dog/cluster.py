"""`dog cluster info|format|shutdown|recover|reweight` (cli.md 2.8)."""

from __future__ import annotations

import time

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Member
from sheepdog.cluster.core.limits import DEFAULT_COPIES
from sheepdog.cluster.core.strings import until_nul
from sheepdog.cluster.wire.header import ClusterRequest
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.structures import NODE_LIST_SIZE, EpochHeader
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import (
    caution,
    confirm,
    full_time,
    redundancy,
    request_failed,
    second,
    text,
    warn,
)
from sheepdog.tools.dog.values import parse_delay, parse_redundancy, parse_shift

STRICT, DISK_MODE, AUTO_VNODES, LOCKING, RECYCLING, AVOID_DISKFULL = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
"""Cluster flags (protocol.md 12.1)."""

_FORCE_QUESTION = """\
Caution! Please try starting all the cluster nodes normally before
running this command.

The cluster may need to be force recovered if:
  - the master node fails to start because of epoch mismatch; or
  - some nodes fail to start after a cluster shutdown.

Are you sure you want to continue? [yes/no]: """


def info(context: Context) -> None:
    """State of the cluster and its epochs, newest first. Status 0 whatever the state is."""
    nodes = context.nodes()
    log = admin.epoch_log(context.gateway(), len(nodes), context.epoch)
    first = log.records[0][0] if log.records else None
    if context.json:
        _info_json(log, first)
        return
    raw = context.raw

    def line(label: str, value: str) -> None:
        print(value if raw else f"{label}: {value}")

    if log.result == Result.SUCCESS and first:
        state = f"running, auto-recovery {'disabled' if first.disable_recovery else 'enabled'}"
    else:
        state = text(log.result)
    line("Cluster status", state)
    if context.verbose:
        if log.result == Result.SUCCESS and first:
            store = until_nul(first.store).decode(errors="replace")
            line("Cluster store", f"{store} with {redundancy(first.copies, first.copy_policy)} redundancy policy")
            line("Cluster vnodes strategy", "auto" if first.cluster_flags & AUTO_VNODES else "fixed")
        else:
            line("Cluster store", text(log.result))
        line("Cluster vnode mode", "disk" if first and first.cluster_flags & DISK_MODE else "node")
    else:
        print()
    if first is None:
        return
    if not raw:
        print(f"Cluster created at {full_time(first.ctime >> 32)}\n")
        print("Epoch Time           Version [Host:Port:V-Nodes,,,]")
    for position, (epoch, members) in enumerate(log.records):
        if context.flag("diff"):
            older = log.records[position + 1][1] if position + 1 < len(log.records) else None
            names = _difference(members, older)
        else:
            names = ", ".join(f"{node.id}:{node.vnodes}" for node in members)
        if raw:
            print(f"{epoch.began_s} {epoch.epoch} [{names}]")
        else:
            print(f"{second(epoch.began_s)} {epoch.epoch:6d} [{names}]")


def _difference(members: list[Member], older: list[Member] | None) -> str:
    if older is None:
        return "formated"
    now, before = {node.id for node in members}, {node.id for node in older}
    joined = [f"+{node.id}" for node in members if node.id not in before]
    left = [f"-{node.id}" for node in older if node.id not in now]
    return ", ".join(joined + left)


def _info_json(log: admin.EpochLog, first: EpochHeader | None) -> None:
    from sheepdog.tools.dog.records import node_record, print_json

    value: dict[str, object] = {"status": "running" if log.result == Result.SUCCESS else text(log.result)}
    if first:
        value |= {
            "auto_recovery": not first.disable_recovery,
            "store": until_nul(first.store).decode(errors="replace"),
            "redundancy": redundancy(first.copies, first.copy_policy),
            "vnodes": "auto" if first.cluster_flags & AUTO_VNODES else "fixed",
            "created": first.ctime >> 32,
        }
    value["epochs"] = [
        {
            "epoch": epoch.epoch,
            "began": epoch.began_s,
            "nodes": [node_record(number, node) for number, node in enumerate(members)],
        }
        for epoch, members in log.records
    ]
    print_json(value)


def format_cluster(context: Context) -> None:
    """A new, empty cluster out of the nodes that are there; everything stored is discarded."""
    copies, policy = parse_redundancy(context.value("copies")) if context.flag("copies") else (DEFAULT_COPIES, 0)
    shift = parse_shift(context.value("block_size_shift")) if context.flag("block_size_shift") else 0
    nodes = context.nodes()
    flags = 0 if context.flag("fixed_vnodes") else AUTO_VNODES
    _check_strategy(context, nodes, flags)
    for option, flag in (
        ("strict", STRICT),
        ("lock", LOCKING),
        ("recycle_vid", RECYCLING),
        ("avoid_diskfull", AVOID_DISKFULL),
    ):
        if context.flag(option):
            flags |= flag
    delay_s = parse_delay(context.value("recovery-delay", "0"))
    _format(context, nodes, copies, policy, shift, flags, context.value("store", "plain"), delay_s)


def make_cluster(context: Context, copies: int, policy: int, shift: int) -> None:
    """As `format`, with the strategy that the nodes were started with."""
    nodes = context.nodes()
    storing = next((node for node in nodes if node.vnodes), None)
    flags = admin.cluster_info(context.node(storing.id))[0].cluster_flags if storing else AUTO_VNODES
    _format(context, nodes, copies, policy, shift, flags & AUTO_VNODES, "plain")


def _format(
    context: Context,
    nodes: list[Member],
    copies: int,
    policy: int,
    shift: int,
    flags: int,
    store: str,
    recovery_delay_s: int = 0,
) -> None:
    zones = {node.zone for node in nodes if node.vnodes}
    if copies > len(zones):
        confirm(
            f"Number of copies ({copies}) is larger than number of zones ({len(zones)}).\n"
            "Are you sure you want to continue? [yes/no]: "
        )
    connection = context.gateway()
    if not context.flag("force") and _has_volumes(connection):
        caution("Caution! The cluster is not empty.")
    print(f"using backend {store} store", flush=True)
    now = time.time_ns()
    fields = ClusterRequest(
        ctime=now // 10**9 << 32 | now % 10**9,
        copies=copies,
        copy_policy=policy,
        cluster_flags=flags,
        block_size_shift=shift,
    )
    try:
        admin.format_cluster(connection, fields, store, recovery_delay_s)
    except SheepError as error:
        if error.result == Result.NO_STORE:
            stores = until_nul(admin.plain(connection, Opcode.GET_STORE_LIST, limit=512)).decode(errors="replace")
            print(f"Available stores:\n---------------------------------------\n{stores}", flush=True)
        raise Failure(f"Format failed: {text(error.result)}", 2) from error


def _has_volumes(connection: Connection) -> bool:
    """Also while members are missing: then nobody knows which."""
    try:
        return bool(inodes.volume_ids(connection))
    except SheepError as error:
        if error.result == Result.WAIT_FOR_JOIN:
            return True
        raise


def _check_strategy(context: Context, nodes: list[Member], flags: int) -> None:
    """Nodes with a fixed number of virtual nodes need -V, the others must not have it."""
    for node in nodes:
        if not node.vnodes:
            continue
        found, _ = admin.cluster_info(context.node(node.id))
        if found.cluster_flags & AUTO_VNODES == flags:
            continue
        if flags:
            raise Failure(
                "Need to specify the option of '-V', because there are vnode strategy of sheep is fixed in the cluster"
            )
        raise Failure(
            "Can not apply the option of '-V', because there are vnode strategy of sheep is auto in the cluster"
        )


def shutdown(context: Context) -> None:
    """All nodes stop orderly; they need a moment after this has returned."""
    _order(context, Opcode.SHUTDOWN)


def reweight(context: Context) -> None:
    """Every storing node publishes its free space anew."""
    _order(context, Opcode.REWEIGHT)


def enable_recovery(context: Context) -> None:
    """Objects move again after changes of membership."""
    _order(context, Opcode.ENABLE_RECOVER)
    print("Cluster recovery: enable")


def disable_recovery(context: Context) -> None:
    """Objects stay where they are until recovery is enabled again."""
    _order(context, Opcode.DISABLE_RECOVER)
    print("Cluster recovery: disable")


def force_recover(context: Context) -> None:
    """A cluster that waits for members which never come back starts with the nodes that are there."""
    if not context.flag("force"):
        confirm(_FORCE_QUESTION)
    try:
        admin.plain(context.gateway(), Opcode.FORCE_RECOVER, limit=NODE_LIST_SIZE)
    except SheepError as error:
        raise Failure(f"failed to execute request, {text(error.result)}") from error


def _order(context: Context, opcode: Opcode) -> None:
    try:
        admin.plain(context.gateway(), opcode)
    except SheepError as error:
        warn(request_failed(error.result))
        raise Failure(code=2) from error
