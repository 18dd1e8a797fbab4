"""A network of its own for servers that listen wider than a test should: a namespace with nothing but its loopback."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from tests.support.processes import environment, run

# In a mount namespace of one's own: the copies of what other tests have mounted go, for as long as they are there a
# filesystem that its test unmounts goes on living. Not where that would unmount the originals too.
LET_GO_OF_OTHERS = """grep -q ' shared:' /proc/self/mountinfo ||
for place in $(cut -d' ' -f5 /proc/self/mountinfo | grep /sheepdog- | sort -r); do
    umount -l "$(printf %b "$place")" || :
done
"""
LIFE_SECONDS = 7200  # the holder ends by itself, whatever becomes of the test; no soak is longer


class NetworkNamespace:
    """Held open by one sleeping process; `enter` stands before each command that shall run inside."""

    def __init__(self) -> None:
        script = f"ip link set lo up && echo ready && exec sleep {LIFE_SECONDS}"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=environment(),
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            raise AssertionError("no private network namespace could be made")
        self.holder = self._holder.pid
        self.enter = ["nsenter", f"--net=/proc/{self.holder}/ns/net", "--"]

    def wait_listening(self, port: int, seconds: float = 10.0) -> None:
        """Until something in here listens on a TCP port."""
        deadline = time.monotonic() + seconds
        while f":{port:04X} 00000000:0000 0A" not in run([*self.enter, "cat", "/proc/net/tcp"]).stdout.decode():
            assert time.monotonic() < deadline, f"nothing listens on port {port}"
            time.sleep(0.05)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait(10)


class Network:
    """Namespaces 0..count-1 on a bridge in one more namespace; nothing of it is seen outside. Call `close`.

    Addresses are 10.77.0.1 and so on, or those after `first`; with one node there is only its loopback.
    """

    def __init__(self, count: int, first: str = "10.77.0.1") -> None:
        self.nodes: list[NetworkNamespace] = []
        lowest = ip_address(first)
        self.addresses = ["127.0.0.1"] if count == 1 else [str(lowest + number) for number in range(count)]
        self._switch = NetworkNamespace()
        try:
            self.nodes.extend(NetworkNamespace() for _ in range(count))
            if count > 1:
                self._wire()
        except BaseException:
            self.close()
            raise

    def _wire(self) -> None:
        self._ip(self._switch, "link", "add", "br0", "type", "bridge")
        self._ip(self._switch, "link", "set", "br0", "up")
        for index, (node, address) in enumerate(zip(self.nodes, self.addresses, strict=True)):
            port = f"p{index}"
            self._ip(
                self._switch, "link", "add", port, "type", "veth",
                "peer", "name", "eth0", "netns", str(node.holder),
            )  # fmt: skip
            self._ip(self._switch, "link", "set", port, "master", "br0", "up")
            self._ip(node, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip(node, "link", "set", "eth0", "up")

    def _ip(self, namespace: NetworkNamespace, *words: str) -> None:
        run([*namespace.enter, "ip", *words])

    def cut(self, *nodes: int) -> None:
        """These nodes reach nobody and are reached by nobody."""
        for node in nodes:
            self._ip(self._switch, "link", "set", f"p{node}", "down")

    def mend(self, *nodes: int) -> None:
        for node in nodes:
            self._ip(self._switch, "link", "set", f"p{node}", "up")

    def split(self, *nodes: int) -> None:
        """These nodes reach each other and nobody else."""
        self._ip(self._switch, "link", "add", "br1", "type", "bridge")
        self._ip(self._switch, "link", "set", "br1", "up")
        for node in nodes:
            self._ip(self._switch, "link", "set", f"p{node}", "master", "br1")

    def unite(self) -> None:
        """All nodes reach all again."""
        for node in range(len(self.nodes)):
            self._ip(self._switch, "link", "set", f"p{node}", "master", "br0")
        self._ip(self._switch, "link", "del", "br1")

    def lose(self, senders: Iterable[int], receivers: Iterable[int]) -> None:
        """What these send to those is lost, what comes back arrives: they think that those have another hardware."""
        for sender, address in self._ways(senders, receivers):
            words = ("neigh", "replace", address, "lladdr", "02:00:00:00:00:fe", "dev", "eth0", "nud", "permanent")
            self._ip(self.nodes[sender], *words)

    def lose_no_more(self, senders: Iterable[int], receivers: Iterable[int]) -> None:
        for sender, address in self._ways(senders, receivers):
            self._ip(self.nodes[sender], "neigh", "del", address, "dev", "eth0")

    def _ways(self, senders: Iterable[int], receivers: Iterable[int]) -> Iterator[tuple[int, str]]:
        to = list(receivers)
        return ((one, self.addresses[other]) for one in senders for other in to if other != one)

    def close(self) -> None:
        for namespace in (*self.nodes, self._switch):
            namespace.close()
