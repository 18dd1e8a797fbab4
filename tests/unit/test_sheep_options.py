"""The command line of sheep: what it accepts, and the exact words with which it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host import usage
from sheepdog.cluster.host.options import (
    CacheOptions,
    IoAddress,
    JournalOptions,
    LogOptions,
    Options,
    RecoveryOptions,
    Refused,
    parse,
    parse_size,
)

DRIVERS = ("local", "zookeeper")
TRY = "\nTry 'sheep --help' for more information."
SIZES = "\nYou may use B, K, M, G, T or P suffixes for bytes, kilobytes, megabytes, gigabytes, terabytes and petabytes."


def parsed(line: str) -> Options:
    options = parse("sheep", line.split(), DRIVERS)
    assert isinstance(options, Options)
    return options


def refusal(line: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse("sheep", line.split(), DRIVERS)
    return str(caught.value)


def test_defaults() -> None:
    options = parsed("")
    assert options == Options()
    assert (options.metadata, options.disks, options.port, options.driver) == ("/tmp", (), 7000, "local")
    assert options.log == LogOptions(6, "server", "default", None)
    assert options.without_effect() == ()


def test_an_ordinary_line() -> None:
    options = parsed("-n -c local:shm -z 3 -p 7003 -y 127.0.0.1 -b ::1 -P pid -V 64 /store/3,/disk/a,/disk/b")
    assert options == Options(
        metadata="/store/3",
        disks=("/disk/a", "/disk/b"),
        driver=f"local:{os.getcwd()}/shm",
        bind_address="::1",
        my_address="127.0.0.1",
        port=7003,
        vnodes=64,
        zone=3,
        nosync=True,
        pid_file=f"{os.getcwd()}/pid",
    )


@pytest.mark.parametrize(
    "line",
    [
        "/store/0 -g -p 7001 -f",
        "-gfp7001 /store/0",
        "--port=7001 --gateway --foreground /store/0",
        "--po 7001 /store/0 --gate --for",
        "-f -g --port 7001 -- /store/0",
    ],
)
def test_gnu_style(line: str) -> None:
    assert parsed(line) == Options(metadata="/store/0", port=7001, gateway=True, foreground=True)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("-k", "sheep: invalid option -- 'k'" + TRY),
        ("-fk", "sheep: invalid option -- 'k'" + TRY),
        ("--nonsense", "sheep: unrecognized option '--nonsense'" + TRY),
        ("--nonsense=1", "sheep: unrecognized option '--nonsense=1'" + TRY),
        ("--v", "sheep: option '--v' is ambiguous; possibilities: '--version' '--vnodes'" + TRY),
        ("--gateway=1", "sheep: option '--gateway' doesn't allow an argument" + TRY),
        ("-p", "sheep: option requires an argument -- 'p'" + TRY),
        ("--zo", "sheep: option '--zone' requires an argument"),
        ("-c", "sheep: option requires an argument -- 'c'"),
        ("-b host", "Bad address 'host'"),
        ("-b 1.2.3", "Bad address '1.2.3'"),
        ("-y 1.2.3.4.5", "Invalid address: '1.2.3.4.5'"),
        ("-i port=7001", "Bad addr: '(null)'"),
        ("-i host=nowhere", "Bad addr: 'nowhere'"),
        ("-i host=127.0.0.1,port=0", "Bad port '0'"),
        ("-i host=127.0.0.1,speed=1", "invalid option speed=1"),
        ("-p 0", "Invalid port number '0'"),
        ("-p 65536", "Invalid port number '65536'"),
        ("-p 70x", "Invalid port number '70x'"),
        ("-p abc -k", "Invalid port number 'abc'"),
        ("-V 0", "Invalid number of vnodes '0': must be an integer between 1 and 65535"),
        ("-V 65536", "Invalid number of vnodes '65536': must be an integer between 1 and 65535"),
        ("-x 0", "Invalid number of threads '0': must be an integer between 1 and 4294967295"),
        ("-z -1", "Invalid zone id '-1': must be an integer between 0 and 4294967295"),
        ("-z 4294967296", "Invalid zone id '4294967296': must be an integer between 0 and 4294967295"),
        ("-g -V 3", "Options '-g' and '-V' can not be both specified"),
        ("-V 3 -g", "Options '-g' and '-V' can not be both specified"),
        ("-c corosync", "Invalid cluster driver 'corosync'"),
        ("-c locally", "Invalid cluster driver 'locally'"),
        ("-j size=10M", "invalid size 10M, must be bigger than 64(M)"),
        ("-j skip", "you must specify size for journal"),
        ("-j size=64M,fast", "invalid option fast"),
        ("-j size=10Q", "Invalid size '10Q'" + SIZES),
        ("-l level=loud", "Invalid log level 'loud'"),
        ("-l format=xml", "invalid log format: xml\nvalid options are:\n\tdefault\n\tserver\n\tjson"),
        ("-l dst=nowhere", "invalid type of log destination: nowhere"),
        ("-l dir=/no/such/dir", "/no/such/dir: No such file or directory"),
        ("-l dir=/tmp,dst=syslog", "logdir (/tmp) is specified but logging destination is syslog"),
        ("-l color=1", "invalid option color=1"),
        ("-r swift", "Option '-r' is not available: this build has no HTTP object service"),
        ("-R max=2,every=3", "invalid option every=3"),
        ("-w sise=1", "invalid option sise=1"),
        ("-w net", "invalid option net"),
        ("-w net=none", "Invalid number of threads 'none': must be an integer between 1 and 4294967295"),
        ("-w dir=/tmp", "object cache size is not set"),
        ("-w object:directio", "object cache size is not set"),
        ("-w size=1M", "Invalid cache option '1M': size must be between between 10M and 4194304G"),
        ("-w size=5P", "Invalid cache option '5P': size must be between between 10M and 4194304G"),
        ("-q size=1G", "invalid option size=1G"),
        ("/store/0 /store/1", "Only one PATH is taken, '/store/1' is too many (disks are separated by commas)"),
        (",", "PATH is empty"),
    ],
)
def test_refusals(line: str, text: str) -> None:
    assert refusal(line) == text


@pytest.mark.parametrize("letter", list("bcijlrRVyz"))
def test_extended_help_for_a_missing_argument(letter: str) -> None:
    with pytest.raises(Refused) as caught:
        parse("sheep", ["/tmp", f"-{letter}"], DRIVERS)
    assert str(caught.value) == f"sheep: option requires an argument -- '{letter}'"
    assert caught.value.output == usage.EXTENDED[letter] != ""


def test_an_unknown_driver_shows_the_known_ones() -> None:
    with pytest.raises(Refused) as caught:
        parse("sheep", ["-c", "x"], DRIVERS)
    assert caught.value.output == "\nSupported features:\n\tCluster drivers: local zookeeper\n"


def test_a_bad_log_level_shows_the_table() -> None:
    with pytest.raises(Refused) as caught:
        parse("sheep", ["-l", "level=9"], DRIVERS)
    assert [name for name in ("emerg", "debug") if name in caught.value.output] == ["emerg", "debug"]


def test_sub_options(tmp_path: Path) -> None:
    options = parsed(
        f"-j dir={tmp_path},size=1.5G,skip -l dir={tmp_path},level=debug,format=json -i port=7100,host=::1"
        " -R interval=1000,max=50 -w net=2,io=3 -x 9 -q gway=4 -u -W -D"
    )
    assert options.journal == JournalOptions(3 << 29, str(tmp_path), True)
    assert options.log == LogOptions(7, "json", "default", str(tmp_path))
    assert options.io_address == IoAddress("::1", 7100)
    assert options.recovery == RecoveryOptions(50, 1000)
    assert options.threads == (("net", 2), ("io", 3), ("gway", 4))
    assert (options.max_dynamic_threads, options.upgrade, options.wildcard_recovery, options.direct_io) == (
        9,
        True,
        True,
        True,
    )
    assert options.cache is None
    assert [line.split()[1] for line in options.without_effect()] == ["-u", "-w", "-W", "-x"]


def test_a_journal_larger_than_can_be_used() -> None:
    assert parsed("-j size=8G").without_effect() == ()
    assert parsed("-j size=20G").without_effect() == (
        "option -j has no effect: what its size has beyond 8G is not used",
    )


@pytest.mark.parametrize("prefix", ["", "object:"])
def test_w_with_the_keys_of_the_cache_is_the_cache(prefix: str) -> None:
    options = parsed(f"-w {prefix}size=20T,dir=/ssd,directio")
    assert options.cache == CacheOptions(20 << 40, "/ssd", True)
    assert options.threads == ()
    assert parsed("--cache size=10M").cache == CacheOptions(10 << 20)
    assert parsed("-w net=3,size=10M") == Options(threads=(("net", 3),), cache=CacheOptions(10 << 20))


def test_recovery_is_throttled_only_if_both_are_given() -> None:
    assert parsed("-R max=5").recovery is None
    assert parsed("-R max=5,interval=0").recovery is None


def test_a_log_on_standard_output_stays_in_the_foreground() -> None:
    assert parsed("-l dst=stdout").foreground
    assert not parsed("-l dst=syslog").foreground


def test_help_has_one_line_an_option_in_order() -> None:
    text = parse("sheep", ["-c", "zookeeper:h:1", "-h", "--wrong"], DRIVERS)
    assert isinstance(text, str)
    lines = text.splitlines()
    assert lines[1:3] == ["Usage: sheep [OPTION]... [PATH] (default: /tmp)", "Options:"]
    assert lines[3] == "  -b, --bindaddr          specify IP address of interface to listen on"
    letters = [line[3] for line in lines[3:] if line.startswith("  -")]
    assert "".join(letters) == "bcDfghijlnpPRuvVwWxyz"
    assert lines[-1] == "Try 'sheep <option>', e.g., 'sheep -w', to get more detail about specific option"


def test_version() -> None:
    assert parse("sheep", ["-v"], DRIVERS) == (
        f"Sheepdog daemon version {usage.VERSION}\n\nSupported features:\n"
        "\tCluster drivers: local zookeeper\n\tMiscellaneous: none\n"
    )
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{usage.VERSION}"\n' in project


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("10", 10), ("1.5G", 3 << 29), ("4k", 4096), ("2.", 2), ("1P", 1 << 50), ("0.1K", 102), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "+1", "1GB", "1 G", ".5", "1e3", "10Q", "١"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="Invalid size"):
        parse_size(text)
