"""The command line of sheepfs: what it takes, and the exact words with which it refuses."""

from __future__ import annotations

import pytest

from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.sheepfs.connection import connection_number
from sheepdog.frontends.sheepfs.options import TRY_HELP, parse


def test_defaults() -> None:
    options = parse(["dir"])
    assert (options.mountpoint, options.address) == ("dir", ("127.0.0.1", 7000))
    assert not (options.debug or options.foreground or options.page_cache or options.object_cache or options.help)


def test_options_may_follow_the_mount_point_and_be_abbreviated() -> None:
    options = parse(["dir", "-a", "10.0.0.1", "--por=7003", "-kf", "--objectcache"])
    assert options.address == ("10.0.0.1", 7003)
    assert options.page_cache and options.foreground and options.object_cache


def test_both_forms_of_object_cache_and_the_old_n_are_taken() -> None:
    assert parse(["-o", "dir"]).object_cache
    assert not parse(["-n", "dir"]).page_cache


def test_debug_stays_in_the_foreground() -> None:
    assert parse(["-d", "dir"]).foreground


@pytest.mark.parametrize("port", ["0", "65536", "x", "70a", "-1", "", "7000 "])
def test_a_bad_port_is_named(port: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(["-p", port, "dir"])
    assert str(caught.value) == f"Invalid port number '{port}'"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], ""),
        (["a", "b"], ""),
        (["-x", "dir"], "sheepfs: invalid option -- 'x'\n"),
        (["--bogus", "dir"], "sheepfs: unrecognized option '--bogus'\n"),
        (["dir", "-p"], "sheepfs: option requires an argument -- 'p'\n"),
        (["--address"], "sheepfs: option '--address' requires an argument\n"),
        (["--debug=1", "dir"], "sheepfs: option '--debug' doesn't allow an argument\n"),
    ],
)
def test_misuse_points_to_the_help(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert str(caught.value) == complaint + TRY_HELP


def test_help_wins_over_a_missing_mount_point() -> None:
    assert parse(["--help"]).help


MOUNTINFO = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:39 / /tmp/a rw,nosuid - fuse sheepfs rw,user_id=0
41 22 0:40 / /tmp/with\\040blank rw,nosuid - fuse sheepfs rw,user_id=0
42 22 0:41 / /tmp/a rw,nosuid shared:5 - fuse sheepfs rw,user_id=0
43 22 0:42 / /tmp/b rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(("place", "number"), [("/tmp/a", 41), ("/tmp/with blank", 40), ("/tmp/b", None), ("/", None)])
def test_the_connection_of_a_mount_is_the_newest_fuse_mount_there(place: str, number: int | None) -> None:
    assert connection_number(place, MOUNTINFO) == number
