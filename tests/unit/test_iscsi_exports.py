"""Documents, names and secrets of iSCSI exports, and what `dog iscsi` says where there is no target."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from sheepdog.cluster.client import admin
from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.frontends.iscsi import exports, kernel, tgt
from sheepdog.frontends.iscsi.exports import Document, Export, Login
from sheepdog.frontends.iscsi.secrets import read_secret
from sheepdog.tools.dog import iscsi
from sheepdog.tools.dog.commands import COMMANDS
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure

SERIAL = "01234567-89ab-cdef-0123-456789abcdef"

EXPORT = Export(
    "node1",
    "iqn.2026-01.org.example:web",
    ("0.0.0.0:3260",),
    ("iqn.2026-01.org.example:one",),
    Login("alice", "/etc/one"),
    Login("bob", "/etc/two"),
)


def test_a_document_comes_back_and_keeps_its_serial_number() -> None:
    document = Document().having(EXPORT)
    assert Document.unpack(document.pack()) == document
    other = Export("node2", "iqn.2026-01.org.example:web2", ("0.0.0.0:3260",), EXPORT.initiators)
    both = document.having(other)
    assert both.serial == document.serial
    assert {export.host for export in both.exports} == {"node1", "node2"}
    assert both.having(other).exports == both.exports
    alone = both.without("node1")
    assert (alone.of("node1"), alone.of("node2"), alone.serial) == (None, other, document.serial)
    assert Document.unpack(alone.without("node2").pack()).serial == document.serial
    assert Document().serial != Document().serial


def test_a_document_holds_no_secret(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("this is very secret\n")
    secret.chmod(0o600)
    assert read_secret(str(secret), os.getuid()) == "this is very secret"
    document = Document().having(Export("n", EXPORT.iqn, (), (), exports.login("alice", str(secret))))
    assert b"very secret" not in document.pack()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"serial": "x"},
        {"serial": 7},
        {"exports": 1},
        {"exports": [{}]},
        {"exports": [{"host": "../../etc", "iqn": EXPORT.iqn}]},
    ],
)
def test_what_anybody_may_have_written_is_refused(change: dict[str, object]) -> None:
    found = {**json.loads(Document().having(EXPORT).pack()), **change}
    with pytest.raises(UsageError, match=r"attribute 'iscsi'|cannot be exported"):
        Document.unpack(json.dumps(found).encode())


@pytest.mark.parametrize("field", ["host", "iqn", "portals", "initiators", "chap"])
def test_every_part_of_a_document_is_checked(field: str) -> None:
    found = json.loads(Document().having(EXPORT).pack())
    bad = {"portals": ["../../x"], "initiators": ["x/../y"], "chap": {"user": "a", "secret_file": "relative"}}
    found["exports"][0][field] = bad.get(field, "a/b\n")
    with pytest.raises(UsageError):
        Document.unpack(json.dumps(found).encode())


def test_not_json_is_refused() -> None:
    for value in (b"", b"x", b"[]", b"null", b"\xff"):
        with pytest.raises(UsageError):
            Document.unpack(value)


@pytest.mark.parametrize(
    ("word", "portal"),
    [
        ("192.0.2.1", "192.0.2.1:3260"),
        ("192.0.2.1:860", "192.0.2.1:860"),
        ("[2001:DB8::1]", "[2001:db8::1]:3260"),
        ("[2001:db8::1]:860", "[2001:db8::1]:860"),
        ("2001:db8::1", "[2001:db8::1]:3260"),
    ],
)
def test_portals(word: str, portal: str) -> None:
    assert exports.portal(word) == portal


@pytest.mark.parametrize("word", ["", "host", "192.0.2.1:", "192.0.2.1:0", "192.0.2.1:70000", "[::1", "1.2.3.4:x"])
def test_wrong_portals(word: str) -> None:
    with pytest.raises(UsageError, match="is no portal"):
        exports.portal(word)


@pytest.mark.parametrize("word", ["iqn.2026-01.org.example:a", "eui.0123456789abcdef", "naa.50123456789abcde"])
def test_names(word: str) -> None:
    assert exports.iqn(word.upper()) == word


@pytest.mark.parametrize(
    "word", ["", "web", "iqn.2026-13.org.example:a", "iqn.2026-01.org.example:a_b", "iqn.2026-01.x"]
)
def test_wrong_names(word: str) -> None:
    with pytest.raises(UsageError, match="is no iSCSI name"):
        exports.iqn(word)


def test_hosts_have_targets_of_their_own() -> None:
    assert exports.default_iqn("Node_1", "My+Web") == "iqn.2003-01.org.linux-iscsi.node-1:my-web"
    assert exports.default_iqn("a", "v") != exports.default_iqn("b", "v")


@pytest.mark.parametrize("word", ["a/b", "a,b", "a b", "..", "-a", "", "x" * 101, "a\n"])
def test_volumes_that_the_kernel_cannot_name(word: str) -> None:
    with pytest.raises(UsageError, match="cannot be exported"):
        exports.name(word)


def test_secret_files_must_be_closed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    me = os.getuid()
    with pytest.raises(UsageError, match=f"{secret}: No such file"):
        read_secret(str(secret), me)
    secret.write_text("twelve-or-more\nsecond line\n")
    for mode in (0o640, 0o604, 0o620, 0o644):
        secret.chmod(mode)
        with pytest.raises(UsageError, match="closed to others"):
            read_secret(str(secret), me)
    secret.chmod(0o400)
    assert read_secret(str(secret), me) == "twelve-or-more"
    with pytest.raises(UsageError, match="must belong to root"):
        read_secret(str(secret), me + 1)
    link = tmp_path / "link"
    link.symlink_to(secret)
    with pytest.raises(UsageError, match=str(link)):
        read_secret(str(link), me)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(UsageError, match="is no file"):
        read_secret(str(fifo), me)


@pytest.mark.parametrize(
    "content", ["", "short\n", "x" * 256, " spaces-around \n", "caf\u00e9-caf\u00e9-caf\u00e9\n", "bell\a-bell-bell\n"]
)
def test_wrong_secrets_are_not_shown(tmp_path: Path, content: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(content)
    secret.chmod(0o600)
    with pytest.raises(UsageError) as refused:
        read_secret(str(secret), os.getuid())
    assert "12 to 255 printable" in str(refused.value)
    assert not content.strip() or content.strip() not in str(refused.value)


def test_the_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError) as refused:
        kernel.load(lambda module: module in ("configfs", "target_core_mod"))
    text = str(refused.value)
    assert "the module target_core_file is missing" in text
    assert "dog iscsi tgt-config" in text
    assert "\n" not in text
    kernel.load(lambda module: True)


def test_a_modprobe_that_hangs_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "modprobe"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kernel, "LOAD_SECONDS", 0.2)
    with pytest.raises(UsageError, match=r"^modprobe configfs does not end within 0.2 s [^\n]*$"):
        kernel.load(lambda module: False)


def test_commands_for_tgtd() -> None:
    serial = Document().serial
    lines = tgt.commands("web", ("192.0.2.1", 7000), EXPORT.iqn, EXPORT.initiators, serial, 3)
    assert all(line[:3] == ["tgtadm", "--lld", "iscsi"] and "3" in line for line in lines)
    assert "tcp:192.0.2.1:7000:web" in lines[1]
    assert lines[-1][-2:] == ["--initiator-name", EXPORT.initiators[0]]
    assert "ALL" not in str(lines), "no target is open to everybody"
    with pytest.raises(UsageError, match="IPv4"):
        tgt.commands("web", ("::1", 7000), EXPORT.iqn, EXPORT.initiators, serial, 3)


def test_the_systemd_unit_runs_commands_that_there_are() -> None:
    unit = Path(__file__).parents[2] / "packaging" / "systemd" / "sheepdog-iscsi.service"
    lines = [line.partition("=") for line in unit.read_text().splitlines() if line.startswith("Exec")]
    names = {command.name for command in COMMANDS["iscsi"]}
    assert {name: value.split()[1:] for name, _, value in lines} == {
        "ExecStart": ["iscsi", "apply"],
        "ExecReload": ["iscsi", "apply"],
        "ExecStop": ["iscsi", "clear"],
    }
    assert {"apply", "clear"} <= names
    assert "KillMode=process" in unit.read_text(), "sheepfs outlives the command that starts it"


@pytest.mark.parametrize(
    ("document", "shared", "locks", "refusal"),
    [
        (Document(SERIAL), False, False, None),
        (Document(SERIAL), True, True, None),
        (Document(SERIAL), True, False, "needs a cluster that enforces locks"),
        (Document(SERIAL, (EXPORT,)), True, True, "exported by node1 without --shared: unexport it first"),
        (Document(SERIAL, (EXPORT,)), False, True, "exported by node1; without --shared one host at a time can"),
        (Document(SERIAL, (EXPORT,), shared=True), False, True, None),
        (Document(SERIAL, shared=True), False, True, None),
    ],
)
def test_who_may_export_what_others_do(
    document: Document, shared: bool, locks: bool, refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shared` stays while somebody exports the volume, and begins only where locks are enforced."""
    context = Mock(spec=Context)
    context.flag.side_effect = {"shared": shared}.__getitem__
    info = Mock(cluster_flags=int(ClusterFlag.LOCKS) if locks else 0)
    monkeypatch.setattr(admin, "cluster_info", lambda connection: (info, []))
    monkeypatch.setattr(iscsi, "_takes_part", lambda context, volume: False)
    if refusal is None:
        found = iscsi._shared_as_wanted(context, "web", "node2", document)
        assert found.shared == (shared or bool(document.exports))
        assert Document.unpack(found.pack()) == found
    else:
        with pytest.raises(Failure, match=refusal):
            iscsi._shared_as_wanted(context, "web", "node2", document)


def test_a_sheep_that_has_a_share_already_takes_no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iscsi, "_takes_part", lambda context, volume: True)
    document = Document(SERIAL, (EXPORT,), shared=True)
    with pytest.raises(Failure, match="every host needs a sheep of its own"):
        iscsi._shared_as_wanted(Mock(spec=Context), "web", "node2", document)
    assert iscsi._shared_as_wanted(Mock(spec=Context), "web", EXPORT.host, document) is document, "the same host again"
