"""What `dog vdi check` asks about erasure-coded objects (protocol.md 3.3.10, 11).

The original's strips are cut otherwise than ours, so the answer to READ_PEER is made from the object. What it is about
is this node's own strip: it is read as a whole (block hashes are verified) and compared with what the object's other
strips say it must be. One that is missing, rotten or different is answered as missing; dog then asks for its repair.
"""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.cluster.core.erasure import Buffer, Coder, Policy
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, oid_name, strip_index, strip_of
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.ports import Store
from sheepdog.cluster.core.striping import encode_stripes

STRIPE_BYTES = 512  # of the original's layout
CHECK_TRIES = 3  # an object that is written meanwhile is looked at again; then its strip counts as good

Answered = Callable[[Result, Buffer], None]


def held_strip(store: Store, oid: ObjectId, policy: Policy) -> ObjectId | None:
    """The strip of the object that this node has."""
    strips = (strip_of(oid, index) for index in range(policy.strips))
    return next((strip for strip in strips if store.version(strip) not in (None, NO_VERSION)), None)


def original_strip(coder: Coder, policy: Policy, data: Buffer, index: int) -> Buffer:
    """Strip `index` of an object in the layout of protocol.md 11: stripes of 512 bytes."""
    width = STRIPE_BYTES // policy.data
    view = memoryview(data)

    def cut(strip: int) -> bytes:
        return b"".join([view[at : at + width] for at in range(strip * width, len(view), STRIPE_BYTES)])

    if index < policy.data:
        return cut(index)
    return coder.encode(policy, [cut(strip) for strip in range(policy.data)])[index - policy.data]


class StripCheck:
    """One READ_PEER of strip `index`."""

    def __init__(self, node: Node, store: Store, oid: ObjectId, policy: Policy, index: int, done: Answered) -> None:
        self._node = node
        self._store = store
        self._oid = oid
        self._policy = policy
        self._index = index
        self._done = done
        self._tries = 0

    def start(self) -> None:
        strip = held_strip(self._store, self._oid, self._policy)
        if strip is None or self._index >= self._policy.strips:
            self._done(Result.NO_OBJ, b"")
            return
        self._tries += 1
        version, context = self._store.version(strip), self._node.context

        def read_object(result: int, data: Buffer) -> None:
            if result:
                self._done(Result(result), b"")
                return
            self._store.read(strip, 0, self._store.size(strip), lambda mine: read_strip(data, mine))

        def read_strip(data: Buffer, mine: Buffer | StoreError) -> None:
            if self._store.version(strip) != version and self._tries < CHECK_TRIES:
                self.start()
            elif isinstance(mine, StoreError) or (self._store.version(strip) == version and not fits(data, mine)):
                context.log(4, f"strip {oid_name(strip)} is not what it must be; it needs a repair")
                self._done(Result.NO_OBJ, b"")
            else:
                self._done(Result.SUCCESS, original_strip(context.coder, self._policy, data, self._index))

        def fits(data: Buffer, mine: Buffer) -> bool:
            change = encode_stripes(context.coder, self._policy, 0, data)[strip_index(strip)]
            return b"".join(change.data) == mine

        self._node.gateway.raw_read(self._oid, 0, context.size_of(self._oid), read_object)
