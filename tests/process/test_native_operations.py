"""Every operation of the native protocol against a real sheep, with the answers that clients need."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.cluster import Cluster, started
from tests.support.door import Answer, Door, plain, vdi

from sheepdog.cluster.core.attributes import Attribute
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import Vid, attribute_oid, data_oid, inode_oid
from sheepdog.cluster.core.inode import InodeHeader
from sheepdog.cluster.core.limits import ATTRIBUTE_SIZE, INODE_SIZE
from sheepdog.cluster.wire.header import (
    CLUSTER_DEFAULT_RESPONSE,
    CLUSTER_REQUEST,
    HASH_RESPONSE,
    NODE_RESPONSE,
    REPAIR_REQUEST,
    VDI_RESPONSE,
    VDI_STATE_REQUEST,
    ClusterRequest,
    RepairRequest,
    VdiResponse,
    VdiStateRequest,
)
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.structures import (
    BITMAP_SIZE,
    CLUSTER_INFO_SIZE,
    DISK_NODE_LIST_SIZE,
    MD_INFO_SIZE,
    NODE_LIST_SIZE,
    RECOVERY_STATE,
    RECOVERY_THROTTLE,
    STATISTICS,
    VDI_STATE_SIZE,
    RecoveryThrottle,
    unpack_cluster_info,
    unpack_disks,
    unpack_epochs,
    unpack_nodes,
    unpack_vdi_states,
    vids_in,
)

MIB = 1 << 20
OBJECT = 4 * MIB
OBSOLETE = (Opcode.FLUSH_DEL_CACHE, Opcode.DELETE_CACHE)
UNSUPPORTED = (Opcode.TRACE_ENABLE, Opcode.TRACE_STATUS, Opcode.NFS_CREATE)
INTERNAL = (Opcode.REMOVE_OBJ, Opcode.GET_OBJ_LIST, Opcode.WRITE_PEER, Opcode.INODE_COHERENCE, 0xB6, 0x7F)


@pytest.fixture
def single(new_cluster: Callable[..., Cluster]) -> Cluster:
    """One node, not formatted."""
    return started(new_cluster(1))


@pytest.fixture
def door(single: Cluster) -> Iterator[Door]:
    """A connection to a formatted cluster of one node."""
    with Door(single.port(0)) as door:
        assert door.ask(make_fs()).result == 0
        yield door


def make_fs(store: bytes = b"plain\0", **fields: int) -> bytes:
    header = ClusterRequest(
        0x0A,
        Opcode.MAKE_FS,
        Flags.WRITE,
        data_length=len(store),
        ctime=int(time.time()) << 32,
        copies=1,
        cluster_flags=4,
    )
    return CLUSTER_REQUEST.pack(header._replace(**fields)) + store


def stat_cluster(records: int, slots: int) -> bytes:
    room = records * (48 + 80 * slots)
    return CLUSTER_REQUEST.pack(ClusterRequest(0x0A, Opcode.STAT_CLUSTER, data_length=room, nodes_nr=slots))


def vdi_answer(answer: Answer) -> VdiResponse:
    assert answer.data == b""
    return VDI_RESPONSE.unpack(answer.head)


def new_vdi(door: Door, name: bytes, **fields: int) -> Vid:
    answer = vdi_answer(door.ask(vdi(Opcode.NEW_VDI, [name], **{"vdi_size": 64 * MIB, **fields})))
    assert answer.result == 0, Result(answer.result).name
    return Vid(answer.vdi_id)


def header_of(door: Door, vid: Vid) -> InodeHeader:
    return InodeHeader.unpack(door.ask(plain(Opcode.READ_OBJ, 4664, oid=inode_oid(vid))).data)


def test_before_the_first_format(single: Cluster) -> None:
    with Door(single.socket(0)) as door:
        for request in (vdi(Opcode.NEW_VDI, [b"v"]), vdi(Opcode.LOCK_VDI, [b"v"]), plain(Opcode.STAT_SHEEP)):
            answer = door.ask(request)
            assert (answer.result, answer.data, answer.epoch) == (Result.WAIT_FOR_FORMAT, b"", 0)
        answer = door.ask(plain(Opcode.READ_OBJ, 4096, oid=data_oid(Vid(1), 0)))
        assert answer.result == Result.WAIT_FOR_FORMAT
        answer = door.ask(stat_cluster(1, 0))
        assert (answer.result, answer.data) == (Result.WAIT_FOR_FORMAT, b"")
        default = CLUSTER_DEFAULT_RESPONSE.unpack(door.ask(plain(Opcode.GET_CLUSTER_DEFAULT, version=1)).head)
        assert (default.result, default.block_size_shift) == (0, 22)
        info, _ = unpack_cluster_info(door.ask(plain(Opcode.CLUSTER_INFO, CLUSTER_INFO_SIZE)).data)
        assert (info.version, info.ctime, info.epoch, info.status, info.cluster_flags) == (0x0A, 0, 0, 2, 4)
        nodes = unpack_nodes(door.ask(plain(Opcode.GET_NODE_LIST, NODE_LIST_SIZE)).data)
        assert [node.id.port for node in nodes] == [single.port(0)]
        assert door.ask(plain(Opcode.READ_VDIS, BITMAP_SIZE)).data == bytes(BITMAP_SIZE)
        assert door.ask(plain(Opcode.FORCE_RECOVER, NODE_LIST_SIZE)).result == Result.FORCE_RECOVER
        assert door.ask(plain(Opcode.GET_STORE_LIST, 512)).data == b"tree plain \0"
        assert door.ask(make_fs(b"bitcask\0")).result == Result.NO_STORE
        assert door.ask(make_fs(block_size_shift=40)).result == Result.INVALID_PARMS


def test_format_and_cluster_state(single: Cluster) -> None:
    with Door(single.port(0)) as door:
        ctime = int(time.time()) << 32 | 5
        assert door.ask(make_fs(ctime=ctime, copies=2, cluster_flags=0x0C)).result == 0
        answer = door.ask(stat_cluster(1, 16))
        assert (answer.result, answer.epoch) == (0, 1)
        ((head, nodes),) = unpack_epochs(answer.data, 16)
        assert (head.ctime, head.epoch, head.copies, head.cluster_flags, head.nr_nodes) == (ctime, 1, 2, 0x0C, 1)
        assert head.store.rstrip(b"\0") == b"plain"
        assert abs(head.began_s - time.time()) < 60
        assert nodes[0].id.port == single.port(0)
        assert nodes[0].vnodes > 0
        assert door.ask(stat_cluster(1, 0)).result == 0
        answer = door.ask(plain(Opcode.CLUSTER_INFO, CLUSTER_INFO_SIZE))
        assert len(answer.data) == CLUSTER_INFO_SIZE
        info, members = unpack_cluster_info(answer.data)
        assert (info.ctime, info.epoch, info.status, info.copies, info.nr_nodes) == (ctime, 1, 1, 2, 1)
        assert members[0].id.port == single.port(0)
        assert door.ask(plain(Opcode.CLUSTER_INFO, 1000)).result == Result.INVALID_PARMS
        answer = door.ask(plain(Opcode.GET_NODE_LIST, DISK_NODE_LIST_SIZE))
        assert len(answer.data) == 592
        assert NODE_RESPONSE.unpack(answer.head).nr_nodes == 1
        assert door.ask(plain(Opcode.FORCE_RECOVER, NODE_LIST_SIZE)).result == Result.FORCE_RECOVER
        for opcode, disabled in ((Opcode.DISABLE_RECOVER, 1), (Opcode.ENABLE_RECOVER, 0)):
            assert door.ask(plain(opcode)).result == 0
            info, _ = unpack_cluster_info(door.ask(plain(Opcode.CLUSTER_INFO, CLUSTER_INFO_SIZE)).data)
            assert info.disable_recovery == disabled


def test_life_of_a_vdi(door: Door) -> None:
    vid = new_vdi(door, b"alpha")
    assert vid == vid_of_name(b"alpha")
    header = header_of(door, vid)
    assert (header.name, header.vdi_size, header.snap_id, header.vdi_id) == (b"alpha", 64 * MIB, 1, vid)
    for name, tag, snap_id, expected in (
        (b"alpha", b"", 0, 0),
        (b"beta", b"", 0, Result.NO_VDI),
        (b"alpha", b"tag", 0, Result.NO_TAG),
        (b"alpha", b"", 7, Result.NO_TAG),
        (b"beta", b"tag", 0, Result.NO_VDI),
    ):
        answer = vdi_answer(door.ask(vdi(Opcode.GET_VDI_INFO, [name, tag], snap_id=snap_id)))
        assert (answer.result, answer.vdi_id) == (expected, 0 if expected else vid)
    answer = vdi_answer(door.ask(vdi(Opcode.GET_VDI_INFO, [b"alpha"])))
    assert (answer.vdi_id, answer.copies, answer.block_size_shift) == (vid, 1, 22)
    assert door.ask(vdi(Opcode.NEW_VDI, [b"alpha"], vdi_size=MIB)).result == Result.VDI_EXIST
    assert door.ask(vdi(Opcode.NEW_VDI, [b"x"] * 2, vdi_size=MIB)).result == Result.INVALID_PARMS
    assert door.ask(vdi(Opcode.LOCK_VDI, [b"x"] * 3)).result == Result.INVALID_PARMS
    # a snapshot: tag first, by the client
    tag = plain(
        Opcode.WRITE_OBJ, payload=b"first".ljust(256, b"\0"), oid=inode_oid(vid), offset=256, flags=Flags.DIRECT
    )
    assert door.ask(tag).result == 0
    child = new_vdi(door, b"alpha", snap_id=1, base_vdi_id=vid)
    assert child == vid + 1
    assert vdi_answer(door.ask(vdi(Opcode.GET_VDI_INFO, [b"alpha"]))).vdi_id == child
    assert vdi_answer(door.ask(vdi(Opcode.GET_VDI_INFO, [b"alpha", b"first"]))).vdi_id == vid
    frozen = header_of(door, vid)
    assert frozen.snap_ctime
    assert header_of(door, child).parent_vdi_id == vid
    write = plain(Opcode.CREATE_AND_WRITE_OBJ, payload=b"x" * 512, oid=data_oid(vid, 3))
    assert door.ask(write).result == Result.READONLY
    in_use = vids_in(door.ask(plain(Opcode.READ_VDIS, BITMAP_SIZE)).data)
    assert in_use == [vid, child]
    states = unpack_vdi_states(door.ask(plain(Opcode.GET_VDI_COPIES, 512 * VDI_STATE_SIZE)).data)
    assert [(state.vid, state.snapshot, state.parent, state.lock_state) for state in states] == [
        (vid, 1, 0, 1),
        (child, 0, vid, 1),
    ]
    assert vdi_answer(door.ask(vdi(Opcode.DEL_VDI, [b"alpha"]))).vdi_id == child
    assert vids_in(door.ask(plain(Opcode.READ_VDIS, BITMAP_SIZE)).data) == [vid, child]
    assert vids_in(door.ask(plain(Opcode.READ_DEL_VDIS, BITMAP_SIZE)).data) == [child]
    assert door.ask(vdi(Opcode.GET_VDI_INFO, [b"alpha"])).result == Result.NO_VDI
    assert door.ask(plain(Opcode.READ_VDIS, 4096)).result == Result.INVALID_PARMS


def test_locks_are_enforced_when_the_cluster_says_so(door: Door) -> None:
    vid = new_vdi(door, b"free")
    for _ in range(2):
        assert vdi_answer(door.ask(vdi(Opcode.LOCK_VDI, [b"free", b""], version=1))).vdi_id == vid
    assert door.ask(make_fs(cluster_flags=0x0C, ctime=(int(time.time()) << 32) + 9)).result == 0
    vid = new_vdi(door, b"locked")
    assert door.ask(vdi(Opcode.LOCK_VDI, [b"locked", b""])).result == 0
    refused = vdi_answer(door.ask(vdi(Opcode.LOCK_VDI, [b"locked", b""])))
    assert (refused.result, refused.vdi_id) == (Result.VDI_LOCKED, vid)
    (state,) = unpack_vdi_states(door.ask(plain(Opcode.GET_VDI_COPIES, 512 * VDI_STATE_SIZE)).data)
    assert state.lock_state == 2
    assert state.owner is not None
    assert door.ask(vdi(Opcode.RELEASE_VDI, [b"locked"], base_vdi_id=vid, version=0)).result == 0
    for _ in range(2):  # tgt: shared, and released without a payload
        assert door.ask(vdi(Opcode.LOCK_VDI, [b"locked", b""], lock_type=1)).result == 0
    (state,) = unpack_vdi_states(door.ask(plain(Opcode.GET_VDI_COPIES, 512 * VDI_STATE_SIZE)).data)
    assert (state.lock_state, len(state.participants)) == (3, 1)
    assert door.ask(vdi(Opcode.RELEASE_VDI, [], base_vdi_id=vid, lock_type=1, version=0)).result == 0
    assert door.ask(vdi(Opcode.RELEASE_VDI, [], base_vdi_id=77)).result == 0


def test_objects_and_their_copies(door: Door) -> None:
    vid = new_vdi(door, b"data")
    oid = data_oid(vid, 0)
    body = bytes(range(256)) * 16
    assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=body, oid=oid, offset=8192, version=0)).result == 0
    answer = door.ask(plain(Opcode.READ_OBJ, OBJECT, oid=oid, version=1))
    assert answer.data == bytes(8192) + body + bytes(OBJECT - 8192 - len(body))
    assert door.ask(plain(Opcode.WRITE_OBJ, oid=oid, offset=4096, flags=Flags.WRITE)).result == 0  # nothing
    assert door.ask(plain(Opcode.FLUSH_VDI, oid=inode_oid(vid), version=0)).result == 0
    empty = data_oid(vid, 2)
    assert door.ask(plain(Opcode.WRITE_OBJ, oid=empty, flags=Flags.WRITE)).result == Result.NO_OBJ
    assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, oid=empty, flags=Flags.WRITE)).result == 0  # `vdi create -P`
    assert door.ask(plain(Opcode.READ_OBJ, OBJECT, oid=empty)).data == bytes(OBJECT)
    other = data_oid(vid, 1)
    assert door.ask(plain(Opcode.READ_OBJ, 10, oid=other)).result == Result.NO_OBJ
    assert door.ask(plain(Opcode.EXIST, oid=oid)).result == 0
    assert door.ask(plain(Opcode.EXIST, oid=other)).result == Result.NO_OBJ
    answer = door.ask(plain(Opcode.GET_HASH, oid=oid))
    assert (
        HASH_RESPONSE.unpack(answer.head).digest
        == hashlib.sha1(door.ask(plain(Opcode.READ_OBJ, OBJECT, oid=oid)).data).digest()
    )
    inode = door.ask(plain(Opcode.READ_OBJ, INODE_SIZE, oid=inode_oid(vid))).data
    answer = door.ask(plain(Opcode.GET_HASH, oid=inode_oid(vid)))
    assert HASH_RESPONSE.unpack(answer.head).digest == hashlib.sha1(inode).digest()
    assert door.ask(plain(Opcode.GET_HASH, oid=other)).result == Result.NO_OBJ
    both = struct.pack("<2Q", oid, other)
    answer = door.ask(plain(Opcode.OIDS_EXIST, payload=both, flags=Flags.PIGGYBACK))
    assert (answer.result, answer.data) == (Result.NO_OBJ, struct.pack("<Q", other))
    answer = door.ask(plain(Opcode.OIDS_EXIST, payload=both[:8], flags=Flags.PIGGYBACK))
    assert (answer.result, answer.data) == (0, b"")
    assert door.ask(plain(Opcode.READ_PEER, 4096, oid=oid, offset=8192, epoch=1)).data == body
    stale = door.ask(plain(Opcode.READ_PEER, 4096, oid=oid, epoch=0))
    assert (stale.result, stale.epoch) == (Result.OLD_NODE_VER, 1)
    assert door.ask(plain(Opcode.READ_PEER, 4096, oid=other, epoch=1)).result == Result.NO_OBJ
    assert door.ask(plain(Opcode.DISCARD_OBJ, oid=oid)).result == 0
    assert door.ask(plain(Opcode.READ_OBJ, 10, oid=oid)).result == Result.NO_OBJ


def test_attributes(door: Door) -> None:
    new_vdi(door, b"painted")

    def attribute(flags: int, key: bytes = b"colour", name: bytes = b"painted") -> VdiResponse:
        payload = Attribute(name=name, tag=b"", key=key, value=b"blue").pack()
        assert len(payload) <= ATTRIBUTE_SIZE
        payload = payload.ljust(ATTRIBUTE_SIZE, b"\0")
        return vdi_answer(door.ask(plain(Opcode.GET_VDI_ATTR, payload=payload, flags=flags)))

    assert attribute(0).result == Result.NO_OBJ
    stored = attribute(Flags.ATTR_CREATE | Flags.ATTR_EXCLUSIVE)
    assert (stored.result, stored.vdi_id) == (0, vid_of_name(b"painted"))
    assert attribute(Flags.ATTR_CREATE | Flags.ATTR_EXCLUSIVE).result == Result.VDI_EXIST
    assert attribute(0).attr_id == stored.attr_id
    oid = attribute_oid(Vid(stored.vdi_id), stored.attr_id)
    value = Attribute.unpack(door.ask(plain(Opcode.READ_OBJ, ATTRIBUTE_SIZE, oid=oid)).data)
    assert value.value == b"blue"
    assert attribute(Flags.ATTR_DELETE).result == 0
    assert attribute(0).result == Result.NO_OBJ
    assert attribute(0, name=b"nobody").result == Result.NO_VDI
    assert door.ask(plain(Opcode.GET_VDI_ATTR, payload=bytes(100))).result == Result.INVALID_PARMS


def test_registering_vids(door: Door) -> None:
    def add(**fields: int) -> int:
        return door.ask(VDI_STATE_REQUEST.pack(VdiStateRequest(0x0A, Opcode.NOTIFY_VDI_ADD)._replace(**fields))).result

    assert add(new_vid=0x1234, copies=1, block_size_shift=22, set_bitmap=1) == 0
    assert vids_in(door.ask(plain(Opcode.READ_VDIS, BITMAP_SIZE)).data) == [0x1234]
    assert add(new_vid=0) == Result.INVALID_PARMS
    assert add(new_vid=1 << 24) == Result.INVALID_PARMS
    assert add(new_vid=5, block_size_shift=60) == Result.INVALID_PARMS


def test_one_node(door: Door) -> None:
    vid = new_vdi(door, b"v")
    for _ in range(3):
        assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=bytes(4096), oid=data_oid(vid, 0))).result == 0
        assert door.ask(plain(Opcode.READ_OBJ, 4096, oid=data_oid(vid, 0))).result == 0
    usage = NODE_RESPONSE.unpack(door.ask(plain(Opcode.STAT_SHEEP)).head)
    assert usage.store_size > usage.store_free > MIB
    counted = STATISTICS.unpack(door.ask(plain(Opcode.STAT, 120)).data)
    assert (counted.gateway_write, counted.gateway_read) == (3, 3)
    assert counted.gateway_rx_bytes > 3 * 4096 < counted.gateway_tx_bytes
    assert counted.gateway_active == 0  # the question itself does not count
    assert door.ask(plain(Opcode.STAT, 100)).result == Result.INVALID_PARMS
    assert RECOVERY_STATE.unpack(door.ask(plain(Opcode.STAT_RECOVERY, 24)).data).in_recovery == 0
    assert door.ask(plain(Opcode.GET_RECOVERY, 24)).data == bytes(24)
    throttle = RECOVERY_THROTTLE.pack(RecoveryThrottle(20, 500, 0))
    assert door.ask(plain(Opcode.SET_RECOVERY, payload=throttle[:4] + b"rubb" + throttle[8:])).result == 0
    shown = RECOVERY_THROTTLE.unpack(door.ask(plain(Opcode.GET_RECOVERY, 24)).data)
    assert shown == RecoveryThrottle(20, 500, 1)
    assert door.ask(plain(Opcode.SET_RECOVERY, payload=bytes(23))).result == Result.INVALID_PARMS
    for level in (7, 0, 6):
        assert door.ask(plain(Opcode.SET_LOGLEVEL, payload=struct.pack("<i", level))).result == 0
        assert struct.unpack("<i", door.ask(plain(Opcode.GET_LOGLEVEL, 4)).data) == (level,)
    for level in (8, -1):
        assert door.ask(plain(Opcode.SET_LOGLEVEL, payload=struct.pack("<i", level))).result == Result.INVALID_PARMS
    (disk,) = unpack_disks(door.ask(plain(Opcode.MD_INFO, MD_INFO_SIZE)).data)
    assert disk.free > MIB
    assert disk.path.endswith(b"/obj")
    assert door.ask(plain(Opcode.SET_VNODES, payload=bytes(8))).result == Result.INVALID_VNODES_STRATEGY
    for policy in (0x10, 0xF1):  # no parity; no such number of data strips
        assert door.ask(plain(Opcode.ALTER_CLUSTER_COPY, copy_policy=policy)).result == Result.INVALID_PARMS
    for opcode in OBSOLETE:
        assert door.ask(plain(opcode)).result == 0
    for opcode in UNSUPPORTED:
        assert door.ask(plain(opcode, payload=b"name\0")).result == Result.NO_SUPPORT
    for number in INTERNAL:
        assert door.ask(plain(number, payload=bytes(300))).result == Result.INVALID_PARMS


def test_shutdown_is_answered(single: Cluster) -> None:
    with Door(single.port(0)) as door, Door(single.port(0)) as other:
        assert door.ask(make_fs()).result == 0
        assert other.ask(plain(Opcode.GET_LOGLEVEL, 4)).result == 0
        assert door.ask(plain(Opcode.SHUTDOWN)).result == 0
        assert door.closed()
        assert other.closed()
    single.wait_stopped()


def test_killing_one_node_leaves_the_other(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(2))
    with Door(cluster.port(0)) as door, Door(cluster.port(1)) as victim:
        assert door.ask(make_fs(copies=2)).result == 0
        cluster.wait_status(0, [0, 1])
        vid = new_vdi(door, b"both")
        assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=b"x" * 4096, oid=data_oid(vid, 0))).result == 0
        assert victim.ask(plain(Opcode.KILL_NODE)).result == 0
        assert victim.closed()
        cluster.wait_members(1, [0])
        assert door.ask(plain(Opcode.READ_OBJ, 4096, oid=data_oid(vid, 0))).data == b"x" * 4096
        answer = door.ask(stat_cluster(2, 2))
        records = unpack_epochs(answer.data, 2)
        assert [head.epoch for head, _ in records] == [answer.epoch, answer.epoch - 1]
        assert [len(nodes) for _, nodes in records] == [1, 2]
        assert records[1][0].ctime == 0  # only the first record carries the cluster's fields
        small = door.ask(stat_cluster(2, 1))
        assert (small.result, small.data) == (Result.BUFFER_SMALL, b"")


def test_a_rotten_copy_is_repaired_on_request(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(3))
    with Door(cluster.port(0)) as door:
        assert door.ask(make_fs(copies=3)).result == 0
        cluster.wait_status(0, [0, 1, 2])
        vid = new_vdi(door, b"rots")
        oid = data_oid(vid, 0)
        body = b"sound" * 2000
        assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=body, oid=oid)).result == 0

    def digest(node: int) -> bytes:
        with Door(cluster.port(node)) as door:
            answer = door.ask(plain(Opcode.GET_HASH, oid=oid))
            assert answer.result == 0
            return HASH_RESPONSE.unpack(answer.head).digest

    good = hashlib.sha1(body.ljust(OBJECT, b"\0")).digest()
    assert [digest(node) for node in range(3)] == [good] * 3
    for node in range(3):  # one of them is the object's home
        with open(cluster.objects(node)[f"{oid:016x}"], "r+b") as file:
            file.seek(5000)
            file.write(b"rot")
        assert digest(node) != good
        with Door(cluster.port(node)) as door:
            assert door.ask(REPAIR_REQUEST.pack(RepairRequest(0x0A, Opcode.REPAIR_REPLICA, oid=oid))).result == 0
        assert digest(node) == good
        assert cluster.objects(node)[f"{oid:016x}"].read_bytes()[: len(body)] == body
    with Door(cluster.port(0)) as door:
        missing = REPAIR_REQUEST.pack(RepairRequest(0x0A, Opcode.REPAIR_REPLICA, oid=data_oid(vid, 7)))
        assert door.ask(missing).result == Result.NO_OBJ


def test_an_open_image_survives_a_restart_of_the_whole_cluster(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(2))
    with Door(cluster.port(0)) as door:
        assert door.ask(make_fs(copies=2)).result == 0
        cluster.wait_status(0, [0, 1])
        vid = new_vdi(door, b"open")
        assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=b"x" * 4096, oid=data_oid(vid, 0))).result == 0
        assert door.ask(plain(Opcode.SHUTDOWN)).result == 0
    cluster.wait_stopped()
    cluster.start(0)
    cluster.wait_status(Result.WAIT_FOR_JOIN, [0])
    read = plain(Opcode.READ_OBJ, 4096, oid=data_oid(vid, 0), version=0, id=9)
    with Door(cluster.port(0)) as image, Door(cluster.port(0)) as dog:
        image.send(read)
        answer = dog.ask(stat_cluster(1, 2))
        assert (answer.result, len(answer.data)) == (Result.WAIT_FOR_JOIN, 48 + 2 * 80)  # the log comes all the same
        assert dog.ask(plain(Opcode.READ_OBJ, 4096, oid=data_oid(vid, 0))).result == Result.WAIT_FOR_JOIN
        assert dog.ask(vdi(Opcode.LOCK_VDI, [b"open", b""], version=1)).result == Result.WAIT_FOR_JOIN
        assert image.silent(0.5)
        cluster.start(1)
        answer = image.answer()
        assert (answer.id, answer.result, answer.data) == (9, 0, b"x" * 4096)
