"""The rebuilder: makes a strip here from others: a copy of the same strip where there is one, else decoded from any D.

Ranges where all sources have holes stay holes. A source that fails is replaced by another strip. The node's pace is
kept unless a client waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import Result, StoreError
from sheepdog.cluster.core.ids import ObjectId, Version, oid_name, plain_oid, strip_index, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE, PULL_WINDOW, REBUILD_CHUNK_BYTES
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.origins import Origin, decode_origins
from sheepdog.cluster.core.pace import Pace, Taken
from sheepdog.cluster.core.peering import NO_MEMBER
from sheepdog.cluster.core.puller import Pulled, Puller


class Rebuilder:
    """All rebuilds that this node has going."""

    def __init__(self, context: Context, puller: Puller) -> None:
        self._context = context
        self._puller = puller
        self._active: dict[ObjectId, _Rebuild] = {}
        self.bytes_rebuilt = 0

    def begin(self) -> None:
        """A new epoch: what was under way is given up."""
        for rebuild in self._active.values():
            rebuild.given_up = True
        self._active = {}

    def rebuild(
        self,
        strip: ObjectId,
        policy: Policy,
        version: Version,
        holders: Sequence[int],
        repair: bool,
        pulled: Pulled,
        urgent: bool = False,
    ) -> None:
        """Makes `strip` of `version`; `holders`: member by strip. `pulled` gets the result.

        `urgent`: a client waits.
        """
        context = self._context
        active = self._active.get(strip)
        if active is not None:
            active.waiting.append(pulled)
            return
        if context.store.version(strip) == version and not repair:
            pulled(Result.SUCCESS)
            return
        same = holders[strip_index(strip)]
        if same not in (NO_MEMBER, context.placement.me):
            fence = context.fence

            def copied(result: int) -> None:
                if result and context.fence == fence:
                    self._decode(strip, policy, version, holders, pulled, urgent)
                else:
                    pulled(result)

            self._puller.pull(strip, version, [context.placement.nodes[same]], repair, copied, urgent)
        else:
            self._decode(strip, policy, version, holders, pulled, urgent)

    def hurry(self, strip: ObjectId) -> None:
        """A client waits for it, if it is being made."""
        active = self._active.get(strip)
        if active is not None:
            active.urgent = True
            active.go_on()

    def _decode(
        self,
        strip: ObjectId,
        policy: Policy,
        version: Version,
        holders: Sequence[int],
        pulled: Pulled,
        urgent: bool,
    ) -> None:
        sources = {
            other: member for other, member in enumerate(holders) if member != NO_MEMBER and other != strip_index(strip)
        }
        pace = self._puller.pace
        self._active[strip] = rebuild = _Rebuild(self, self._context, pace, strip, policy, version, sources)
        rebuild.urgent = urgent
        rebuild.waiting.append(pulled)
        rebuild.start()

    def ended(self, rebuild: _Rebuild, result: int) -> None:
        self._active.pop(rebuild.strip, None)
        for pulled in rebuild.waiting:
            pulled(result)


class _Rebuild:
    """One strip on its way."""

    def __init__(
        self,
        rebuilder: Rebuilder,
        context: Context,
        pace: Pace,
        strip: ObjectId,
        policy: Policy,
        version: Version,
        sources: dict[int, int],
    ) -> None:
        self.strip = strip
        self.waiting: list[Pulled] = []
        self.given_up = False
        self.urgent = False
        self._pace = pace
        self._rebuilder = rebuilder
        self._context = context
        self._policy = policy
        self._version = version
        self._sources = sources  # member by strip, of those that have not failed
        self._tables: dict[int, memoryview] = {}
        self._origins: dict[Origin, None] = {}  # what any source knows: none was touched by all writes
        self._size = 0
        self._chunks: Iterator[tuple[int, int]] = iter(())
        self._chunk: tuple[int, int] | None = None  # the next to be fetched
        self._fetching = False
        self._in_flight = 0
        self._failed: int | None = None

    def start(self) -> None:
        """Asks D of the others for their tables."""
        chosen = sorted(self._sources, key=lambda strip: (self._sources[strip] != self._context.placement.me, strip))
        chosen = chosen[: self._policy.data]
        if len(chosen) < self._policy.data:
            self._end(self._failed if self._failed is not None else Result.EIO)
            return
        self._failed = None
        self._fetching = False
        self._tables.clear()
        self._in_flight = len(chosen)
        for strip in chosen:
            self._ask_table(strip)

    def _end(self, result: int) -> None:
        if not self.given_up:
            self._rebuilder.ended(self, result)

    def _lose(self, strip: int, result: int) -> None:
        """A source failed: again without it, once nothing is on its way."""
        self._sources.pop(strip, None)
        self._failed = result

    def _landed(self, go_on: Callable[[], None]) -> None:
        if self._failed is None:
            go_on()
        elif not self._in_flight:
            self.start()

    def _ask_table(self, strip: int) -> None:
        context, member = self._context, self._sources[strip]
        oid = strip_of(plain_oid(self.strip), strip)

        def got(result: int, table: Buffer, size: int) -> None:
            if self.given_up:
                return
            self._in_flight -= 1
            if result:
                self._lose(strip, result)
            else:
                entries = 8 * -(-size // BLOCK_SIZE)
                self._tables[strip] = memoryview(bytes(table[:entries])).cast("Q")
                self._origins.update(dict.fromkeys(decode_origins(table[entries:])))
                self._size = size
            self._landed(self._begin)

        if member == context.placement.me:
            try:
                right = context.store.version(oid) == self._version
                got(0 if right else Result.STALE_OBJ, context.store.table(oid), context.store.size(oid))
            except StoreError as error:
                got(error.result, b"", 0)
            return
        message = Message(Kind.TABLE, context.fence, oid=oid, version=self._version)
        context.peers.request(
            context.placement.nodes[member],
            message,
            lambda answer: got(answer.result, _bytes(answer), answer.length),
        )

    def _begin(self) -> None:
        if self._in_flight:
            return
        self._context.store.restore_begin(self.strip, self._size)
        self._chunks = self._cut()
        self._chunk = next(self._chunks, None)
        self._fetching = True
        self._fetch_more()

    def _cut(self) -> Iterator[tuple[int, int]]:
        """Ranges in which some source has bytes; the others become holes."""
        blocks = REBUILD_CHUNK_BYTES // BLOCK_SIZE
        tables = list(self._tables.values())
        for first in range(0, -(-self._size // BLOCK_SIZE), blocks):
            offset = first * BLOCK_SIZE
            length = min(REBUILD_CHUNK_BYTES, self._size - offset)
            if any(any(table[first : first + blocks]) for table in tables):
                yield offset, length
            else:
                self._context.store.restore_punch(self.strip, offset, length)

    def go_on(self) -> None:
        """It may be its turn now."""
        if self._fetching and not self.given_up:
            self._fetch_more()

    def _fetch_more(self) -> None:
        while self._chunk is not None and self._in_flight < PULL_WINDOW and self._failed is None:
            offset, length = self._chunk
            taken: Taken = None
            if not self.urgent:
                sources = len(self._tables)
                taken = self._pace.take(length * sources, self.go_on), self._context.clock.now_ns()
                if not taken[0]:
                    return
                length = min(length, max(BLOCK_SIZE, taken[0] // sources // BLOCK_SIZE * BLOCK_SIZE))
            left = self._chunk[1] - length
            self._chunk = (offset + length, left) if left else next(self._chunks, None)
            self._in_flight += 1
            self._fetch(offset, length, taken)
        if self._fetching and not self._in_flight and self._chunk is None and self._failed is None:
            self._fetching = False
            self._finish()

    def _fetch(self, offset: int, length: int, taken: Taken) -> None:
        """One range of all D sources."""
        have: dict[int, Buffer] = {}
        left = len(self._tables)

        def arrived(strip: int) -> Callable[[int, Buffer], None]:
            def got(result: int, data: Buffer) -> None:
                nonlocal left
                if self.given_up:
                    return
                left -= 1
                if result:
                    self._lose(strip, result)
                else:
                    have[strip] = data
                if left:
                    return
                if self._failed is None:
                    self._put(offset, have, taken)
                else:
                    self._in_flight -= 1
                    self._landed(self._fetch_more)
                    self._pace.give_back(taken)

            return got

        for strip in list(self._tables):
            self._read(strip, offset, length, arrived(strip))

    def _read(self, strip: int, offset: int, length: int, got: Callable[[int, Buffer], None]) -> None:
        context = self._context
        member = self._sources.get(strip)
        oid = strip_of(plain_oid(self.strip), strip)
        if member is None:
            got(Result.EIO, b"")
        elif member == context.placement.me:
            context.store.read(
                oid,
                offset,
                length,
                lambda data: got(data.result, b"") if isinstance(data, StoreError) else got(0, data),
            )
        else:
            message = Message(Kind.FETCH, context.fence, oid=oid, offset=offset, length=length, version=self._version)

            def answered(answer: Message) -> None:
                if answer.flags & Flag.CLIENTS:
                    self._pace.told()
                got(answer.result, _bytes(answer))

            context.peers.request(context.placement.nodes[member], message, answered)

    def _put(self, offset: int, have: dict[int, Buffer], taken: Taken) -> None:
        data = self._context.coder.decode(self._policy, have, [strip_index(self.strip)])[0]
        self._rebuilder.bytes_rebuilt += len(data)

        def written(error: StoreError | None) -> None:
            if self.given_up:
                return
            self._in_flight -= 1
            if error is not None:
                self._context.log(3, f"strip {oid_name(self.strip)} cannot be rebuilt here: {error}")
                self._sources.clear()
                self._failed = error.result
            self._landed(self._fetch_more)
            self._pace.give_back(taken)

        self._context.store.restore_write(self.strip, offset, data, written)

    def _finish(self) -> None:
        context = self._context
        context.probe("rebuilder.rebuilt")
        oid = plain_oid(self.strip)
        context.origins.forget(oid)
        context.origins.merge(self._origins)
        context.store.restore_finish(
            self.strip, self._version, lambda error: self._end(0 if error is None else error.result)
        )


def _bytes(answer: Message) -> Buffer:
    assert isinstance(answer.body, (bytes, bytearray, memoryview))
    return answer.body
