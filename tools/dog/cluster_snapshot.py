"""`dog cluster snapshot save|list|show|load|delete`: all snapshots of a cluster in a directory (cli.md 2.8)."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sheepdog.cluster.client import admin, inodes
from sheepdog.cluster.client.channel import Channel
from sheepdog.cluster.client.connection import Connection, connect_near
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.client.requests import create_header, read_header, write_header
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid, inode_oid, vid_of, vmstate_oid
from sheepdog.cluster.core.inode import HEADER_SIZE, InodeHeader, objects_of, pack_map
from sheepdog.tools.dog.archive import CHUNK_BYTES, Archive, ArchiveError, State
from sheepdog.tools.dog.cluster import make_cluster
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure, UsageFailure
from sheepdog.tools.dog.output import full_time, text, warn
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.vdi_list import decoded, unreadable
from sheepdog.tools.dog.window import WIDTH, in_order

_NO_PATH = "Please specify the path to save snapshot."
_NOTHING = "Cannot execute. It may be caused by:\n"
_NOT_FOUND = f"{_NOTHING}1. The specified VDIs are not found.\n2. The specified VDIs don't have snapshots."
_EMPTY = f"{_NOTHING}1. The cluster is empty.\n2. All VDIs of the cluster don't have snapshots."


@contextmanager
def _failing(message: str) -> Iterator[None]:
    """Whatever goes wrong is told, then `message`; status 2."""
    try:
        yield
    except ArchiveError as error:
        raise Failure(f"{error}\n{message}", 2) from error
    except SheepError as error:
        raise Failure(f"{text(error.result)}\n{message}", 2) from error
    except OSError as error:
        raise Failure(f"{error.strerror or error}\n{message}", 2) from error


def _chosen(archive: Archive, word: str, message: str) -> State:
    state = archive.find(word)
    if state is None:
        raise Failure(f"Snapshot index or tag does not exist.\n{message}", 2)
    return state


def _headers(state: State) -> list[InodeHeader]:
    return [InodeHeader.unpack(base64.b64decode(one).ljust(HEADER_SIZE, b"\0")) for one in state.vdis]


def _tombstone(inode: InodeHeader) -> InodeHeader:
    """A volume that is not kept, but whose objects others share."""
    return replace(inode, name=b"", vdi_size=0, vm_state_size=0)


# -- save


def save(context: Context) -> None:
    """Stores what no earlier state of the directory holds. Snapshots only: a working volume changes meanwhile."""
    tag = context.argument(0)
    if tag[:1].isdigit():
        raise UsageFailure("Tag should not start with number.")
    if not tag or "\t" in tag or "\n" in tag:  # nobody could name it, or read the list
        raise UsageFailure("Tag should not be empty, nor have tabs or line feeds.")
    path = context.argument(1, _NO_PATH)
    names = [name.encode(errors="surrogateescape") for name in context.rest(2)]
    context.nodes()
    with _failing(f"Fail to save snapshot to path: {path}."):
        archive = Archive(Path(path))
        with archive.locked():
            states = archive.states()
            if any(state.tag == tag for state in states):
                raise Failure(
                    "Snapshot tag has already been used for another snapshot, please, use another one.\n"
                    f"Fail to save snapshot to path: {path}.",
                    2,
                )
            _save(context, archive, states, tag, names)


def _save(context: Context, archive: Archive, states: Sequence[State], tag: str, names: list[bytes]) -> None:
    connection = context.gateway()
    found, _ = admin.cluster_info(connection)
    every = {inode.vdi_id: inode for inode in _all_inodes(connection)}
    chosen = [
        inode
        for inode in every.values()
        if inode.is_snapshot and not inode.is_deleted and not inode.store_policy and (not names or inode.name in names)
    ]
    if not chosen:
        raise Failure(_NOT_FOUND if names else _EMPTY, 2)
    number = states[-1].number + 1 if states else 1
    state = State(number, tag, int(time.time()), found.ctime, found.copies, found.copy_policy, found.block_size_shift)
    wanted: dict[ObjectId, int] = {}  # and their sizes
    for inode in chosen:
        vid = Vid(inode.vdi_id)
        entries = list(inodes.allocated(inodes.read_map(connection, inode)))
        state.maps[f"{vid:x}"] = [[index, owner] for index, owner in entries]
        wanted.update((data_oid(owner, index), inode.object_size) for index, owner in entries)
        chunks = objects_of(inode.vm_state_size, inode.block_size_shift)
        wanted.update((vmstate_oid(vid, index), inode.object_size) for index in range(chunks))
    owners = dict.fromkeys([*(inode.vdi_id for inode in chosen), *(vid_of(oid) for oid in wanted)])
    for owner in sorted(owners):
        header = every[owner]
        if f"{owner:x}" not in state.maps:
            header = _tombstone(header)
        state.vdis.append(base64.b64encode(header.pack().rstrip(b"\0")).decode())
    # What a frozen vid owns never changes, so what an earlier state of the same cluster holds need not be read again.
    known = {oid: chunks for one in states if one.cluster == state.cluster for oid, chunks in one.objects.items()}
    state.objects = {f"{oid:016x}": known[f"{oid:016x}"] for oid in wanted if f"{oid:016x}" in known}
    missing = [oid for oid in wanted if f"{oid:016x}" not in known]
    state.objects |= _store(context, archive, missing, wanted)
    archive.add(state)


def _all_inodes(connection: Connection) -> Iterator[InodeHeader]:
    for found in inodes.headers(connection, inodes.volume_ids(connection, deleted=True), deleted=True):
        if isinstance(found, inodes.Unread):
            unreadable(found.vid, found.result)
        else:
            yield found


def _store(
    context: Context, archive: Archive, oids: Sequence[ObjectId], sizes: dict[ObjectId, int]
) -> dict[str, list[str]]:
    """Reads objects and puts their chunks, several at a time with -m."""
    channel = Channel((context.host, context.port), patience_s=0, dial=connect_near)
    stored: dict[str, list[str]] = {}
    calls = (partial(_store_object, channel, archive, oid, sizes[oid]) for oid in oids)
    with Progress("save", sum(sizes[oid] for oid in oids)) as progress:
        for oid, chunks in zip(oids, in_order(calls, WIDTH if context.flag("multithread") else 1), strict=True):
            stored[f"{oid:016x}"] = chunks
            progress.advance(sizes[oid])
    channel.close()
    return stored


def _store_object(channel: Channel, archive: Archive, oid: ObjectId, size: int) -> list[str]:
    """Reads an object and puts its chunks; their names."""
    chunks = []
    for offset in range(0, size, CHUNK_BYTES):
        data = memoryview(bytearray(min(CHUNK_BYTES, size - offset)))
        result, got = channel.ask(read_header(oid, offset, len(data)), b"", data)
        if result or got != len(data):
            raise ArchiveError(f"Failed to read object {oid:016x} {text(result or Result.EIO)}")
        chunks.append(archive.put(data))
    return chunks


# -- list, show, delete


def list_all(context: Context) -> None:
    """The saved states of a directory, which is made if it is not there."""
    path = context.argument(0, _NO_PATH)
    with _failing("Fail to list snapshots."):
        states = Archive(Path(path)).states()
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json([_record(state) for state in states])
        return
    print("Index\t\tTag\t\tSnapshot Time")
    for state in states:
        print(f"{state.number}\t\t{state.tag}\t\t{full_time(state.time)}")


def _record(state: State) -> dict[str, object]:
    return {
        "index": state.number,
        "tag": state.tag,
        "time": state.time,
        "snapshots": sum(not inode.is_deleted for inode in _headers(state)),
        "objects": len(state.objects),
    }


def show(context: Context) -> None:
    """The snapshots of one saved state, on stderr as ever."""
    word, path = context.argument(0), context.argument(1, _NO_PATH)
    message = "Fail to show snapshot"
    with _failing(message):
        headers = [inode for inode in _headers(_chosen(Archive(Path(path)), word, message)) if not inode.is_deleted]
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json(
            [
                {
                    "vdi_id": f"{inode.vdi_id:x}",
                    "name": decoded(inode.name),
                    "tag": decoded(inode.tag),
                    "snapshot_id": inode.snap_id,
                    "size": inode.vdi_size,
                }
                for inode in headers
            ]
        )
        return
    for number, inode in enumerate(headers, 1):
        warn(f"{number}. VDI id: {inode.vdi_id:x}, name: {decoded(inode.name)}, tag: {decoded(inode.tag)}")


def delete(context: Context) -> None:
    """One saved state, and the data that no other one needs."""
    word, path = context.argument(0), context.argument(1, _NO_PATH)
    message = "Fail to delete snapshot"
    with _failing(message):
        archive = Archive(Path(path))
        with archive.locked():
            archive.delete(_chosen(archive, word, message))


# -- load


def load(context: Context) -> None:
    """Formats the cluster, loads the snapshots, and begins a working volume on the latest one of each name."""
    word, path = context.argument(0), context.argument(1, _NO_PATH)
    names = [name.encode(errors="surrogateescape") for name in context.rest(2)]
    message = "Fail to load snapshot"
    with _failing(message), (archive := Archive(Path(path))).kept():
        state = _chosen(archive, word, message)
        headers = _headers(state)
        chosen = [inode for inode in headers if not inode.is_deleted and (not names or inode.name in names)]
        if not chosen:
            raise Failure(_NOT_FOUND if names else _EMPTY, 2)
        objects = _needed(state, chosen)
        for name in dict.fromkeys(chunk for chunks in objects.values() for chunk in chunks):
            archive.get(name)  # nothing is discarded before everything has proved to be there
        make_cluster(context, state.copies, state.policy, state.shift)
        owners = {vid_of(oid) for oid in objects} | {Vid(inode.vdi_id) for inode in chosen}
        _load(context, archive, state, [inode for inode in headers if inode.vdi_id in owners], chosen, objects)


def _needed(state: State, chosen: Sequence[InodeHeader]) -> dict[ObjectId, list[str]]:
    """The objects of these snapshots and their chunks."""
    needed: dict[ObjectId, list[str]] = {}
    for inode in chosen:
        vid = Vid(inode.vdi_id)
        oids = [data_oid(Vid(owner), index) for index, owner in state.maps[f"{vid:x}"]]
        chunks = objects_of(inode.vm_state_size, inode.block_size_shift)
        oids += [vmstate_oid(vid, index) for index in range(chunks)]
        needed.update((oid, state.objects[f"{oid:016x}"]) for oid in oids)
    return needed


def _load_object(channel: Channel, archive: Archive, oid: ObjectId, chunks: Sequence[str]) -> int:
    """Creates an object from its chunks; their size."""
    for number, chunk in enumerate(chunks):
        data = archive.get(chunk)
        if number:
            header = write_header(oid, number * CHUNK_BYTES, len(data), durable=True)
        else:
            header = create_header(oid, 0, 0, len(data), durable=True)
        if data or not number:
            result, _ = channel.ask(header, data)
            if result:
                raise SheepError(result)
    return CHUNK_BYTES * len(chunks)


def _load(
    context: Context,
    archive: Archive,
    state: State,
    headers: Sequence[InodeHeader],
    chosen: Sequence[InodeHeader],
    objects: dict[ObjectId, list[str]],
) -> None:
    connection = context.gateway()
    for inode in headers:
        admin.register_volume(connection, inode)
    channel = Channel(connection.address, patience_s=0, dial=connect_near)
    calls = (partial(_load_object, channel, archive, oid, chunks) for oid, chunks in objects.items())
    with Progress("load", CHUNK_BYTES * sum(len(chunks) for chunks in objects.values())) as progress:
        for size in in_order(calls):
            progress.advance(size)
    channel.close()
    kept = {inode.vdi_id for inode in chosen}
    for inode in headers:
        header = inode if inode.vdi_id in kept else _tombstone(inode)
        entries = inodes.empty_map(header)
        for index, owner in state.maps[f"{inode.vdi_id:x}"] if inode.vdi_id in kept else ():
            entries[index] = owner
        oid = inode_oid(Vid(inode.vdi_id))
        admin.create_object(connection, oid, 0, header.pack() + pack_map(entries))
    latest: dict[bytes, InodeHeader] = {}
    for inode in sorted(chosen, key=lambda inode: inode.snap_id):
        latest[inode.name] = inode
    for name, inode in latest.items():
        admin.new_volume(
            connection,
            name,
            inode.vdi_size,
            Vid(inode.vdi_id),
            copies=inode.nr_copies,
            policy=inode.copy_policy,
            shift=inode.block_size_shift,
        )
