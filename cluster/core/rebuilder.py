"""The rebuilder: makes a strip here from others: a copy of the same strip where there is one, else decoded from any D.

Of a strip that is only old, the blocks are decoded that changed meanwhile (core.strip_changes). Ranges where all
sources have holes stay holes. A source that fails is replaced by another strip. The node's pace is kept unless a client
waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.core.errors import NoSpace, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, ObjectId, Version, oid_name, plain_oid, strip_index, strip_of
from sheepdog.cluster.core.limits import BLOCK_SIZE, PULL_WINDOW, REBUILD_CHUNK_BYTES
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.origins import Origin, decode_origins
from sheepdog.cluster.core.pace import Pace, Taken
from sheepdog.cluster.core.peering import NO_MEMBER
from sheepdog.cluster.core.puller import Pulled, Puller
from sheepdog.cluster.core.strip_changes import (
    ALL_BLOCKS,
    StripChanges,
    decode_changes,
    encode_changes,
    in_common,
)


class Rebuilder:
    """All rebuilds that this node has going."""

    def __init__(self, context: Context, puller: Puller, changes: StripChanges) -> None:
        self._context = context
        self.changes = changes
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
        mine = context.store.version(strip)
        if mine == version and not repair:
            pulled(Result.SUCCESS)
            return
        known = {} if repair or mine is None or mine == NO_VERSION else self.changes.since(strip, mine)
        same = holders[strip_index(strip)]
        if same not in (NO_MEMBER, context.placement.me):
            fence = context.fence

            def copied(result: int) -> None:
                if result and context.fence == fence:
                    self._decode(strip, policy, version, holders, {}, pulled, urgent)
                else:
                    pulled(result)

            self._puller.pull(strip, version, [context.placement.nodes[same]], repair, copied, urgent)
        else:
            self._decode(strip, policy, version, holders, known, pulled, urgent)

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
        known: dict[Version, int],
        pulled: Pulled,
        urgent: bool,
    ) -> None:
        sources = {
            other: member for other, member in enumerate(holders) if member != NO_MEMBER and other != strip_index(strip)
        }
        pace = self._puller.pace
        self._active[strip] = rebuild = _Rebuild(self, self._context, pace, strip, policy, version, sources, known)
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
        known: dict[Version, int],
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
        self._known = known  # what changed here since versions that the strip here had; empty: nothing here is of use
        self._changes: list[dict[Version, int]] = []  # the same of the sources
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
        self._changes.clear()
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

    def _failed_here(self, error: StoreError) -> None:
        """No other source would help."""
        level = 7 if isinstance(error, NoSpace) else 3  # it is tried again and again; the home tells now and then
        self._context.log(level, f"strip {oid_name(self.strip)} cannot be rebuilt here: {error}")
        self._sources.clear()
        self._failed = error.result

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
                blocks = -(-size // BLOCK_SIZE)
                self._tables[strip] = memoryview(bytes(table[: 8 * blocks])).cast("Q")
                changes, end = decode_changes(table[8 * blocks :], blocks)
                self._changes.append(changes)
                self._origins.update(dict.fromkeys(decode_origins(table[8 * blocks + end :])))
                self._size = size
            self._landed(self._begin)

        if member == context.placement.me:
            try:
                right, size = context.store.version(oid) == self._version, context.store.size(oid)
                changes = encode_changes(self._rebuilder.changes.since(oid, self._version), -(-size // BLOCK_SIZE))
                got(0 if right else Result.STALE_OBJ, context.store.table(oid) + changes, size)
            except StoreError as error:
                got(error.result, b"", 0)
            return
        message = Message(Kind.TABLE, context.fence, oid=oid, version=self._version, flags=Flag.CHANGES)
        context.peers.request(
            context.placement.nodes[member],
            message,
            lambda answer: got(answer.result, _bytes(answer), answer.length),
        )

    def _begin(self) -> None:
        if self._in_flight:
            return
        wanted = in_common([self._known, *self._changes])
        if wanted != ALL_BLOCKS:
            self._context.probe("rebuilder.only_what_changed")
        self._known = {}  # should a source fail: what is here by then is of no version
        error = self._context.store.restore_begin(self.strip, self._size)
        if error is not None:
            self._failed_here(error)
            self._landed(self._begin)
            return
        self._chunks = self._cut(wanted)
        self._chunk = next(self._chunks, None)
        self._fetching = True
        self._fetch_more()

    def _cut(self, wanted: int) -> Iterator[tuple[int, int]]:
        """Ranges of wanted blocks in which some source has bytes; the others become holes."""
        tables = list(self._tables.values())
        for first, last in runs(wanted, -(-self._size // BLOCK_SIZE)):
            offset = first * BLOCK_SIZE
            length = min(last * BLOCK_SIZE, self._size) - offset
            if any(any(table[first:last]) for table in tables):
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
                self._failed_here(error)
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


def runs(wanted: int, blocks: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the runs of bits, each as long as one fetch may be, among so many blocks."""
    most, first = REBUILD_CHUNK_BYTES // BLOCK_SIZE, 0
    while first < blocks:
        if not wanted >> first & 1:
            first += 1
            continue
        last = first + 1
        while last < blocks and last - first < most and wanted >> last & 1:
            last += 1
        yield first, last
        first = last


def _bytes(answer: Message) -> Buffer:
    assert not isinstance(answer.body, list)
    return answer.body
