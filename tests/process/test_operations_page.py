"""What docs/operations.md says of several machines, typed line by line on machines made of namespaces.

From nothing to a mounted volume, one machine more, an upgrade of all, one machine for another, a lost one: all the time
somebody writes to the volume, and in the end every byte is there. The units and the samples of packaging/ are used as
they are; the addresses in them are those of the machines.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import corosync, needs, trees, zookeeper
from tests.support.hosts import ROOT, Host
from tests.support.netns import Network
from tests.support.processes import run, wait_until

PAGE = ROOT / "docs" / "operations.md"
FIRST_ADDRESS = "192.0.2.11"  # as on the page and in the samples
MACHINES = 4  # three, and the one that is added
SECONDS = 90.0  # for a step, on a busy machine
# What has been done on these machines already: the test needs no network and changes nothing of the system.
INSTALLED = ("apt-get install", "python3 -m venv", "/opt/sheepdog/bin/pip")
FILES = 8
# Blocks that only one of the engines needs.
OF_COROSYNC = (
    "Three machines from nothing: Corosync on",
    "Three machines from nothing: Corosync on again",
    "One more machine: Say 192",
    "One more machine: Say 192 again",
)
OF_ZOOKEEPER = (
    "Three machines from nothing: ZooKeeper on",
    "Three machines from nothing: ZooKeeper on again",
    "One machine for another: If the",
)
ZOOKEEPER_STATUS = "/usr/share/zookeeper/bin/zkServer.sh status"
COROSYNC_CONF, ZOO_CFG = "/etc/corosync/corosync.conf", "/etc/zookeeper/conf/zoo.cfg"
MODEST = "system {\n\tsched_rr: no\n\tmove_to_cgroup: no\n}\n"  # a test's daemon takes no real-time priority


class Page:
    """The code blocks of one part of the page; `typed` remembers which were used."""

    def __init__(self, heading: str) -> None:
        text = PAGE.read_text()
        part = text[text.index(f"## {heading}\n") :]
        self._blocks: dict[str, list[str]] = {}
        section = lead = key = before = ""
        for line in part.splitlines()[1:]:
            if line.startswith("## "):
                break
            if line.startswith("### "):
                section = line[4:]
            elif line.startswith("    "):
                if not before.startswith("    "):
                    key = f"{section}: {lead}"
                    while key in self._blocks:
                        key += " again"
                    self._blocks[key] = []
                self._blocks[key].append(line[4:])
            elif line and not before:
                lead = " ".join(re.findall(r"\w+", line)[:2])
            before = line
        self.unused = dict.fromkeys(self._blocks)

    def lines(self, key: str) -> list[str]:
        """The commands of a block, named by its section and the first two words of the paragraph before it."""
        self.unused.pop(key, None)
        return [line.split("  #")[0].rstrip() for line in self._blocks[key]]


class Site:
    """Machines 0..3 (the last one is not there at first) and an administrator with the page."""

    def __init__(self, engine: str, directory: Path) -> None:
        self.engine = engine
        self.page = Page("Several machines")
        self.directory = directory
        self.network = Network(MACHINES, FIRST_ADDRESS)
        self.hosts: dict[int, Host] = {}

    def buy(self, machine: int, name: str = "") -> None:
        """A machine with an empty disk."""
        self.hosts[machine] = Host(self.network.nodes[machine], self.directory / f"host{machine}{name}")

    def type(self, machine: int, key: str, *changes: tuple[str, str]) -> str:
        """Types a block; each line has to succeed."""
        output = ""
        for line in self.page.lines(key):
            if not line.startswith(INSTALLED):
                for old, new in changes:
                    line = line.replace(old, new)
                output += self.hosts[machine].type(line, seconds=SECONDS)
        return output

    def edit(self, machine: int, path: str, old: str, new: str) -> None:
        """Edits a file of a machine."""
        text = self.hosts[machine].read(path)
        assert old in text
        self.hosts[machine].write(path, text.replace(old, new))

    def install(self, machine: int) -> None:
        self.type(machine, "Three machines from nothing: Say 192")
        assert self.engine in self.hosts[machine].type("sheep --version")

    def install_engine(self, machine: int, number: int, conf: str = "") -> None:
        """`conf`: what the other machines' files say by now; else the sample."""
        if self.engine == "corosync":
            copy, restart = self.page.lines("Three machines from nothing: Corosync on")
            self.hosts[machine].type(copy)
            self.hosts[machine].write(COROSYNC_CONF, conf or self.hosts[machine].read(COROSYNC_CONF) + MODEST)
            self.hosts[machine].type(restart)
        else:
            copy, *rest = self.page.lines("Three machines from nothing: ZooKeeper on")
            self.hosts[machine].type(copy)
            if conf:
                self.hosts[machine].write(ZOO_CFG, conf)
            for line in rest:
                self.hosts[machine].type(line.replace("echo 1", f"echo {number}"))

    def install_sheep(self, machine: int) -> None:
        *before, enable = self.page.lines("Three machines from nothing: The sheep")
        for line in before:
            self.hosts[machine].type(line)
        default = "/etc/default/sheep"
        if self.engine == "zookeeper":
            self.edit(machine, default, 'SHEEP_OPTIONS="-c corosync', '#SHEEP_OPTIONS="-c corosync')
            self.edit(machine, default, '#SHEEP_OPTIONS="-c zookeeper', 'SHEEP_OPTIONS="-c zookeeper')
        self.edit(machine, default, " -z 1", f" -z {machine + 1}")
        complaints = self.hosts[machine].type("systemd-analyze verify --man=no sheep.service", check=False)
        assert "sheep" not in complaints, complaints
        self.hosts[machine].type(enable)

    def listed(self, machine: int) -> dict[int, int]:
        """Machine and Id of each node, as `machine` lists them."""
        rows = [line.split() for line in self.hosts[machine].type("dog node list -r", check=False).splitlines()]
        addresses = {row[1].rpartition(":")[0]: int(row[0]) for row in rows if len(row) > 2 and row[0].isdigit()}
        known = self.network.addresses
        return {known.index(address): number for address, number in addresses.items() if address in known}

    def wait_listed(self, machine: int, *machines: int) -> None:
        wait_until(lambda: sorted(self.listed(machine)) == list(machines), SECONDS, f"nodes {machines}", 0.3)

    def stop_line(self, machine: int, others: int, key: str, first: str) -> list[str]:
        """The lines of a block after `first`, which `others` says yes to."""
        line, *rest = self.page.lines(key)
        assert line == first
        number = self.listed(others)[machine]
        wait_until(
            lambda: "yes" in self.hosts[others].type(line.replace("2", str(number)), check=False).lower(),
            SECONDS, f"machine {machine} may stop", 0.5,
        )  # fmt: skip
        return rest

    def logs(self) -> str:
        show = "tail -n 25 /var/log/*.out /var/lib/sheepdog/sheep.log"
        return "\n".join(f"--- {machine}\n{host.type(show, check=False)}" for machine, host in self.hosts.items())

    def close(self) -> None:
        for host in self.hosts.values():
            host.power_off()
        self.network.close()


class Writer:
    """Writes and syncs files on the first machine's mount without a break, eight names again and again."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.rounds = 0
        self.error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.wait(0.2):
                text = trees.pattern(self.rounds, 2048).hex()
                place = f"/mnt/{self.rounds % FILES}"
                self.host.type(f"printf {text} > {place} && sync {place}", seconds=SECONDS)
                self.rounds += 1
        except AssertionError as error:
            self.error = str(error)

    def goes_on(self) -> None:
        before = self.rounds
        wait_until(lambda: self.rounds > before + 1 or bool(self.error), SECONDS, "writes go on")
        assert not self.error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(SECONDS)
        assert not self.error, self.error

    def check(self) -> None:
        for number in range(max(0, self.rounds - FILES), self.rounds):
            found = self.host.type(f"cat /mnt/{number % FILES}")
            assert found == trees.pattern(number, 2048).hex(), f"file of round {number}"


@pytest.fixture(params=["corosync", "zookeeper"])
def site(request: pytest.FixtureRequest, directory: Path, teardown: ExitStack) -> Iterator[Site]:
    needs.fuse()
    needs.loop_devices()
    needs.program("systemd-analyze")
    {"corosync": corosync.needed, "zookeeper": zookeeper.needed}[request.param]()
    made = Site(request.param, directory)
    teardown.callback(made.close)
    yield made
    if request.session.testsfailed:
        print(made.logs())


def test_every_line_of_the_page(site: Site) -> None:
    three_machines_from_nothing(site)
    writer = Writer(site.hosts[0])
    writer.goes_on()
    try:
        one_more(site)
        writer.goes_on()
        upgrades(site)
        writer.goes_on()
        one_for_another(site)
        writer.goes_on()
        a_lost_one(site)
        writer.goes_on()
    finally:
        writer.stop()
    writer.check()
    first = site.hosts[0]
    first.type("umount /mnt")
    wait_until(lambda: "web" not in first.type("losetup -a"), SECONDS, "the loop device lets go", 0.2)
    first.type("e2fsck -fn /run/sheepfs/vdi/volume/web && mount -o loop,ro /run/sheepfs/vdi/volume/web /mnt")
    writer.check()
    stop_all(site)
    other = {"corosync": OF_ZOOKEEPER, "zookeeper": OF_COROSYNC}[site.engine]
    assert list(site.page.unused) == list(other), "lines of the page that were not typed"


def three_machines_from_nothing(site: Site) -> None:
    for machine in range(3):
        site.buy(machine)
        site.install(machine)
        site.install_engine(machine, machine + 1)
    if site.engine == "corosync":
        (line,) = site.page.lines("Three machines from nothing: Corosync on again")
        wait_until(lambda: votes(site.hosts[0].type(line, check=False)) == ("3", "Yes"), SECONDS, "three votes", 0.5)
    else:
        (line,) = site.page.lines("Three machines from nothing: ZooKeeper on again")
        assert line in ZOOKEEPER_STATUS
        for machine in range(3):
            wait_serving(site, machine)
    for machine in range(3):
        site.install_sheep(machine)
    site.wait_listed(1, 0, 1, 2)
    assert "Filesystem" not in site.type(0, "Three machines from nothing: And once")
    assert " /mnt ext4 " in site.hosts[0].type("cat /proc/mounts")


def one_more(site: Site) -> None:
    if site.engine == "corosync":
        node = "".join(f"\t{line}\n" for line in site.page.lines("One more machine: Say 192"))
    site.buy(3)
    site.install(3)
    if site.engine == "corosync":
        before = site.hosts[0].read(COROSYNC_CONF)
        after = before.replace("\n}\n\nquorum", f"\n{node}}}\n\nquorum")
        assert "192.0.2.14" in after
        for machine in range(3):
            site.hosts[machine].write(COROSYNC_CONF, after)
        (reload,) = site.page.lines("One more machine: Say 192 again")
        site.hosts[0].type(reload)
        site.install_engine(3, 4, after)
    site.install_sheep(3)
    site.wait_listed(0, 0, 1, 2, 3)
    output = site.type(0, "One more machine: ZooKeeper nothing")
    assert "192.0.2.14" in output and "HEALTHY" in output


def upgrades(site: Site) -> None:
    """All machines, the one whose volume is mounted among them."""
    for machine in range(MACHINES):
        other = (machine + 1) % MACHINES
        stop, _, start, healthy = site.stop_line(
            machine, other, "Reboots and upgrades: One machine", "dog node may-stop 2"
        )
        site.hosts[machine].type(stop)
        assert machine not in site.listed(other)
        if site.engine == "corosync":
            site.hosts[machine].type("systemctl restart corosync")
        site.hosts[machine].type(start)
        site.wait_listed(other, 0, 1, 2, 3)
        site.hosts[other].type(healthy, seconds=SECONDS)
    if site.engine == "zookeeper":
        before = [site.hosts[machine].type("pgrep -f '[s]heep /var/lib/sheepdog '").split() for machine in range(3)]
        for machine in range(3):
            site.hosts[machine].type("systemctl restart zookeeper")
            wait_serving(site, machine)
        site.wait_listed(3, 0, 1, 2, 3)
        after = [site.hosts[machine].type("pgrep -f '[s]heep /var/lib/sheepdog '").split() for machine in range(3)]
        assert before == after, "no sheep was touched"


def wait_serving(site: Site, machine: int) -> None:
    wait_until(lambda: "Mode:" in serving(site, machine), SECONDS, f"ZooKeeper on machine {machine}", 1.0)


def serving(site: Site, machine: int) -> str:
    """What a ZooKeeper server says of itself, if it serves."""
    return site.hosts[machine].type(ZOOKEEPER_STATUS, check=False)


def votes(status: str) -> tuple[str, str]:
    """Total votes and whether quorate, of corosync-quorumtool's output."""
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return values.get("Total votes", "").strip(), values.get("Quorate", "").strip()


def one_for_another(site: Site) -> None:
    """The third machine goes; the fourth is there already."""
    disable, engine = site.stop_line(2, 0, "One machine for another: First the", "dog node may-stop 2")
    site.hosts[2].type(disable)
    site.wait_listed(0, 0, 1, 3)
    section = "One machine for another"
    reload, healthy = site.page.lines(f"{section}: and on")
    if site.engine == "corosync":
        site.hosts[2].type(engine)
        text = site.hosts[0].read(COROSYNC_CONF)
        text = re.sub(r"\tnode \{\n\t*ring0_addr: 192.0.2.13\n(.*\n)*?\t\}\n", "", text)
        assert "192.0.2.13" not in text and "192.0.2.14" in text
        for machine in (0, 1, 3):
            site.hosts[machine].write(COROSYNC_CONF, text)
        site.hosts[0].type(reload)
    else:
        for machine in (0, 1):
            site.edit(machine, ZOO_CFG, "server.3=192.0.2.13", "server.3=192.0.2.14")
        site.hosts[3].write(ZOO_CFG, site.hosts[0].read(ZOO_CFG))
        site.hosts[3].type("echo 3 > /etc/zookeeper/conf/myid")
        disable, restart = site.page.lines(f"{section}: If the")
        site.hosts[2].type(disable)
        leader_last = sorted((0, 1), key=lambda machine: "leader" in serving(site, machine))
        for machine in (3, *leader_last):
            site.hosts[machine].type(restart)
            time.sleep(1.0)
        for machine in (3, *leader_last):
            wait_serving(site, machine)
    site.hosts[0].type(healthy, seconds=SECONDS)
    site.hosts[2].power_off()
    site.wait_listed(0, 0, 1, 3)


def a_lost_one(site: Site) -> None:
    """The second machine breaks; another one gets its address."""
    site.hosts[1].power_off()
    site.wait_listed(0, 0, 3)
    site.buy(1, "new")
    site.install(1)
    if site.engine == "corosync":
        site.install_engine(1, 2, site.hosts[0].read(COROSYNC_CONF))
    else:
        site.install_engine(1, 2, site.hosts[0].read(ZOO_CFG))
    site.install_sheep(1)
    site.wait_listed(0, 0, 1, 3)
    site.hosts[0].type("until dog cluster health; do sleep 1; done", seconds=SECONDS)


def stop_all(site: Site) -> None:
    """An order to stop ends the sheep with status 0: nothing starts them again."""
    first = site.hosts[0]
    first.type("umount /mnt")
    wait_until(lambda: "web" not in first.type("losetup -a"), SECONDS, "the loop device lets go", 0.2)
    first.type("echo web > /run/sheepfs/vdi/unmount && umount /run/sheepfs && dog cluster shutdown")
    for machine in (0, 1, 3):
        assert "on-failure" in site.hosts[machine].type("grep Restart= /etc/systemd/system/sheep.service")
        gone = "until ! pgrep -f '[s]heep /var/lib/sheepdog '; do sleep 0.2; done; sleep 3; ! pgrep -f '[s]heep /var'"
        site.hosts[machine].type(gone, seconds=SECONDS)


def test_the_iscsi_unit_is_one_that_systemd_takes(site: Site) -> None:
    site.buy(0)
    site.install(0)
    site.hosts[0].type("cp packaging/systemd/sheepdog-iscsi.service /etc/systemd/system/")
    complaints = site.hosts[0].type("systemd-analyze verify --man=no sheepdog-iscsi.service", check=False)
    assert "sheepdog" not in complaints, complaints


def test_the_unit_is_found_by_tools() -> None:
    """They look for `sheep PATH ` in the list of processes: the path comes first."""
    unit = (ROOT / "packaging/systemd/sheep.service").read_text()
    assert "\nExecStart=/usr/local/bin/sheep $SHEEP_STORE -f " in unit


def test_what_is_installed_exists() -> None:
    """The lines that are not typed: pip's extras are the project's, and the packages those that tests install."""
    lines = Page("Several machines").lines("Three machines from nothing: Say 192")
    extras = re.search(r"'\.\[(.*)\]'", " ".join(lines))
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    for extra in extras[1].split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
    packages = lines[0].split()[2:]
    run(["dpkg-query", "-W", *packages])
