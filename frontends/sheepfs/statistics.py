"""`stat/volume/NAME` and `stat/cluster`: numbers as text that is also valid Prometheus exposition (version 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from sheepdog.frontends.sheepfs.cluster import Cluster
from sheepdog.frontends.sheepfs.tree import ControlFile, Directory, Node, Numbers
from sheepdog.frontends.sheepfs.volumes import MountedVolume, Volumes

Labels = Mapping[str, str]
Samples = Iterable[tuple[Labels, int]]


def statistics_directory(cluster: Cluster, volumes: Volumes, numbers: Numbers) -> Directory:
    """`stat/`."""
    return Directory(
        {"volume": VolumeStatistics(volumes, numbers), "cluster": ControlFile(partial(cluster_text, cluster))}
    )


class VolumeStatistics(Directory):
    """A file for each mounted volume."""

    def __init__(self, volumes: Volumes, numbers: Numbers) -> None:
        super().__init__({}, live=self._current)
        self._volumes = volumes
        self._numbers = numbers
        self._files: dict[MountedVolume, Node] = {}

    def _current(self) -> dict[str, Node]:
        mounted = self._volumes.mounted()
        for volume in [volume for volume in self._files if volume not in mounted]:
            self._numbers.remove(self._files.pop(volume))
        for volume in mounted:
            if volume not in self._files:
                self._files[volume] = ControlFile(partial(_volume_text, volume))
                self._numbers.add(self._files[volume])
        return {volume.name: node for volume, node in self._files.items()}


async def _volume_text(volume: MountedVolume) -> str:
    return volume_text(volume)


def volume_text(volume: MountedVolume) -> str:
    """Everything known of one mounted volume."""
    labels = {"volume": volume.name}
    counters = volume.counters
    text = ""
    for name, kind, help_text, value in (
        ("size_bytes", "gauge", "Size as of the mount", volume.size),
        ("allocated_bytes", "gauge", "Backed by objects", volume.volume.allocated_bytes()),
        ("open_files", "gauge", "Open files", volume.opened),
        ("reads_total", "counter", "Reads", counters.reads),
        ("read_bytes_total", "counter", "Bytes read", counters.read_bytes),
        ("writes_total", "counter", "Writes", counters.writes),
        ("written_bytes_total", "counter", "Bytes written", counters.written_bytes),
        ("flushes_total", "counter", "Flushes", counters.flushes),
        ("discards_total", "counter", "Discards and zeroed ranges", counters.discards),
        ("discarded_bytes_total", "counter", "Bytes discarded or zeroed", counters.discarded_bytes),
    ):
        text += metric(f"sheepdog_volume_{name}", kind, help_text, [(labels, value)])
    return text


async def cluster_text(cluster: Cluster) -> str:
    """Nodes and volumes; empty if the cluster cannot be reached."""
    try:
        nodes, catalog = await cluster.space(), await cluster.catalog()
    except OSError:
        return ""
    working = [info for info in catalog if not info.is_snapshot]
    provisioned = sum(info.size for info in working)
    return "".join(
        (
            metric("sheepdog_nodes", "gauge", "Nodes that store objects and answer", [({}, len(nodes))]),
            metric(
                "sheepdog_node_size_bytes", "gauge", "Capacity", [({"node": node.node}, node.size) for node in nodes]
            ),
            metric("sheepdog_node_free_bytes", "gauge", "Free", [({"node": node.node}, node.free) for node in nodes]),
            metric("sheepdog_volumes", "gauge", "Volumes", [({}, len(working))]),
            metric("sheepdog_snapshots", "gauge", "Snapshots", [({}, len(catalog) - len(working))]),
            metric("sheepdog_provisioned_bytes", "gauge", "Sizes of all volumes", [({}, provisioned)]),
        )
    )


def metric(name: str, kind: str, help_text: str, samples: Samples) -> str:
    """One metric family."""
    lines = [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{shown}}} {value}" if shown else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
