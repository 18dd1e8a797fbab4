"""What a membership event costs each node, among few and among many: counted, so the same on every machine."""

from __future__ import annotations

import pytest
from tests.bench.cluster_scale import Cluster, Cost, events

FEW, MANY = 3, 60
CALLS_PER_MEMBER = 14  # of a change, in each node: weights, who is shown; 11 when this was written


@pytest.fixture(scope="module")
def costs() -> dict[int, dict[str, Cost]]:
    """Of clusters in which every node is a machine of its own, and which agree after each change."""
    return {size: events(Cluster(size)) for size in (FEW, MANY)}


def test_messages_of_an_event_do_not_depend_on_the_number_of_nodes(costs: dict[int, dict[str, Cost]]) -> None:
    for found in costs.values():
        messages = {name: cost.messages for name, cost in found.items()}
        assert messages == {"notification": 1, "operation": 2, "node lost": 1, "node joins": 2}


@pytest.mark.parametrize("event", ["notification", "operation"])
def test_what_is_ordered_costs_a_node_the_same_among_many(costs: dict[int, dict[str, Cost]], event: str) -> None:
    few, many = (costs[size][event].calls / size for size in (FEW, MANY))
    assert few > 0
    assert many <= 1.1 * few


@pytest.mark.parametrize("event", ["node lost", "node joins"])
def test_a_change_costs_a_node_a_few_calls_for_each_member(costs: dict[int, dict[str, Cost]], event: str) -> None:
    few, many = (costs[size][event].calls / size for size in (FEW, MANY))
    assert (many - few) / (MANY - FEW) <= CALLS_PER_MEMBER
