"""VDI operations of the native protocol: opcode -> core operation (protocol.md 3.3.5-3.3.8, 8, 9, 14.4).

Handlers check lengths and shapes; what an operation means is core's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sheepdog.cluster.core.coherence import Coherence
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VID, VID_COUNT, Vid
from sheepdog.cluster.core.limits import ATTRIBUTE_SIZE, DEFAULT_SHIFT, MAX_COPIES, MAX_SHIFT, MIN_SHIFT
from sheepdog.cluster.core.operations import Operations
from sheepdog.cluster.core.script import run
from sheepdog.cluster.core.state import ClusterState, node_from_key
from sheepdog.cluster.core.strings import NAME_SIZE, until_nul
from sheepdog.cluster.core.vdi import LockState, VdiRecord
from sheepdog.cluster.wire.header import (
    CLUSTER_DEFAULT_RESPONSE,
    VDI_REQUEST,
    VDI_RESPONSE,
    VDI_STATE_REQUEST,
    ClusterDefaultResponse,
    VdiRequest,
    VdiResponse,
)
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.structures import BITMAP_SIZE, VDI_STATE_SIZE, VDI_STATES_MAX, VdiState, pack_vdi_state
from sheepdog.frontends.qemu.connection import Call
from sheepdog.frontends.qemu.requests import Handler

_SHARED = 1  # lock type (protocol.md 2.5)


class Cluster(Protocol):
    """What these operations need of `core.node.Node`."""

    @property
    def cluster(self) -> ClusterState: ...

    @property
    def operations(self) -> Operations: ...

    @property
    def coherence(self) -> Coherence: ...


class VdiOperations:
    """Of one sheep."""

    def __init__(self, node: Cluster) -> None:
        self._node = node

    def handlers(self) -> dict[int, Handler]:
        return {
            Opcode.NEW_VDI: self._new,
            Opcode.LOCK_VDI: self._lock,
            Opcode.RELEASE_VDI: self._release,
            Opcode.GET_VDI_INFO: self._info,
            Opcode.DEL_VDI: self._delete,
            Opcode.GET_VDI_ATTR: self._attribute,
            Opcode.READ_VDIS: lambda call: self._bitmap(call, self._node.cluster.vdis.in_use_bitmap),
            Opcode.READ_DEL_VDIS: lambda call: self._bitmap(call, self._node.cluster.vdis.deleted_bitmap),
            Opcode.GET_CLUSTER_DEFAULT: self._default,
            Opcode.GET_VDI_COPIES: self._states,
            Opcode.NOTIFY_VDI_ADD: self._add,
            Opcode.ALTER_VDI_COPY: self._alter,
        }

    def _new(self, call: Call) -> None:
        fields = VDI_REQUEST.unpack(call.header)
        name = until_nul(call.payload[:NAME_SIZE])
        shift = fields.block_size_shift
        tagged = len(call.payload) == 2 * NAME_SIZE and fields.snap_id and not fields.base_vdi_id
        if (
            (len(call.payload) != NAME_SIZE and not tagged)
            or not name
            or fields.copies > MAX_COPIES
            or not valid_shift(shift)
            or fields.base_vdi_id >= VID_COUNT
        ):
            call.fail(Result.INVALID_PARMS)
            return
        if tagged:  # ours: a snapshot of the volume as it is, with its tag
            self._node.operations.snapshot_vdi(
                name,
                until_nul(call.payload[NAME_SIZE:]),
                fields.copies,
                fields.copy_policy,
                lambda result, record: self._answer(call, result, record),
            )
            return
        self._node.operations.create_vdi(
            name,
            fields.vdi_size,
            Vid(fields.base_vdi_id),
            fields.copies,
            fields.copy_policy,
            fields.store_policy,
            shift,
            fields.snap_id,
            lambda result, record: self._answer(call, result, record),
        )

    def _lock(self, call: Call) -> None:
        target = _target(call)
        if target is not None:
            fields, name, tag = target
            shared = fields.lock_type == _SHARED

            def locked(result: Result, record: VdiRecord | None) -> None:
                self._answer(call, result, record, always=True)

            self._node.operations.lock_vdi(name, tag, fields.snap_id, shared, locked)

    def _info(self, call: Call) -> None:
        target = _target(call)
        if target is not None:
            fields, name, tag = target
            self._node.operations.find_vdi(
                name, tag, fields.snap_id, lambda result, record: self._answer(call, result, record)
            )

    def _delete(self, call: Call) -> None:
        target = _target(call)
        if target is not None:
            fields, name, tag = target
            self._node.operations.delete_vdi(
                name, tag, fields.snap_id, lambda result, record: self._answer(call, result, record)
            )

    def _answer(self, call: Call, result: Result, record: VdiRecord | None, always: bool = False) -> None:
        """The vid goes with success; a refused lock tells it too (`always`, protocol.md 2.6)."""
        if record is None or (result and not always):
            call.fail(result)
            return
        head = VdiResponse(
            opcode=call.opcode,
            epoch=call.epoch,
            id=call.id,
            result=result,
            vdi_id=record.vid,
            copies=record.copies,
            block_size_shift=record.shift,
        )
        call.reply(VDI_RESPONSE.pack(head))

    def _release(self, call: Call) -> None:
        fields = VDI_REQUEST.unpack(call.header)
        # Success in any case: a lock that is not held is no reason for a client to fail its close.
        self._node.operations.release_vdi(
            Vid(fields.base_vdi_id), fields.lock_type == _SHARED, lambda _: call.done(Result.SUCCESS)
        )

    def _attribute(self, call: Call) -> None:
        fields = VDI_REQUEST.unpack(call.header)
        if len(call.payload) != ATTRIBUTE_SIZE:
            call.fail(Result.INVALID_PARMS)
            return

        def ended(result: Result, vid: int, attribute: int) -> None:
            if result:
                call.fail(result)
                return
            head = VdiResponse(
                opcode=call.opcode,
                epoch=call.epoch,
                id=call.id,
                vdi_id=vid,
                attr_id=attribute,
                copies=self._node.cluster.copies,
            )
            call.reply(VDI_RESPONSE.pack(head))

        self._node.operations.attribute(
            bytes(call.payload),
            fields.snap_id,
            bool(call.flags & Flags.ATTR_CREATE),
            bool(call.flags & Flags.ATTR_EXCLUSIVE),
            bool(call.flags & Flags.ATTR_DELETE),
            ended,
        )

    def _bitmap(self, call: Call, bitmap: Callable[[], bytes]) -> None:
        """No volumes are not the same as not knowing them: members are missing, or were until a moment ago."""
        cluster = self._node.cluster
        state = cluster.result()
        if call.flags & Flags.WRITE or call.length != BITMAP_SIZE:
            call.fail(Result.INVALID_PARMS)
        elif state == Result.WAIT_FOR_JOIN:
            call.fail(state)
        elif state == Result.SUCCESS and not cluster.loaded:
            self._node.operations.find_vdi(b"", b"", 0, lambda *_: self._bitmap(call, bitmap))  # answered when it is
        else:
            call.done(Result.SUCCESS, bitmap())

    def _default(self, call: Call) -> None:
        cluster = self._node.cluster
        head = ClusterDefaultResponse(
            opcode=call.opcode,
            epoch=call.epoch,
            id=call.id,
            copies=cluster.copies,
            copy_policy=cluster.policy,
            block_size_shift=cluster.shift or DEFAULT_SHIFT,  # QEMU would make objects of one byte out of 0
        )
        call.reply(CLUSTER_DEFAULT_RESPONSE.pack(head))

    def _states(self, call: Call) -> None:
        """As many as there is room for: dog shows nothing at all when it is told that its buffer is too small."""
        room = min(call.length // VDI_STATE_SIZE, VDI_STATES_MAX)
        if call.flags & Flags.WRITE or not room:
            call.fail(Result.INVALID_PARMS if call.flags & Flags.WRITE else Result.BUFFER_SMALL)
            return
        records = list(self._node.cluster.vdis.records())
        if len(records) > room:  # whoever asks wants to know of locks
            records.sort(key=lambda record: (record.deleted, record.lock == LockState.UNLOCKED, record.vid))
        call.done(Result.SUCCESS, b"".join(pack_vdi_state(_state_of(record)) for record in records[:room]))

    def _add(self, call: Call) -> None:
        fields = VDI_STATE_REQUEST.unpack(call.header)
        shift = fields.block_size_shift
        if not 0 < fields.new_vid < VID_COUNT or fields.copies > MAX_COPIES or not valid_shift(shift):
            call.fail(Result.INVALID_PARMS)
        else:
            self._node.operations.add_vdi(
                Vid(fields.new_vid),
                fields.copies,
                fields.copy_policy,
                shift,
                bool(fields.set_bitmap),
                call.written,
            )

    def _alter(self, call: Call) -> None:
        """dog has written the new number into the inode's header as well, which alone would change nothing."""
        fields = VDI_STATE_REQUEST.unpack(call.header)
        if fields.set_bitmap:
            self._move(call, Vid(fields.new_vid))
        elif fields.copy_policy or not 0 < fields.copies <= MAX_COPIES:
            call.fail(Result.INVALID_PARMS)
        else:
            self._node.operations.alter_copies(Vid(fields.new_vid), fields.copies, call.written)

    def _move(self, call: Call, vid: Vid) -> None:
        """Our own meaning of a field that ALTER_VDI_COPY does not use: some objects are moved (core.moves)."""

        def moved(result: int) -> None:
            if result:
                call.fail(Result(result))
            else:  # clients that share the volume learn that their maps are old
                run(self._node.coherence.claim(vid), call.written)

        self._node.operations.move_objects(vid, moved)


def valid_shift(shift: int) -> bool:
    """Log2 of an object size that a client may ask for; 0 is the cluster's default."""
    return not shift or MIN_SHIFT <= shift <= MAX_SHIFT


def _target(call: Call) -> tuple[VdiRequest, bytes, bytes] | None:
    """Name and tag that a lookup is for; answers a call of another shape."""
    size = len(call.payload)
    if size not in (NAME_SIZE, 2 * NAME_SIZE):
        call.fail(Result.INVALID_PARMS)
        return None
    payload = memoryview(call.payload)
    return (
        VDI_REQUEST.unpack(call.header),
        until_nul(payload[:NAME_SIZE]),
        until_nul(payload[NAME_SIZE:]),
    )


def _state_of(record: VdiRecord) -> VdiState:
    owners = [node_from_key(owner) for owner in record.owners]
    shared = record.lock == LockState.SHARED
    return VdiState(
        vid=record.vid,
        copies=record.copies,
        snapshot=int(record.is_snapshot),
        deleted=int(record.deleted),
        copy_policy=record.policy,
        block_size_shift=record.shift,
        parent=record.parent or NO_VID,
        lock_state=record.lock,
        owner=owners[0] if record.lock == LockState.LOCKED and owners else None,
        participants=tuple(zip(record.sharing, owners, strict=True)) if shared else (),
    )
