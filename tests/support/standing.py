"""Three nodes that the tests of a file get one after the other, each time formatted anew.

Starting and ending nodes takes longer than most of what is tested with them. Nodes that a test has killed, stopped or
started again are not handed on, and neither is a cluster in which they are not all together.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from shutil import rmtree

from tests.support import native
from tests.support.cluster import RUNNING, Cluster, started

NODES = 3


class StandingCluster:
    """Call `close` in every case."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._pids: list[list[int]] = []

    def take(self) -> Cluster:
        """Empty, with three copies of everything."""
        if self._cluster is not None and not self._is_unharmed(self._cluster):
            self.close()
        if self._cluster is None:
            self._cluster = Cluster(NODES, Path(tempfile.mkdtemp(prefix="sheepdog-")))
            started(self._cluster)
            self._pids = [self._cluster.pids(node) for node in range(NODES)]
        self._cluster.format("--force", "-c", "3")
        return self._cluster

    def _is_unharmed(self, cluster: Cluster) -> bool:
        pids = [cluster.pids(node) for node in range(NODES)]
        if pids != self._pids or any(_is_stopped(pid) for of_node in pids for pid in of_node):
            return False
        return all(
            native.member_count(cluster.socket(node)) == NODES and native.status(cluster.socket(node)) == RUNNING
            for node in range(NODES)
        )

    def close(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()
            rmtree(cluster.directory, ignore_errors=True)


def _is_stopped(pid: int) -> bool:
    """By a signal; asking it would take as long as waiting for an answer may."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
