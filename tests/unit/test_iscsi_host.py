"""What `dog iscsi apply` does to the kernel's target, against a tree that behaves like configfs."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from tests.support.fake_configfs import FakeConfigfs

from sheepdog.cluster.client import inodes
from sheepdog.cluster.core.errors import Result, UsageError
from sheepdog.cluster.core.ids import Vid
from sheepdog.frontends.iscsi import cluster, configfs
from sheepdog.frontends.iscsi.cluster import Exported, Unreadable
from sheepdog.frontends.iscsi.exports import Document, Export, Login
from sheepdog.frontends.iscsi.files import Files
from sheepdog.frontends.iscsi.host import Host, Wanted
from sheepdog.frontends.iscsi.model import DISK_ATTRIBUTES, label
from sheepdog.tools.dog import iscsi
from sheepdog.tools.dog.context import Context

HERE = "node1"
INITIATOR, OTHER = "iqn.2026-01.org.example:one", "iqn.2026-01.org.example:two"
SERIAL = "01234567-89ab-cdef-0123-456789abcdef"
MIB = 1 << 20
SECRETS = {"/s/chap": "first-secret-1", "/s/mutual": "other-secret-2", "/s/discovery": "third-secret-3"}


class MemoryFiles(Files):
    """sheepfs without a mount. `held` are the files that the kernel has open."""

    def __init__(self, directory: Path, configuration: Path) -> None:
        super().__init__(HERE, ("127.0.0.1", 7000), directory)
        self.sizes = {"web": 64 * MIB, "db": 32 * MIB}
        self.running = False
        self.starts = 0
        self.visible: list[str] = []
        self.configuration = configuration
        self.lost: set[str] = set()
        self.shared: set[str] = set()
        self.unflushed: set[str] = set()

    def is_alive(self) -> bool:
        return self.running

    def start(self) -> None:
        self.starts += not self.running
        self.running = True

    def show(self, volume: str, shared: bool = False) -> int:
        if volume not in self.sizes:
            raise UsageError("Invalid argument")
        if volume not in self.visible:
            self.visible.append(volume)
            self.shared |= {volume} if shared else set()
            self.lost.discard(volume)
        return self.sizes[volume]

    def is_held(self, volume: str) -> bool:
        return configfs.disk_directory(label(HERE, volume), self.configuration) is not None and volume not in self.lost

    def shown(self) -> list[str]:
        return list(self.visible)

    def hide(self, volume: str) -> None:
        if volume in self.unflushed:
            raise UsageError("it cannot be flushed")
        assert not self.is_held(volume), "the kernel has the file open"
        self.visible.remove(volume)

    def stop(self) -> None:
        assert not self.visible
        self.running = False


class World:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (directory / "run").mkdir()
        self.kernel = FakeConfigfs(directory / "target", monkeypatch)
        self.root = self.kernel.root
        self.files = MemoryFiles(directory / "run", self.root)
        self.secrets = dict(SECRETS)
        self.host = self.new_host()

    def new_host(self) -> Host:
        from sheepdog.frontends.iscsi.lio import Lio

        return Host(HERE, self.files, lambda: Lio(self.root).perform, self.root, self.secret)

    def secret(self, path: str) -> str:
        if path not in self.secrets:
            raise UsageError(f"secret file {path}: {os.strerror(errno.ENOENT)}")
        return self.secrets[path]

    def value(self, path: str) -> str:
        return (self.root / path).read_text().strip()

    def good(self, wanted: Mapping[str, Wanted], only: list[str] | None = None) -> int:
        """Changes of an apply without problems."""
        outcome = self.host.apply(wanted, only)
        assert outcome.problems == []
        return outcome.changes


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def web(**changes: object) -> Wanted:
    export = Export(
        HERE,
        "iqn.2026-01.org.example:web",
        ("192.0.2.1:3260",),
        (INITIATOR,),
        Login("alice", "/s/chap"),
        Login("bob", "/s/mutual"),
    )
    return Wanted(replace(export, **changes), SERIAL, 4 * MIB)  # type: ignore[arg-type]


def db(**changes: object) -> Wanted:
    return Wanted(replace(web(**changes).export, iqn="iqn.2026-01.org.example:db"), SERIAL.replace("0", "f"), 4 * MIB)


WEB = "iscsi/iqn.2026-01.org.example:web/tpgt_1"
ENTRY = f"{WEB}/acls/{INITIATOR}"
DISK = f"core/fileio_0/{label(HERE, 'web')}"


def test_a_shared_volume_is_shown_as_one(world: World) -> None:
    world.good({"web": replace(web(), shared=True), "db": db()})
    assert world.files.shared == {"web"}


def test_an_export_is_safe_and_complete(world: World) -> None:
    assert world.good({"web": web()}) > 10
    path = str(world.files.path("web"))
    assert f"File: {path}  Size: {64 * MIB}  Mode: Buffered-WCE" in world.value(f"{DISK}/info")
    assert world.value(f"{DISK}/enable") == "1"
    assert world.value(f"{DISK}/wwn/vpd_unit_serial").endswith(SERIAL)
    kept = {name: int(world.value(f"{DISK}/attrib/{name}")) for name in DISK_ATTRIBUTES if name != "emulate_pr"}
    assert kept == {name: value for name, value in DISK_ATTRIBUTES.items() if name != "emulate_pr"}
    assert kept["emulate_write_cache"] == 1, "flushes would be lost"
    assert kept["emulate_caw"] == kept["emulate_3pc"] == 0, "they are not right across hosts"
    assert world.value(f"{DISK}/attrib/unmap_granularity") == str(4 * MIB // 512)
    assert world.value(f"{DISK}/attrib/max_write_same_len") == str(4 * MIB // 512), "less gives no object back"
    assert world.value(f"{WEB}/attrib/authentication") == "1"
    assert world.value(f"{WEB}/attrib/generate_node_acls") == "0"
    assert world.value(f"{WEB}/attrib/demo_mode_discovery") == "0"
    assert [place.name for place in (world.root / WEB / "acls").iterdir()] == [INITIATOR]
    assert [place.name for place in (world.root / WEB / "np").iterdir()] == ["192.0.2.1:3260"]
    assert world.value(f"{ENTRY}/auth/userid") == "alice"
    assert world.value(f"{ENTRY}/auth/password") == SECRETS["/s/chap"]
    assert world.value(f"{ENTRY}/auth/userid_mutual") == "bob"
    assert world.value(f"{ENTRY}/auth/password_mutual") == SECRETS["/s/mutual"]
    assert world.value(f"{ENTRY}/lun_0/write_protect") == "0"
    assert world.value(f"{WEB}/enable") == "1"


def test_nobody_gets_in_before_all_is_in_its_place(world: World) -> None:
    world.good({"web": web()})
    writes = world.kernel.writes
    enabled = writes.index(f"write {WEB}/enable")
    assert enabled == len(writes) - 1
    assert writes.index(f"write {ENTRY}/auth/password") < writes.index(f"write {ENTRY}/lun_0/write_protect") < enabled
    assert writes.index(f"write {DISK}/attrib/unmap_zeroes_data") < writes.index(f"mkdir {WEB}/lun/lun_0")


def test_applying_twice_changes_nothing(world: World) -> None:
    wanted = {"web": web(), "db": db(chap=None, mutual=None, read_only=True)}
    world.good(wanted)
    before = world.kernel.snapshot()
    world.kernel.writes.clear()
    assert world.good(wanted) == 0
    assert world.kernel.writes == []
    world.host = world.new_host()
    assert world.good(wanted) == 0
    assert world.kernel.snapshot() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"chap": None, "mutual": None},
        {"mutual": None},
        {"read_only": True},
        {"initiators": (OTHER,)},
        {"initiators": (INITIATOR, OTHER)},
        {"portals": ("192.0.2.1:3260", "[2001:db8::1]:3260")},
        {"portals": ("192.0.2.9:860",)},
        {"iqn": "iqn.2026-01.org.example:new"},
    ],
)
def test_a_change_gives_what_a_new_export_would(world: World, changes: dict[str, object]) -> None:
    world.good({"web": web()})
    assert world.good({"web": web(**changes)}) > 0
    changed = world.kernel.snapshot()
    world.host.clear()
    world.good({"web": web(**changes)})
    assert world.kernel.snapshot() == changed


def test_what_is_not_touched_stays_up(world: World) -> None:
    world.good({"web": web()})
    world.kernel.writes.clear()
    world.good({"web": web(initiators=(INITIATOR, OTHER))})
    assert world.kernel.writes, "nothing was changed"
    assert all(f"acls/{OTHER}" in write for write in world.kernel.writes), world.kernel.writes


def test_a_larger_volume_gets_a_larger_disk_in_place(world: World) -> None:
    world.good({"web": web()})
    world.files.sizes["web"] = 96 * MIB
    world.kernel.writes.clear()
    assert world.good({"web": web()}) == 1
    assert world.kernel.writes == [f"write {DISK}/control"]
    assert f"Size: {96 * MIB}" in world.value(f"{DISK}/info")
    assert world.good({"web": web()}) == 0


def test_another_secret_reaches_the_kernel(world: World) -> None:
    world.good({"web": web()})
    world.secrets["/s/chap"] = "changed-secret"
    assert world.good({"web": web()}) == 1
    assert world.value(f"{ENTRY}/auth/password") == "changed-secret"


def test_what_others_made_is_never_touched(world: World) -> None:
    world.kernel.foreign("iqn.2026-01.org.other:x")
    theirs = world.kernel.snapshot()
    world.good({"web": web(), "db": db()})
    world.good({"db": db()})
    world.host.clear()
    assert world.kernel.snapshot() == theirs
    assert not any("other:x" in write or "fileio_77" in write for write in world.kernel.writes)


def test_a_name_that_is_taken_is_a_problem_of_that_volume_only(world: World) -> None:
    world.kernel.foreign("iqn.2026-01.org.example:web")
    outcome = world.host.apply({"web": web(), "db": db()})
    assert len(outcome.problems) == 1
    assert "web: a target named iqn.2026-01.org.example:web exists" in outcome.problems[0]
    assert world.value("iscsi/iqn.2026-01.org.example:db/tpgt_1/enable") == "1"
    assert not any(write.startswith(f"write {WEB}") for write in world.kernel.writes)


def test_two_volumes_cannot_have_one_target(world: World) -> None:
    outcome = world.host.apply({"web": web(), "db": replace(db(), export=web().export)})
    assert outcome.problems == ["db: another volume is exported as iqn.2026-01.org.example:web already"]


def test_apply_says_which_secret_is_missing_and_does_the_rest(world: World) -> None:
    world.good({"web": web(), "db": db(mutual=None)})
    del world.secrets["/s/mutual"]
    before = world.kernel.snapshot()
    outcome = world.host.apply({"web": web(read_only=True), "db": db(mutual=None, initiators=(OTHER,))})
    assert outcome.problems == ["web: secret file /s/mutual: No such file or directory"]
    after = world.kernel.snapshot()
    assert {path: text for path, text in after.items() if ":web" in path} == {
        path: text for path, text in before.items() if ":web" in path
    }, "an export that is up stays as it is"
    assert any(OTHER in path for path in after)


def test_no_secret_in_any_message(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.kernel.refuse = "password_mutual"
    outcome = world.host.apply({"web": web()})
    assert "alice" in outcome.problems[0]
    text = f"{outcome} {capsys.readouterr()}"
    assert not any(secret in text for secret in SECRETS.values())


def test_both_directions_need_their_own_secret(world: World) -> None:
    outcome = world.host.apply({"web": web(mutual=Login("bob", "/s/chap"))})
    assert outcome.problems == ["web: the secrets of both directions must differ (RFC 7143, 9.2.1)"]


def test_one_volume_alone(world: World) -> None:
    wanted = {"web": web(), "db": db()}
    world.good(wanted, ["web"])
    assert set(world.host.tree().disks) == {label(HERE, "web")}
    world.good(wanted)
    del world.secrets["/s/chap"]
    assert world.good({"db": db()}, ["web"]) > 0
    assert set(world.host.tree().disks) == {label(HERE, "db")}
    assert world.files.visible == ["db"]


def test_a_volume_that_is_gone_is_taken_down(world: World) -> None:
    world.good({"web": web(), "db": db()})
    world.good({"db": db()})
    assert set(world.host.tree().disks) == {label(HERE, "db")}
    outcome = world.host.apply({"web": web(), "none": web(iqn="iqn.2026-01.org.example:none")})
    assert outcome.problems == ["none: Invalid argument"]


def test_a_dead_sheepfs_is_replaced_and_its_disks_made_anew(world: World) -> None:
    world.good({"web": web()})
    whole = world.kernel.snapshot()
    world.files.running = False
    world.files.visible.clear()
    world.kernel.writes.clear()
    world.good({"web": web()})
    assert f"rmdir {DISK}" in world.kernel.writes
    assert world.files.starts == 2
    assert world.kernel.snapshot() == whole
    # Somebody has started it again: it runs, and the kernel's file is not one of its own.
    world.files.lost.add("web")
    world.files.visible.clear()
    world.kernel.writes.clear()
    world.good({"web": web()})
    assert f"rmdir {DISK}" in world.kernel.writes
    assert world.good({"web": web()}) == 0


def test_clear_leaves_nothing_and_apply_brings_it_back(world: World) -> None:
    empty = world.kernel.snapshot()
    world.good({"web": web(discovery=Login("carol", "/s/discovery")), "db": db()})
    whole = world.kernel.snapshot()
    assert world.host.clear().problems == []
    assert world.kernel.snapshot() == empty
    assert (world.files.running, world.files.visible) == (False, [])
    assert world.host.clear().changes == 0
    world.good({"web": web(discovery=Login("carol", "/s/discovery")), "db": db()})
    assert world.kernel.snapshot() == whole


def test_what_cannot_be_flushed_is_told_and_kept_for_another_attempt(world: World) -> None:
    world.good({"web": web(), "db": db()})
    world.files.unflushed.add("web")
    assert world.host.clear().problems == ["web: it cannot be flushed"]
    assert (world.files.running, world.files.visible) == (True, ["web"]), "the other one is flushed and gone"
    world.files.unflushed.clear()
    assert world.host.clear().problems == []
    assert (world.files.running, world.files.visible) == (False, [])


def test_discovery_is_closed_before_there_is_anything_to_discover(world: World) -> None:
    wanted = {"web": web(discovery=Login("carol", "/s/discovery")), "db": db()}
    world.good(wanted)
    assert world.value("iscsi/discovery_auth/userid") == "carol"
    assert world.value("iscsi/discovery_auth/enforce_discovery_auth") == "1"
    writes = world.kernel.writes
    assert writes.index("write iscsi/discovery_auth/enforce_discovery_auth") < writes.index(f"mkdir {WEB}")
    assert world.good(wanted) == 0
    outcome = world.host.apply({**wanted, "db": db(discovery=Login("dave", "/s/discovery"))})
    assert outcome.problems == ["db: its discovery user is not that of web; a host has one"]


def test_discovery_of_somebody_else_stays(world: World) -> None:
    for name, value in (("userid", "admin"), ("password", "theirsecret12"), ("enforce_discovery_auth", "1")):
        (world.root / "iscsi/discovery_auth" / name).write_text(value)
    outcome = world.host.apply({"web": web(discovery=Login("carol", "/s/discovery"))})
    assert outcome.problems == ["web: this host's discovery user is another one, set by somebody else"]
    world.host.clear()
    assert world.value("iscsi/discovery_auth/userid") == "admin"


def test_a_half_made_target_is_finished(world: World) -> None:
    """The power went, or the kernel refused, in the middle: the next apply does the rest."""
    for step in ("attrib/demo_mode_discovery", "np/", "auth/password", "wwn/vpd_unit_serial", "lun/lun_0"):
        world.kernel.refuse = step
        assert "refuses" in world.host.apply({"web": web()}).problems[0]
        world.kernel.refuse = ""
        world.good({"web": web()})
        assert world.value(f"{WEB}/enable") == "1"
        world.host.clear()
        assert not world.host.tree().disks


def test_what_the_kernel_refuses_of_one_volume_keeps_no_other_from_being_exported(world: World) -> None:
    world.kernel.refuse = "np/192.0.2.99"
    outcome = world.host.apply({"web": web(portals=("192.0.2.99:3260",)), "db": db()})
    assert len(outcome.problems) == 1
    assert outcome.problems[0].startswith("web: the kernel's iSCSI target refuses AddPortal(")
    assert world.value("iscsi/iqn.2026-01.org.example:db/tpgt_1/enable") == "1"
    assert world.value(f"{WEB}/enable") == "0", "half an export lets nobody in"


def test_all_volumes_of_a_dead_sheepfs_come_back_though_one_was_asked_for(world: World) -> None:
    wanted = {"web": web(), "db": db()}
    world.good(wanted)
    whole = world.kernel.snapshot()
    world.files.running = False
    world.files.visible.clear()
    world.good(wanted, ["web"])
    assert {path: text for path, text in world.kernel.snapshot().items() if "acls" in path} == {
        path: text for path, text in whole.items() if "acls" in path
    }


def test_nothing_is_exported_whose_discovery_cannot_be_closed(world: World) -> None:
    del world.secrets["/s/discovery"]
    outcome = world.host.apply({"web": web(discovery=Login("carol", "/s/discovery")), "db": db()})
    assert outcome.problems == ["web: secret file /s/discovery: No such file or directory"]
    assert set(world.host.tree().disks) == {label(HERE, "db")}


def test_an_export_of_which_nobody_knows_whether_it_is_wanted_stays_up(world: World) -> None:
    world.good({"web": web(discovery=Login("carol", "/s/discovery")), "db": db()})
    before = world.kernel.snapshot()
    outcome = world.host.apply({"db": db(initiators=(OTHER,))}, unknown={"web"}.__contains__)
    assert (outcome.problems, outcome.changes > 0) == ([], True)
    after = world.kernel.snapshot()
    assert {path: text for path, text in after.items() if ":db" not in path} == {
        path: text for path, text in before.items() if ":db" not in path
    }
    assert world.host.apply({"db": db(initiators=(OTHER,))}, ["web"], {"web"}.__contains__).changes == 0, "asked for"
    world.good({"db": db(initiators=(OTHER,))})
    assert set(world.host.tree().disks) == {label(HERE, "db")}


def exported(volume: str, wanted: Wanted | None) -> Exported:
    return Exported(volume, 4 * MIB, Document(SERIAL, (wanted.export,) if wanted else ()))


@pytest.mark.parametrize("name", ["web", None])
def test_a_volume_that_cannot_be_read_stays_up_and_keeps_no_other_from_being_exported(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """`None`: not even its name can be read."""
    monkeypatch.setattr(iscsi, "_host", lambda context, host: world.host)
    context = Mock(spec=Context)

    def apply(only: list[str] | None, *said: Exported | Unreadable) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(cluster, "documents", lambda connection: iter(said))
        outcome = iscsi._apply(context, HERE, only)
        return outcome.problems, outcome.remarks

    assert apply(None, exported("web", web()), exported("db", db())) == ([], [])
    bad = Unreadable(name, "cannot be understood")
    changed = exported("db", db(initiators=(OTHER,)))
    assert apply(["db"], bad, changed) == ([], ["cannot be understood"]), "nobody asked for it"
    assert apply(None, bad, changed) == (["cannot be understood"], [])
    tree = world.host.tree()
    assert set(tree.disks) == {label(HERE, "web"), label(HERE, "db")}
    assert set(tree.targets[db().export.iqn].acls) == {OTHER}
    assert apply(None, bad, exported("db", None)) == (["cannot be understood"], []), "what can be read is obeyed"
    assert set(world.host.tree().disks) == {label(HERE, "web")}


def test_a_volume_whose_inode_cannot_be_read_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "volume_ids", lambda connection: [Vid(0xABC)])
    monkeypatch.setattr(inodes, "headers", lambda connection, vids: [inodes.Unread(vid, Result.EIO) for vid in vids])
    (found,) = cluster.documents(Mock())
    assert isinstance(found, Unreadable)
    assert found.volume is None
    assert "volume abc cannot be read" in found.problem
