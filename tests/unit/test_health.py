"""What the reports of all nodes mean together: healthy, degraded, halted, and what stopping one would cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sheepdog.cluster.core.health import Level, NodeReport, costs_of_stopping, findings, level_of
from sheepdog.cluster.core.ids import Member, NodeId

GB = 1 << 30
FINE = NodeReport(epoch=3, redundancy=[[3, 0, 5]], used=GB, free=9 * GB)


def member(last: int, zone: int, vnodes: int = 128) -> Member:
    return Member(NodeId(bytes(12) + bytes([10, 0, 0, last]), 7000), zone, vnodes, 10 * GB)


FOUR = [member(zone + 1, zone) for zone in range(4)]


def reports(*changed: NodeReport | None, base: NodeReport = FINE) -> dict[NodeId, NodeReport | None]:
    """Those of FOUR: the first are as given, the others `base`."""
    given = [*changed, *[base] * (len(FOUR) - len(changed))]
    return {node.id: one for node, one in zip(FOUR, given, strict=True)}


def test_a_report_survives_its_journey() -> None:
    report = replace(FINE, sole={"a": 3}, away=["b"], absent=["c"], failed_disks=["/d"], clients=7)
    assert NodeReport.from_json({**report.to_json(), "of a newer version": 1}) == report


def test_a_cache_that_is_away_is_told_once() -> None:
    away = replace(FINE, cached_away={"web": "x:1"})
    (found,) = findings(FOUR, reports(away, away))
    assert (found.level, found.text) == (
        Level.HALTED, "volume web: refused; acknowledged writes are in the cache of x:1, which is away or has lost it",
    )  # fmt: skip


def test_all_is_well() -> None:
    assert findings(FOUR, reports()) == []
    assert level_of([]) == Level.HEALTHY


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "does not answer"),
        (replace(FINE, unfinished=4, finished=6, total=10), "4 objects short of copies; recovery has done 6 of 10"),
        (replace(FINE, unfinished=1, recovery_enabled=False), "1 object short of copies; recovery is disabled"),
        (replace(FINE, unfinished=2, recovery_waits_s=30, away=["x:1"]), "recovery waits 30 s for x:1"),
        (replace(FINE, unfinished=2, sole={"x:1": 2}), "2 objects would be lost with one more node"),
        (replace(FINE, epoch=2), "still in epoch 2, not 3"),
        (replace(FINE, peering=["x:1"]), "waits to hear what x:1 holds"),
        (replace(FINE, suspended=True), "the membership engine is out of reach"),
        (replace(FINE, failed_disks=["/disk1"]), "disk /disk1 is out of service"),
        (replace(FINE, used=96 * GB, free=4 * GB), "96 % full"),
    ],
)
def test_degraded(changed: NodeReport | None, words: str) -> None:
    found = findings(FOUR, reports(changed))
    assert level_of(found) == Level.DEGRADED
    assert any(words in one.text for one in found), found


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (replace(FINE, state="unformatted"), "not formatted"),
        (replace(FINE, state="waiting", absent=["x:1", "y:1"]), "waits for members of its last epoch: x:1, y:1"),
        (replace(FINE, state="shutdown"), "not running (shutdown)"),
        (replace(FINE, lost=1), "4 objects without a current copy"),
        (replace(FINE, knows_all=False), "nodes or disks away may hold all copies of some objects"),
        (replace(FINE, full=2), "8 objects refused for writing"),
        (replace(FINE, suspended=True), "the membership engine is out of reach"),
        (replace(FINE, strict=True, redundancy=[[5, 0, 2]]), "2 volumes of 5 copies: only 4 zones, writes are refused"),
        (replace(FINE, redundancy=[[6, 0x42, 1]]), "1 volume of 8:2 strips: only 4 zones, they cannot be read"),
    ],
)
def test_halted(base: NodeReport, words: str) -> None:
    found = findings(FOUR, reports(base=base))
    assert level_of(found) == Level.HALTED
    assert words in found[0].text


def test_fewer_zones_than_copies_are_a_weakness() -> None:
    found = findings(FOUR, reports(base=replace(FINE, redundancy=[[5, 0, 1]])))
    assert [(one.level, one.text) for one in found] == [(Level.DEGRADED, "1 volume of 5 copies: only 4 zones")]


def test_gateways_alone_halt() -> None:
    gateways = [replace(node, vnodes=0) for node in FOUR]
    assert level_of(findings(gateways, reports())) == Level.HALTED


def test_one_of_four_may_stop() -> None:
    assert costs_of_stopping(FOUR[0], FOUR, reports()) == []


@pytest.mark.parametrize(
    ("base", "kind", "words"),
    [
        (replace(FINE, redundancy=[[1, 0, 2], [3, 0, 1]]), "data", "2 volumes of 1 copy"),
        (replace(FINE, redundancy=[[6, 0x22, 1]]), "data", "1 volume of 4:2 strips"),
        (replace(FINE, redundancy=[[4, 0, 1]], strict=True), "availability", "with 3 zones strict mode refuses writes"),
        (replace(FINE, sole={"10.0.0.1:7000": 3, "10.0.0.2:7000": 9}), "data", "12 objects would have no other"),
        (replace(FINE, state="waiting"), "availability", "not running"),
        (replace(FINE, peering=["x:1"]), "availability", "agreeing"),
        (replace(FINE, votes=[1, 2, 2]), "availability", "engine would have 1 vote of the 2 that it needs"),
        (replace(FINE, used=40 * GB, free=GB), "availability", "3072 MB free for the 40960 MB"),
    ],
)
def test_a_stop_that_costs(base: NodeReport, kind: str, words: str) -> None:
    costs = costs_of_stopping(FOUR[0], FOUR, reports(base=base))
    assert [cost.kind for cost in costs] == [kind]
    assert words in costs[0].text


@pytest.mark.parametrize("votes", [[], [1, 3, 2], [1, 2, 1], [0, 2, 2]])
def test_a_stop_that_leaves_votes_enough(votes: list[int]) -> None:
    assert costs_of_stopping(FOUR[0], FOUR, reports(base=replace(FINE, votes=votes))) == []


def test_a_gateway_has_a_vote() -> None:
    gateway = replace(FOUR[0], vnodes=0)
    costs = costs_of_stopping(gateway, [gateway, *FOUR[1:]], reports(base=replace(FINE, votes=[2, 3, 2])))
    assert [cost.kind for cost in costs] == ["availability"]


def test_objects_that_only_another_node_has_do_not_matter() -> None:
    assert not costs_of_stopping(FOUR[0], FOUR, reports(base=replace(FINE, sole={"10.0.0.2:7000": 9})))


def test_a_silent_node_makes_stopping_another_one_a_risk() -> None:
    (cost,) = costs_of_stopping(FOUR[0], FOUR, reports(FINE, None))
    assert (cost.kind, FOUR[1].id.port) == ("data", 7000)
    assert "10.0.0.2:7000 does not answer" in cost.text
    assert costs_of_stopping(FOUR[1], FOUR, reports(FINE, None)) == [], "it answers nobody anyhow"


def test_the_last_of_a_zone_and_others() -> None:
    """Two nodes in each of two zones, strict, two copies: any one of them may stop; the last one of a zone may not."""
    base = replace(FINE, redundancy=[[2, 0, 1]], strict=True)
    nodes = [replace(node, zone=number // 2) for number, node in enumerate(FOUR)]
    assert costs_of_stopping(nodes[0], nodes, reports(base=base)) == []
    (cost,) = costs_of_stopping(nodes[0], [nodes[0], *nodes[2:]], reports(base=base))
    assert cost.kind == "availability"


def test_gateways_and_single_nodes() -> None:
    assert costs_of_stopping(FOUR[0], FOUR[:1], reports()) != []
    gateway = replace(FOUR[0], vnodes=0)
    assert costs_of_stopping(gateway, [gateway, *FOUR[1:]], reports(base=replace(FINE, redundancy=[[1, 0, 2]]))) == []
