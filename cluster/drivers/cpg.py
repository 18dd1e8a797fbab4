"""The libraries of corosync by ctypes: closed process groups, quorum, votes, a node's addresses.

Layouts and numbers are those of corosync 3's headers (cpg.h, quorum.h, cfg.h ...). Callbacks come from
within `dispatch`, which is called on the loop's thread, as `send` and `fileno` are: they do not wait for the daemon.
All others do, for as long as it is stopped: corosync_calls sets a limit.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_char,
    c_char_p,
    c_int,
    c_size_t,
    c_uint,
    c_uint32,
    c_uint64,
    c_void_p,
    cast,
    string_at,
)
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

LIBRARIES = {
    "cpg": "libcpg.so.4",
    "quorum": "libquorum.so.5",
    "cfg": "libcfg.so.7",
    "votequorum": "libvotequorum.so.8",
}
MAX_ADDRESSES = 8  # rings of one node; knet knows eight links
_NAME_BYTES = 128
_CPG_MODEL_V1, _INITIAL_TOTEM_CONF = 1, 1
_QUORUM_MODEL_V1 = 1
_TYPE_AGREED = 2
_DISPATCH_ALL = 2
_TRACK_CURRENT_AND_CHANGES = 1 | 2
_ADDRESS_BYTES = 28  # sizeof(struct sockaddr_in6)
_TWO_NODE = 1  # flag in votequorum_info


class Code(IntEnum):
    """cs_error_t, as far as it matters here."""

    OK = 1
    LIBRARY = 2
    TIMEOUT = 5
    TRY_AGAIN = 6
    ACCESS = 11

    @classmethod
    def text(cls, code: int) -> str:
        texts: dict[int, str] = {
            cls.LIBRARY: "corosync does not run here",
            cls.TIMEOUT: "corosync runs and does not answer",
            cls.TRY_AGAIN: "corosync is starting, or too busy to answer",
            cls.ACCESS: "corosync does not let this user in (see uidgid in corosync.conf(5))",
        }
        return texts.get(code, f"corosync answers with error {code}")


class Reason(IntEnum):
    """Why a process is in the group or is not any more."""

    JOIN = 1
    LEAVE = 2
    NODEDOWN = 3
    NODEUP = 4
    PROCDOWN = 5


class CorosyncError(Exception):
    """A call was refused, or the daemon is gone."""

    def __init__(self, code: int) -> None:
        super().__init__(Code.text(code))
        self.code = code


class Process(NamedTuple):
    """One process of a group."""

    node: int
    pid: int


class Change(NamedTuple):
    """The group has changed."""

    members: tuple[Process, ...]
    left: tuple[tuple[Process, int], ...]  # with reasons
    joined: tuple[tuple[Process, int], ...]


class _Name(Structure):
    _fields_ = (("length", c_uint32), ("value", c_char * _NAME_BYTES))


class _Address(Structure):
    _fields_ = (("node", c_uint32), ("pid", c_uint32), ("reason", c_uint32))


class _RingId(Structure):
    _fields_ = (("node", c_uint32), ("sequence", c_uint64))


class _IoVector(Structure):
    _fields_ = (("base", c_void_p), ("length", c_size_t))


class _NodeAddress(Structure):
    _fields_ = (("length", c_int), ("address", c_char * _ADDRESS_BYTES))


class _VoteQuorumInfo(Structure):
    _fields_ = (
        *((name, c_uint) for name in ("node", "state", "votes", "expected", "highest", "total", "quorum", "flags")),
        ("device_votes", c_uint),
        ("device_name", c_char * 255),
    )


_Addresses = POINTER(_Address)
_OnMessage = CFUNCTYPE(None, c_uint64, POINTER(_Name), c_uint32, c_uint32, c_void_p, c_size_t)
_OnChange = CFUNCTYPE(None, c_uint64, POINTER(_Name), _Addresses, c_size_t, _Addresses, c_size_t, _Addresses, c_size_t)
_Nodes = POINTER(c_uint32)
_OnRing = CFUNCTYPE(None, c_uint64, _RingId, c_uint32, _Nodes)
_OnQuorum = CFUNCTYPE(None, c_uint64, c_uint32, _RingId, c_uint32, _Nodes)
_OnNodes = CFUNCTYPE(None, c_uint64, _RingId, c_uint32, _Nodes, c_uint32, _Nodes, c_uint32, _Nodes)


class _CpgModel(Structure):
    _fields_ = (
        ("model", c_int), ("on_message", _OnMessage), ("on_change", _OnChange), ("on_ring", _OnRing), ("flags", c_uint)
    )  # fmt: skip


class _QuorumModel(Structure):
    _fields_ = (("model", c_int), ("on_quorum", _OnQuorum), ("on_nodes", _OnNodes))


@cache
def _library(name: str) -> Any:
    return ctypes.CDLL(LIBRARIES[name], use_errno=True)


def missing() -> str | None:
    """The first library that cannot be loaded; None when all are there."""
    for name, file in LIBRARIES.items():
        try:
            _library(name)
        except OSError:
            return file
    return None if hasattr(_library("quorum"), "quorum_model_initialize") else "corosync 3.1 (libquorum5)"


def _checked(code: int) -> None:
    if code != Code.OK:
        raise CorosyncError(code)


class _Handle:
    """One connection to the daemon's service `name`."""

    def __init__(self, name: str) -> None:
        self._library = _library(name)
        self._name = name
        self._handle = c_uint64()
        self._open = False

    def _call(self, function: str, *arguments: Any) -> None:
        if not self._open:
            raise CorosyncError(Code.LIBRARY)
        _checked(getattr(self._library, f"{self._name}_{function}")(self._handle, *arguments))

    def fileno(self) -> int:
        """Readable when `dispatch` has something to do."""
        descriptor = c_int()
        self._call("fd_get", byref(descriptor))
        return descriptor.value

    def dispatch(self) -> None:
        """Calls back for everything that has come. CorosyncError: the daemon is gone."""
        try:
            self._call("dispatch", c_int(_DISPATCH_ALL))
        except CorosyncError as error:
            if error.code != Code.TRY_AGAIN and self._open:  # a callback may have closed the handle
                raise

    def close(self) -> None:
        """May be repeated."""
        if self._open:
            self._open = False
            getattr(self._library, f"{self._name}_finalize")(self._handle)


class Group(_Handle):
    """A closed process group: one order of messages and changes, for all processes that are in it.

    on_message(process, data), on_change(change), on_ring(sequence, nodes): the ring that what follows belongs to.
    """

    def __init__(self) -> None:
        super().__init__("cpg")
        self.on_message: Callable[[Process, bytes], None] = lambda process, data: None
        self.on_change: Callable[[Change], None] = lambda change: None
        self.on_ring: Callable[[int, tuple[int, ...]], None] = lambda sequence, nodes: None

        def message(_: int, __: Any, node: int, pid: int, data: int, length: int) -> None:
            self.on_message(Process(node, pid), string_at(data, length))

        def change(_: int, __: Any, *lists: Any) -> None:
            members, left, joined = (
                tuple((Process(one.node, one.pid), int(one.reason)) for one in lists[i][: lists[i + 1]])
                for i in (0, 2, 4)
            )
            self.on_change(Change(tuple(process for process, _ in members), left, joined))

        def ring(_: int, ring_id: _RingId, count: int, nodes: Any) -> None:
            self.on_ring(int(ring_id.sequence), tuple(nodes[:count]))

        self._callbacks = (_OnMessage(message), _OnChange(change), _OnRing(ring))  # must live as long as the handle
        model = _CpgModel(_CPG_MODEL_V1, *self._callbacks, _INITIAL_TOTEM_CONF)
        _checked(self._library.cpg_model_initialize(byref(self._handle), c_int(_CPG_MODEL_V1), byref(model), None))
        self._open = True

    def join(self, name: bytes) -> None:
        self._call("join", byref(_Name(len(name), name)))

    def leave(self, name: bytes) -> None:
        self._call("leave", byref(_Name(len(name), name)))

    def send(self, data: bytes) -> None:
        """To all processes in the group, this one included. CorosyncError TRY_AGAIN: later."""
        vector = _IoVector(cast(c_char_p(data), c_void_p), len(data))
        self._call("mcast_joined", c_int(_TYPE_AGREED), byref(vector), c_uint(1))

    def local_node(self) -> int:
        """The number of this node."""
        node = c_uint()
        self._call("local_get", byref(node))
        return node.value


class Verdict(NamedTuple):
    """What the quorum says of a ring. `left`: nodes that did not come from the ring before together with this one,
    also those that are in this ring again."""

    quorate: bool
    sequence: int
    nodes: tuple[int, ...]
    left: tuple[int, ...]


class Quorum(_Handle):
    """on_quorum(verdict), now and at every change."""

    def __init__(self) -> None:
        super().__init__("quorum")
        self.on_quorum: Callable[[Verdict], None] = lambda verdict: None
        self._left: tuple[int, tuple[int, ...]] = 0, ()  # sequence of a ring, and who left when it came

        def quorum(_: int, quorate: int, ring: _RingId, count: int, nodes: Any) -> None:
            members, (sequence, left) = tuple(nodes[:count]), self._left
            if sequence != ring.sequence:
                left = members  # not told: as if nobody had stayed
            self.on_quorum(Verdict(bool(quorate), int(ring.sequence), members, left))

        def changed(_: int, ring: _RingId, *lists: Any) -> None:
            count, left = lists[-2:]
            self._left = int(ring.sequence), tuple(left[:count])

        self._callbacks = _QuorumModel(0, _OnQuorum(quorum), _OnNodes(changed))
        kind = c_uint32()
        _checked(
            self._library.quorum_model_initialize(
                byref(self._handle), c_int(_QUORUM_MODEL_V1), byref(self._callbacks), byref(kind), None
            )
        )
        self._open = True
        if not kind.value:
            self.close()
            raise CorosyncError(Code.LIBRARY)
        self._call("trackstart", c_uint(_TRACK_CURRENT_AND_CHANGES))


class Votes(NamedTuple):
    """How the quorum counts. `two_node`: it was told that two nodes are all there are, each is quorate alone then."""

    quorum: int
    total: int  # of what is in reach, a quorum device too
    of_nodes: dict[int, int]
    two_node: bool


def votes(nodes: tuple[int, ...]) -> Votes:
    """What these nodes count; CorosyncError also where votes are not what decides."""
    library = _library("votequorum")
    handle = c_uint64()
    _checked(library.votequorum_initialize(byref(handle), None))
    try:
        info = _VoteQuorumInfo()
        of_nodes = {}
        for node in nodes:
            _checked(library.votequorum_getinfo(handle, c_uint(node), byref(info)))
            of_nodes[node] = int(info.votes)
        _checked(library.votequorum_getinfo(handle, c_uint(0), byref(info)))
        return Votes(int(info.quorum), int(info.total), of_nodes, bool(info.flags & _TWO_NODE))
    finally:
        library.votequorum_finalize(handle)


def node_address(node: int) -> str | None:
    """The first address that corosync knows of a node."""
    library = _library("cfg")
    handle = c_uint64()
    _checked(library.corosync_cfg_initialize(byref(handle), None))
    try:
        count = c_int()
        found = (_NodeAddress * MAX_ADDRESSES)()
        _checked(
            library.corosync_cfg_get_node_addrs(handle, c_uint(node), c_size_t(MAX_ADDRESSES), byref(count), found)
        )
        for entry in found[: count.value]:
            raw = bytes(bytearray(string_at(byref(entry, _NodeAddress.address.offset), _ADDRESS_BYTES)))
            family = int.from_bytes(raw[:2], "little" if _LITTLE else "big")
            if family == socket.AF_INET:
                return socket.inet_ntop(socket.AF_INET, raw[4:8])
            if family == socket.AF_INET6:
                return socket.inet_ntop(socket.AF_INET6, raw[8:24])
        return None
    finally:
        library.corosync_cfg_finalize(handle)


_LITTLE = bytes(c_uint32(1))[0] == 1
