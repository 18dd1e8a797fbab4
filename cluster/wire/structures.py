"""Payloads of the client protocol: node lists, epoch log, cluster info, VDI state, counters (protocol.md 14)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple

from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import VID_COUNT, EpochRecord, Member, NodeId
from sheepdog.cluster.core.limits import MAX_COPIES, MAX_NODES
from sheepdog.cluster.core.strings import padded
from sheepdog.cluster.wire.layout import Layout

Bytes = bytes | bytearray | memoryview

NODE_SIZE: Final = 80
DISK_NODE_SIZE: Final = 592  # of dog built for disk vnodes: 32 (disk, bytes) pairs follow, which we leave zero
DISK_MAX_NODES: Final = 830  # records of that size such a dog has room for
NODE_LIST_SIZE: Final = NODE_SIZE * MAX_NODES
DISK_NODE_LIST_SIZE: Final = DISK_NODE_SIZE * DISK_MAX_NODES
NODE_ID_SIZE: Final = 40
BITMAP_SIZE: Final = VID_COUNT // 8
VDI_STATES_MAX: Final = 512  # dog's buffer; it shows nothing when told BUFFER_SMALL
DISKS_MAX: Final = 64
_BITMAP_STEP: Final = 1024  # bytes looked at in one go: bitmaps are nearly empty


class NodeRecord(NamedTuple):
    """A node as dog sees it (14.1): `vnodes` 0 is a gateway, `space` is in bytes."""

    address: bytes
    port: int
    io_address: bytes
    io_port: int
    vnodes: int
    zone: int
    space: int


class NodeIdRecord(NamedTuple):
    """The identity inside a node record, as VDI states name lock owners."""

    address: bytes
    port: int
    io_address: bytes
    io_port: int


class EpochHeader(NamedTuple):
    """Head of one record of the epoch log (14.2); only the first record of a log fills the fields marked +."""

    ctime: int  # +
    began_s: int
    epoch: int
    nr_nodes: int
    disable_recovery: int  # +
    copies: int  # +
    copy_policy: int  # +
    cluster_flags: int  # +
    store: bytes  # +


class ClusterInfo(NamedTuple):
    """CLUSTER_INFO without its node slots (14.3)."""

    version: int
    disable_recovery: int
    nr_nodes: int
    epoch: int
    ctime: int
    cluster_flags: int
    copies: int
    copy_policy: int
    status: int
    block_size_shift: int
    store: bytes


class VdiState(NamedTuple):
    """State of one VDI (14.4); lock state: 1 unlocked, 2 locked, 3 shared. Participants: (state, node id)."""

    vid: int
    copies: int
    snapshot: int
    deleted: int
    copy_policy: int
    block_size_shift: int
    parent: int
    lock_state: int
    owner: NodeId | None
    participants: tuple[tuple[int, NodeId], ...]


class RecoveryState(NamedTuple):
    """STAT_RECOVERY (14.5); phase: 0 preparing the list, 1 recovering, 2 notifying. Counts are objects."""

    in_recovery: int
    phase: int
    finished: int
    total: int


class RecoveryThrottle(NamedTuple):
    """GET_RECOVERY and SET_RECOVERY (14.5); both numbers zero: unthrottled."""

    max_exec: int
    interval_ms: int
    active: int


class Statistics(NamedTuple):
    """STAT (14.6): requests in progress, requests ever, bytes, and requests by kind."""

    gateway_active: int
    peer_active: int
    gateway_total: int
    peer_total: int
    gateway_rx_bytes: int
    gateway_tx_bytes: int
    peer_rx_bytes: int
    peer_tx_bytes: int
    gateway_remove: int
    gateway_read: int
    gateway_write: int
    gateway_flush: int
    peer_remove: int
    peer_read: int
    peer_write: int


class DiskInfo(NamedTuple):
    """One disk of MD_INFO (14.7); sizes in bytes."""

    number: int
    free: int
    used: int
    path: bytes


NODE: Final = Layout(NodeRecord._make, "24x16sH16sH4xH2xIQ")
NODE_ID: Final = Layout(NodeIdRecord._make, "16sH16sH4x")
EPOCH_HEADER: Final = Layout(EpochHeader._make, "QQIIBBB3xH16s")
CLUSTER_INFO: Final = Layout(ClusterInfo._make, "BBHIQHBBBB3x16s7x")
RECOVERY_STATE: Final = Layout(RecoveryState._make, "B3xIQQ")
RECOVERY_THROTTLE: Final = Layout(RecoveryThrottle._make, "I4xQB7x")
STATISTICS: Final = Layout(Statistics._make, "15Q")
DISK_INFO: Final = Layout(DiskInfo._make, "i4xQQ4096s")
_VDI_STATE: Final = Struct("<IBBBBB3xII40sI")
VDI_STATE_SIZE: Final = _VDI_STATE.size + MAX_COPIES * (4 + NODE_ID_SIZE)
CLUSTER_INFO_SIZE: Final = CLUSTER_INFO.size + NODE_LIST_SIZE
DISK_CLUSTER_INFO_SIZE: Final = CLUSTER_INFO.size + DISK_NODE_LIST_SIZE
MD_INFO_SIZE: Final = DISKS_MAX * DISK_INFO.size + 8


def node_record_size(room: int) -> int:
    """Size of the node records in the answer, told by the client's buffer: dog is built in two ways (14.1)."""
    return DISK_NODE_SIZE if room in (DISK_NODE_LIST_SIZE, DISK_CLUSTER_INFO_SIZE) else NODE_SIZE


def pack_node(member: Member, record_size: int = NODE_SIZE) -> bytes:
    """One node record of `record_size` bytes."""
    record = NodeRecord(member.id.address, member.id.port, bytes(16), 0, member.vnodes, member.zone, member.space)
    return NODE.pack(record).ljust(record_size, b"\0")


def pack_nodes(members: Iterable[Member], record_size: int = NODE_SIZE) -> bytes:
    """A node list; the caller passes the members in ascending order of id, as dog expects them."""
    return b"".join([pack_node(member, record_size) for member in members])


def unpack_nodes(data: Bytes, record_size: int = NODE_SIZE) -> list[Member]:
    """The nodes of a list; PeerError if it does not end with a whole record."""
    if len(data) % record_size:
        raise PeerError(f"node list of {len(data)} bytes")
    records = [NODE.unpack(data, start) for start in range(0, len(data), record_size)]
    return [Member(NodeId(node.address, node.port), node.zone, node.vnodes, node.space) for node in records]


def pack_epoch(record: EpochRecord, slots: int, first: EpochHeader | None = None) -> bytes:
    """One record of the epoch log with `slots` node slots; with 0 slots it tells of no nodes (12.3).

    `first` carries the cluster's fields into the first record; its epoch, time and count are not used.
    A list longer than the slots is cut: the caller answers BUFFER_SMALL before it comes to that.
    """
    nodes = record.members[:slots]
    head = first or EpochHeader(0, 0, 0, 0, 0, 0, 0, 0, b"")
    head = head._replace(began_s=record.began_s, epoch=record.epoch, nr_nodes=len(nodes))
    return (EPOCH_HEADER.pack(head) + pack_nodes(nodes)).ljust(EPOCH_HEADER.size + slots * NODE_SIZE, b"\0")


def unpack_epochs(data: Bytes, slots: int) -> list[tuple[EpochHeader, list[Member]]]:
    """The records of an epoch log; PeerError for a length or a node count that cannot be."""
    size = EPOCH_HEADER.size + slots * NODE_SIZE
    if len(data) % size:
        raise PeerError(f"epoch log of {len(data)} bytes")
    records = []
    for start in range(0, len(data), size):
        header = EPOCH_HEADER.unpack(data, start)
        if header.nr_nodes > slots:
            raise PeerError(f"epoch record of {header.nr_nodes} nodes in {slots} slots")
        nodes = start + EPOCH_HEADER.size
        records.append((header, unpack_nodes(data[nodes : nodes + header.nr_nodes * NODE_SIZE])))
    return records


def pack_cluster_info(info: ClusterInfo, members: Sequence[Member], record_size: int = NODE_SIZE) -> bytes:
    """CLUSTER_INFO in full length; `members` of the last epoch, ascending by id."""
    slots = NODE_LIST_SIZE if record_size == NODE_SIZE else DISK_NODE_LIST_SIZE
    head = CLUSTER_INFO.pack(info._replace(nr_nodes=len(members)))
    return head + pack_nodes(members, record_size).ljust(slots, b"\0")


def unpack_cluster_info(data: Bytes) -> tuple[ClusterInfo, list[Member]]:
    """CLUSTER_INFO and its nodes; PeerError for a length or a node count that cannot be."""
    if len(data) != CLUSTER_INFO_SIZE:
        raise PeerError(f"cluster info of {len(data)} bytes")
    info = CLUSTER_INFO.unpack(data)
    if info.nr_nodes > MAX_NODES:
        raise PeerError(f"cluster info of {info.nr_nodes} nodes")
    end = CLUSTER_INFO.size + info.nr_nodes * NODE_SIZE
    return info, unpack_nodes(memoryview(data)[CLUSTER_INFO.size : end])


def pack_vdi_state(state: VdiState) -> bytes:
    """One VDI state of 1428 bytes."""
    owner = _pack_node_id(state.owner) if state.owner else bytes(NODE_ID_SIZE)
    head = _VDI_STATE.pack(*state[:8], owner, len(state.participants))
    states = b"".join([kind.to_bytes(4, "little") for kind, _ in state.participants])
    nodes = b"".join([_pack_node_id(node) for _, node in state.participants])
    return head + states.ljust(MAX_COPIES * 4, b"\0") + nodes.ljust(MAX_COPIES * NODE_ID_SIZE, b"\0")


def unpack_vdi_states(data: Bytes) -> list[VdiState]:
    """The states of a table; PeerError for a length or a participant count that cannot be."""
    if len(data) % VDI_STATE_SIZE:
        raise PeerError(f"VDI state table of {len(data)} bytes")
    return [_unpack_vdi_state(data, start) for start in range(0, len(data), VDI_STATE_SIZE)]


def _unpack_vdi_state(data: Bytes, start: int) -> VdiState:
    vid, copies, snapshot, deleted, policy, shift, parent, lock, owner, count = _VDI_STATE.unpack_from(data, start)
    if count > MAX_COPIES:
        raise PeerError(f"VDI state of {count} participants")
    states = start + _VDI_STATE.size
    nodes = states + MAX_COPIES * 4
    participants = tuple(
        (
            int.from_bytes(data[states + i * 4 : states + i * 4 + 4], "little"),
            _unpack_node_id(data, nodes + i * NODE_ID_SIZE),
        )
        for i in range(count)
    )
    locked_by = _unpack_node_id(owner) if any(owner) else None
    return VdiState(vid, copies, snapshot, deleted, policy, shift, parent, lock, locked_by, participants)


def _pack_node_id(node: NodeId) -> bytes:
    return NODE_ID.pack(NodeIdRecord(node.address, node.port, b"", 0))


def _unpack_node_id(data: Bytes, start: int = 0) -> NodeId:
    record = NODE_ID.unpack(data, start)
    return NodeId(record.address, record.port)


def pack_disks(disks: Sequence[DiskInfo]) -> bytes:
    """MD_INFO in full length; disks beyond the 64th are left out."""
    shown = disks[:DISKS_MAX]
    records = b"".join([DISK_INFO.pack(disk) for disk in shown]).ljust(DISKS_MAX * DISK_INFO.size, b"\0")
    return records + len(shown).to_bytes(8, "little")


def unpack_disks(data: Bytes) -> list[DiskInfo]:
    """The disks of MD_INFO, paths without padding; PeerError for a length or a count that cannot be."""
    if len(data) != MD_INFO_SIZE:
        raise PeerError(f"disk info of {len(data)} bytes")
    count = int.from_bytes(data[-8:-4], "little")
    if count > DISKS_MAX:
        raise PeerError(f"disk info of {count} disks")
    disks = [DISK_INFO.unpack(data, i * DISK_INFO.size) for i in range(count)]
    return [disk._replace(path=disk.path.partition(b"\0")[0]) for disk in disks]


def in_bitmap(bitmap: Bytes, vid: int) -> bool:
    """Whether `vid` is set in the bitmap of READ_VDIS or READ_DEL_VDIS (3.3.7)."""
    return bool(bitmap[vid >> 3] >> (vid & 7) & 1)


def vids_in(bitmap: Bytes) -> list[int]:
    """The vids set in a bitmap, ascending."""
    vids = []
    for start in range(0, len(bitmap), _BITMAP_STEP):
        bits = int.from_bytes(bitmap[start : start + _BITMAP_STEP], "little")
        while bits:
            lowest = bits & -bits
            vids.append(start * 8 + lowest.bit_length() - 1)
            bits ^= lowest
    return vids


def pack_names(*names: bytes) -> bytes:
    """The payload of a VDI request: a name and perhaps a tag, 256 bytes each."""
    return b"".join([padded(name) for name in names])
