"""The puller: makes a copy here equal to one elsewhere, moving only the blocks whose hashes differ.

What a client waits for goes first: the other restores ask for nothing more meanwhile. They keep to the node's pace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import NoObject, NoSpace, Result, StoreError
from sheepdog.cluster.core.ids import NO_VERSION, NodeId, ObjectId, Version, plain_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE, PULL_CHUNK_BYTES, PULL_WINDOW
from sheepdog.cluster.core.messages import Buffer, Flag, Kind, Message
from sheepdog.cluster.core.origins import Origin, decode_origins, encode_origins
from sheepdog.cluster.core.pace import Pace, Taken
from sheepdog.cluster.core.repair import Repair
from sheepdog.cluster.core.strip_changes import StripChanges, encode_changes

Pulled = Callable[[int], None]


class Puller:
    """All restores that this node has going. `bytes_pulled` counts what was moved since the start."""

    def __init__(self, context: Context, changes: StripChanges) -> None:
        self.pace = Pace(context)
        self._context = context
        self._changes = changes
        self._active: dict[ObjectId, _Pull] = {}
        self._urgent: dict[ObjectId, None] = {}  # those of them that clients wait for
        self.bytes_pulled = 0

    def begin(self) -> None:
        """A new epoch: what was under way is given up (blocks that arrived are not fetched again)."""
        for pull in self._active.values():
            pull.given_up = True
        self._active = {}
        self._urgent = {}
        self.pace.begin()

    def pull(
        self,
        oid: ObjectId,
        version: Version,
        sources: Sequence[NodeId],
        repair: bool,
        pulled: Pulled,
        urgent: bool = False,
    ) -> None:
        """Restores `oid` at `version`; `pulled` gets the result. With `repair` the bytes here are not trusted.

        `urgent`: a client waits.
        """
        if self._context.store.version(oid) == version and not repair and oid not in self._active:
            pulled(Result.SUCCESS)
            return
        if urgent:
            self._urgent[oid] = None
        active = self._active.get(oid)
        if active is not None:
            active.waiting.append(pulled)
            return
        self._active[oid] = pull = _Pull(self, self._context, oid, version, list(sources), repair)
        pull.waiting.append(pulled)
        pull.start()

    def hurry(self, oid: ObjectId) -> None:
        """A client waits for it, if it is being restored."""
        active = self._active.get(oid)
        if active is not None:
            self._urgent[oid] = None
            active.go_on()

    def ended(self, pull: _Pull, result: int) -> None:
        self._active.pop(pull.oid, None)
        was_urgent = self._urgent.pop(pull.oid, False) is None
        for pulled in pull.waiting:
            pulled(result)
        if was_urgent and not self._urgent:
            for other in list(self._active.values()):
                other.go_on()

    def is_urgent(self, oid: ObjectId) -> bool:
        """A client waits for it."""
        return oid in self._urgent

    def may_fetch(self, oid: ObjectId) -> bool:
        """Nothing else is more urgent."""
        return not self._urgent or oid in self._urgent

    # -- the other side ----------------------------------------------------------------------------------------

    def on_table(self, sender: NodeId, message: Message) -> None:
        """Somebody restores from here: hashes of the copy, if it has the version asked for. NO_VERSION asks which.

        The answer: table; with CHANGES the changes of the strip; origins.
        """
        context = self._context
        version = context.store.version(message.oid)
        if message.version == NO_VERSION:
            context.peers.answer(sender, message, Result.SUCCESS, b"", version or NO_VERSION)
            return
        if version != message.version:
            context.peers.answer(sender, message, Result.STALE_OBJ)
            return
        try:
            table, size = context.store.table(message.oid), context.store.size(message.oid)
        except StoreError as error:
            context.peers.answer(sender, message, error.result)
            return
        told = encode_origins(context.origins.of(plain_oid(message.oid)))
        if message.flags & Flag.CHANGES:
            told = encode_changes(self._changes.since(message.oid, version), -(-size // BLOCK_SIZE)) + told
        context.peers.answer(sender, message, Result.SUCCESS, table + told, message.version, size)

    def on_fetch(self, sender: NodeId, message: Message) -> None:
        context = self._context
        if context.store.version(message.oid) != message.version:
            context.peers.answer(sender, message, Result.STALE_OBJ)
            return

        def done(data: Buffer | StoreError) -> None:
            if context.store.version(message.oid) != message.version:
                context.probe("puller.written_while_read")
                context.peers.answer(sender, message, Result.STALE_OBJ)
            elif isinstance(data, StoreError):
                context.log(4, f"object {message.oid:016x}: cannot be fetched from here: {data}")
                context.peers.answer(sender, message, data.result)
            else:
                context.counters.peer_reads += 1
                context.counters.peer_tx += len(data)
                flags = Flag.CLIENTS if self.pace.has_clients() else 0
                context.peers.answer(sender, message, Result.SUCCESS, data, flags=flags)

        context.store.read(message.oid, message.offset, message.length, done)


class _Pull:
    """One object on its way. A source that fails is replaced by the next; the last failure is the result."""

    def __init__(
        self, puller: Puller, context: Context, oid: ObjectId, version: Version, sources: list[NodeId], repair: bool
    ) -> None:
        self.oid = oid
        self.waiting: list[Pulled] = []
        self.given_up = False
        self._puller = puller
        self._context = context
        self._version = version
        self._sources = sources
        self._repair = repair
        self._table: Buffer = b""
        self._origins: list[Origin] = []
        self._ranges: list[tuple[int, int]] = []
        self._in_flight = 0
        self._failed: int | None = None
        self._fetching = False

    def go_on(self) -> None:
        """It may be its turn now."""
        if self._fetching and not self.given_up:
            self._fetch_more()

    def start(self) -> None:
        self._fetching = False
        if not self._sources:
            self._end(self._failed if self._failed is not None else int(Result.NO_OBJ))
            return
        self._failed = None
        self._ask(Message(Kind.TABLE, self._context.fence, oid=self.oid, version=self._version), self._on_table)

    def _ask(self, message: Message, answered: Callable[[Message], None]) -> None:
        self._context.peers.request(self._sources[0], message, answered)

    def _end(self, result: int) -> None:
        """NO_OBJ: it failed, and what is here is not the object (any more)."""
        if result == Result.EIO and self._context.store.version(self.oid) != self._version:
            result = Result.NO_OBJ
        if not self.given_up:
            self._puller.ended(self, result)

    def _next_source(self, result: int) -> None:
        self._failed = result
        if self._in_flight == 0:
            self._sources.pop(0)
            self.start()

    def _failed_here(self, error: StoreError) -> None:
        """No other source would help."""
        level = 7 if isinstance(error, NoSpace) else 3  # it is tried again and again; the home tells now and then
        self._context.log(level, f"object {self.oid:016x}: cannot be restored here: {error}")
        self._sources = self._sources[:1]
        self._next_source(error.result)

    def _on_table(self, answer: Message) -> None:
        if self.given_up:
            return
        if answer.result != Result.SUCCESS:
            self._next_source(answer.result)
            return
        store = self._context.store
        assert not isinstance(answer.body, list)
        size = answer.length
        table_size = 8 * -(-size // BLOCK_SIZE)
        self._table = bytes(answer.body[:table_size])
        self._origins = decode_origins(answer.body[table_size:])
        try:
            mine = store.table(self.oid) if store.size(self.oid) == size else bytes(table_size)
        except NoObject:
            mine = bytes(table_size)  # a new one is all holes
        except StoreError:
            mine = b""
        if self._repair:
            if mine == self._table and store.version(self.oid) == self._version:
                _, used = difference(b"", mine, size)
                sources = list(self._sources)
                Repair(self._context, self.oid, self._version, sources, used, self._repaired).start()
                return
            mine = b""
        self._begin(mine, size)

    def _begin(self, mine: Buffer, size: int) -> None:
        """Opens the copy here, whose good blocks are those of the table `mine`, and fetches the others."""
        store = self._context.store
        error = store.restore_begin(self.oid, size)
        if error is not None:
            self._failed_here(error)
            return
        holes, self._ranges = difference(mine, self._table, size)
        self._ranges.reverse()  # they are taken from the end
        self._repair = False  # a second source goes on where the first one ended
        self._context.origins.forget(plain_oid(self.oid))
        for offset, length in holes:
            store.restore_punch(self.oid, offset, length)
        self._fetching = True
        self._fetch_more()

    def _repaired(self, result: int) -> None:
        if self.given_up:
            return
        if result == Result.NO_MEM:
            self._begin(b"", self._context.store.size(self.oid))
        else:
            self._end(result)

    def _fetch_more(self) -> None:
        while self._ranges and self._in_flight < PULL_WINDOW and self._failed is None:
            if not self._puller.may_fetch(self.oid):
                self._context.probe("puller.gives_way")
                return
            paced = not self._puller.is_urgent(self.oid)
            offset, wanted = self._ranges[-1]
            length = self._puller.pace.take(wanted, self.go_on) if paced else wanted
            if not length:
                return
            self._ranges[-1:] = [(offset + length, wanted - length)] if length < wanted else []
            self._in_flight += 1
            message = Message(
                Kind.FETCH, self._context.fence, oid=self.oid, offset=offset, length=length, version=self._version
            )
            begun_ns = self._context.clock.now_ns()
            taken: Taken = (length, begun_ns) if paced else None
            self._ask(message, partial(self._on_data, offset, taken))
        if self._in_flight == 0 and not self._ranges and self._failed is None:
            self._fetching = False
            self._finish()

    def _on_data(self, offset: int, taken: Taken, answer: Message) -> None:
        if self.given_up:
            return
        if answer.flags & Flag.CLIENTS:
            self._puller.pace.told()
        if answer.result != Result.SUCCESS:
            self._in_flight -= 1
            self._next_source(answer.result)
            self._puller.pace.give_back(taken)
            return
        assert not isinstance(answer.body, list)
        self._puller.bytes_pulled += len(answer.body)
        self._context.store.restore_write(self.oid, offset, answer.body, partial(self._written, taken))

    def _written(self, taken: Taken, error: StoreError | None) -> None:
        if self.given_up:
            return
        self._in_flight -= 1
        if error is not None:
            self._failed_here(error)
        elif self._failed is not None:
            self._next_source(self._failed)
        else:
            self._fetch_more()
        self._puller.pace.give_back(taken)

    def _finish(self) -> None:
        store = self._context.store
        try:
            is_equal = store.table(self.oid) == self._table
        except StoreError as error:  # its disk has just failed
            self._failed_here(error)
            return
        if not is_equal:
            self._context.log(3, f"object {self.oid:016x}: restored bytes do not have the source's hashes")
            self._next_source(Result.EIO)
            return

        def finished(error: StoreError | None) -> None:
            self._end(Result.SUCCESS if error is None else error.result)

        self._context.origins.merge(self._origins)
        store.restore_finish(self.oid, self._version, finished)


def difference(mine: Buffer, theirs: Buffer, size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(holes to make, ranges to fetch) that turn a copy with table `mine` into one with `theirs`; bytes.

    `mine` empty: nothing that is here is to be trusted. Ranges are cut at PULL_CHUNK_BYTES and at the object's size.
    """
    old = memoryview(mine).cast("Q") if mine else None
    new = memoryview(theirs).cast("Q")
    holes: list[tuple[int, int]] = []
    ranges: list[tuple[int, int]] = []
    if mine == theirs:
        return holes, ranges
    for block, entry in enumerate(new):
        if old is not None and old[block] == entry:
            continue
        offset = block * BLOCK_SIZE
        length = min(BLOCK_SIZE, size - offset)
        target = ranges if entry else holes
        if target and sum(target[-1]) == offset and target[-1][1] + length <= PULL_CHUNK_BYTES:
            target[-1] = (target[-1][0], target[-1][1] + length)
        else:
            target.append((offset, length))
    return holes, ranges
