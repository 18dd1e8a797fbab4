"""The corosync driver against real daemons: on one node, and on three and two whose network breaks."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.corosync import Corosync
from tests.support.members import Member, Members, agree, wait
from tests.support.processes import BIN, run

CLEAN_SECONDS = 1.0  # a process's end is seen within milliseconds; this machine may be busy
END_SECONDS = 60.0
RING_SECONDS = 30.0  # losing a node takes 2.2 tokens and more under load


class Group:
    """Daemons and members on them."""

    def __init__(self, directory: Path, count: int, quorum: tuple[str, ...]) -> None:
        self.corosync = Corosync(directory, count, quorum)
        self.members = Members(directory, "corosync")

    def start(self, name: str, node: int = 0) -> Member:
        return self.members.start(name, self.corosync.daemons[node].enter)

    def together(self, *names: str) -> list[Member]:
        """One on each node, the first one oldest; again and again if there is only one node."""
        count = len(self.corosync.daemons)
        started: list[Member] = []
        for index, name in enumerate(names):
            started.append(self.start(name, index % count))
            wait(lambda: started[-1].members() == list(names[: len(started)]), self.members)
        wait(lambda: all(member.members() == list(names) for member in started), self.members)
        return started

    def wait(self, condition: Callable[[], bool], seconds: float = RING_SECONDS) -> float:
        return wait(condition, self.members, seconds)

    def reunited(self, *members: Member) -> list[Member]:
        """All see all; a lost one is started again, as a sheep would join again. When links come back, corosync may
        take a ring or two more until all are in one: that may cost the others their place too."""
        now = list(members)

        def together() -> bool:
            for node, member in enumerate(now):
                if "Lost" in member.others():
                    member.process.kill()
                    now[node] = self.start(member.name, node)
            return all(sorted(one.members()) == sorted(other.name for other in now) for one in now)

        self.wait(together)
        return now

    def close(self) -> None:
        self.members.close()
        self.corosync.close()


@pytest.fixture
def group(directory: Path, teardown: ExitStack) -> Iterator[Callable[..., Group]]:
    def make(count: int, *quorum: str) -> Group:
        made = Group(directory, count, quorum)
        teardown.callback(made.close)
        made.corosync.start()
        return made

    yield make


def test_processes_of_one_node(group: Callable[..., Group]) -> None:
    one = group(1)
    a, b, c = one.together("a", "b", "c")
    for member in (a, b, c):
        member.tell("send x 200")
    one.wait(lambda: all(len(member.messages()) == 600 for member in (a, b, c)))
    assert len({member.digest("c") for member in (a, b, c)}) == 1
    for member in (a, b, c):
        own = [text for text in member.messages() if text.startswith(member.name)]
        assert own == [f"{member.name} x {index}" for index in range(200)]
    b.signal(signal.SIGKILL)
    assert one.wait(lambda: a.members() == c.members() == ["a", "c"]) < CLEAN_SECONDS
    assert a.views()[-1][4] == 0, "the death is proven: nobody has to wait for a lease"
    b2 = one.start("b")
    one.wait(lambda: all(member.members() == ["a", "c", "b"] for member in (a, b2, c)))
    assert b2.views()[0][2][0][1] > b.views()[0][2][0][1], "a new incarnation"
    c.tell("send last 3")
    c.tell("leave")
    assert one.wait(lambda: a.members() == b2.members() == ["a", "b"]) < CLEAN_SECONDS
    assert a.messages()[-3:] == b2.messages() == [f"c last {index}" for index in range(3)]
    a.tell("renew")
    one.wait(lambda: len(a.leases()) == 2)  # the other one came with the first view
    assert 0.5 < a.leases()[1] <= 1.0


def test_everybody_starts_at_once(group: Callable[..., Group]) -> None:
    three = group(3)
    members = [three.start(f"m{index}", index % 3) for index in range(6)]
    three.wait(lambda: all(len(member.members()) == 6 for member in members))
    for member in members:
        member.tell("spread x 50")
    three.wait(lambda: all(len(member.messages()) == 300 for member in members))
    assert agree(members)
    assert [member.others() for member in members] == [[]] * 6


def test_large_messages(group: Callable[..., Group]) -> None:
    two = group(2, "two_node: 1")
    a, b = two.together("a", "b")
    a.tell("send big 20 900000")
    two.wait(lambda: len(a.messages()) == len(b.messages()) == 20)
    assert a.digest("b") == b.digest("b")


def test_more_than_the_daemon_takes_at_a_time(group: Callable[..., Group]) -> None:
    """It refuses for as long as its queue is full (CS_ERR_TRY_AGAIN): everything arrives, once and in order."""
    one = group(1)
    a, b, c = one.together("a", "b", "c")
    for member in (a, b, c):
        member.tell("send much 400 50000")
    one.wait(lambda: all(len(member.messages()) == 1200 for member in (a, b, c)))
    assert len({member.digest("c") for member in (a, b, c)}) == 1
    for member in (a, b, c):
        member.tell("refused")
        own = [text for text in a.messages() if text.startswith(member.name)]
        assert own == [f"{member.name} much {index}" for index in range(400)]
    one.wait(lambda: all(member.refused() >= 0 for member in (a, b, c)))
    assert sum(member.refused() for member in (a, b, c)) > 0


def test_a_newcomer_is_let_in_while_the_oldest_member_is_stopped(group: Callable[..., Group]) -> None:
    three = group(3)
    a, b, c = three.together("a", "b", "c")
    c.signal(signal.SIGKILL)
    three.wait(lambda: b.members() == ["a", "b"])
    a.signal(signal.SIGSTOP)
    again = three.start("c", 2)
    three.wait(lambda: again.members() == b.members() == ["a", "b", "c"])
    again.tell("send x 3")
    three.wait(lambda: b.messages() == again.messages() == [f"c x {index}" for index in range(3)])
    a.signal(signal.SIGCONT)
    three.wait(lambda: a.messages() == again.messages() and a.members() == ["a", "b", "c"])
    assert a.others() == b.others() == []


def test_the_engine_that_a_sheep_takes_by_itself(group: Callable[..., Group], directory: Path) -> None:
    """corosync where its daemon runs, local where it does not, neither where it does not say."""
    one = group(1)
    (daemon,) = one.corosync.daemons
    script = "from sheepdog.cluster.drivers import corosync_calls, registry\n"
    script += "corosync_calls.START_PATIENCE_S = corosync_calls.ANSWER_S = 1.0\nprint(registry.default())"
    command = [*daemon.enter, sys.executable, "-c", script]
    assert run(command).stdout == b"corosync\n"
    daemon.send(signal.SIGSTOP)
    silent = run(command, check=False)
    assert silent.returncode == 1
    assert b"corosync runs and does not answer; with -c local it is not asked" in silent.stderr.splitlines()[-1]
    daemon.send(signal.SIGCONT)
    place = directory / "store"
    sheep = subprocess.Popen([*daemon.enter, str(BIN / "sheep"), "-f", "-y", "127.0.0.1", "-p", "7000", str(place)])
    try:
        a = one.start("a")
        one.wait(lambda: len(a.members()) == 2)
    finally:
        sheep.terminate()
        sheep.wait(END_SECONDS)
    daemon.stop()
    assert run(command).stdout == b"local\n"


def test_a_node_is_cut_off_and_comes_back(group: Callable[..., Group]) -> None:
    three = group(3)
    a, b, c = three.together("a", "b", "c")
    three.corosync.network.cut(2)
    c.tell("send never 5")
    three.wait(lambda: a.members() == b.members() == ["a", "b"] and c.others() == ["Suspended"])
    assert a.views()[-1][4] == b.views()[-1][4] == 1.1, "the others wait for the lease of the one they cannot see"
    a.tell("send meanwhile 5")
    three.wait(lambda: len(b.messages()) == 5)
    assert (c.members(), c.messages()) == (["a", "b", "c"], []), "a minority delivers nothing"
    three.corosync.network.mend(2)
    three.wait(lambda: c.others() == ["Suspended", "Lost"])
    a, b, c = three.reunited(a, b, c)
    c.tell("send back 5")
    three.wait(lambda: all([text for text in one.messages() if "back" in text][4:] for one in (a, b, c)))
    assert a.ordered()[-6:] == b.ordered()[-6:] == c.ordered()[-6:], "all from the view that all are in"
    assert not [text for text in a.messages() if "never" in text]


def test_nobody_goes_on_without_a_majority(group: Callable[..., Group]) -> None:
    three = group(3)
    members = three.together("a", "b", "c")
    three.corosync.network.cut(0, 1, 2)
    three.wait(lambda: all(member.others() == ["Suspended"] for member in members))
    time.sleep(1.0)
    assert all(member.members() == ["a", "b", "c"] for member in members)
    three.corosync.network.mend(0, 1, 2)
    three.wait(lambda: all(member.others()[-1] == "Lost" for member in members))
    three.reunited(*members)


def test_what_one_node_sends_is_lost(group: Callable[..., Group]) -> None:
    """The network is broken in one direction only: whoever goes on, it is one side."""
    three = group(3)
    a, b, c = three.together("a", "b", "c")
    three.corosync.network.lose([2], [0, 1])
    three.wait(lambda: a.members() == b.members() == ["a", "b"] or "Suspended" in a.others() + b.others())
    three.wait(lambda: "Suspended" in c.others())
    assert c.members() == ["a", "b", "c"]
    three.corosync.network.lose_no_more([2], [0, 1])
    three.wait(lambda: c.others()[-1] == "Lost")


def test_two_nodes_have_a_tie_breaker(group: Callable[..., Group]) -> None:
    """two_node makes each side quorate alone: the node with the lower number goes on, the other one waits."""
    two = group(2, "two_node: 1")
    a, b = two.together("a", "b")
    two.corosync.network.cut(0)
    two.wait(lambda: a.members() == ["a"] and b.others() == ["Suspended"])
    assert b.members() == ["a", "b"]
    two.corosync.network.mend(0)
    two.wait(lambda: b.others() == ["Suspended", "Lost"])
    assert a.others() == []


def test_the_daemon_dies(group: Callable[..., Group]) -> None:
    three = group(3)
    a, b, c = three.together("a", "b", "c")
    three.corosync.daemons[2].stop()
    assert three.wait(lambda: c.others() == ["Lost"]) < CLEAN_SECONDS
    three.wait(lambda: a.members() == b.members() == ["a", "b"])
    three.corosync.daemons[2].start()
    three.corosync.daemons[0].wait_votes(3)
    three.reunited(a, b, c)


def test_the_daemon_is_stopped_for_a_while(group: Callable[..., Group]) -> None:
    """No lease without the ring: a member on a stopped daemon learns nothing, but it must not answer either."""
    three = group(3)
    a, b, c = three.together("a", "b", "c")
    first = c.leases()
    assert len(first) == 1, "the one that comes with the first view"
    three.corosync.daemons[2].send(signal.SIGSTOP)
    c.tell("renew")
    three.wait(lambda: a.members() == b.members() == ["a", "b"])
    three.wait(lambda: c.others() == ["Suspended"])
    assert c.leases() == first
    three.corosync.daemons[2].send(signal.SIGCONT)
    three.wait(lambda: c.others()[-1] == "Lost")
    assert all(lease < 0 for lease in c.leases()[1:]), "over before it came"


def test_a_daemon_that_stood_still_has_missed_another_order(group: Callable[..., Group]) -> None:
    """Its ring is quorate again, and nobody is back whom its member knows: the others began anew without it.

    Sometimes the daemon has a ring of its own in between, and is told that it has no quorum: tests/unit has both ways.
    """
    three = group(3)
    a, b, c = three.together("a", "b", "c")
    three.corosync.daemons[1].send(signal.SIGSTOP)
    three.wait(lambda: three.corosync.daemons[0].quorum() == (True, 2))
    for member in (a, c):
        member.process.kill()
        member.process.wait(END_SECONDS)
    a, c = three.start("a", 0), three.start("c", 2)
    three.wait(lambda: sorted(a.members()) == sorted(c.members()) == ["a", "c"])
    time.sleep(3)  # after so long, half the times it comes straight into the ring of the others
    three.corosync.daemons[1].send(signal.SIGCONT)
    three.wait(lambda: b.others()[-1:] == ["Lost"])
    assert len(b.views()) == 2, "those in which it came and c came: it has gone on with nothing"
    a, b, c = three.reunited(a, b, c)
    assert a.others() == c.others() == []


def test_a_stopped_process_counts_as_alive(group: Callable[..., Group]) -> None:
    """Its node has the messages; the others go on after a while, and it has missed nothing."""
    three = group(3)
    a, b, c = three.together("a", "b", "c")
    c.signal(signal.SIGSTOP)
    a.tell("send while 50")
    three.wait(lambda: len(a.messages()) == len(b.messages()) == 50)
    a.tell("send again 50")
    assert three.wait(lambda: len(a.messages()) == len(b.messages()) == 100) < 2.0, "it is not waited for every time"
    c.signal(signal.SIGCONT)
    three.wait(lambda: len(c.messages()) == 100)
    assert a.members() == ["a", "b", "c"]
    assert len({member.digest("c") for member in (a, b, c)}) == 1
