"""Erasure-coded volumes in the simulated world: nodes die at any point, up to the parity and beyond, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sheepdog.cluster.core.ids import ObjectId, Version, strip_index
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.node import Node
from sheepdog.cluster.core.ports import Done, NodeState
from sheepdog.cluster.core.strip_replica import StripReplica
from sheepdog.cluster.core.strip_undo import Undo, UndoLog
from sheepdog.cluster.sim.nemesis import Faults
from sheepdog.cluster.sim.run import Failure, Run, Scenario
from sheepdog.cluster.sim.world import MILLISECOND, SECOND

BLOCKS = (0, 1, 16, 17, 255)  # of two data strips of 4:2, and the last one
SEEDS = 24
SEEDS_PER_TEST = 8


def scenario(name: str, policy: int, machines: int, make_node: Callable[..., Node] = Node, kill: float = 1) -> Scenario:
    return Scenario(
        name, machines=machines, policy=policy, blocks=BLOCKS, faults=Faults(kill=kill), make_node=make_node
    )


@pytest.mark.parametrize(
    ("policy", "machines"), [(0x22, 6), (0x22, 4), (0x11, 3), (0x12, 5), (0x43, 11)], ids=lambda value: f"{value:#x}"
)
def test_calm(policy: int, machines: int) -> None:
    calm = scenario("calm", policy, machines, kill=0)
    calm.duration_ns = SECOND
    run = Run(calm, seed=1)
    run.execute()
    assert run.history.operations > 300
    assert not run.errors


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
@pytest.mark.parametrize(("policy", "machines"), [(0x22, 6), (0x22, 8), (0x12, 5)], ids=lambda value: f"{value:#x}")
def test_nodes_are_killed_and_started_again(policy: int, machines: int, first: int) -> None:
    """Every acknowledged write is readable, no read goes back, and in the end the parity of everything fits."""
    for seed in range(first, first + SEEDS_PER_TEST):
        run = Run(scenario("kills", policy, machines), seed)
        run.execute()
        assert run.history.operations > 100, f"seed {seed}: nothing was tested"


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_everybody_is_killed_while_some_are_down(first: int) -> None:
    """No memory is left of what was on its way: the files must do."""
    for seed in range(first, first + SEEDS_PER_TEST):
        everybody = scenario("everybody", 0x22, 6)
        everybody.faults = Faults(kill=0.5, everybody=1, link=0.5, leave=0.3)
        Run(everybody, seed).execute()


def power_fails_everywhere(make_node: Callable[..., Node] = Node) -> Scenario:
    scene = scenario("blackout", 0x22, 6, make_node)
    scene.faults = Faults(kill=0.3, power=0.3, blackout=1)
    scene.durable_chance = 1.0
    return scene


@pytest.mark.parametrize("first", range(0, 2 * SEEDS_PER_TEST, SEEDS_PER_TEST))
def test_the_power_fails_everywhere(first: int) -> None:
    """What was durable is readable, although strips are durable up to different writes."""
    for seed in range(first, first + SEEDS_PER_TEST):
        Run(power_fails_everywhere(), seed).execute()


def test_rare_paths_are_taken() -> None:
    """What the seeds above are about really happens in them."""
    probes: dict[str, int] = {}
    for seed in range(12):
        run = Run(scenario("kills", 0x22, 6), seed)
        run.execute()
        for name, count in run.cluster.probes().items():
            probes[name] = probes.get(name, 0) + count
    for name in ("strips.rolled_back", "strips.decoded", "rebuilder.rebuilt", "strips.not_readable_here"):
        assert probes.get(name), f"{name} was never reached: {probes}"


class _ForgetsAtOnce(UndoLog):
    """Planted bug: what a write replaced is dropped before the write is everywhere."""

    def keep(self, strip: ObjectId, undo: Undo) -> None:
        pass


class _LeavesParity(StripReplica):
    """Planted bug: going back leaves parity strips with the bytes of the version that was taken back."""

    def undo_step(self, strip: ObjectId, before: Version, offset: int, old: Buffer, done: Done) -> None:
        policy = self._context.policy_of(ObjectId(strip & (1 << 64) - 1))
        parity = policy is not None and strip_index(strip) >= policy.data
        super().undo_step(strip, before, offset, b"" if parity else old, done)


def _forgetful(*arguments: Any) -> Node:
    node = Node(*arguments)
    node.replica.strips.undo = _ForgetsAtOnce()
    return node


def _with_wrong_parity(*arguments: Any) -> Node:
    node = Node(*arguments)
    node.replica.strips = _LeavesParity(node.context)
    return node


class _LostWithThePower(UndoLog):
    """Planted bug: the writes are durable, what leads back from them is not."""

    def load(self, state: NodeState, version_of: Callable[[ObjectId], Version | None]) -> None:
        pass


def _without_a_file(*arguments: Any) -> Node:
    node = Node(*arguments)
    node.replica.strips.undo = _LostWithThePower()
    return node


class _TakesLateWrites(StripReplica):
    """Planted bug: the epoch is checked only when a write arrives, not when the old bytes have been read for it."""

    def begin(self) -> None:
        self._looked = {}


def _fenced_at_arrival(*arguments: Any) -> Node:
    node = Node(*arguments)
    node.replica.strips = _TakesLateWrites(node.context)
    return node


def churn(make_node: Callable[..., Node] = Node) -> Scenario:
    scene = scenario("churn", 0x22, 8, make_node)
    scene.faults = Faults(kill=0.5, leave=1, join=1, hold=1, slow=3, mean_ns=80 * MILLISECOND)
    return scene


@pytest.mark.parametrize(
    "scene",
    [
        scenario("planted", 0x22, 6, _forgetful),
        scenario("planted", 0x22, 6, _with_wrong_parity),
        power_fails_everywhere(_without_a_file),
        churn(_fenced_at_arrival),
    ],
    ids=["forgetful", "wrong parity", "without a file", "fenced at arrival"],
)
def test_planted_bugs_are_found(scene: Scenario) -> None:
    for seed in range(SEEDS):
        try:
            Run(scene, seed).execute()
        except Failure:
            return
    pytest.fail(f"not found in {SEEDS} seeds")
