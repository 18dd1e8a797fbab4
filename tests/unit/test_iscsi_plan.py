"""The planner, on any two trees: what it plans leads from one to the other, and then there is nothing left to do."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.frontends.iscsi import plan as do
from sheepdog.frontends.iscsi.model import Acl, Credentials, Disk, Target, Tree
from sheepdog.frontends.iscsi.plan import plan


class Machine:
    """Does actions on a tree, and refuses what a kernel would."""

    def __init__(self, tree: Tree) -> None:
        self.disks = dict(tree.disks)
        self.targets = dict(tree.targets)
        self.discovery = tree.discovery
        self.touched: set[str] = set()

    def tree(self) -> Tree:
        return Tree(self.disks, self.targets, self.discovery)

    def perform(self, action: do.Action) -> None:
        match action:
            case do.CreateDisk(label, disk):
                assert label not in self.disks
                self.disks[label] = replace(disk, attributes={})
            case do.ResizeDisk(label, size):
                assert size > self.disks[label].size, "a disk shrinks under its initiators"
                self.disks[label] = replace(self.disks[label], size=size)
            case do.SetDiskAttribute(label, attribute, value):
                disk = self.disks[label]
                self.disks[label] = replace(disk, attributes={**disk.attributes, attribute: value})
            case do.DeleteDisk(label):
                assert all(target.disk != label for target in self.targets.values()), "in use"
                del self.disks[label]
            case do.SetDiscovery(credentials):
                self.discovery = credentials
            case do.CreateTarget(iqn, label, disk):
                assert iqn not in self.targets
                assert disk in self.disks
                attributes = {"a": -1, "b": -1}
                self.targets[iqn] = Target(label, disk, frozenset(), {}, attributes, enabled=False)
            case do.DeleteTarget(iqn):
                del self.targets[iqn]
            case _:
                self.targets[action.target] = self._changed(self.targets[action.target], action)

    def _changed(self, target: Target, action: do.Action) -> Target:
        match action:
            case do.SetTargetAttribute(_, attribute, value):
                return replace(target, attributes={**target.attributes, attribute: value})
            case do.SetAcl(_, initiator, acl):
                return replace(target, acls={**target.acls, initiator: acl})
            case do.RemoveAcl(_, initiator):
                return replace(target, acls={name: acl for name, acl in target.acls.items() if name != initiator})
            case do.AddPortal(_, portal):
                assert portal not in target.portals
                return replace(target, portals=target.portals | {portal})
            case do.RemovePortal(_, portal):
                assert portal in target.portals
                return replace(target, portals=target.portals - {portal})
            case do.Enable():
                return replace(target, enabled=True)
        raise AssertionError(action)


names = st.sampled_from("xyz")
numbers = st.fixed_dictionaries({"a": st.integers(0, 2), "b": st.integers(0, 1)})
credentials = st.builds(Credentials, names, names)
disks = st.builds(Disk, names, st.integers(1, 3), names, numbers, st.booleans())
acls = st.dictionaries(names, st.builds(Acl, credentials, st.booleans()), max_size=3)


@st.composite
def trees(draw: st.DrawFn, enabled: bool) -> Tree:
    made = draw(st.dictionaries(names, disks, max_size=3))
    targets: dict[str, Target] = {}
    for label in made:
        if draw(st.booleans()):
            targets[draw(names)] = Target(
                label,
                label,
                draw(st.frozensets(names, max_size=3)),
                draw(acls),
                draw(numbers),
                enabled or draw(st.booleans()),
            )
    return Tree(made, targets, draw(credentials))


@settings(max_examples=150, deadline=None)
@given(wanted=trees(enabled=True), present=trees(enabled=False))
def test_a_plan_leads_to_what_is_wanted(wanted: Tree, present: Tree) -> None:
    machine = Machine(present)
    for action in plan(wanted, present):
        machine.perform(action)
    assert machine.tree() == wanted
    assert plan(wanted, machine.tree()) == []


@settings(max_examples=50, deadline=None)
@given(wanted=trees(enabled=True), present=trees(enabled=False), data=st.data())
def test_a_plan_that_was_cut_short_is_taken_up(wanted: Tree, present: Tree, data: st.DataObject) -> None:
    machine = Machine(present)
    actions = plan(wanted, present)
    for action in actions[: data.draw(st.integers(0, len(actions)))]:
        machine.perform(action)
    for action in plan(wanted, machine.tree()):
        machine.perform(action)
    assert machine.tree().targets == wanted.targets


def test_attributes_that_the_kernel_lacks_are_not_planned_for_ever() -> None:
    disk = Disk("path", 1, "serial", {"old": 1, "new": 1})
    assert plan(Tree({"x": disk}), Tree({"x": replace(disk, attributes={"old": 1})})) == []


def test_a_disk_is_made_anew_rather_than_made_smaller_or_another() -> None:
    disk = Disk("path", 2, "serial", {})
    for other in (
        replace(disk, size=1),
        replace(disk, path="p"),
        replace(disk, serial="s"),
        replace(disk, cached=False),
    ):
        assert plan(Tree({"x": other}), Tree({"x": disk})) == [do.DeleteDisk("x"), do.CreateDisk("x", other)]
    assert plan(Tree({"x": replace(disk, size=3)}), Tree({"x": disk})) == [do.ResizeDisk("x", 3)]
