"""What `dog vdi cache` asks: of this node's object cache, and of whichever node caches a volume."""

from __future__ import annotations

import json
from typing import Any

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import ObjectId, vid_of
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.wire.header import OBJECT_REQUEST
from sheepdog.cluster.wire.opcodes import Flags, Opcode
from sheepdog.frontends.qemu.connection import Call
from sheepdog.frontends.qemu.requests import Handler


class CacheOperations:
    """Of one sheep. The volume is named by the object id of its inode, as in FLUSH_VDI."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> dict[int, Handler]:
        return {
            Opcode.FLUSH_DEL_CACHE: self._let_go,
            Opcode.DELETE_CACHE: self._let_go,
            Opcode.CACHE_PURGE: self._purge,
            Opcode.CACHE_INFO: self._info,
        }

    def _let_go(self, call: Call) -> None:
        """Whoever caches the volume pushes what is dirty, and has nothing of it any more."""
        node, vid = self._node, vid_of(_object_of(call))
        refusal = node.cluster.result()
        if refusal:
            call.fail(refusal)
        elif node.claims.mine(vid) is not None and node.cache is not None:
            node.cache.volumes.let_go(vid, lambda result: call.done(Result(result)))
        elif vid in node.cluster.vdis.claims:
            node.claims.revoke(vid, lambda: call.done(Result.SUCCESS), call.written)
        else:
            call.done(Result.SUCCESS)

    def _purge(self, call: Call) -> None:
        """What was not pushed is given up."""
        refusal = self._node.cluster.result()
        if refusal:
            call.fail(refusal)
        elif vid_of(_object_of(call)) not in self._node.cluster.vdis.claims:
            call.fail(Result.NO_CACHE)
        else:
            self._node.claims.purge(vid_of(_object_of(call)), lambda result: call.done(Result(result)))

    def _info(self, call: Call) -> None:
        cache = self._node.cache
        if call.flags & Flags.WRITE:
            call.fail(Result.INVALID_PARMS)
        elif cache is None:
            call.fail(Result.NO_CACHE)
        else:
            data = json.dumps(self._of(cache.volumes.held())).encode()
            call.done(Result.SUCCESS, data[: call.length])

    def _of(self, volumes: list[tuple[Any, int, int]]) -> dict[str, Any]:
        cache, disk = self._node.cache, self._node.cache_disk
        assert cache is not None and disk is not None
        pusher = cache.entries.pusher
        return {
            "size": cache.entries.space.size_bytes,
            "direct_io": disk.direct_io,
            "used": cache.entries.space.used_blocks * BLOCK_SIZE,
            "hits": cache.reads.hits,
            "misses": cache.reads.misses,
            "local_writes": cache.local_writes,
            "dirty": cache.volumes.dirty_blocks() * BLOCK_SIZE,
            "pushes": pusher.pushes,
            "pushed": pusher.pushed_blocks * BLOCK_SIZE,
            "push_ns": pusher.push_ns,
            "push_failures": pusher.failures,
            "volumes": [
                {
                    "name": record.name.decode("latin-1"),
                    "tag": record.tag.decode("latin-1"),
                    "id": record.snap_id,
                    "vid": record.vid,
                    "total": total,
                    "dirty": dirty,
                }
                for record, total, dirty in volumes
            ],
        }


def _object_of(call: Call) -> ObjectId:
    return ObjectId(OBJECT_REQUEST.unpack(call.header).oid)
