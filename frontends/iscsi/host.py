"""One exporting host: makes its kernel's target what the cluster wants, takes it down, tells how it is.

Failures are collected: a volume whose secret is missing does not keep the others from being exported, and what is
exported already stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
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
from sheepdog.frontends.iscsi.plan import Action, SetDiscovery, plan
from sheepdog.frontends.iscsi.secrets import read_secret

Perform = Callable[[Iterable[Action]], int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one volume shall be on this host."""

    export: Export
    serial: str
    object_size: int
    shared: bool = False


@dataclass(slots=True)
class Outcome:
    """Changes made to the kernel's target, and a line for each volume that could not be brought to what is wanted.

    `remarks` are about volumes that were not asked for.
    """

    changes: int = 0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class Host:
    """`performer` gives what does actions; it is asked for when the first one is to be done."""

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

    def apply(
        self,
        wanted: Mapping[str, Wanted],
        only: Iterable[str] | None = None,
        unknown: Callable[[str], bool] = lambda volume: False,
    ) -> Outcome:
        """Exports all of `wanted` and nothing else; with `only`, other volumes stay as they are, if they are alive.

        So do those of which it is `unknown` whether they are wanted: an initiator may be writing to them.
        """
        self._outcome = Outcome()
        chosen = None if self._drop_dead() or only is None else frozenset(only)
        present = self.tree()
        if chosen is not None:
            wanted = {volume: one for volume, one in wanted.items() if volume in chosen}

        def stays(volume: str) -> bool:
            return (chosen is not None and volume not in chosen) or unknown(volume)

        staying = _part(present, stays, self.name)
        going = _part(present, lambda volume: volume not in wanted and not stays(volume), self.name)
        self._perform(plan(Tree(), going))
        if wanted:
            self._files.start()
        held_up = self._set_discovery(wanted, present, alone=not staying.targets)
        taken = set(staying.targets)
        for volume, one in wanted.items():
            if volume not in held_up:
                try:
                    self._export(volume, one, present, taken)
                except UsageError as error:
                    self._outcome.problems.append(f"{volume}: {error}")
            taken.add(one.export.iqn)
        self._hide({volume_of(disk, self.name) for disk in self.tree().disks})
        return self._outcome

    def clear(self) -> Outcome:
        """Nothing of ours is left in the kernel, and sheepfs has flushed and ended.

        Without a cluster to flush to the volumes are problems, and stay in sheepfs, to be flushed by the next attempt.
        """
        self._outcome = Outcome()
        present = self.tree()
        discovery = Credentials() if self._owns_discovery(present) else present.discovery
        self._perform(plan(Tree(discovery=discovery), present))
        self._record_discovery("")
        self._hide(frozenset())
        return self._outcome

    def _drop_dead(self) -> bool:
        """Disks on a sheepfs that is gone never come back to life: they are taken away, to be made anew."""
        present = self.tree()
        alive = self._files.is_alive()
        dead = _part(present, lambda volume: not (alive and self._files.is_held(volume)), self.name)
        self._perform(plan(Tree(), dead))
        return bool(dead.disks or dead.targets)

    def _export(self, volume: str, wanted: Wanted, present: Tree, taken: Collection[str]) -> None:
        """Brings one volume to what is wanted; UsageError, and what is up stays up, if that cannot be."""
        export = wanted.export
        if export.iqn in present.foreign:
            raise UsageError(
                f"a target named {export.iqn} exists that was not made here: choose another one with --iqn"
            )
        if export.iqn in taken:
            raise UsageError(f"another volume is exported as {export.iqn} already")
        credentials = self._credentials(export.chap, export.mutual)
        if export.chap and credentials.secret == credentials.mutual_secret:
            raise UsageError("the secrets of both directions must differ (RFC 7143, 9.2.1)")
        mark = label(self.name, volume)
        size = self._files.show(volume, wanted.shared)
        path = str(self._files.path(volume))
        disk = Disk(path, size, wanted.serial, disk_attributes(wanted.object_size))
        target = Target(
            label=mark,
            disk=mark,
            portals=frozenset(export.portals),
            acls={initiator: Acl(credentials, export.read_only) for initiator in export.initiators},
            attributes={**TARGET_ATTRIBUTES, "authentication": int(export.chap is not None)},
        )
        self._perform(plan(Tree({mark: disk}, {export.iqn: target}), _part(present, {volume}.__contains__, self.name)))

    def _credentials(self, login: Login | None, mutual: Login | None = None) -> Credentials:
        if login is None:
            return Credentials()
        secret = self._secret(login.secret_file)
        if mutual is None:
            return Credentials(login.user, secret)
        return Credentials(login.user, secret, mutual.user, self._secret(mutual.secret_file))

    # -- discovery: one for the whole host, so perhaps somebody else's

    def _set_discovery(self, wanted: Mapping[str, Wanted], present: Tree, alone: bool) -> set[str]:
        """Sets or clears the discovery user; the volumes that cannot have theirs. `alone`: no other volumes are up."""
        logins = {volume: one.export.discovery for volume, one in wanted.items() if one.export.discovery is not None}
        ours = self._owns_discovery(present)
        if not logins:
            if ours and alone:
                self._perform([SetDiscovery(Credentials())])
                self._record_discovery("")
            return set()
        first, login = next(iter(logins.items()))
        try:
            if present.discovery.user and not ours:
                raise UsageError("this host's discovery user is another one, set by somebody else")
            credentials = self._credentials(login)
            if credentials != present.discovery:
                self._record_discovery(credentials.user)
                self._perform([SetDiscovery(credentials)])
        except UsageError as error:
            self._outcome.problems += [f"{volume}: {error}" for volume in logins]
            return set(logins)
        others = {volume for volume, other in logins.items() if other != login}
        self._outcome.problems += [
            f"{volume}: its discovery user is not that of {first}; a host has one" for volume in sorted(others)
        ]
        return others

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
        """Files of volumes that are not exported go, flushed; with the last one sheepfs does."""
        clean = True
        for volume in self._files.shown():
            if volume not in kept:
                try:
                    self._files.hide(volume)
                except UsageError as error:
                    self._outcome.problems.append(f"{volume}: {error}")
                    clean = False
        if not kept and clean:
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
