"""The 48-byte headers of requests and responses, one layout per overlay (protocol.md 2).

All overlays share their first 16 bytes: version, opcode, flags, epoch, id, length. In a request `data_length`
is the payload's size if the WRITE flag is set, else the room for the answer; in a response always the payload's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sheepdog.cluster.wire.layout import Layout

HEADER_SIZE: Final = 48
_COMMON: Final = "BBHIII"


class Request(NamedTuple):
    """What every request starts with; for operations without fields of their own."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0


class ObjectRequest(NamedTuple):
    """Object I/O, FLUSH_VDI, GET_HASH, EXIST and the two PEER operations (2.3).

    `copies` and `copy_policy` are guesses of the client: the server's own record counts.
    """

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    oid: int = 0
    cow_oid: int = 0
    copies: int = 0
    copy_policy: int = 0
    ec_index: int = 0
    tgt_epoch: int = 0
    offset: int = 0


class VdiRequest(NamedTuple):
    """NEW_VDI, LOCK_VDI, RELEASE_VDI, GET_VDI_INFO, DEL_VDI, GET_VDI_ATTR (2.5)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    vdi_size: int = 0
    base_vdi_id: int = 0
    copies: int = 0
    copy_policy: int = 0
    store_policy: int = 0
    block_size_shift: int = 0
    snap_id: int = 0
    lock_type: int = 0  # 0 normal, 1 shared


class ClusterRequest(NamedTuple):
    """MAKE_FS, STAT_CLUSTER, ALTER_CLUSTER_COPY (2.7)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    ctime: int = 0  # seconds << 32 | nanoseconds
    copies: int = 0
    copy_policy: int = 0
    cluster_flags: int = 0
    nodes_nr: int = 0  # node slots reserved in each epoch record
    block_size_shift: int = 0


class VdiStateRequest(NamedTuple):
    """NOTIFY_VDI_ADD, ALTER_VDI_COPY (2.7)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    old_vid: int = 0
    new_vid: int = 0
    copies: int = 0
    set_bitmap: int = 0
    copy_policy: int = 0
    block_size_shift: int = 0


class RepairRequest(NamedTuple):
    """REPAIR_REPLICA: fetch `oid` from the node at this address (2.7)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    oid: int = 0
    address: bytes = b""
    port: int = 0


class Response(NamedTuple):
    """Any response, read for its result only. The server sends version 0 and flags 0; `epoch` is the current one."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    result: int = 0


class VdiResponse(NamedTuple):
    """NEW_VDI, LOCK_VDI, GET_VDI_INFO, DEL_VDI, GET_VDI_ATTR (2.6)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    result: int = 0
    vdi_id: int = 0  # GET_VDI_ATTR: the hash of the name, not the VDI's own vid
    attr_id: int = 0
    copies: int = 0
    block_size_shift: int = 0


class ClusterDefaultResponse(NamedTuple):
    """GET_CLUSTER_DEFAULT (2.7)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    result: int = 0
    copies: int = 0
    copy_policy: int = 0
    block_size_shift: int = 0


class NodeResponse(NamedTuple):
    """GET_NODE_LIST (`nr_nodes`) and STAT_SHEEP (`store_size`, `store_free` in bytes) (2.7)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    result: int = 0
    nr_nodes: int = 0
    store_size: int = 0
    store_free: int = 0


class HashResponse(NamedTuple):
    """GET_HASH: SHA-1 of the replica (2.7)."""

    version: int = 0
    opcode: int = 0
    flags: int = 0
    epoch: int = 0
    id: int = 0
    data_length: int = 0
    result: int = 0
    digest: bytes = b""


REQUEST: Final = Layout(Request._make, _COMMON + "32x")
OBJECT_REQUEST: Final = Layout(ObjectRequest._make, _COMMON + "QQBBBxII4x")
VDI_REQUEST: Final = Layout(VdiRequest._make, _COMMON + "QIBBBBII8x")
CLUSTER_REQUEST: Final = Layout(ClusterRequest._make, _COMMON + "8xQBBH4xIB3x")
VDI_STATE_REQUEST: Final = Layout(VdiStateRequest._make, _COMMON + "IIBBBB20x")
REPAIR_REQUEST: Final = Layout(RepairRequest._make, _COMMON + "Q16sH6x")
RESPONSE: Final = Layout(Response._make, _COMMON + "I28x")
VDI_RESPONSE: Final = Layout(VdiResponse._make, _COMMON + "I4xIIBB14x")
CLUSTER_DEFAULT_RESPONSE: Final = Layout(ClusterDefaultResponse._make, _COMMON + "IBBB25x")
NODE_RESPONSE: Final = Layout(NodeResponse._make, _COMMON + "II8xQQ")
HASH_RESPONSE: Final = Layout(HashResponse._make, _COMMON + "I4x20s4x")

# Places of an OBJECT_REQUEST's fields, for what comes with every read and write.
OID_AT: Final = 16
COW_OID_AT: Final = 24
OFFSET_AT: Final = 40
