"""Operations on the cluster and on one node: what `dog cluster` and `dog node` ask (protocol.md 3.3.10, 12, 14)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.health import report
from sheepdog.cluster.core.ids import Member
from sheepdog.cluster.core.limits import DEFAULT_SHIFT, MAX_COPIES, MAX_NODES, MAX_RECOVERY_DELAY_S
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.ports import Store
from sheepdog.cluster.core.state import PROTOCOL_VERSION, STORE_NAMES, ClusterFlag
from sheepdog.cluster.core.strings import until_nul
from sheepdog.cluster.wire.header import CLUSTER_REQUEST, NODE_RESPONSE, NodeResponse
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.response import response
from sheepdog.cluster.wire.structures import (
    CLUSTER_INFO_SIZE,
    DISK_CLUSTER_INFO_SIZE,
    EPOCH_HEADER,
    MD_INFO_SIZE,
    NODE_SIZE,
    RECOVERY_STATE,
    RECOVERY_THROTTLE,
    STATISTICS,
    ClusterInfo,
    DiskInfo,
    EpochHeader,
    RecoveryState,
    RecoveryThrottle,
    node_record_size,
    pack_cluster_info,
    pack_disks,
    pack_epoch,
    pack_nodes,
)
from sheepdog.frontends.qemu.connection import Call
from sheepdog.frontends.qemu.requests import Handler
from sheepdog.frontends.qemu.vdis import valid_shift

MAX_EPOCH_LOG_BYTES = 16 << 20  # of one STAT_CLUSTER answer: 2,000 epochs of 100 nodes; the newest come first
_LOG_LEVELS = range(8)
_MAX_VNODES = 65_535
_NS_PER_MS = 1_000_000


class Logs(Protocol):
    """What they need of the daemon's log: its level, 0 (emerg) to 7 (debug)."""

    level: int


class Disks(Protocol):
    """The disks of this node; the callbacks tell whether at least one directory could be changed."""

    def listed(self) -> list[tuple[str, int, int]]:
        """(path, bytes used, bytes free) by path."""

    def rot(self) -> dict[str, int]:
        """Blocks that were found bad since the start, that are right again, that are still bad."""

    def plug(self, paths: Sequence[str], done: Callable[[bool], None]) -> None: ...

    def unplug(self, paths: Sequence[str], done: Callable[[bool], None]) -> None: ...


class Administration:
    """Of one sheep."""

    def __init__(self, node: Node, store: Store, logs: Logs, disks: Disks, failed_disks: Sequence[str]) -> None:
        self._node = node
        self._me = node.context.me
        self._store = store
        self._logs = logs
        self._md = disks
        self._failed_disks = failed_disks  # the daemon adds to it

    def handlers(self) -> dict[int, Handler]:
        operations = self._node.operations
        return {
            Opcode.GET_NODE_LIST: self._node_list,
            Opcode.STAT_CLUSTER: self._epoch_log,
            Opcode.CLUSTER_INFO: self._cluster_info,
            Opcode.MAKE_FS: self._format,
            Opcode.GET_STORE_LIST: self._store_list,
            Opcode.SHUTDOWN: lambda call: operations.shutdown(call.written),
            Opcode.KILL_NODE: lambda call: operations.kill(call.written),
            Opcode.FORCE_RECOVER: self._force_recover,
            Opcode.ENABLE_RECOVER: lambda call: operations.set_recovery(True, call.written),
            Opcode.DISABLE_RECOVER: lambda call: operations.set_recovery(False, call.written),
            Opcode.REWEIGHT: lambda call: operations.reweight(call.written),
            Opcode.STAT_SHEEP: self._usage,
            Opcode.STAT: self._statistics,
            Opcode.STAT_RECOVERY: self._recovery,
            Opcode.GET_RECOVERY: self._throttle,
            Opcode.SET_RECOVERY: self._set_throttle,
            Opcode.GET_LOGLEVEL: self._log_level,
            Opcode.SET_LOGLEVEL: self._set_log_level,
            Opcode.MD_INFO: self._disks,
            Opcode.SET_VNODES: self._set_vnodes,
            Opcode.NODE_DETAILS: self._details,
            Opcode.SCRUB: self._change_scrub,
            Opcode.SCRUB_STATUS: self._scrub_status,
            Opcode.ALTER_CLUSTER_COPY: self._alter_copies,
            Opcode.MD_PLUG: lambda call: self._change_disks(call, self._md.plug),
            Opcode.MD_UNPLUG: lambda call: self._change_disks(call, self._md.unplug),
            Opcode.TRACE_ENABLE: _no_support,
            Opcode.TRACE_DISABLE: _no_support,
            Opcode.TRACE_STATUS: _no_support,
            Opcode.TRACE_READ_BUF: _no_support,
            Opcode.NFS_CREATE: _no_support,
            Opcode.NFS_DELETE: _no_support,
        }

    # -- the cluster -------------------------------------------------------------------------------------------------

    def _node_list(self, call: Call) -> None:
        """The members as they are now, this node at least: dog gives up on an empty list."""
        size = node_record_size(call.length)
        members = (self._node.cluster.members or (self._member(),))[: call.length // size]
        if call.flags & Flags.WRITE or not members:
            call.fail(Result.INVALID_PARMS)
            return
        self._reply_nodes(call, members, size)

    def _member(self) -> Member:
        """This node as the others know it; before they do, only its address is sure."""
        members = self._node.cluster.members
        return next((member for member in members if member.id == self._me), Member(self._me, 0, 0, 0))

    def _reply_nodes(self, call: Call, members: Sequence[Member], size: int) -> None:
        head = NodeResponse(
            opcode=call.opcode,
            epoch=call.epoch,
            id=call.id,
            data_length=size * len(members),
            nr_nodes=len(members),
        )
        call.reply(NODE_RESPONSE.pack(head), pack_nodes(members, size))

    def _epoch_log(self, call: Call) -> None:
        """STAT_CLUSTER: the one answer that carries data with an error code (protocol.md 12.3)."""
        cluster = self._node.cluster
        slots = CLUSTER_REQUEST.unpack(call.header).nodes_nr
        if call.flags & Flags.WRITE or slots > MAX_NODES:
            call.fail(Result.INVALID_PARMS)
            return
        room = min(call.length, MAX_EPOCH_LOG_BYTES) // (EPOCH_HEADER.size + slots * NODE_SIZE)
        shown = cluster.epochs[::-1][:room] if cluster.ctime else []
        if slots and any(len(record.members) > slots for record in shown):
            call.fail(Result.BUFFER_SMALL)
            return
        first: EpochHeader | None = EpochHeader(
            cluster.ctime,
            0,
            0,
            0,
            int(cluster.disable_recovery),
            cluster.copies,
            cluster.policy,
            cluster.flags,
            cluster.store_name.encode(),
        )
        log = []
        for record in shown:
            log.append(pack_epoch(record, slots, first))
            first = None
        data = b"".join(log)
        head = response(call.opcode, call.id, call.epoch, cluster.result(), len(data))
        call.reply(head, data)

    def _cluster_info(self, call: Call) -> None:
        if call.flags & Flags.WRITE or call.length not in (CLUSTER_INFO_SIZE, DISK_CLUSTER_INFO_SIZE):
            call.fail(Result.INVALID_PARMS)
            return
        cluster = self._node.cluster
        info = ClusterInfo(
            version=PROTOCOL_VERSION,
            disable_recovery=int(cluster.disable_recovery),
            nr_nodes=0,  # counted by the packer
            epoch=cluster.epoch,
            ctime=cluster.ctime,
            cluster_flags=cluster.flags if cluster.ctime else self._own_strategy(),
            copies=cluster.copies,
            copy_policy=cluster.policy,
            status=cluster.status,
            block_size_shift=cluster.shift or DEFAULT_SHIFT,
            store=cluster.store_name.encode(),
        )
        members = cluster.epochs[-1].members if cluster.epochs else cluster.members
        call.done(Result.SUCCESS, pack_cluster_info(info, members, node_record_size(call.length)))

    def _own_strategy(self) -> int:
        """Before the cluster is formatted: as this node was started, which has to fit (cli.md 2.8, format -V)."""
        return 0 if self._node.machine.fixed_vnodes else ClusterFlag.AUTO_VNODES

    def _format(self, call: Call) -> None:
        fields = CLUSTER_REQUEST.unpack(call.header)
        shift = fields.block_size_shift
        if fields.copies > MAX_COPIES or not valid_shift(shift) or not fields.ctime:
            call.fail(Result.INVALID_PARMS)
            return
        store = until_nul(call.payload)
        delay_s = int.from_bytes(call.payload[len(store) + 1 :][:4], "little")  # ours: after the name's end
        if delay_s > MAX_RECOVERY_DELAY_S:
            call.fail(Result.INVALID_PARMS)
            return
        self._node.operations.format(
            fields.ctime,
            fields.copies,
            fields.copy_policy,
            fields.cluster_flags,
            shift,
            store.decode("latin-1"),
            call.written,
            delay_s,
        )

    def _store_list(self, call: Call) -> None:
        text = "".join(f"{name} " for name in reversed(STORE_NAMES[:2])).encode() + b"\0"
        call.done(Result.SUCCESS, text[: call.length])

    def _force_recover(self, call: Call) -> None:
        size = node_record_size(call.length)

        def started(result: Result) -> None:
            if result:
                call.fail(result)
                return
            epochs = self._node.cluster.epochs
            members = epochs[-1].members if epochs else ()
            self._reply_nodes(call, members[: call.length // size], size)

        if call.flags & Flags.WRITE:
            call.fail(Result.INVALID_PARMS)
        else:
            self._node.operations.force_recover(started)

    def _alter_copies(self, call: Call) -> None:
        fields = CLUSTER_REQUEST.unpack(call.header)
        copies, policy = fields.copies, fields.copy_policy
        if policy_of(policy) is not None or (not policy and 0 < copies <= MAX_COPIES):
            self._node.operations.new_epoch(call.written, copies, policy)
        else:
            call.fail(Result.INVALID_PARMS)

    # -- this node ---------------------------------------------------------------------------------------------------

    def _usage(self, call: Call) -> None:
        used, free = self._store.usage()
        head = NodeResponse(opcode=call.opcode, epoch=call.epoch, id=call.id, store_size=used + free, store_free=free)
        call.reply(NODE_RESPONSE.pack(head))

    def _fixed(self, call: Call, data: bytes) -> None:
        """An answer of fixed size; the client must have room for it."""
        if call.flags & Flags.WRITE or call.length < len(data):
            call.fail(Result.INVALID_PARMS)
        else:
            call.done(Result.SUCCESS, data)

    def _statistics(self, call: Call) -> None:
        self._fixed(call, STATISTICS.pack(call.statistics()))

    def _recovery(self, call: Call) -> None:
        recovers, finished, total = self._node.recovery_progress()
        state = RecoveryState(int(recovers), 1 if total else 0, finished, total)
        self._fixed(call, RECOVERY_STATE.pack(state))

    def _throttle(self, call: Call) -> None:
        most, interval_ns = self._node.context.throttle
        throttle = RecoveryThrottle(most, interval_ns // _NS_PER_MS, int(bool(most and interval_ns)))
        self._fixed(call, RECOVERY_THROTTLE.pack(throttle))

    def _set_throttle(self, call: Call) -> None:
        if len(call.payload) != RECOVERY_THROTTLE.size:
            call.fail(Result.INVALID_PARMS)
            return
        wanted = RECOVERY_THROTTLE.unpack(call.payload)
        self._node.context.throttle = (wanted.max_exec, wanted.interval_ms * _NS_PER_MS)
        call.done(Result.SUCCESS)

    def _details(self, call: Call) -> None:
        found = report(self._node, self._failed_disks, call.clients)
        about = {"node": str(self._me), "coder": self._node.context.coder.name}
        self._fixed(call, json.dumps(about | found.to_json()).encode())

    def _log_level(self, call: Call) -> None:
        self._fixed(call, self._logs.level.to_bytes(4, "little", signed=True))

    def _set_log_level(self, call: Call) -> None:
        level = int.from_bytes(call.payload, "little", signed=True) if len(call.payload) == 4 else -1
        if level in _LOG_LEVELS:
            self._logs.level = level
            call.done(Result.SUCCESS)
        else:
            call.fail(Result.INVALID_PARMS)

    def _scrub_status(self, call: Call) -> None:
        self._fixed(call, json.dumps(self._node.scrub.status() | {"rot": self._md.rot()}).encode())

    def _change_scrub(self, call: Call) -> None:
        """{"do": "start" | "stop" | "schedule", "hours": ..., "rate": bytes per second}"""
        scrub = self._node.scrub
        try:
            asked = json.loads(bytes(call.payload))
            what, hours, rate = asked["do"], int(asked.get("hours", scrub.hours)), int(asked.get("rate", scrub.rate))
        except (ValueError, TypeError, KeyError, AttributeError):
            call.fail(Result.INVALID_PARMS)
            return
        if not self._member().vnodes:
            call.fail(Result.GATEWAY_MODE)
        elif what == "schedule" and scrub.schedule(hours, rate):
            call.done(Result.SUCCESS)
        elif what in ("start", "stop"):
            (scrub.start if what == "start" else scrub.stop)()
            call.done(Result.SUCCESS)
        else:
            call.fail(Result.INVALID_PARMS)

    def _disks(self, call: Call) -> None:
        if call.flags & Flags.WRITE or call.length != MD_INFO_SIZE:
            call.fail(Result.INVALID_PARMS)
        elif not self._member().vnodes:
            call.fail(Result.GATEWAY_MODE)
        else:
            listed = enumerate(self._md.listed())
            disks = [DiskInfo(number, free, used, os.fsencode(path)) for number, (path, used, free) in listed]
            call.done(Result.SUCCESS, pack_disks(disks))

    def _change_disks(self, call: Call, change: Callable[[Sequence[str], Callable[[bool], None]], None]) -> None:
        """Plug or unplug; some of a list are enough for success."""
        paths = [os.path.normpath(path) for path in os.fsdecode(until_nul(call.payload)).split(",") if path]
        if not self._member().vnodes:
            call.fail(Result.GATEWAY_MODE)
        elif not self._node.cluster.ctime:
            call.fail(Result.WAIT_FOR_FORMAT)
        else:
            change(paths, lambda changed: call.done(Result.SUCCESS) if changed else call.fail(Result.SYSTEM_ERROR))

    def _set_vnodes(self, call: Call) -> None:
        vnodes = int.from_bytes(call.payload[:4], "little", signed=True) if len(call.payload) >= 4 else 0
        if not self._member().vnodes:
            call.fail(Result.GATEWAY_MODE)
        elif self._node.cluster.flags & ClusterFlag.AUTO_VNODES:
            call.fail(Result.INVALID_VNODES_STRATEGY)
        elif not 1 <= vnodes <= _MAX_VNODES:
            call.fail(Result.INVALID_PARMS)
        else:
            self._node.operations.set_vnodes(vnodes, call.written)


def _no_support(call: Call) -> None:
    call.fail(Result.NO_SUPPORT)
