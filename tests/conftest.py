"""Fixtures for tests with real processes, and three rules.

A skip in CI is a failure. A failed test shows the end of its nodes' logs. Daemons run what users run, the compiled hot
path where it was built; the tests' own process runs the plain modules, so that it can plant bugs in them, unless
SHEEPDOG_COMPILED says otherwise.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree

import pytest
import tests.support.plain
from tests.support.cluster import Cluster, started
from tests.support.mounts import LoopMount, SheepFs
from tests.support.netns import NetworkNamespace
from tests.support.standing import StandingCluster

_clusters = pytest.StashKey[list[Cluster]]()
COMPILED = tests.support.plain.COMPILED  # imported before anything of ours
IN_CI = os.environ.get("CI") == "true"


def pytest_report_header() -> str:
    return f"sheepdog's hot path in this process: {'compiled' if COMPILED else 'plain'}"


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job: the daemons would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "soak: runs long; make soak runs these, make test does not")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where everything is installed: {report.longrepr}"
    if report.failed:
        for cluster in item.stash.get(_clusters, []):
            report.sections.append(("logs of the nodes", cluster.logs()))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where everything is installed: {report.longrepr}"
    return report


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory of the test's own with a short name: a unix socket's path has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="sheepdog-"))
    yield path
    rmtree(path, ignore_errors=True)


@pytest.fixture
def teardown(directory: Path) -> Iterator[ExitStack]:
    """What a test opened, closed in reverse order: mounts before the cluster below them, all before the directory."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def new_cluster(request: pytest.FixtureRequest, directory: Path, teardown: ExitStack) -> Callable[..., Cluster]:
    """Makes a cluster (arguments as Cluster, without the directory) whose processes end with the test."""

    def make(count: int, **settings: object) -> Cluster:
        cluster = Cluster(count, directory, **settings)  # type: ignore[arg-type]
        teardown.callback(cluster.close)
        request.node.stash.setdefault(_clusters, []).append(cluster)
        return cluster

    return make


@pytest.fixture
def cluster3(new_cluster: Callable[..., Cluster]) -> Cluster:
    """Three nodes, joined and formatted with three copies."""
    cluster = started(new_cluster(3))
    cluster.format()
    return cluster


@pytest.fixture(scope="module")
def standing_clusters() -> Iterator[StandingCluster]:
    standing = StandingCluster()
    yield standing
    standing.close()


@pytest.fixture
def standing3(request: pytest.FixtureRequest, standing_clusters: StandingCluster) -> Cluster:
    """As `cluster3`, but it may have served other tests of the file, and its directory is its own."""
    cluster = standing_clusters.take()
    request.node.stash.setdefault(_clusters, []).append(cluster)
    return cluster


@pytest.fixture
def mount_sheepfs(teardown: ExitStack, directory: Path) -> Callable[..., SheepFs]:
    """Mounts sheepfs of a cluster on a directory of the test."""

    def mount(cluster: Cluster, node: int = 0, *options: str) -> SheepFs:
        place = SheepFs(cluster, directory / "dir", node, *options)
        teardown.callback(place.close)
        return place

    return mount


@pytest.fixture
def mount_loop(teardown: ExitStack, directory: Path) -> Callable[..., LoopMount]:
    """Mounts a volume's filesystem."""

    def mount(file: Path, *options: str) -> LoopMount:
        place = LoopMount(file, directory / "mnt", *options)
        teardown.callback(place.close)
        return place

    return mount


@pytest.fixture
def private_network(teardown: ExitStack) -> NetworkNamespace:
    """A network namespace with nothing but its loopback."""
    namespace = NetworkNamespace()
    teardown.callback(namespace.close)
    return namespace
