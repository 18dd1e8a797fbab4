"""What `sheep` says about itself: help, extended help, version. Imports nothing heavy: it is on the fast path."""

from __future__ import annotations

from collections.abc import Sequence

VERSION = "2.0.dev0"

_OPTIONS = (
    ("b", "bindaddr", "specify IP address of interface to listen on"),
    ("c", "cluster", "specify the cluster driver (default: {driver})"),
    ("D", "directio", "use direct IO for backend store"),
    ("f", "foreground", "make the program run in foreground"),
    ("g", "gateway", "make the program run as a gateway, without storing objects"),
    ("h", "help", "display this help and exit"),
    ("i", "ioaddr", "use separate network card to handle IO requests"),
    ("j", "journal", "use journal file to log all the write operations"),
    ("l", "log", "specify the log level, the log directory and the log format"),
    ("n", "nosync", "drop O_SYNC for write of backend store"),
    ("p", "port", "specify the TCP port on which to listen (default: 7000)"),
    ("P", "pidfile", "create a pid file"),
    ("R", "recovery", "specify the recovery speed throttling"),
    ("u", "upgrade", "upgrade to the latest data layout"),
    ("v", "version", "show the version"),
    ("V", "vnodes", "set number of vnodes"),
    ("w", "wq-threads", "specify the numbers of worker threads, or the object cache"),
    ("W", "wildcard-recovery", "wildcard recovery for first time"),
    ("x", "max-dynamic-threads", "specify the maximum number of dynamic threads"),
    ("y", "myaddr", "specify the address advertised to other sheep"),
    ("z", "zone", "specify the zone id (default: determined by the listen address)"),
)

EXTENDED = {
    "b": """Example:
\t$ sheep -b 192.168.1.1 ...
This tries to bind to the network interface with this address only.
""",
    "c": """Available arguments:
\tlocal[:FILE]: all nodes on this host, shared state in FILE (default /tmp/sheepdog_shm)
\tcorosync[:GROUP]: the corosync daemon of this host (the default where one runs)
\tzookeeper:HOST:PORT[,HOST:PORT...][/CLUSTER_ID][,timeout=MS]: a ZooKeeper ensemble;
\t    CLUSTER_ID tells clusters apart (default: sheepdog), timeout is how long a node
\t    may not be heard of before it is out (default: 3000)
Example:
\t$ sheep -c local:/run/sheepdog/cluster ...
\t$ sheep -c zookeeper:zoo1:2181,zoo2:2181,zoo3:2181/production,timeout=5000 ...
""",
    "i": """Example:
\t$ sheep -i host=192.168.1.1,port=7001 ...
This tries to add an IO network card of this address for the object traffic between nodes (default port: 7000).
""",
    "j": """Available arguments:
\tsize=: size of the journal, at least 64M (mandatory)
\tdir=: path to the location of the journal (default: metadata directory)
\tskip: if specified, skip the recovery at startup
Example:
\t$ sheep -j dir=/journal,size=1G ...
""",
    "l": """Available arguments:
\tdir=: path to the location of sheep.log
\tlevel=: log level of sheep.log
\tformat=: log format type (default, server, json)
\tdst=: log destination type (default, syslog, stdout)
Example:
\t$ sheep -l dir=/var/log/,level=debug,format=server ...
""",
    "r": """This build has no HTTP object service.
""",
    "R": """Available arguments:
\tmax=: maximum number of objects recovered in one interval
\tinterval=: interval in milliseconds
Example:
\t$ sheep -R max=50,interval=1000 ...
This recovers at most 50 objects a second.
""",
    "V": """Example:
\t$ sheep -V 128 ...
This sets the number of virtual nodes of this node to 128, whatever its disks hold. All nodes that store
objects must have the same strategy, automatic or fixed.
""",
    "w": """Available arguments:
\tnet=, gway=, io=, peer=, reclaim=, gway_fwd=, remove=, remove_peer=, recovery=, async=:
\t    numbers of worker threads
\tsize=: size of the object cache, from 10M on
\tdir=: path to the location of the object cache (default: cache in the metadata directory)
\tdirectio: use direct IO for the object cache
Example:
\t$ sheep -w size=200G,dir=/ssd ...
""",
    "y": """Example:
\t$ sheep -y 192.168.1.1 ...
This announces the address to the other nodes, which connect to it.
""",
    "z": """Example:
\t$ sheep -z 1 ...
Copies of an object are kept in different zones.
""",
}


def help_text(driver: str) -> str:
    """`sheep --help`; `driver` is the default membership driver."""
    lines = [f"Sheepdog daemon (version {VERSION})", "Usage: sheep [OPTION]... [PATH] (default: /tmp)", "Options:"]
    lines += [f"  -{letter}, --{name:<18}{text.format(driver=driver)}" for letter, name, text in _OPTIONS]
    lines += ["", "Try 'sheep <option>', e.g., 'sheep -w', to get more detail about specific option", ""]
    return "\n".join(lines)


def version_text(drivers: Sequence[str]) -> str:
    """`sheep --version`: what scripts look for to know which drivers this build has."""
    return f"Sheepdog daemon version {VERSION}\n\n{features_text(drivers)}\tMiscellaneous: none\n"


def features_text(drivers: Sequence[str]) -> str:
    return f"Supported features:\n\tCluster drivers: {' '.join(drivers)}\n"
