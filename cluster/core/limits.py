"""Every size, queue, retry and timeout, each with its reason. Full is an answer, not a crash."""

from __future__ import annotations

from typing import Final

BLOCK_SIZE: Final = 4096  # unit of hash and of promise P1: the page of every kernel and filesystem above us
DEFAULT_SHIFT: Final = 22  # 4 MiB objects, as every existing client expects
MIN_SHIFT, MAX_SHIFT = 20, 31  # protocol.md 6.2
MAX_MAP_ENTRIES: Final = 1 << 20  # protocol.md 6.2: plain volumes
DEFAULT_COPIES: Final = 3
MAX_COPIES: Final = 31  # protocol.md 14.4: room for 31 participants
DEFAULT_VNODES: Final = 128  # protocol.md 10.2
MAX_VNODES: Final = 65_535  # protocol.md 14.1: 16 bits in a node record
MAX_NODES: Final = 6144  # protocol.md 14.3

INODE_SIZE: Final = 12_587_576  # protocol.md 7.1
ATTRIBUTE_SIZE: Final = 66_320  # protocol.md 9
BTREE_NODE_SIZE: Final = 4_194_304
LEDGER_SIZE: Final = 4_194_304

MAX_REQUEST_BYTES: Final = (1 << 31) + 4096  # one whole object of the largest size
MAX_ADMIN_PAYLOAD_BYTES: Final = INODE_SIZE  # payloads of anything that is not object I/O
MAX_PEER_BODY_BYTES: Final = (1 << 31) + 4096

PLACEMENT_CACHE_ENTRIES: Final = 65_536  # a lookup costs 3 us, a hit 0.1; 64 Ki entries are 10 MB
RECOVERY_PULLS: Final = 4  # objects one home restores at a time: fills a disk without starving clients
PULL_CHUNK_BYTES: Final = 512 << 10  # one fetch of a restore: large enough for streaming
PULL_WINDOW_BYTES: Final = 4 << 20  # fetches of a node under way: 10 Gbit/s over 3 ms
PULL_SLICE_BYTES: Final = 128 << 10  # one fetch while clients are at work: half a millisecond of two processors
PULL_YIELD: Final = 5  # then a pause so many times as long as the fetch took: a sixth of what there is
PULL_FLOOR_BYTES_PER_S: Final = 16 << 20  # but so much at least: 1 TB in 17 hours, of one node alone
PULL_QUIET_NS: Final = 100_000_000  # without requests for so long nobody is at work
INVENTORY_PART_ENTRIES: Final = 32_768  # 1 MiB messages
LOST_PART_ENTRIES: Final = 8_192  # 72 KiB messages, each a moment's work for the home
STABLE_DELAY_NS: Final = 20_000_000  # then an idle home pushes its watermark: until then reads go by the home
LATE_NS: Final = 10_000_000  # an answer that nobody waits for goes with the next message: under load that is sooner
DIRECT_BYTES: Final = 64 * 1024  # a larger write's bytes are not kept at its home for longer than they must be
MAX_RETRIES: Final = 1_000  # of one client request over epoch changes; beyond it the client gets EIO
RETRY_DELAY_NS: Final = 20_000_000  # before a request is tried again that met a node not ready yet
VIGIL_TICK_NS: Final = 1_000_000_000  # between looks at open requests: they are looked at only while there are any
SILENT_TICKS: Final = 5  # a member that answers nothing for so many ticks is expelled: longer than any sane pause
UNSETTLED_TICKS: Final = 60  # while the cluster recovers: with millions of objects a member is at work with their list
LEASE_NS: Final = 2_000_000_000  # a node answers its clients for so long after it last saw the order of events
MAX_EXPELLED: Final = 64  # expelled incarnations remembered: each is gone from the engine within seconds of waking up
STATE_CHUNK_BYTES: Final = 512 * 1024  # of ordered messages: below the limit of every engine (1 MB)
JOIN_HISTORY_EPOCHS: Final = 256  # records that a joining node tells: 6 nodes take 100 KB; more than any outage makes
MAX_ENDED_OPERATIONS: Final = 64  # remembered: a link that comes back asks again for what was asked seconds ago
MAX_EARLY_MESSAGES: Final = 4096  # held for an epoch this node has not seen yet: peers get there within milliseconds
UNDO_RECORD_BYTES: Final = 64 * 1024  # what a larger write replaced is in memory only: twice the bytes would cost half
CHANGED_STRIPS: Final = 16_384  # of a node, of which it is known which blocks changed: 64 GB of 4:2 volumes, 8 MB
CHANGES_KEPT: Final = 8  # versions from which on that is known: the last that all strips have, and those on their way
LOOKED_STRIPS: Final = 256  # bytes are kept between the home's look at them and the change: more are never under way
LOOKED_BYTES: Final = 64 * 1024  # of one strip: 16 MiB in all
LEVEL_TICK_NS: Final = 100_000_000  # without a write of a coded object: then all its strips get the version of the last
LEVEL_WRITES: Final = 128  # of an object without such a pause: until then each strip remembers those that changed it
LOOSE_OBJECTS: Final = 65_536  # coded objects with durable writes that a home remembers: 10 MB
LEVEL_BATCH: Final = 1024  # objects in one such message: 28 KB
UNDO_FILE_BYTES: Final = 16 * 1024 * 1024  # then what is not needed any more is dropped: some thousand small writes
REBUILD_CHUNK_BYTES: Final = 256 * 1024  # of each of D strips at a time: 16 MiB in memory for the widest policy
PULL_WINDOW: Final = 2  # fetches of one restore in flight: the next is on its way while one is written
MOVE_RETRIES: Final = 100  # of a copy that is in use all the while: it stays on its disk until the next plug or start
MOVE_RETRY_NS: Final = 20_000_000  # before a copy in use is looked at again: a sync takes less
DISK_LOOK_NS: Final = 2_000_000_000  # between looks at object directories: a system call each
SCRUB_CHUNK_BYTES: Final = 256 * 1024  # verified at a time: 15 ms of a slow disk, between two looks at clients
STRIP_CHECK_BYTES: Final = 2 << 20  # of all strips of an object together, compared at a time: writes there wait 20 ms
STRIP_CHECK_LIMIT_NS: Final = 30_000_000_000  # for the answer, which does not come when the epoch ends
SCRUB_BYTES_PER_S: Final = 16 << 20  # 1.4 TB a day, a tenth of what a slow disk reads
SCRUB_BYTES_PER_S_MAX: Final = 1 << 30
SCRUB_YIELD: Final = 4  # while clients have requests under way the scrub takes a quarter of its rate
SCRUB_INTERVAL_HOURS: Final = 7 * 24  # rot is found while the other copies are still good
SCRUB_TICK_NS: Final = 10_000_000_000  # between looks whether it is time, or whether the node has joined
SCRUB_SAVE_NS: Final = 10_000_000_000  # so much of a pass is done again after a crash
SCRUB_REPAIR_TRIES: Final = 3  # of one object: nodes that find it bad at the same time wait for each other
SCRUB_REPAIR_WAIT_NS: Final = 1_000_000_000  # before the second (n-th node: n times this); twice before the third
SCRUB_LOST_MAX: Final = 1000  # objects with lost blocks that are named in the status; the log names all
RECOVERY_FULL_PERCENT: Final = 95  # of a node's space: with format -F recovery leaves the rest to clients
RECOVERY_SKIP_NS: Final = 10_000_000_000  # before a copy that found a node so full is tried again: people made room
RECOVERY_RETRY_NS: Final = 200_000_000  # before a restore that failed is tried again: a disk or source may be back
MAX_STRIPS: Final = 31  # of one object: 16 data and 15 parity strips (protocol.md 11)
HEALTH_JOBS: Final = 10_000  # unfinished objects looked at for one report of health, the neediest first: 5 ms
NEARLY_FULL_PERCENT: Final = 95  # of a node's space: time to add some
MAX_RECOVERY_DELAY_S: Final = 86_400  # what is down for a day will not be back
REPAIR_TRIES: Final = 3  # of a copy that could not be read: its readers wait for them, RECOVERY_RETRY_NS each
MAX_REPAIR_BYTES: Final = 64 << 20  # bad blocks of one copy held in memory; a copy with more is made anew in place
MOVE_BATCH: Final = 16  # objects given another redundancy at a time: the table of volumes waits for less than a second
MOVE_PARALLEL: Final = 4  # of them at a time: 16 MiB in memory, and clients are not starved
SWEEP_DELAY_NS: Final = 1_000_000_000  # after a deletion or a change of members: many of them need one sweep
MAP_WRITE_BYTES: Final = 4096  # parts of a map, within which writes go together: a block is written whole anyway
RECLAIM_PARALLEL: Final = 64  # objects freed at a time: deleting a volume must not starve its neighbours
ATTRIBUTE_PROBES: Final = 64  # places an attribute may move to when ids collide: 32-bit ids make even two rare
COPY_CHUNK_BYTES: Final = 1 << 22  # of an object copied on write: one of the usual size at once, 2 GiB not
COPY_PARALLEL: Final = 4  # pieces of a larger one at a time: the next are read while one is written, 16 MiB in memory

CACHE_GROUP_BLOCKS: Final = 16  # a mark for 64 KiB: a random write marks once, a restart pushes little too much
CACHE_PUSH_BYTES: Final = 1 << 20  # of one push: neighbours leave together, and no single one delays clients for long
CACHE_PUSHES: Final = 16  # pushes under way: they share the syncs of the replicas
CACHE_PUSH_AGE_NS: Final = 5_000_000_000  # dirty blocks are pushed after so long without a flush, as kernels do
CACHE_TICK_NS: Final = 1_000_000_000  # between looks at their age; only while there are any
CACHE_DIRTY_PART: Final = 2  # of the cache's size 1/2 may be dirty; beyond it writes wait for their push
CACHE_HIGH_PERCENT: Final = 90  # of its size in use: the least recently used clean objects go ...
CACHE_LOW_PERCENT: Final = 80  # ... until this much is in use
CACHE_READ_AHEAD_MIN_BYTES: Final = 64 << 10  # the window when a second read continues the first; it doubles ...
CACHE_READ_AHEAD_MAX_BYTES: Final = 1 << 20  # ... up to this
CACHE_QUIET_NS: Final = 10_000_000_000  # a volume that another gateway wanted is not cached again for so long
CACHE_END_NS: Final = 20_000_000_000  # an orderly end pushes for so long; the rest stays for the next start

ORIGINS_SWEEP_AT: Final = 64  # writes remembered of a gateway: swept seldom enough to cost nothing (core.origins)

JOURNALED_BYTES: Final = 64 << 10  # a larger write goes to its file at once: the journal would take as long again
JOURNALED_NOSYNC_BYTES: Final = 16 << 10  # without syncs it saves no wait: only what has to be whole is written twice
JOURNAL_READ_BYTES: Final = 4 << 20  # larger than any record: reading a mostly empty segment whole took seconds
JOURNAL_DAMAGE_BYTES: Final = 16 << 20  # looked at behind it: what is not synced is less, so a later record is nearer
OVERLAY_SYNC_BYTES: Final = 8 << 20  # of undurable writes in memory: then the journal is synced although nobody waits
OVERLAY_LIMIT_BYTES: Final = 64 << 20  # then new writes wait for the disk
OVERLAY_AGE_NS: Final = 1_000_000_000  # of an undurable write: what a power failure of one node may take from it
NO_ROOM_RETRY_NS: Final = 1_000_000_000  # between tries: a few failing writes, and people wait for seconds anyway
CHECKPOINT_PARALLEL: Final = 2  # copies brought up to date at a time: the journal's syncs must find a free thread
FILE_SYNCS: Final = 16  # of object files at a time: they share commits of the file system, and leave room for others
