"""What nodes say to each other. The bytes are in cluster/wire/peer.py.

One shape for all: a request carries `rid` and is answered by one ANSWER with the same `rid`; kinds named
"notice" have no answer. Every message carries the sender's fence, era << 32 | epoch, and is not
obeyed behind another one. The era counts the formats of the cluster, after which epochs begin again at 1.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, TypeAlias

from sheepdog.cluster.core.ids import (
    NO_OID,
    NO_VERSION,
    ObjectId,
    Version,
)

Buffer: TypeAlias = bytes | bytearray | memoryview

# Of these messages, their bytes and what they mean: nodes of different versions form no cluster (core.join_rules).
# Never 10: that is what all of them said when they joined, as long as it was not this.
PEER_VERSION: Final = 11


class Kind(IntEnum):
    """Kinds of peer messages; sender -> receiver."""

    ANSWER = 1  # to any request: result, version, body
    SUBMIT = 2  # gateway -> home: write, create, punch or remove, see Flag
    READ = 3  # gateway -> replica or home: `length` bytes at `offset`
    APPLY = 4  # home -> replica: a numbered write
    STABLE = 5  # notice, home -> replica: watermark of an idle home
    INVENTORY = 6  # notice, member -> home: copies held (body: core.peering.Inventory)
    SETTLE = 7  # notice, home -> member: peering is done; body: oids of which its copy is not current
    PULL = 8  # home -> replica: restore `oid` at `version`; body: the nodes to fetch from
    TABLE = 9  # puller -> source: block hashes; NO_VERSION: only which version is there
    FETCH = 10  # puller -> source: bytes of a copy of exactly `version`
    DROP = 11  # notice, home -> holder of a surplus or stale copy
    COMPLETE = 12  # notice, home -> all: everything it is home of is recovered
    FLUSH = 13  # gateway -> member: make a volume's writes durable (oid: its inode)
    DRAIN = 14  # owner of an ordered operation -> member: hold new writes of the vid, answer when none is in flight
    QUERY = 15  # gateway -> member: administration (body: JSON, answer's body: JSON)
    PING = 16  # any -> member: a sign of life, please
    ROLLBACK = 17  # home -> holder of a strip: be again as at (offset, length, sequence), as `version`; body: origins.
    # NO_VERSION: as before the write (offset, length, sequence)
    LEVEL = 18  # home -> holder of strips: versions up to which they are level (core.strip_levels)
    LOST = 19  # member -> home: these copies went with a disk (body: oids)
    ANSWERS = 20  # between links only: success, and no more, of several requests (body: rids; wire.peer)
    BAD = 21  # home -> holder of a strip: if it lacks a write, remember durably that it does not count
    APPLIED = 22  # notice, home or replica -> gateway: its write `origin`, of this `sequence`, is in the copy here


class Flag:
    """Bits of `Message.flags`; for SUBMIT and APPLY none of CREATE, PUNCH, REMOVE means overwrite.

    Plain integers: an IntFlag costs more than everything else that is done with the bits of a write.
    """

    CREATE: Final = 1  # a new object of `length` bytes with the body at `offset`
    REMOVE: Final = 2
    PUNCH: Final = 4  # `length` bytes at `offset` become a hole
    DURABLE: Final = 8  # on the disk before the answer
    LAST: Final = 16  # INVENTORY: no further part follows
    ONLY_NEW: Final = 16  # SUBMIT of CREATE: an object that is there already stays as it is, and that is success
    DIRECT: Final = 128  # SUBMIT, APPLY: the gateway is a replica, and is told by each replica itself (APPLIED)
    OWN: Final = 64  # APPLY without a body: the bytes are those that the receiver submitted as `origin`
    OLD: Final = 32  # APPLY of a data strip: the answer has the bytes that were there
    XOR: Final = 16  # APPLY of a parity strip: the body is XORed into what is there
    URGENT: Final = 16  # PULL: a client waits for it
    SURPLUS: Final = 16  # DROP: the object lives, elsewhere
    HURRY: Final = 8  # PULL: a client waits for what is being restored already; nothing else is meant
    REPAIR: Final = 32  # PULL: replace the copy even if its version is right (it is corrupt)
    WITNESS: Final = 64  # PULL: who has no space for it must not vouch that nothing happened to it (core.past)
    COMPLETE: Final = 128  # SETTLE: the home knows of all its objects that exist
    MAP: Final = 128  # READ: not the bytes but which blocks are no holes (core.blocks)
    CHANGES: Final = 16  # TABLE: also which blocks changed since versions that the strip had (core.strip_changes)
    AS_IS: Final = 32  # ROLLBACK of a strip that only gets a version
    UNEVEN: Final = 32  # LEVEL `offset`, which has been before: these strips of it are not level with the others
    CLIENTS: Final = 16  # ANSWER of a FETCH: clients are at work there
    ORIGINS: Final = 64  # INVENTORY: the part lists origins of writes (core.origins), not copies


class Message:
    """One peer message; unused fields are zero. `body` is a buffer or a list of buffers to be sent together."""

    __slots__ = (
        "body",
        "copies",
        "fence",
        "flags",
        "floor",
        "gateway",
        "kind",
        "length",
        "offset",
        "oid",
        "origin",
        "result",
        "rid",
        "sequence",
        "version",
        "watermark",
    )

    def __init__(
        self,
        kind: int,
        fence: int,
        rid: int = 0,
        oid: ObjectId = NO_OID,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        version: Version = NO_VERSION,
        sequence: int = 0,
        watermark: int = 0,
        copies: int = 0,
        result: int = 0,
        body: Buffer | list[Buffer] = b"",
        origin: int = 0,
        floor: int = 0,
        gateway: int = 0,
    ) -> None:
        self.kind = kind
        self.fence = fence
        self.rid = rid
        self.oid = oid
        self.offset = offset
        self.length = length
        self.flags = flags
        self.version = version
        self.sequence = sequence
        self.watermark = watermark
        self.copies = copies
        self.result = result
        self.body = body
        self.origin = origin
        self.floor = floor
        self.gateway = gateway

    def payload(self) -> Buffer:
        """The body of a message that came: one buffer."""
        body = self.body
        assert not isinstance(body, list)
        return body

    def __repr__(self) -> str:
        return (
            f"Message({Kind(self.kind).name} fence={self.fence:x} rid={self.rid} oid={self.oid:016x} "
            f"{self.offset}+{self.length} flags={self.flags} {tuple(self.version)} result={self.result})"
        )
