"""Commands larger than a membership engine takes at once: cut at the sender, put together at every receiver."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from sheepdog.cluster.core.limits import STATE_CHUNK_BYTES

Key = tuple[bytes, int]  # a process: id and incarnation
_HEADER = Struct("<BIHH")  # kind (0 whole, 1 part), id, index, total


class Fragments:
    """Both directions of one attachment. The engine keeps the order of a sender's messages."""

    def __init__(self) -> None:
        self._next_id = 0
        self._begun: dict[tuple[Key, int], list[bytes]] = {}

    def cut(self, data: bytes) -> Iterator[bytes]:
        """The messages to broadcast, in this order."""
        if len(data) <= STATE_CHUNK_BYTES:
            yield _HEADER.pack(0, 0, 0, 1) + data
            return
        self._next_id += 1
        parts = [data[i : i + STATE_CHUNK_BYTES] for i in range(0, len(data), STATE_CHUNK_BYTES)]
        for index, part in enumerate(parts):
            yield _HEADER.pack(1, self._next_id, index, len(parts)) + part

    def whole(self, sender: Key, message: bytes) -> bytes | None:
        """What this message completes; None for a part that others follow, or whose beginning was never seen."""
        kind, fragment, index, total = _HEADER.unpack_from(message)
        body = message[_HEADER.size :]
        if not kind:
            return body
        name = sender, fragment
        if index == 0:
            self._begun[name] = []
        parts = self._begun.get(name)
        if parts is None or len(parts) != index:
            return None  # the beginning was sent before this node attached
        parts.append(body)
        return b"".join(self._begun.pop(name)) if len(parts) == total else None

    def forget(self, sender: Key) -> None:
        """A sender is gone: what it has begun will not be completed."""
        for name in [name for name in self._begun if name[0] == sender]:
            del self._begun[name]
