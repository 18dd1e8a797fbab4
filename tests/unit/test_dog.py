"""dog's command line and output: every text here is what scripts written for Sheepdog 1.0 see."""

from __future__ import annotations

import importlib
import json
import os
import pty
import random
import re
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
from tests.support.fake_sheep import FakeSheep
from tests.unit.conftest import Dog

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Epoch, EpochRecord, Member, NodeId, Vid, data_oid
from sheepdog.cluster.wire import header as wire
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.response import response
from sheepdog.tools.dog import vdi_list
from sheepdog.tools.dog.commands import COMMANDS
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import human_size, parse_size
from sheepdog.tools.dog.table import Command
from sheepdog.tools.dog.values import parse_redundancy

MIB = 1 << 20


# -- command lines


def test_overview_and_unknown_commands(dog: Dog) -> None:
    for words in ((), ("help",), ("-h",), ("--help",)):
        status, out, err = dog(*words)
        assert (status, err) == (0, "")
        assert "  vdi create              create an image\n" in out
    assert dog("foo") == (64, "", "Invalid command 'foo'\nTry 'dog --help' for more information.\n")
    status, out, err = dog("vdi", "foo")
    assert (status, out) == (64, "")
    assert err.startswith("Invalid command 'vdi foo'\nAvailable vdi commands:\n  vdi check\n  vdi create\n")
    status, out, err = dog("vdi")
    assert err.startswith("Available vdi commands:\n")


def test_usage_texts(dog: Dog) -> None:
    status, out, _ = dog("vdi", "create", "--help")
    assert status == 0
    assert out.startswith(
        "Usage: dog vdi create [-P] [-y] [-c copies] [-a address] [-p port] [-h] [-r] [-v] [-z block_size_shift] [-T] "
        "<vdiname> <size>\n"
        "Options:\n"
        "  -P, --prealloc          preallocate all the data objects\n"
        "  -y, --hyper             create a hyper volume\n"
    )
    status, out, _ = dog("node", "md")
    assert status == 64
    assert out.startswith(
        "Usage: dog node md {info|plug|unplug} [-a address] [-p port] [-r] [-A] [-f] [-h] [-T] [disks]\n"
        "Available subcommands:\n"
        "  info                    show multi-disk information\n"
        "  plug                    plug more disk(s) into node\n"
        "  unplug                  unplug disk(s) from node\n"
        "Options:\n"
    )
    status, out, err = dog("node", "md", "foo")
    assert (status, err) == (1, "")
    assert out.startswith("Usage: dog node md {")
    assert dog("node", "log")[1].startswith("Usage: dog node log level [-a address]")


def test_options_as_getopt_takes_them(dog: Dog) -> None:
    wrong = "\nTry 'dog --help' for more information.\n"
    assert dog("vdi", "resize", "-r") == (64, "", f"dog: invalid option -- 'r'{wrong}")
    assert dog("vdi", "list", "-a") == (64, "", f"dog: option requires an argument -- 'a'{wrong}")
    assert dog("vdi", "list", "--foo") == (64, "", f"dog: unrecognized option '--foo'{wrong}")
    assert dog("vdi", "list", "--raw=1") == (64, "", f"dog: option '--raw' doesn't allow an argument{wrong}")
    assert dog("vdi", "list", "--port") == (64, "", f"dog: option '--port' requires an argument{wrong}")
    assert dog("vdi", "list", "a", "-r")[0] == 0
    assert dog("vdi", "list", "--ra", "--", "-x")[:2] == (0, "")
    assert dog("vdi", "list", "-rT")[1].startswith("\nElapsed time: 0.")


def test_address_and_port(dog: Dog, sheep: FakeSheep, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dog("vdi", "list", "-a", "no such host") == (1, "", "Invalid ip address no such host\n")
    for port in ("0", "65536", "7a", "-1", ""):
        status, out, err = dog("vdi", "list", f"--port={port}") if port else (64, "", "Invalid port number ''\n")
        assert (status, out, err) == (64, "", f"Invalid port number '{port}'\n")
    sheep.__exit__(None, None, None)
    refused = f"failed to connect to 127.0.0.1:{sheep.address[1]}: Connection refused\n" * 2
    assert dog("node", "list") == (2, "", refused + "Failed to get node list\n")
    assert dog("vdi", "list") == (2, "", refused)
    assert dog("vdi", "read", "a") == (1, "", refused)
    assert dog("vdi", "getattr", "a", "k") == (5, "", refused)


def test_command_line_is_logged(dog: Dog, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.path.join(str(tmp_path), "log")
    monkeypatch.setenv("SHEEPDOG_DOG_LOG", "")
    monkeypatch.setenv("SHEEPDOG_DOG_LOG_PATH", path)
    dog("vdi", "list", "-r")
    with open(path) as log:
        assert log.read().endswith(" : dog vdi list -r\n")
    dog("vdi", "list", "a\n2026 Nov 22 20:04:20 : dog cluster shutdown")
    with open(path) as log:
        assert len(log.readlines()) == 2, "one line for each command"


def test_commands_that_ask_no_sheep_need_no_address(dog: Dog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEEPDOG_DOG_ADDR", "no such host")
    for words in (("node", "log", "level", "list"), ("simulate", "--nodes", "3", "--fail", "node:1", "--json")):
        assert dog(*words)[0] == 0
    assert dog("cluster", "info")[::2] == (1, "Invalid ip address no such host\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [("10", 10), ("10B", 10), ("1.5G", 3 << 29), ("10m", 10 << 20), ("2T", 2 << 40), ("16P", 1 << 54), (".5K", 512)],
)
def test_sizes_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["10Q", "", "-1", "1e3", "M", ".", "1.2.3", "0x10", "1 M", "\u0661"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(Failure) as caught:
        parse_size(text)
    assert caught.value.text.startswith(f"Invalid size '{text}'\nYou may use B, K, M, G, T or P suffixes for bytes, ")


def test_sizes_shown() -> None:
    shown = {0: "0.0 MB", 4 << 20: "4.0 MB", 10 << 20: "10 MB", 1 << 30: "1.0 GB", 20 << 30: "20 GB", 1 << 42: "4.0 TB"}
    assert {size: human_size(size) for size in shown} == shown
    assert human_size(int(9.96 * MIB)) == "10.0 MB"
    assert human_size(1 << 54) == "16 PB"


def test_redundancy_read() -> None:
    assert [parse_redundancy(text) for text in ("1", "31", "2:1", "4:2", "16:15")] == [
        (1, 0),
        (31, 0),
        (3, 0x11),
        (6, 0x22),
        (31, 0x8F),
    ]
    for text in ("0", "32", "3:1", "4:0", "4:16", "", ":", "a", "4:2:1"):
        with pytest.raises(Failure):
            parse_redundancy(text)


def test_every_command_has_its_code_and_a_usage(dog: Dog) -> None:
    def walk(path: tuple[str, ...], command: Command) -> None:
        path = path if path == (command.name,) else (*path, command.name)
        assert command.run or command.nested, path
        if command.run:
            module, _, function = command.run.partition(":")
            assert callable(getattr(importlib.import_module(f"sheepdog.tools.dog.{module}"), function))
        status, out, err = dog(*path, "-h")
        assert (status, err) == (0, "")
        assert out.startswith(f"Usage: dog {' '.join(path)} ")
        for nested in command.nested:
            walk(path, nested)

    for noun, commands in COMMANDS.items():
        for command in commands:
            walk((noun,), command)


def test_what_changes_something_refuses_json(dog: Dog) -> None:
    def walk(path: tuple[str, ...], command: Command) -> list[tuple[str, ...]]:
        below = [found for nested in command.nested for found in walk((*path, nested.name), nested)]
        return [path, *below] if command.changes else below

    changing = [path for noun in COMMANDS for command in COMMANDS[noun] for path in walk((noun, command.name), command)]
    assert ("vdi", "lock", "unlock") in changing and ("node", "log", "level", "set") in changing
    refused = (64, "", "dog: unrecognized option '--json'\nTry 'dog --help' for more information.\n")
    for path in changing:
        assert dog(*path, "--json", "word", "another") == refused
        assert "--json" not in dog(*path, "-h")[1]
    assert dog("node", "log", "level", "list", "--json")[0] == 0  # a neighbour that reads


# -- node and cluster


def test_node_list(dog: Dog, sheep: FakeSheep) -> None:
    port = sheep.address[1]
    sheep.members = [
        Member(NodeId(bytes(12) + b"\x7f\0\0\1", 7000), 0, 128, 1),
        Member(NodeId(bytes(12) + b"\x7f\0\0\1", 7003), 3, 0, 0),
        Member(NodeId(bytes(15) + b"\1", 7008), 8, 64, 0),
    ]
    assert dog("node", "list") == (
        0,
        "  Id   Host:Port         V-Nodes       Zone\n"
        "   0   127.0.0.1:7000      \t128          0\n"
        "   1   127.0.0.1:7003      \t 0          3\n"
        "   2   ::1:7008            \t64          8\n",
        "",
    )
    assert dog("node", "list", "-r")[1] == "0 127.0.0.1:7000 128 0\n1 127.0.0.1:7003 0 3\n2 ::1:7008 64 8\n"
    assert port


def test_the_node_asked_is_marked_whatever_address_leads_to_it(dog: Dog, sheep: FakeSheep) -> None:
    """People ask 127.0.0.1; the members know each other by other addresses."""
    sheep.members = [Member(NodeId(bytes(12) + bytes((192, 0, 2, host)), 7000), 0, 128, 1) for host in (1, 2)]

    def details(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        request = wire.REQUEST.unpack(header)
        data = b'{"node": "192.0.2.2:7000"}'
        return response(request.opcode, request.id, 1, 0, len(data)), data

    sheep.handlers[Opcode.NODE_DETAILS] = details
    rows = dog("node", "list", "-v")[1].splitlines()
    assert [row.endswith(" *") for row in rows] == [False, False, True]
    assert [node["asked"] for node in json.loads(dog("node", "list", "--json")[1])] == [False, True]


def test_node_info(dog: Dog, sheep: FakeSheep) -> None:
    def usage(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        fields = wire.NodeResponse(0, Opcode.STAT_SHEEP, 0, 1, 0, 0, 0, 0, 81430835200, 81403457536)
        return wire.NODE_RESPONSE.pack(fields._replace(id=wire.REQUEST.unpack(header).id)), b""

    sheep.handlers[Opcode.STAT_SHEEP] = usage
    sheep.create("a", 3 << 30)
    sheep.snapshot("a")
    assert dog("node", "info") == (
        0,
        "Id\tSize\tUsed\tAvail\tUse%\n"
        " 0\t76 GB\t26 MB\t76 GB\t  0%\n"
        "Total\t76 GB\t26 MB\t76 GB\t  0%\n"
        "\n"
        "Total virtual image size\t3.0 GB\n",
        "",
    )
    assert dog("node", "info", "-r")[1] == (
        "0 81430835200 27377664 81403457536 0%\nTotal 81430835200 27377664 81403457536 0% 3221225472\n"
    )
    del sheep.handlers[Opcode.STAT_SHEEP]
    sheep.results[Opcode.STAT_SHEEP] = Result.NO_SUPPORT
    assert dog("node", "info") == (
        2,
        "",
        "Response's result: Operation is not supported\nCannot get information from any nodes\n",
    )


def test_cluster_info(dog: Dog, sheep: FakeSheep) -> None:
    one = Member(NodeId(bytes(12) + b"\x7f\0\0\1", 7000), 0, 128, 1)
    two = Member(NodeId(bytes(12) + b"\x7f\0\0\1", 7001), 1, 128, 1)
    sheep.epochs = [
        EpochRecord(Epoch(1), 1795292655, (one, two)),
        EpochRecord(Epoch(2), 1795292925, (one,)),
        EpochRecord(Epoch(3), 1795292999, (one,)),
    ]
    sheep.members = [one]
    sheep.ctime = 1795292655 << 32
    assert dog("cluster", "info") == (
        0,
        "Cluster status: running, auto-recovery enabled\n"
        "\n"
        "Cluster created at Sat Nov 21 20:24:15 2026\n"
        "\n"
        "Epoch Time           Version [Host:Port:V-Nodes,,,]\n"
        "2026-11-21 20:29:59      3 [127.0.0.1:7000:128]\n"
        "2026-11-21 20:28:45      2 [127.0.0.1:7000:128]\n"
        "2026-11-21 20:24:15      1 [127.0.0.1:7000:128, 127.0.0.1:7001:128]\n",
        "",
    )
    assert dog("cluster", "info", "-v")[1].startswith(
        "Cluster status: running, auto-recovery enabled\n"
        "Cluster store: plain with 3 redundancy policy\n"
        "Cluster vnodes strategy: auto\n"
        "Cluster vnode mode: node\n"
        "Cluster created at Sat Nov 21 20:24:15 2026\n\nEpoch"
    )
    assert dog("cluster", "info", "-r", "-d")[1] == (
        "running, auto-recovery enabled\n\n1795292999 3 []\n1795292925 2 [-127.0.0.1:7001]\n1795292655 1 [formated]\n"
    )
    sheep.policy, sheep.copies = 0x22, 6
    assert dog("cluster", "info", "-v", "-r")[1].startswith(
        "running, auto-recovery enabled\nplain with 4:2 redundancy policy\nauto\nnode\n1795292999 3"
    )
    sheep.formatted = False
    assert dog("cluster", "info") == (0, "Cluster status: Waiting for cluster to be formatted\n\n", "")


def test_cluster_format(dog: Dog, sheep: FakeSheep) -> None:
    made: list[tuple[wire.ClusterRequest, bytes]] = []

    def make_fs(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        request = wire.CLUSTER_REQUEST.unpack(header)
        made.append((request, payload))
        return response(request.opcode, request.id, 1), b""

    sheep.handlers[Opcode.MAKE_FS] = make_fs
    few = "Number of copies (3) is larger than number of zones (1).\nAre you sure you want to continue? [yes/no]: "
    assert dog("cluster", "format") == (0, few, "")
    assert not made
    assert dog("cluster", "format", stdin=b"Yes please\n") == (0, few + "using backend plain store\n", "")
    assert made[0][1] == b"plain\0"
    assert (made[0][0].copies, made[0][0].copy_policy, made[0][0].cluster_flags) == (3, 0, 4)
    assert abs((made[0][0].ctime >> 32) - time.time()) < 100
    sheep.members = [Member(NodeId(bytes(12) + b"\x7f\0\0\1", sheep.address[1]), zone, 1, 1) for zone in range(6)]
    assert dog("cluster", "format", "-c", "4:2", "-tlRF", "-z", "24", "-b", "tree")[1] == "using backend tree store\n"
    assert (made[1][0].copies, made[1][0].copy_policy, made[1][0].cluster_flags) == (6, 0x22, 0x3D)
    assert made[1][0].block_size_shift == 24
    assert dog("cluster", "format", "-V") == (
        1,
        "",
        "Can not apply the option of '-V', because there are vnode strategy of sheep is auto in the cluster\n",
    )
    sheep.create("a", MIB)
    assert dog("cluster", "format", "-c", "2", stdin=b"no\n") == (
        0,
        "    __\n   ()'`;\n   /\\|`\n  /  |   Caution! The cluster is not empty.\n"
        "(/_)_|_  Are you sure you want to continue? [yes/no]: ",
        "",
    )
    assert len(made) == 2
    assert dog("cluster", "format", "-c", "2", "-f")[0] == 0
    del sheep.handlers[Opcode.MAKE_FS]
    sheep.results[Opcode.MAKE_FS] = Result.NO_STORE
    sheep.handlers[Opcode.GET_STORE_LIST] = lambda header, payload: (
        response(Opcode.GET_STORE_LIST, wire.REQUEST.unpack(header).id, 1, 0, 12),
        b"tree plain \0",
    )
    assert dog("cluster", "format", "-f", "-c", "2", "-b", "foo") == (
        2,
        "using backend foo store\nAvailable stores:\n---------------------------------------\ntree plain \n",
        "Format failed: Targeted backend store is not found\n",
    )


def test_recovery_orders(dog: Dog, sheep: FakeSheep) -> None:
    for opcode in (Opcode.ENABLE_RECOVER, Opcode.DISABLE_RECOVER, Opcode.SHUTDOWN):
        sheep.results[opcode] = Result.SUCCESS
    sheep.results[Opcode.FORCE_RECOVER] = Result.FORCE_RECOVER
    assert dog("cluster", "recover", "enable") == (0, "Cluster recovery: enable\n", "")
    assert dog("cluster", "recover", "disable") == (0, "Cluster recovery: disable\n", "")
    assert dog("cluster", "shutdown") == (0, "", "")
    status, out, err = dog("cluster", "recover", "force", stdin=b"YES\n")
    assert status == 1
    assert out.startswith(
        "Caution! Please try starting all the cluster nodes normally before\nrunning this command.\n\n"
    )
    assert err == "failed to execute request, Cluster is running/halted and cannot be force recovered\n"
    assert dog("cluster", "recover", "force", "-f")[1] == ""


def test_node_kill_and_throttle(dog: Dog, sheep: FakeSheep) -> None:
    assert dog("node", "kill") == (64, "", "please specify -l option or node id\n")
    assert dog("node", "kill", "x")[2] == "Invalid node id 'x', please specify a numeric value\n"
    assert dog("node", "kill", "99") == (64, "", "Invalid node id '99'\n")
    assert dog("node", "kill", "-l", "1")[2] == "don't use -l option and specify node id at the same time\n"
    sheep.results[Opcode.KILL_NODE] = Result.SUCCESS
    assert dog("node", "kill", "0") == (0, "", "")
    for words, text in (
        (("0", "500"), "Invalid interval max (0), interval (500)"),
        (("x", "1"), "Invalid max (x)"),
        (("1", "y"), "Invalid interval (y)"),
        (("0",), "Invalid interval max (0), interval ((null))"),
    ):
        assert dog("node", "recovery", "set-throttle", *words) == (64, "", text + "\n")
    assert dog("node", "log", "level", "set", "foo")[::2] == (
        255,
        "invalid loglevel: foo\navailable loglevels:\nemerg\t(0)\nalert\t(1)\ncrit\t(2)\nerr\t(3)\nwarning\t(4)\n"
        "notice\t(5)\ninfo\t(6)\ndebug\t(7)\n",
    )


# -- volumes


def test_vdi_list(dog: Dog, sheep: FakeSheep) -> None:
    header = "  Name        Id    Size    Used  Shared    Creation time   VDI id  Copies  Tag   Block Size Shift\n"
    sheep.formatted = False
    assert dog("vdi", "list") == (0, header, "")
    sheep.formatted = True
    sheep.created = 1795292679 - 60
    assert dog("vdi", "create", "a", "10M")[0] == 0
    assert dog("vdi", "write", "a", "0", "9M", stdin=b"x" * 9 * MIB)[0] == 0
    assert dog("vdi", "snapshot", "-s", "t1", "a") == (0, "", "")
    assert dog("vdi", "clone", "-s", "t1", "a", "sp ace", "-v") == (0, "VDI ID of newly created clone: c605b1\n", "")
    assert dog("vdi", "list") == (
        0,
        header
        + "s a            1   10 MB   12 MB  0.0 MB 2026-11-21 20:24    1ec8c      3            t1  22\n"
        + "  a            0   10 MB  0.0 MB   12 MB 2026-11-21 20:25    1ec8d      3                22\n"
        + "c sp ace       0   10 MB  0.0 MB   12 MB 2026-11-21 20:26   c605b1      3                22\n",
        "",
    )
    assert dog("vdi", "list", "-r") == (
        0,
        "s a 1 10485760 12582912 0 1795292679 1ec8c 3 t1 22\n"
        "= a 0 10485760 0 12582912 1795292739 1ec8d 3  22\n"
        "c sp\\ ace 0 10485760 0 12582912 1795292799 c605b1 3  22\n",
        "",
    )
    assert dog("vdi", "list", "nosuch") == (0, header, "")
    assert len(dog("vdi", "list", "-r", "a")[1].splitlines()) == 2
    assert len(dog("vdi", "list", "-r", "-o", "0001ec8c00000000")[1].splitlines()) == 3
    assert dog("vdi", "list", "-o", "8001ec8c00000000") == (1, header, "")
    sheep.unreadable.add(0x8001EC8C << 32)
    status, out, err = dog("vdi", "list", "-r", "a")
    assert (status, out) == (0, "= a 0 10485760 0 12582912 1795292739 1ec8d 3  22\n")
    assert err == "Failed to read object 8001ec8c00000000 No object found\nFailed to read inode header\n"


def test_vdi_create_refusals(dog: Dog, sheep: FakeSheep) -> None:
    assert dog("vdi", "create", "a", "10M", "-v", "-r") == (0, "1ec8c\n", "")
    assert dog("vdi", "create", "a", "10M") == (1, "", "Failed to create VDI a: VDI exists already\n")
    status, out, err = dog("vdi", "create", "big", "5T")
    assert status == 64
    assert out.startswith("Usage: dog vdi create ")
    assert err == (
        "VDI size is larger than 4.0 TB bytes, please use '-y' to create a hyper volume with size up to 16 PB bytes "
        "or use '-z' to create larger object size volume\n"
    )
    assert dog("vdi", "create", "x1")[::2] == (64, "Please specify the VDI size\n")
    assert dog("vdi", "create", "b", "10Q")[0] == 1
    assert dog("vdi", "create", "b", "1M", "-z", "19")[2].startswith("Object Size is larger than 2^20.")
    assert dog("vdi", "create", "b", "1M", "-z", "32")[2].startswith("Object Size is limited to 2^31.")
    assert dog("vdi", "create", "b", "1M", "-z", "22", "-y")[2] == "Don't specify both -y and -z options, please\n"
    assert dog("vdi", "create", "b", "1M", "-c", "3:1") == (
        1,
        "",
        "Invalid parameter 3:1\nTo create replicated vdi, set -c x\n  x(1 to 31)   - number of replicated copies\n"
        "To create erasure coded vdi, set -c x:y\n  x(2,4,8,16)  - number of data strips\n"
        "  y(1 to 15)   - number of parity strips\n",
    )
    sheep.ctime = 0
    assert dog("vdi", "create", "b", "1M") == (
        1,
        "",
        "Failed to create VDI b: Waiting for cluster to be formatted\n",
    )


def test_vdi_read_and_write(dog: Dog, sheep: FakeSheep) -> None:
    vid = sheep.create("t", 10 * MIB)
    assert dog("vdi", "write", "t", stdin=b"x" * 5 * MIB)[0] == 0
    assert dog("vdi", "write", "t", "1", "3", stdin=b"abcdef")[0] == 0
    assert dog("vdi", "read", "t", "0", "6") == (0, "xabcxx", "")
    # A short chunk clears the rest of its object.
    assert dog("vdi", "write", "t", stdin=b"short")[0] == 0
    assert sheep.content(vid) == b"short" + bytes(4 * MIB - 5) + b"x" * MIB + bytes(5 * MIB)
    assert dog("vdi", "write", "t", "9M", "10M", stdin=b"y" * 2 * MIB)[0] == 0
    assert dog("vdi", "read", "t", "10485758", "100") == (0, "yy", "")
    assert dog("vdi", "read", "t", "100M") == (1, "", "Read offset is beyond the end of the VDI\n")
    assert dog("vdi", "write", "t", "11M", stdin=b"x") == (1, "", "Write offset is beyond the end of the VDI\n")
    assert dog("vdi", "read", "u") == (
        1,
        "",
        "Failed to open VDI u (snapshot id: 0 snapshot tag: ): No VDI found\n",
    )


def test_snapshot_clone_rollback_delete(dog: Dog, sheep: FakeSheep) -> None:
    sheep.create("a", 10 * MIB)
    assert dog("vdi", "write", "a", "0", "3", stdin=b"one")[0] == 0
    assert dog("vdi", "snapshot", "-s", "t1", "a", "-v") == (
        0,
        "new VID of original VDI: 1ec8d, VDI ID of newly created snapshot: 1ec8c\n",
        "",
    )
    assert dog("vdi", "snapshot", "-s", "t1", "a") == (
        1,
        "",
        "Failed to create snapshot for a, maybe snapshot id (0) or tag (t1) is existed\n",
    )
    assert dog("vdi", "snapshot", "nosuch") == (1, "", "Failed to create snapshot for nosuch: No VDI found\n")
    assert dog("vdi", "snapshot", "-s", "12", "a")[::2] == (
        64,
        "Please specify a non-integer value for a snapshot tag name\n",
    )
    assert dog("vdi", "snapshot", "-R", "-v", "a") == (
        0,
        "",
        "VDI a doesn't have its own objects, skipping creation of snapshot\n",
    )
    assert dog("vdi", "write", "a", "0", "3", stdin=b"two")[0] == 0
    assert dog("vdi", "read", "a", "-s", "t1", "0", "3")[1] == "one"
    assert dog("vdi", "read", "a", "-s", "1", "0", "3")[1] == "one"
    assert dog("vdi", "clone", "a", "b")[::2] == (
        64,
        "Only snapshot VDIs can be cloned\nPlease specify the '-s' option\n",
    )
    assert dog("vdi", "clone", "-s", "t1", "a")[2] == "Destination VDI name must be specified\n"
    assert dog("vdi", "clone", "-s", "t1", "a", "a") == (1, "", "Failed to create VDI a: VDI exists already\n")
    assert dog("vdi", "clone", "-s", "t1", "-n", "a", "b")[0] == 0
    assert dog("vdi", "read", "b", "0", "3")[1] == "one"
    assert dog("vdi", "clone", "-s", "t1", "-P", "a", "c", "-r", "-v")[0] == 0
    rows = {row.split()[1]: row.split() for row in dog("vdi", "list", "-r")[1].splitlines()}
    assert (rows["b"][0], rows["b"][4]) == ("=", "4194304")
    assert (rows["c"][0], rows["c"][4]) == ("c", "12582912")
    question = "This operation discards any changes made since the previous\nsnapshot was taken.  Continue? [yes/no]: "
    assert dog("vdi", "rollback", "-s", "t1", "a") == (0, question, "")
    assert dog("vdi", "read", "a", "0", "3")[1] == "two"
    assert dog("vdi", "rollback", "-s", "t1", "a", "-f") == (0, "", "")
    assert dog("vdi", "read", "a", "0", "3")[1] == "one"
    assert dog("vdi", "delete", "nosuch") == (
        0,
        "",
        "Failed to open VDI nosuch (snapshot id: 0 snapshot tag: ): No VDI found\n",
    )
    assert dog("vdi", "delete", "a", "-B", "0")[2] == "The number of batched reclamation must bepositive integer\n"
    for words in (("a",), ("-s", "t1", "a"), ("b",), ("c",)):
        assert dog("vdi", "delete", *words) == (0, "", "")
    assert dog("vdi", "list", "-r")[1] == ""
    assert not [oid for oid in sheep.objects if not oid >> 63]
    assert dog("vdi", "read", "a", "-s", "0")[2] == "The snapshot id must be larger than zero\n"


@pytest.mark.parametrize(
    "words",
    [
        ("delete", "-s", "", "a"),
        ("rollback", "-f", "-s", "", "a"),
        ("clone", "-s", "", "a", "b"),
        ("read", "-s", "", "a"),
        ("backup", "-s", "1", "-F", "", "a"),
    ],
)
def test_an_empty_tag_is_not_the_volume_itself(dog: Dog, sheep: FakeSheep, words: tuple[str, ...]) -> None:
    """`-s "$TAG"` of a script that has no TAG."""
    sheep.create("a", 10 * MIB)
    dog("vdi", "snapshot", "a")
    before = dict(sheep.objects)
    assert dog("vdi", *words) == (1, "", "The snapshot id or tag is empty\n")
    assert sheep.objects == before


@pytest.mark.parametrize(("options", "cleared"), [((), 0), (("-B", "2"), 2), (("-I", "1", "-B", "3"), 1)])
def test_a_deletion_is_one_step_that_nobody_sees_half_done(
    dog: Dog, sheep: FakeSheep, options: tuple[str, ...], cleared: int
) -> None:
    """Unless batches are asked for: a clone of a snapshot that was being cleared had holes where it had data."""
    sheep.create("a", 12 * MIB)
    assert dog("vdi", "write", "a", stdin=bytes(12 * MIB))[0] == 0
    dog("vdi", "snapshot", "-s", "t", "a")
    sheep.log.clear()
    assert dog("vdi", "delete", "-s", "t", "a", *options) == (0, "", "")
    assert [entry[0] for entry in sheep.log].count(Opcode.WRITE_OBJ) == cleared


def test_resize(dog: Dog, sheep: FakeSheep) -> None:
    vid = sheep.create("a", 10 * MIB)
    assert dog("vdi", "resize", "a", "20M") == (0, "", "")
    assert sheep.inode(vid).vdi_size == 20 * MIB
    assert dog("vdi", "resize", "a", "1M") == (64, "", "Shrinking VDIs is not implemented\n")
    assert dog("vdi", "resize", "a", "5T") == (
        64,
        "",
        "New VDI size is too large. This volume's max size is 4398046511104\n",
    )
    assert dog("vdi", "resize", "a")[::2] == (64, "Please specify the new size for the VDI\n")


def test_a_resize_that_a_snapshot_overtakes_begins_again(dog: Dog, sheep: FakeSheep) -> None:
    vid = sheep.create("a", 10 * MIB)

    def before(opcode: int, oid: int) -> None:
        if opcode == Opcode.WRITE_OBJ and not sheep.inode(vid).is_snapshot:
            sheep.snapshot("a", b"t")

    sheep.before = before
    assert dog("vdi", "resize", "a", "20M") == (0, "", "")
    rows = [row.split(" ") for row in dog("vdi", "list", "-r", "a")[1].splitlines()]
    assert [(row[0], int(row[3])) for row in rows] == [("s", 10 * MIB), ("=", 20 * MIB)]


def test_object_map_and_tree(dog: Dog, sheep: FakeSheep) -> None:
    sheep.created = 1795292679 - 60
    sheep.create("a", 10 * MIB)
    dog("vdi", "write", "a", "5M", "1", stdin=b"x")
    dog("vdi", "snapshot", "-s", "t1", "a")
    dog("vdi", "write", "a", "0", "1", stdin=b"x")
    assert dog("vdi", "object", "map", "a") == (
        0,
        "Index       VID\n00000000    1ec8d\n00000001    1ec8c\n",
        "",
    )
    assert dog("vdi", "object", "map", "nosuch") == (
        1,
        "",
        "Failed to open VDI nosuch (snapshot id: 0 snapshot tag: ): No VDI found\nFATAL: nosuch not found\n",
    )
    assert dog("vdi", "object", "location", "a", "-i", "2")[:2] == (
        0,
        "The inode object 0x1ec8d idx 2 is not allocated\n",
    )
    assert dog("vdi", "object", "location", "a", "-i", "4294967296") == (1, "The offset is too large!\n", "")
    sheep.create("b", MIB)
    dog("vdi", "snapshot", "-s", "t2", "a")
    dog("vdi", "rollback", "-f", "-s", "t1", "a")
    assert dog("vdi", "tree")[1] == (
        "a---[2026-11-21 20:24]-+-[2026-11-21 20:25]\n                       `-(you are here)\nb---(you are here)\n"
    )
    assert (
        '  "1ec8c" -> "1ec8d";\n  "1ec8d" [\n    group = "a",\n    label = "Name:          a\\nTag:           2\\n'
        in (dog("vdi", "graph")[1])
    )


def test_check(dog: Dog, sheep: FakeSheep) -> None:
    vid = sheep.create("a", 10 * MIB)
    dog("vdi", "write", "a", "0", "8M", stdin=b"a" * 8 * MIB)
    assert dog("vdi", "check", "-e", "a") == (0, "a is fine, no object is missing.\n", "")
    sheep.members.append(Member(NodeId(bytes(12) + b"\x7f\0\0\1", 1), 1, 128, 1))
    del sheep.members[0]
    refused = "failed to connect to 127.0.0.1:1: Connection refused\n" * 2
    lost = [f"[127.0.0.1:1] oid {oid:016x} is missing.\n" for oid in (1 << 63 | vid << 32, vid << 32, vid << 32 | 1)]
    assert dog("vdi", "check", "-e", "a") == (1, "".join(lost) + "a lost 3 object(s).\n", refused)
    found = json.loads(dog("vdi", "check", "-e", "a", "--json")[1])["missing"]
    assert [f"[{one['node']}] oid {one['oid']} is missing.\n" for one in found] == lost


def test_repair_follows_the_majority(dog: Dog, sheep: FakeSheep) -> None:
    vid = sheep.create("a", 4 * MIB)
    oid = 1 << 63 | vid << 32
    one, two = b"1" * 20, b"2" * 20
    with FakeSheep() as second, FakeSheep() as third:
        nodes = [sheep, second, third]
        sheep.members = sorted(
            (Member(node.members[0].id, zone, 128, 1) for zone, node in enumerate(nodes)), key=lambda node: node.id
        )
        copies: dict[int, bytes | None] = {}
        repaired: list[int] = []

        def serve(number: int) -> None:
            def digest(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
                request = wire.OBJECT_REQUEST.unpack(header)
                found = copies[number]
                result = Result.SUCCESS if found else Result.NO_OBJ
                fields = wire.HashResponse(0, request.opcode, 0, 1, request.id, 0, result, found or bytes(20))
                return wire.HASH_RESPONSE.pack(fields), b""

            def repair(header: bytes, payload: bytes) -> tuple[bytes, bytes]:
                request = wire.REPAIR_REQUEST.unpack(header)
                assert request.oid == oid
                ports = [node.address[1] for node in nodes]
                assert copies[ports.index(request.port)] == one
                repaired.append(number)
                return response(request.opcode, request.id, 1), b""

            nodes[number].handlers |= {Opcode.GET_HASH: digest, Opcode.REPAIR_REPLICA: repair}

        for number in range(3):
            serve(number)
        for found, output, errors, bad in (
            ((one, one, one), "", "", []),
            ((one, two, one), f"fixed replica {oid:016x}\n", "", [1]),
            ((None, one, one), f"fixed missing {oid:016x}\n", "", [0]),
            ((None, None, None), "", f"no node has {oid:016x}\n", []),
            ((one, two, None), "", f"no majority of {oid:016x}\n", []),
        ):
            repaired.clear()
            copies.update(enumerate(found))
            assert dog("vdi", "check", "a") == (0, output + "finish check&repair a\n", errors)
            assert repaired == bad


@pytest.mark.parametrize("state", ["running", "unformatted", "absent"])
def test_failures_are_told_with_json_as_without(
    dog: Dog, sheep: FakeSheep, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/json.md: exit statuses and the text on stderr are the same."""
    sheep.create("a", 4 * MIB)
    sheep.formatted = state != "unformatted"
    if state == "absent":
        monkeypatch.setenv("SHEEPDOG_DOG_PORT", "1")
    for words in (
        "vdi list", "vdi tree", "vdi check -e a", "vdi object location a", "vdi object map a -i x", "vdi track nosuch",
        "vdi object explain a 0", "vdi object dump-inode nosuch", "vdi getattr a k", "vdi lock list", "vm list",
        "vdi cache info", "node list", "node info", "node stat", "node may-stop 0", "node recovery", "node md info",
        "node recovery get-throttle", "node md info -A", "node scrub status", "node log level get", "cluster info",
        "cluster health", "nbd uri a",
    ):  # fmt: skip
        assert dog(*words.split())[::2] == dog(*words.split(), "--json")[::2], words


def test_json_is_the_only_thing_on_stdout(dog: Dog, sheep: FakeSheep) -> None:
    status, out, errors = dog("node", "list", "--json", "-T")
    assert (status, len(json.loads(out))) == (0, 1)
    assert re.fullmatch(r"\nElapsed time: \d\.\d{3} seconds\n", errors)
    assert dog("node", "recovery", "-P", "--json")[::2] == (
        64, "--json shows what is now: it does not go with -P\n",
    )  # fmt: skip


def test_entries_of_a_map_are_counted() -> None:
    chooser = random.Random(1)
    for _ in range(30):
        entries = array("I")
        for _ in range(chooser.randrange(9)):
            entries.extend([chooser.choice([0, 7, 9])] * chooser.choice([1, 255, 256, 300, 1000]))
        assert vdi_list._count(entries, 7) == (entries.count(7), entries.count(0))


def test_start_is_quick_and_light(sheep: FakeSheep) -> None:
    code = (
        "import sys; from sheepdog.tools.dog.main import main\n"
        f"main(['node', 'list', '-r', '-p', '{sheep.address[1]}'])\n"
        "heavy = {'asyncio', 'click', 'ssl', 'logging', 'json', 'xxhash', 'subprocess'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"0 127.0.0.1:{sheep.address[1]} 128 0\n"


@pytest.mark.parametrize("rich", [True, False])
def test_a_bar_is_for_people_only(rich: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """On a terminal it tells the share, and is gone at the end; into a pipe nothing is written."""
    script = (
        "import sys\n"
        f"sys.modules.update({{}} if {rich} else {{'rich.console': None}})\n"
        "from sheepdog.tools.dog import progress\n"
        "progress._QUIET_S = progress._STEP_S = 0\n"
        "with progress.Progress('export', 1000) as bar:\n"
        "    for _ in range(4): bar.advance(250)\n"
        "    sys.exit()\n"
    )
    if rich:
        pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", script], stderr=theirs, check=True, timeout=60)
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "export" in shown
    assert ("100.0%" in shown) != rich
    assert shown.endswith("\x1b[2K" if rich else "\r"), "the bar is gone also when the command fails"
    assert shown.rfind("\x1b[?25h") >= shown.rfind("\x1b[?25l"), "and the cursor is back"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert capfd.readouterr().err == ""


def test_a_save_names_what_is_wrong(dog: Dog, sheep: FakeSheep, tmp_path: Path) -> None:
    oid = data_oid(Vid(sheep.create("a", 10 * MIB)), 0)
    dog("vdi", "write", "a", "0", "3", stdin=b"one")
    dog("vdi", "snapshot", "-s", "t", "a")
    for tag in ("", "a\tb", "a\nb"):
        refused = dog("cluster", "snapshot", "save", tag, str(tmp_path / "saved"))
        assert refused[::2] == (64, "Tag should not be empty, nor have tabs or line feeds.\n")
    sheep.unreadable.add(oid)
    assert dog("cluster", "snapshot", "save", "s1", str(tmp_path / "saved")) == (
        2,
        "",
        f"Failed to read object {oid:016x} No object found\nFail to save snapshot to path: {tmp_path}/saved.\n",
    )
