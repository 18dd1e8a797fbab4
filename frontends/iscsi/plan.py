"""From what is and what is wanted to what has to be done. Pure: no kernel, no files.

A plan done on its tree gives the wanted tree, for which the plan is empty. It names nothing but the disks and
targets of the trees that it is given, and the caller gives it only its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sheepdog.frontends.iscsi.model import Acl, Credentials, Disk, Target, Tree


@dataclass(frozen=True, slots=True)
class CreateDisk:
    disk: str
    content: Disk


@dataclass(frozen=True, slots=True)
class ResizeDisk:
    disk: str
    size: int


@dataclass(frozen=True, slots=True)
class SetDiskAttribute:
    disk: str
    attribute: str
    value: int


@dataclass(frozen=True, slots=True)
class DeleteDisk:
    disk: str


@dataclass(frozen=True, slots=True)
class CreateTarget:
    """Marked as ours and not enabled: nobody can log in before everything is in its place."""

    target: str
    label: str
    disk: str


@dataclass(frozen=True, slots=True)
class SetTargetAttribute:
    target: str
    attribute: str
    value: int


@dataclass(frozen=True, slots=True)
class SetAcl:
    """The initiator's entry is this one, whatever it was."""

    target: str
    initiator: str
    acl: Acl


@dataclass(frozen=True, slots=True)
class RemoveAcl:
    target: str
    initiator: str


@dataclass(frozen=True, slots=True)
class AddPortal:
    target: str
    portal: str


@dataclass(frozen=True, slots=True)
class RemovePortal:
    target: str
    portal: str


@dataclass(frozen=True, slots=True)
class Enable:
    target: str


@dataclass(frozen=True, slots=True)
class DeleteTarget:
    target: str


@dataclass(frozen=True, slots=True)
class SetDiscovery:
    """Who may ask for the list of targets; no user: everybody."""

    credentials: Credentials


Action = (
    CreateDisk
    | ResizeDisk
    | SetDiskAttribute
    | DeleteDisk
    | CreateTarget
    | SetTargetAttribute
    | SetAcl
    | RemoveAcl
    | AddPortal
    | RemovePortal
    | Enable
    | DeleteTarget
    | SetDiscovery
)


def plan(wanted: Tree, present: Tree) -> list[Action]:
    """What makes `present` equal to `wanted`, in an order in which each step can be done."""
    rebuilt = {label for label, disk in present.disks.items() if _must_go(wanted.disks.get(label), disk)}
    kept = {
        iqn: target for iqn, target in present.targets.items() if _may_stay(wanted.targets.get(iqn), target, rebuilt)
    }
    actions: list[Action] = [DeleteTarget(iqn) for iqn in present.targets if iqn not in kept]
    actions += [DeleteDisk(label) for label in present.disks if label in rebuilt]
    # Discovery is closed before the first target can be discovered, and opened after the last is gone.
    if wanted.discovery != present.discovery:
        actions.append(SetDiscovery(wanted.discovery))
    for label, disk in wanted.disks.items():
        actions += _disk(label, disk, None if label in rebuilt else present.disks.get(label))
    for iqn, target in wanted.targets.items():
        actions += _target(iqn, target, kept.get(iqn))
    return actions


def _must_go(wanted: Disk | None, present: Disk) -> bool:
    """Path, serial number and caching cannot be changed under a logical unit; and a disk never shrinks."""
    if wanted is None:
        return True
    same = (wanted.path, wanted.serial, wanted.cached) == (present.path, present.serial, present.cached)
    return not same or wanted.size < present.size


def _may_stay(wanted: Target | None, present: Target, rebuilt: Iterable[str]) -> bool:
    return (
        wanted is not None
        and (wanted.label, wanted.disk) == (present.label, present.disk)
        and present.disk not in rebuilt
    )


def _disk(label: str, wanted: Disk, present: Disk | None) -> Iterator[Action]:
    if present is None:
        yield CreateDisk(label, wanted)
        for attribute, value in wanted.attributes.items():
            yield SetDiskAttribute(label, attribute, value)
        return
    if wanted.size != present.size:
        yield ResizeDisk(label, wanted.size)
    for attribute, value in _changed(wanted.attributes, present.attributes):
        yield SetDiskAttribute(label, attribute, value)


def _target(iqn: str, wanted: Target, present: Target | None) -> Iterator[Action]:
    if present is None:
        yield CreateTarget(iqn, wanted.label, wanted.disk)
        present = Target(
            wanted.label, wanted.disk, frozenset(), {}, dict.fromkeys(wanted.attributes, -1), enabled=False
        )
    for attribute, value in _changed(wanted.attributes, present.attributes):
        yield SetTargetAttribute(iqn, attribute, value)
    for initiator in present.acls:
        if initiator not in wanted.acls:
            yield RemoveAcl(iqn, initiator)
    for initiator, acl in wanted.acls.items():
        if present.acls.get(initiator) != acl:
            yield SetAcl(iqn, initiator, acl)
    for portal in sorted(present.portals - wanted.portals):
        yield RemovePortal(iqn, portal)
    for portal in sorted(wanted.portals - present.portals):
        yield AddPortal(iqn, portal)
    if not present.enabled:
        yield Enable(iqn)


def _changed(wanted: Mapping[str, int], present: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Attributes to set. Those that nobody wants to be anything stay, and those that this kernel lacks are left out."""
    for attribute, value in wanted.items():
        if present.get(attribute, value) != value:
            yield attribute, value
