"""What `dog vdi check` and `dog vdi object location` ask about the copies on one node (protocol.md 3.3.10)."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable

from sheepdog.cluster.core.errors import Corrupt, NoObject, Result, StoreError
from sheepdog.cluster.core.health import object_report
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.ports import Store
from sheepdog.cluster.wire.header import HASH_RESPONSE, OBJECT_REQUEST, REPAIR_REQUEST, HashResponse
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.cluster.wire.response import response
from sheepdog.frontends.qemu.connection import Call
from sheepdog.frontends.qemu.requests import Handler
from sheepdog.frontends.qemu.strips import StripCheck, held_strip

HASH_CHUNK_BYTES = 512 * 1024  # hashed between two turns of the loop: 0.3 ms of SHA-1
HASH_TRIES = 5  # an object that is written meanwhile is hashed again; one that is always written fails the check
MAX_OIDS = 1 << 18  # of one OIDS_EXIST: a volume of 1 TiB

Later = Callable[[Callable[[], None]], object]


class Copies:
    """Of one sheep. `later` calls back in the loop's next turn."""

    def __init__(self, node: Node, store: Store, later: Later) -> None:
        self._node = node
        self._store = store
        self._later = later

    def handlers(self) -> dict[int, Handler]:
        return {
            Opcode.EXIST: self._exists,
            Opcode.OIDS_EXIST: self._all_exist,
            Opcode.GET_HASH: self._hash,
            Opcode.READ_PEER: self._read_strip,
            Opcode.CREATE_AND_WRITE_PEER: self._repair_strip,
            Opcode.REPAIR_REPLICA: self._repair,
            Opcode.OBJECT_DETAILS: self._details,
        }

    def _has(self, oid: ObjectId) -> bool:
        policy = self._node.context.policy_of(oid)
        if policy is not None:
            return held_strip(self._store, oid, policy) is not None
        return self._store.version(oid) not in (None, NO_VERSION)

    def _exists(self, call: Call) -> None:
        oid = ObjectId(OBJECT_REQUEST.unpack(call.header).oid)
        call.done(Result.SUCCESS if self._has(oid) else Result.NO_OBJ)

    def _details(self, call: Call) -> None:
        oid = ObjectId(OBJECT_REQUEST.unpack(call.header).oid)
        data = json.dumps(object_report(self._node, oid)).encode()
        if call.flags & Flags.WRITE or call.length < len(data):
            call.fail(Result.INVALID_PARMS)
        else:
            call.done(Result.SUCCESS, data)

    def _all_exist(self, call: Call) -> None:
        if len(call.payload) % 8 or len(call.payload) > 8 * MAX_OIDS:
            call.fail(Result.INVALID_PARMS)
            return
        missing = array("Q", [oid for oid in array("Q", bytes(call.payload)) if not self._has(ObjectId(oid))])
        if not missing:
            call.done(Result.SUCCESS)
            return
        data = missing.tobytes() if call.flags & Flags.PIGGYBACK else b""
        head = response(call.opcode, call.id, call.epoch, Result.NO_OBJ, len(data))
        call.reply(head, data)

    def _repair(self, call: Call) -> None:
        """The node that dog would fetch from does not matter: core knows which copies are good."""
        self._node.gateway.repair(ObjectId(REPAIR_REQUEST.unpack(call.header).oid), call.written)

    def _repair_strip(self, call: Call) -> None:
        """The bytes that dog made are not needed (and cut otherwise): core makes the strip anew from the others."""
        self._node.gateway.repair(ObjectId(OBJECT_REQUEST.unpack(call.header).oid), call.written)

    def _hash(self, call: Call) -> None:
        oid = ObjectId(OBJECT_REQUEST.unpack(call.header).oid)

        def hashed(result: Result, digest: bytes) -> None:
            if result:
                call.fail(result)
            else:
                head = HashResponse(opcode=call.opcode, epoch=call.epoch, id=call.id, digest=digest)
                call.reply(HASH_RESPONSE.pack(head))

        # A copy that cannot be read has a digest that no other copy has: dog will repair it.
        rotten = hashlib.sha1(f"{self._node.context.me} {oid:x}".encode(), usedforsecurity=False).digest()
        _Hashing(self._store, self._later, oid, rotten, hashed).start()

    def _read_strip(self, call: Call) -> None:
        """A replicated object is its own single strip; its size is the client's room."""
        fields = OBJECT_REQUEST.unpack(call.header)
        oid = ObjectId(fields.oid)
        policy = self._node.context.policy_of(oid)
        if call.epoch > fields.epoch:
            call.fail(Result.OLD_NODE_VER)
        elif call.flags & Flags.WRITE:
            call.fail(Result.INVALID_PARMS)
        elif policy is not None:
            StripCheck(self._node, self._store, oid, policy, fields.ec_index, call.read).start()
        elif not self._has(oid):
            call.fail(Result.NO_OBJ)
        elif fields.offset + call.length > self._store.size(oid):
            call.fail(Result.INVALID_PARMS)
        else:

            def read(data: Buffer | StoreError) -> None:
                if isinstance(data, StoreError):
                    call.fail(data.result)
                else:
                    call.read(Result.SUCCESS, data)

            self._store.read(oid, fields.offset, call.length, read)


class _Hashing:
    """SHA-1 of one copy, a chunk a turn; the copy must not change meanwhile."""

    def __init__(
        self, store: Store, later: Later, oid: ObjectId, rotten: bytes, done: Callable[[Result, bytes], None]
    ) -> None:
        self._store = store
        self._later = later
        self._oid = oid
        self._rotten = rotten
        self._done = done
        self._tries = 0
        self._size = 0
        self._offset = 0
        self._version: Version | None = None
        self._digest = hashlib.sha1(usedforsecurity=False)

    def start(self) -> None:
        self._tries += 1
        self._version = self._store.version(self._oid)
        if self._version in (None, NO_VERSION):
            self._done(Result.NO_OBJ, b"")
            return
        try:
            self._size = self._store.size(self._oid)
        except NoObject:
            self._done(Result.NO_OBJ, b"")
            return
        self._offset = 0
        self._digest = hashlib.sha1(usedforsecurity=False)
        self._chunk()

    def _chunk(self) -> None:
        if self._store.version(self._oid) != self._version:
            if self._tries < HASH_TRIES:
                self.start()
            else:
                self._done(Result.AGAIN, b"")
        elif self._offset == self._size:
            self._done(Result.SUCCESS, self._digest.digest())
        else:
            length = min(HASH_CHUNK_BYTES, self._size - self._offset)
            self._store.read(self._oid, self._offset, length, self._read)

    def _read(self, data: Buffer | StoreError) -> None:
        if isinstance(data, Corrupt):
            self._done(Result.SUCCESS, self._rotten)
            return
        if isinstance(data, StoreError):
            self._done(Result(data.result), b"")
            return
        self._digest.update(data)
        self._offset += len(data)
        self._later(self._chunk)
