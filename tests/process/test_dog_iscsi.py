"""`dog iscsi` where nothing is exported, and where the kernel has no target."""

from __future__ import annotations

import json
import shlex
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.cluster import Cluster
from tests.support.processes import shown

from sheepdog.cluster.client.connection import Connection
from sheepdog.frontends.iscsi.cluster import begin

INITIATOR = "iqn.2026-01.org.example:one"


def test_without_exports(cluster3: Cluster) -> None:
    cluster3.dog("vdi", "create", "web", "8M")
    assert json.loads(cluster3.dog("iscsi", "list", "--json")) == []
    assert cluster3.dog("iscsi", "list", "-r") == ""
    assert cluster3.dog("iscsi", "list").split() == [
        "Volume",
        "Host",
        "State",
        "Target",
        "Portals",
        "Initiators",
        "CHAP",
    ]
    for words, code, text in (
        (("unexport", "web"), 5, "web is not exported by"),
        (("unexport", "none"), 5, "Failed to open none: "),
        (("tgt-config", "web"), 64, "Please specify --initiator"),
        (("tgt-config", "web", "--initiator", "nobody"), 1, "'nobody' is no iSCSI name"),
        (("tgt-config", "a/b", "--initiator", INITIATOR), 1, "cannot be exported"),
    ):
        done = cluster3.try_dog("iscsi", *words)
        assert (done.returncode, text in shown(done.stderr)) == (code, True), (words, done)
        assert shown(done.stderr).count("\n") == 1, "one line says it"
    lines = cluster3.dog("iscsi", "tgt-config", "web", "--initiator", INITIATOR, "--tid", "7").splitlines()
    assert [shlex.split(line)[0] for line in lines] == ["tgtadm"] * 4
    assert f"tcp:127.0.0.1:{cluster3.port(0)}:web" in lines[1]


def test_tgtd_shows_the_volumes_serial_number_at_every_node(cluster3: Cluster) -> None:
    """Without one tgtd makes it of the target's and the unit's numbers: two volumes would look like one disk."""

    def parameters(volume: str, node: int) -> str:
        words = json.loads(
            cluster3.dog("iscsi", "tgt-config", volume, "--initiator", INITIATOR, "--json", node=node),
        )[2]
        assert words[4:] == ["update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--params", words[-1]]
        return str(words[-1])

    for volume in ("web", "db"):
        cluster3.dog("vdi", "create", volume, "8M")
    web = parameters("web", 0)
    kept = json.loads(cluster3.dog("vdi", "getattr", "web", "iscsi"))
    number = kept["serial"].replace("-", "")[:16]
    assert web == f"scsi_sn={number},scsi_id={number},vendor_id=SHEEPDOG"
    assert kept["exports"] == [], "this host's kernel shall not export it"
    assert [parameters("web", node) for node in (0, 1, 2)] == [web] * 3
    assert parameters("db", 0) != web


def test_who_begins_at_the_same_time_gets_the_same_serial_number(cluster3: Cluster) -> None:
    cluster3.dog("vdi", "create", "web", "8M")
    with closing(Connection(("127.0.0.1", cluster3.port(0)), 0)) as connection:
        first = begin(connection, b"web")
        assert begin(connection, b"web") == first


def test_a_kernel_without_a_target_is_told_plainly_and_nothing_is_recorded(cluster3: Cluster) -> None:
    running = Path("/proc/sys/kernel/osrelease").read_text().strip()
    modules = (Path("/sys/module/target_core_mod"), Path(f"/lib/modules/{running}/kernel/drivers/target"))
    if any(place.exists() for place in modules):
        pytest.skip("needs a kernel without an iSCSI target")
    cluster3.dog("vdi", "create", "web", "8M")
    done = cluster3.try_dog("iscsi", "export", "web", "--initiator", INITIATOR)
    assert done.returncode == 1
    text = shown(done.stderr)
    assert "has no iSCSI target: the module " in text or "needs root" in text
    assert text.count("\n") == 1
    assert json.loads(cluster3.dog("iscsi", "list", "--json")) == []
    assert cluster3.dog("iscsi", "apply") == "nothing to change\n", "there is nothing to do, so nothing is missing"


def test_an_attribute_that_cannot_be_read_is_named_and_stands_in_nobodys_way(cluster3: Cluster) -> None:
    for volume, value in (("new", '{"format": 2}'), ("odd", '{"format": "\\u001b[2J\\n"}'), ("web", None)):
        cluster3.dog("vdi", "create", volume, "8M")
        if value:
            cluster3.dog("vdi", "setattr", volume, "iscsi", value)
    done = cluster3.try_dog("iscsi", "apply")
    lines = shown(done.stderr).splitlines()
    assert (done.returncode, len(lines)) == (1, 2), done
    assert lines[0].startswith("new: its attribute 'iscsi' has format 2")
    assert lines[1].startswith("odd: its attribute 'iscsi' has format ?[2J?")
    done = cluster3.try_dog("iscsi", "apply", "web")
    assert (done.returncode, shown(done.stderr).splitlines()) == (0, lines), "it was not asked for"
    assert cluster3.try_dog("iscsi", "apply", "odd").returncode == 1
    cluster3.dog("vdi", "setattr", "-d", "new", "iscsi")
    cluster3.dog("vdi", "setattr", "-d", "odd", "iscsi")
    assert cluster3.try_dog("iscsi", "apply").stderr == b"", "who takes the attribute away has the answer"
