"""The tree of cli.md 3.1, with `snapshot/` and `stat/`: what files there are, what they say and what they do."""

from __future__ import annotations

import errno
from functools import partial

from sheepdog.cluster.client.address import Address, describe
from sheepdog.frontends.sheepfs.cluster import Cluster
from sheepdog.frontends.sheepfs.files import Settings
from sheepdog.frontends.sheepfs.snapshots import Snapshots
from sheepdog.frontends.sheepfs.transport import error
from sheepdog.frontends.sheepfs.tree import ControlFile, Directory, Link
from sheepdog.frontends.sheepfs.volumes import VolumeDirectory, Volumes

SWITCH_SIZE = 5  # what `stat` has always shown for page_cache and object_cache


def root_directory(
    cluster: Cluster, settings: Settings, volumes: Volumes, snapshots: Snapshots, statistics: Directory
) -> Directory:
    """The root with everything below."""

    def status(noun: str, verb: str) -> ControlFile:
        return ControlFile(partial(report, cluster, noun, verb))

    vdi = {
        "list": status("vdi", "list"),
        "mount": ControlFile(write=volumes.mount, size=lambda: 0),
        "lock": ControlFile(write=volumes.lock, size=lambda: 0),
        "share": ControlFile(write=volumes.share, size=lambda: 0),
        "unmount": ControlFile(write=volumes.unmount, size=lambda: 0),
        "volume": Link("../volume"),  # both forms are in use
    }
    config = {
        "page_cache": _switch(settings, "page_cache"),
        "object_cache": _switch(settings, "object_cache"),
        "sheep_info": _gateway(cluster, volumes),
    }
    return Directory(
        {
            "cluster": Directory({"info": status("cluster", "info")}),
            "node": Directory({"info": status("node", "info"), "list": status("node", "list")}),
            "vdi": Directory(vdi),
            "volume": VolumeDirectory(volumes),
            "config": Directory(config),
            "snapshot": snapshots,
            "stat": statistics,
        }
    )


async def report(cluster: Cluster, noun: str, verb: str) -> str:
    """What `dog NOUN VERB` prints; empty if the cluster cannot be reached."""
    try:
        return (await cluster.dog(noun, verb)).text
    except OSError:
        return ""


def parse_gateway(text: str) -> Address:
    """`HOST:PORT`; the port follows the last colon (IPv6 goes without brackets). ValueError if it is not that."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or host.strip() != host:
        raise ValueError(f"'{text}' is not HOST:PORT")
    return host, parse_port(port)


def parse_port(text: str) -> int:
    """1 to 65535, digits only; else ValueError."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        raise ValueError(f"Invalid port number '{text}'")
    return int(text)


def _switch(settings: Settings, name: str) -> ControlFile:
    async def read() -> str:
        return f"{int(getattr(settings, name))}\n"

    async def write(text: str) -> None:
        try:
            setattr(settings, name, int(text) != 0)
        except ValueError:
            raise error(errno.EINVAL) from None

    return ControlFile(read, write, size=lambda: SWITCH_SIZE)


def _gateway(cluster: Cluster, volumes: Volumes) -> ControlFile:
    async def read() -> str:
        return f"{describe(cluster.address)}\n"

    async def write(text: str) -> None:
        try:
            address = parse_gateway(text)
        except ValueError:
            raise error(errno.EINVAL) from None
        await volumes.move(address)

    def size() -> int:
        host = cluster.address if isinstance(cluster.address, str) else cluster.address[0]
        return len(host) + 6

    return ControlFile(read, write, size)
