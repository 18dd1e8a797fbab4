"""What is read of callgrind's files."""

from __future__ import annotations

from tests.bench.instructions import Counts, parse, roles

DUMP = """\
events: Ir sysCount sysTime sysCpuTime

fl=(1) ???
fn=(1) CPyDef_home___Home___submit
0 100
+3 20
cfn=(2) PyDict_SetItem
calls=7 0
* 900 3 50 40

fn=(2)
0 700 3 50 40
-2 5
fn=(1)
0 1
"""


def test_costs_of_calls_are_counted_where_they_arise() -> None:
    counts = parse(iter(DUMP.splitlines()))
    assert counts.instructions == {"CPyDef_home___Home___submit": 121, "PyDict_SetItem": 705}
    assert counts.system_calls == 3


def test_the_other_nodes_are_added_up() -> None:
    counts = [Counts() for _ in range(3)]
    for node, count in enumerate((100, 10, 20)):
        counts[node].instructions["f"] = count
        counts[node].system_calls = node
    by_role = roles(counts)
    assert {role: (one.instructions["f"], one.system_calls, nodes) for role, (one, nodes) in by_role.items()} == {
        "gateway": (100, 0, 1),
        "other node": (30, 3, 2),
        "all nodes": (130, 3, 1),
    }
