"""tgtd as `dog iscsi tgt-config` sets it up, and libiscsi's tests of it: a volume is no worse than a plain file."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.frontends.test_tgt import PORTAL, Target
from tests.support import conformance, needs
from tests.support.cluster import Cluster, started
from tests.support.netns import NetworkNamespace
from tests.support.processes import run, wait_until

INITIATOR = "iqn.2026-01.org.example:one"
SUITES_SECONDS = 120.0  # 5 s on a quiet machine
MIB = 1 << 20


def suites(target: Target, name: str) -> dict[str, str]:
    uri = f"iscsi://127.0.0.1:{PORTAL}/{name}/1"
    command = ["iscsi-test-cu", "-i", INITIATOR, "--dataloss", conformance.SELECTED, uri]
    done = run([*target.network.enter, *command], check=False, seconds=SUITES_SECONDS)
    return conformance.outcomes(done.stdout.decode(errors="replace"))


def test_a_volume_behaves_as_a_plain_file(request: pytest.FixtureRequest, directory: Path, teardown: ExitStack) -> None:
    needs.network_namespaces()
    needs.program("tgtd", "tgtadm", "iscsi-test-cu", "iscsi-inq")
    network: NetworkNamespace = request.getfixturevalue("private_network")
    cluster: Cluster = request.getfixturevalue("new_cluster")(3, prefix=network.enter)
    started(cluster).format()
    cluster.dog("vdi", "create", "disk", "64M")
    target = Target(network, cluster.port(0), directory / "tgtd.log")
    teardown.callback(target.close)
    wait_until(target.answers, 20, "tgtd answers")

    printed = cluster.dog("iscsi", "tgt-config", "disk", "--initiator", INITIATOR, "--host", "here", "--tid", "3")
    for line in printed.splitlines():
        program, *words = shlex.split(line)
        run([*network.enter, program, "-C", str(target.control), *words])
    name = "iqn.2003-01.org.linux-iscsi.here:disk"
    uri = f"iscsi://127.0.0.1:{PORTAL}/{name}/1"
    inquiry = [*network.enter, "iscsi-inq", "-i"]
    assert b"DIRECT_ACCESS" in run([*inquiry, INITIATOR, uri]).stdout
    assert run([*inquiry, "iqn.2026-01.org.example:stranger", uri], check=False).returncode != 0
    number = json.loads(cluster.dog("vdi", "getattr", "disk", "iscsi"))["serial"].replace("-", "")[:16].encode()
    for page in ("128", "131"):  # 0x80, 0x83: it takes decimal numbers
        assert number in run([*inquiry, INITIATOR, "-e", "1", "-c", page, uri]).stdout, f"page {page}"

    plain = directory / "plain"
    with open(plain, "wb") as file:
        file.truncate(64 * MIB)
    target.admin("--op", "new", "--mode", "target", "--tid", "4", "-T", f"{name}.plain")
    target.admin("--op", "new", "--mode", "logicalunit", "--tid", "4", "--lun", "1", "-b", str(plain))
    target.admin("--op", "bind", "--mode", "target", "--tid", "4", "-I", "ALL")

    expected, found = suites(target, f"{name}.plain"), suites(target, name)
    print(f"a plain file: {conformance.summary(expected)}\na volume: {conformance.summary(found)}")
    assert set(found) == set(expected)
    # The rest is skipped: with this backing store tgtd knows no UNMAP, WRITE SAME, VERIFY and WRITE AND VERIFY.
    assert len(conformance.passed(found)) >= 50, "too little was tested"
    assert conformance.failed(found) <= conformance.failed(expected)
