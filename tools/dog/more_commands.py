"""The rest of the table of commands: what moves whole volumes and clusters, and what belongs to no noun of its own."""

from __future__ import annotations

from sheepdog.tools.dog.options import Option
from sheepdog.tools.dog.table import COPIES, FORCE, HELP, JSON, LAST, NETWORK, RAW, SHIFT, SNAPSHOT, TIME, Command

_FORMAT = Option("O", "format", "raw or qcow2 (default: as the file's name ends, else raw)", True)
_ORIGIN = Option("o", "orig", "specify the version of the original format", True)

CACHE = Command(
    "cache",
    (SNAPSHOT, *NETWORK, *LAST, JSON),
    "control the object cache of a node",
    nested=(
        Command(
            "flush", (), "write what is only in the cache to the cluster", "cache:flush", "<vdiname>", changes=True
        ),
        Command(
            "delete", (), "flush and drop the cache of an image on all nodes", "cache:delete", "<vdiname>", changes=True
        ),
        Command("info", (), "show what the cache of a node holds", "cache:info"),
        Command("purge", (), "drop the cache without flushing it", "cache:purge", "[vdiname]", changes=True),
    ),
    arguments="[vdiname]",
)
EXPORT = Command(
    "export",
    (SNAPSHOT, _FORMAT, *NETWORK, *LAST),
    "write an image to a file",
    "transfer:export",
    "<vdiname> <file|->",
)
IMPORT = Command(
    "import",
    (COPIES, SHIFT, _FORMAT, *NETWORK, *LAST),
    "create an image from a file",
    "transfer:import_file",
    "<vdiname> <file|->",
)
CLUSTER_SNAPSHOT = Command(
    "snapshot",
    (
        Option("m", "multithread", "use several threads to save"),
        FORCE,
        *NETWORK,
        *LAST,
        JSON,
    ),
    "save and load the snapshots of a cluster",
    nested=(
        Command(
            "save",
            (),
            "save all snapshots to a directory",
            "cluster_snapshot:save",
            "<tag> <path> [vdi...]",
            changes=True,
        ),
        Command("list", (), "list what a directory holds", "cluster_snapshot:list_all", "<path>"),
        Command("show", (), "show the images of a saved state", "cluster_snapshot:show", "<tag|idx> <path>"),
        Command(
            "load",
            (),
            "make a cluster of a saved state",
            "cluster_snapshot:load",
            "<tag|idx> <path> [vdi...]",
            changes=True,
        ),
        Command("delete", (), "delete a saved state", "cluster_snapshot:delete", "<tag|idx> <path>", changes=True),
    ),
    arguments="<tag|idx> <path> [vdi...]",
)
VM = (Command("list", (*NETWORK, RAW, *LAST, JSON), "list images and who runs them", "vm:list_machines"),)
BENCHMARK = (
    Command(
        "io",
        (
            FORCE,
            Option("w", "workqueue", "ordered, dynamic or fixed (default: ordered)", True),
            Option("n", "nr_threads", "specify the number of threads (default: 1)", True),
            Option("t", "total", "specify the number of requests (default: 1000)", True),
            *NETWORK,
            *LAST,
        ),
        "overwrite an image as fast as it goes",
        "benchmark:io",
        "<vdiname>",
    ),
    Command(
        "run",
        (
            COPIES,
            Option("S", "size", "MiB of the image that is made for it (default: 256)", True),
            Option("d", "seconds", "of each run (default: 2)", True),
            Option("n", "rounds", "runs of each load, which take turns (default: 3)", True),
            *NETWORK,
            RAW,
            *LAST,
            JSON,
        ),
        "measure this cluster with an image of its own",
        "benchmark_run:run",
        "[operation:size:depth[:volatile|durable|flushN][:seq][:xCLIENTS]...]",
    ),
)
_OLD_AND_NEW = "<old file> <new file>"
UPGRADE = (
    Command("inode-convert", (_ORIGIN, HELP, TIME), "convert an inode file", "upgrade:convert_inode", _OLD_AND_NEW),
    Command("epoch-convert", (_ORIGIN, HELP, TIME), "convert an epoch log file", "upgrade:convert_epoch", _OLD_AND_NEW),
    Command("config-convert", (HELP, TIME), "convert a config file", "upgrade:convert_config", _OLD_AND_NEW),
    Command(
        "object-location",
        (_ORIGIN, HELP, TIME),
        "show where an old version kept an object",
        "upgrade:object_location",
        "<epoch file> <oid>",
    ),
)
_JOURNAL = Option("j", "journal", "the journals' directories, in the order of the stores (sheep -j dir=)", True)
STORE = (
    Command(
        "check",
        (_JOURNAL, *LAST, JSON),
        "verify every block of the stores of sheep that do not run",
        "store:check",
        "<meta[,disk...]>...",
    ),
    Command(
        "salvage",
        (
            Option("V", "vdi", "write this image to stdout (default: list the images)", True),
            SNAPSHOT,
            _JOURNAL,
            RAW,
            *LAST,
            JSON,
        ),
        "get an image out of the stores of sheep that do not run",
        "store:salvage",
        "<meta[,disk...]>...",
    ),
)

SIMULATE = (
    Command(
        "simulate",
        (
            Option("", "from-cluster", "take nodes and usage from the running cluster"),
            Option("", "topology", "take them from a JSON file", True),
            Option("", "nodes", "so many equal nodes", True),
            Option("", "zones", "in so many zones (default: one for each node)", True),
            Option("", "used", "data that they hold, all copies together (default: 1T)", True),
            COPIES,
            Option("", "fail", "what fails: node:ID or zone:ZONE, several with commas", True),
            Option("", "rate", "what recovery reads or writes on one node in a second (default: 200M)", True),
            Option("", "seeds", "rehearse it in so many simulated clusters with clients (default: 0)", True),
            *NETWORK,
            *LAST,
            JSON,
        ),
        "tell what a failure would move, how long that takes and what is at risk",
        "simulate:simulate",
    ),
)
