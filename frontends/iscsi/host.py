"""One exporting host: makes its kernel's target what the cluster wants, takes it down, tells how it is.

Failures are collected: a volume whose secret is missing does not keep the others from being exported, and what is
exported already stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.iscsi.configfs import ROOT, read_tree
from sheepdog.frontends.iscsi.exports import Export, Login
from sheepdog.frontends.iscsi.files import Files
from sheepdog.frontends.iscsi.model import (
    TARGET_ATTRIBUTES,
    Acl,
    Credentials,
    Disk,
    Target,
    Tree,
    disk_attributes,
    label,
    volume_of,
)
from sheepdog.frontends.iscsi.plan import Action, plan
from sheepdog.frontends.iscsi.secrets import read_secret

Perform = Callable[[Iterable[Action]], int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one volume shall be on this host."""

    export: Export
    serial: str
    object_size: int


@dataclass(slots=True)
class Outcome:
    """Changes made to the kernel's target, and one line for each volume that could not be brought to what is wanted."""

    changes: int = 0
    problems: list[str] = field(default_factory=list)


class Host:
    """`perform` does actions; it is asked for when the first one is to be done."""

    def __init__(
        self,
        name: str,
        files: Files,
        performer: Callable[[], Perform],
        root: Path = ROOT,
        secret: Callable[[str], str] = read_secret,
    ) -> None:
        self.name = name
        self._files = files
        self._performer = performer
        self._root = root
        self._secret = secret
        self._outcome = Outcome()

    def tree(self) -> Tree:
        """What is there of ours."""
        return read_tree(self.name, self._root)

    def apply(self, wanted: Mapping[str, Wanted], only: Iterable[str] | None = None) -> Outcome:
        """Exports all of `wanted` and nothing else; with `only`, other volumes stay as they are."""
        self._outcome = Outcome()
        chosen = None if only is None else frozenset(only)
        self._drop_dead()
        present = self.tree()
        if chosen is None:
            staying = Tree()
        else:
            staying = _part(present, lambda volume: volume not in chosen, self.name)
            wanted = {volume: one for volume, one in wanted.items() if volume in chosen}
        if wanted:
            self._files.start()
        tree = Tree(dict(staying.disks), dict(staying.targets), present.discovery)
        tree = self._with_discovery(tree, present, wanted)
        for volume, one in wanted.items():
            try:
                tree = self._with(tree, present, volume, one)
            except UsageError as error:
                self._outcome.problems.append(f"{volume}: {error}")
                tree = _joined(tree, _part(present, {volume}.__contains__, self.name))
        self._perform(plan(tree, present))
        self._hide({volume_of(disk, self.name) for disk in tree.disks})
        return self._outcome

    def clear(self) -> Outcome:
        """Nothing of ours is left in the kernel, and sheepfs has flushed and ended. Needs no cluster."""
        self._outcome = Outcome()
        present = self.tree()
        discovery = Credentials() if self._owns_discovery(present) else present.discovery
        self._perform(plan(Tree(discovery=discovery), present))
        self._record_discovery("")
        self._hide(frozenset())
        return self._outcome

    def _drop_dead(self) -> None:
        """Disks on a sheepfs that is gone never come back to life: they are taken away, to be made anew."""
        present = self.tree()
        alive = self._files.is_alive()
        held = _part(present, lambda volume: alive and self._files.is_held(volume), self.name)
        self._perform(plan(replace(held, discovery=present.discovery), present))

    def _with(self, tree: Tree, present: Tree, volume: str, wanted: Wanted) -> Tree:
        """The tree with one more volume; UsageError if it cannot be exported."""
        export = wanted.export
        if export.iqn in present.foreign:
            raise UsageError(
                f"a target named {export.iqn} exists that was not made here: choose another one with --iqn"
            )
        if export.iqn in tree.targets:
            raise UsageError(f"another volume is exported as {export.iqn} already")
        credentials = self._credentials(export.chap, export.mutual)
        if export.chap and credentials.secret == credentials.mutual_secret:
            raise UsageError("the secrets of both directions must differ (RFC 7143, 9.2.1)")
        mark = label(self.name, volume)
        size = self._files.show(volume)
        path = str(self._files.path(volume))
        disk = Disk(path, size, wanted.serial, disk_attributes(wanted.object_size))
        target = Target(
            label=mark,
            disk=mark,
            portals=frozenset(export.portals),
            acls={initiator: Acl(credentials, export.read_only) for initiator in export.initiators},
            attributes={**TARGET_ATTRIBUTES, "authentication": int(export.chap is not None)},
        )
        return replace(tree, disks={**tree.disks, mark: disk}, targets={**tree.targets, export.iqn: target})

    def _credentials(self, login: Login | None, mutual: Login | None = None) -> Credentials:
        if login is None:
            return Credentials()
        secret = self._secret(login.secret_file)
        if mutual is None:
            return Credentials(login.user, secret)
        return Credentials(login.user, secret, mutual.user, self._secret(mutual.secret_file))

    # -- discovery: one for the whole host, so perhaps somebody else's

    def _with_discovery(self, tree: Tree, present: Tree, wanted: Mapping[str, Wanted]) -> Tree:
        logins = {volume: one.export.discovery for volume, one in wanted.items() if one.export.discovery is not None}
        ours = self._owns_discovery(present)
        if not logins:
            gone = ours and not tree.targets
            return replace(tree, discovery=Credentials()) if gone else tree
        first, login = next(iter(logins.items()))
        for volume, other in logins.items():
            if other != login:
                self._outcome.problems.append(f"{volume}: its discovery user is not that of {first}; a host has one")
        if present.discovery.user and not ours:
            self._outcome.problems.append(f"{first}: this host's discovery user is another one, set by somebody else")
            return tree
        try:
            credentials = self._credentials(login)
        except UsageError as error:
            self._outcome.problems.append(f"{first}: {error}")
            return tree
        self._record_discovery(credentials.user)
        return replace(tree, discovery=credentials)

    def _owns_discovery(self, present: Tree) -> bool:
        """The record lies where a restart of the host deletes it, as it deletes what it tells of."""
        try:
            return bool(present.discovery.user) and self._discovery_record().read_text() == present.discovery.user
        except OSError:
            return False

    def _record_discovery(self, user: str) -> None:
        record = self._discovery_record()
        if user:
            record.write_text(user)
        else:
            record.unlink(missing_ok=True)

    def _discovery_record(self) -> Path:
        return self._files.place.with_name(f"{self.name}.discovery")

    def _perform(self, actions: list[Action]) -> None:
        if actions:
            self._outcome.changes += self._performer()(actions)

    def _hide(self, kept: Collection[str | None]) -> None:
        """Files of volumes that are not exported go; with the last one sheepfs does."""
        shown = self._files.shown()
        for volume in shown:
            if volume not in kept:
                self._files.hide(volume)
        if not kept:
            self._files.stop()


def _part(tree: Tree, wanted: Callable[[str], bool], host: str) -> Tree:
    """Disks and targets of some volumes."""

    def takes(mark: str) -> bool:
        volume = volume_of(mark, host)
        return volume is not None and wanted(volume)

    return Tree(
        {mark: disk for mark, disk in tree.disks.items() if takes(mark)},
        {iqn: target for iqn, target in tree.targets.items() if takes(target.label)},
    )


def _joined(one: Tree, other: Tree) -> Tree:
    return replace(one, disks={**one.disks, **other.disks}, targets={**one.targets, **other.targets})
