"""All commands of `dog` in one table: names, options in the order of their usage lines, where the code is.

Nothing here imports the code of a command.
"""

from __future__ import annotations

from sheepdog.tools.dog.iscsi_commands import ISCSI
from sheepdog.tools.dog.more_commands import BENCHMARK, CACHE, CLUSTER_SNAPSHOT, EXPORT, IMPORT, STORE, UPGRADE, VM
from sheepdog.tools.dog.options import Option
from sheepdog.tools.dog.table import (
    BATCH,
    COPIES,
    FORCE,
    HELP,
    INDEX,
    INTERVAL,
    JSON,
    LAST,
    NETWORK,
    OBJECT,
    RAW,
    SHIFT,
    SNAPSHOT,
    TIME,
    VERBOSE,
    Command,
)

_PREALLOC = Option("P", "prealloc", "preallocate all the data objects")

VDI = (
    Command(
        "check",
        (SNAPSHOT, Option("e", "exist", "only check that the objects exist, repair nothing"), *NETWORK, *LAST, JSON),
        "check and repair the copies of an image",
        "check:volume",
        "<vdiname>",
    ),
    Command(
        "create",
        (
            _PREALLOC,
            Option("y", "hyper", "create a hyper volume"),
            COPIES,
            *NETWORK,
            HELP,
            RAW,
            VERBOSE,
            SHIFT,
            TIME,
        ),
        "create an image",
        "vdi:create",
        "<vdiname> <size>",
    ),
    Command(
        "snapshot",
        (
            SNAPSHOT,
            *NETWORK,
            HELP,
            RAW,
            VERBOSE,
            Option("R", "reduce_identical_snapshots", "create no snapshot if the image has no objects of its own"),
            TIME,
        ),
        "create a snapshot",
        "snapshot:snapshot",
        "<vdiname>",
    ),
    Command(
        "clone",
        (
            SNAPSHOT,
            _PREALLOC,
            Option("n", "no_share", "copy the objects instead of sharing them"),
            *NETWORK,
            HELP,
            RAW,
            VERBOSE,
            TIME,
        ),
        "clone an image from a snapshot",
        "snapshot:clone",
        "<src vdi> <dst vdi>",
    ),
    Command(
        "delete",
        (
            SNAPSHOT,
            *NETWORK,
            BATCH,
            INTERVAL,
            Option("m", "max_reclaim", "reclaim at most so many objects and keep the image", True),
            *LAST,
        ),
        "delete an image or a snapshot",
        "vdi:delete",
        "<vdiname>",
    ),
    Command(
        "rollback",
        (SNAPSHOT, *NETWORK, FORCE, RAW, VERBOSE, BATCH, INTERVAL, *LAST),
        "roll back to a snapshot",
        "snapshot:rollback",
        "<vdiname>",
    ),
    Command(
        "list",
        (*NETWORK, RAW, OBJECT, *LAST, JSON),
        "list images",
        "vdi_list:run",
        "[vdiname]",
    ),
    Command("tree", (*NETWORK, *LAST, JSON), "show images in tree view format", "family:tree"),
    Command("graph", (*NETWORK, *LAST, JSON), "show images in Graphviz dot format", "family:graph"),
    Command(
        "object",
        (INDEX, SNAPSHOT, *NETWORK, *LAST, JSON),
        "show the objects of an image",
        nested=(
            Command("location", (), "show where an object is stored", "objects:location", "<vdiname>"),
            Command("map", (), "show the object map of an image", "objects:object_map", "<vdiname>"),
            Command(
                "explain",
                (),
                "show why an object is where it is, and who holds what",
                "explain:explain",
                "<vdiname> <offset>",
            ),
            Command("dump-inode", (), "decode the file of an inode object", "objects:dump_inode", "<file>"),
        ),
        arguments="<vdiname|file> [offset]",
    ),
    Command(
        "track",
        (INDEX, SNAPSHOT, OBJECT, *NETWORK, *LAST, JSON),
        "show the locations of an object in each epoch",
        "objects:track",
        "<vdiname>",
    ),
    Command(
        "setattr",
        (
            Option("d", "delete", "delete the attribute"),
            Option("x", "exclusive", "fail if the attribute exists"),
            *NETWORK,
            *LAST,
        ),
        "set an attribute",
        "attributes:set_attribute",
        "<vdiname> <key> [value]",
    ),
    Command(
        "getattr",
        (*NETWORK, *LAST, JSON),
        "get an attribute of an image",
        "attributes:get_attribute",
        "<vdiname> <key>",
    ),
    Command("resize", (*NETWORK, *LAST), "resize an image", "vdi:resize", "<vdiname> <new size>"),
    Command(
        "read",
        (SNAPSHOT, *NETWORK, *LAST),
        "read data from an image",
        "data:read",
        "<vdiname> [<offset> [<len>]]",
    ),
    Command(
        "write",
        (Option("w", "writeback", "write in write-back mode"), *NETWORK, *LAST),
        "write data to an image",
        "data:write",
        "<vdiname> [<offset> [<len>]]",
    ),
    Command(
        "backup",
        (SNAPSHOT, Option("F", "from", "specify the snapshot to compare with", True), *NETWORK, *LAST),
        "write the difference between two snapshots to stdout",
        "backup:backup",
        "<vdiname>",
    ),
    Command(
        "restore",
        (SNAPSHOT, *NETWORK, BATCH, INTERVAL, *LAST),
        "restore an image from a difference on stdin",
        "backup:restore",
        "<vdiname>",
    ),
    Command(
        "alter-copy",
        (COPIES, FORCE, *NETWORK, *LAST),
        "set the redundancy level of an image",
        "redundancy:volume",
        "<vdiname>",
    ),
    Command(
        "lock",
        (SNAPSHOT, *NETWORK, *LAST, JSON),
        "show and break the locks of images",
        nested=(
            Command("list", (), "list locked images", "locks:list_locks"),
            Command("unlock", (), "unlock an image", "locks:unlock", "<vdiname>"),
        ),
        arguments="[vdiname]",
    ),
    CACHE,
    EXPORT,
    IMPORT,
)

NODE = (
    Command("list", (*NETWORK, RAW, VERBOSE, *LAST, JSON), "list nodes", "node:list_nodes"),
    Command("info", (*NETWORK, RAW, *LAST, JSON), "show the space of each node", "node:info"),
    Command(
        "stat",
        (*NETWORK, RAW, Option("w", "watch", "show the counters every second"), *LAST, JSON),
        "show the request counters of a node",
        "node:stat",
    ),
    Command(
        "kill",
        (*NETWORK, RAW, Option("l", "local", "kill the addressed node"), *LAST),
        "end the sheep of a node",
        "node:kill",
        "[node id]",
    ),
    Command(
        "may-stop",
        (*NETWORK, *LAST, JSON),
        "say whether stopping a node now costs data or availability: status 0 no, 1 yes",
        "health:may_stop",
        "<node id>",
    ),
    Command(
        "recovery",
        (*NETWORK, Option("P", "progress", "follow the progress of the addressed node"), RAW, *LAST, JSON),
        "show and throttle the recovery of nodes",
        "recovery:info",
        "[max] [interval]",
        (
            Command("info", (), "show the nodes in recovery (default)", "recovery:info"),
            Command("set-throttle", (), "set the recovery throttling", "recovery:set_throttle", "<max> <interval>"),
            Command("get-throttle", (), "show the recovery throttling", "recovery:get_throttle"),
        ),
        True,
    ),
    Command(
        "md",
        (
            *NETWORK,
            RAW,
            Option("A", "all", "show the disks of all nodes"),
            FORCE,
            *LAST,
            JSON,
        ),
        "show and change the disks of a node",
        nested=(
            Command("info", (), "show multi-disk information", "disks:info"),
            Command("plug", (), "plug more disk(s) into node", "disks:plug", "<path[,path...]>"),
            Command("unplug", (), "unplug disk(s) from node", "disks:unplug", "<path[,path...]>"),
        ),
        arguments="[disks]",
    ),
    Command(
        "scrub",
        (*NETWORK, RAW, Option("A", "all", "all nodes"), *LAST, JSON),
        "verify every block that a node holds, and repair what is bad",
        "scrub:status",
        "[hours] [MB/s]",
        (
            Command("status", (), "show how far it is, and what was found (default)", "scrub:status"),
            Command("start", (), "begin, or go on after a stop", "scrub:start"),
            Command("stop", (), "stop; a start goes on from here", "scrub:stop"),
            Command(
                "schedule",
                (),
                "set hours from pass to pass (0: never), and the rate",
                "scrub:schedule",
                "<hours> [MB/s]",
            ),
        ),
        True,
    ),
    Command(
        "log",
        (*NETWORK, *LAST, JSON),
        "show and set the log level of a node",
        nested=(
            Command(
                "level",
                (),
                "get, set or list log levels",
                nested=(
                    Command("get", (), "show the log level", "loglevel:get"),
                    Command("set", (), "set the log level", "loglevel:set_level", "<level>"),
                    Command("list", (), "list the log levels", "loglevel:list_levels"),
                ),
            ),
        ),
    ),
    Command(
        "vnodes",
        (*NETWORK, HELP),
        "set the number of virtual nodes of a node",
        nested=(Command("set", (), "set the number", "node:set_vnodes", "<number>"),),
    ),
    Command("format", (*NETWORK, *LAST), "write the store format", "node:format_directory", "<dir> <store>"),
)

CLUSTER = (
    Command(
        "info",
        (
            *NETWORK,
            RAW,
            VERBOSE,
            Option("d", "diff", "show what changed from epoch to epoch"),
            *LAST,
            JSON,
        ),
        "show cluster information",
        "cluster:info",
    ),
    Command(
        "format",
        (
            Option("b", "store", "specify the backend store (default: plain)", True),
            COPIES,
            Option("l", "lock", "lock images: one client at a time may have one open"),
            Option("t", "strict", "refuse writes when zones are fewer than copies"),
            SHIFT,
            Option("V", "fixed_vnodes", "the nodes have fixed numbers of virtual nodes"),
            Option("R", "recycle_vid", "use the ids of deleted images again"),
            FORCE,
            Option("F", "avoid_diskfull", "skip a recovery that could fill a disk"),
            Option("", "recovery-delay", "give a node that leaves so many seconds to come back before recovery", True),
            *NETWORK,
            *LAST,
        ),
        "create a Sheepdog store",
        "cluster:format_cluster",
    ),
    Command(
        "health",
        (*NETWORK, *LAST, JSON),
        "say whether all is well: status 0 healthy, 1 degraded, 2 halted",
        "health:health",
    ),
    Command("shutdown", (*NETWORK, *LAST), "stop Sheepdog on all nodes", "cluster:shutdown"),
    Command(
        "recover",
        (FORCE, *NETWORK, *LAST),
        "control the recovery of the cluster",
        nested=(
            Command("force", (), "start with the nodes that are there", "cluster:force_recover"),
            Command("enable", (), "enable automatic recovery", "cluster:enable_recovery"),
            Command("disable", (), "disable automatic recovery", "cluster:disable_recovery"),
        ),
    ),
    Command("reweight", (*NETWORK, *LAST), "take the free space of the nodes into account", "cluster:reweight"),
    Command("check", (*NETWORK, *LAST), "check and repair all images", "check:cluster"),
    Command(
        "alter-copy",
        (COPIES, FORCE, *NETWORK, *LAST),
        "set the redundancy level of new images",
        "redundancy:cluster",
    ),
    CLUSTER_SNAPSHOT,
)

_NBD_PLACE = (
    Option("", "socket", "a unix socket", True),
    Option("", "listen", "address and port (default: 127.0.0.1:10809)", True),
    Option("", "tls-certificates", "TLS with the X.509 certificates of this directory", True),
    Option("", "tls-psk", "TLS with the keys of this file (lines of user:key)", True),
    Option("", "tls-verify-peer", "accept only clients with a certificate of the same authority"),
)

NBD = (
    Command(
        "serve",
        (
            *_NBD_PLACE,
            Option("", "readonly", "let nobody write"),
            Option("", "exclusive", "refuse a second connection to a volume"),
            Option("", "mode", "permissions of the socket, octal (default: 600)", True),
            Option("", "group", "group of the socket", True),
            Option("", "threads", "requests of one connection under way at a time (default: 16)", True),
            Option("", "swap", "lock the server into memory: a volume is used on this very machine"),
            *NETWORK,
            HELP,
        ),
        "serve images and snapshots to NBD clients",
        "nbd:serve",
        "[vdiname[@tag]...]",
    ),
    Command(
        "uri",
        (*_NBD_PLACE, *NETWORK, RAW, *LAST, JSON),
        "show how NBD clients reach an image",
        "nbd:uri",
        "<vdiname[@tag]>",
    ),
)

COMMANDS: dict[str, tuple[Command, ...]] = {
    "vdi": VDI,
    "node": NODE,
    "cluster": CLUSTER,
    "vm": VM,
    "benchmark": BENCHMARK,
    "upgrade": UPGRADE,
    "nbd": NBD,
    "iscsi": ISCSI,
    "store": STORE,
}
