"""`dog` as a process of its own: streams that are closed or full, readers that leave, signals, strange servers."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.fake_sheep import FakeSheep
from tests.support.processes import BIN, environment, run

from sheepdog.cluster.client import connection
from sheepdog.tools.dog.main import main

MIB = 1 << 20
LIMIT_S = 60.0


def line(sheep: FakeSheep, words: str) -> str:
    """A command for the shell."""
    noun, verb, *rest = words.split(" ", 2)
    return f"{BIN}/dog {noun} {verb} -p {sheep.address[1]} {' '.join(rest)}"


def shell(command: str) -> subprocess.CompletedProcess[bytes]:
    return run(["bash", "-c", command], check=False, seconds=LIMIT_S)


@pytest.fixture
def filled(sheep: FakeSheep) -> FakeSheep:
    """With a volume of 16 MiB, all of it data, and two more."""
    sheep.create("a", 16 * MIB)
    for number in range(2):
        sheep.create(f"volume{number}", 4 * MIB)
    done = run(["bash", "-c", f"head -c 16M /dev/urandom | {line(sheep, 'vdi write a')}"])
    assert not done.stderr
    return sheep


@pytest.mark.parametrize("words", ["vdi create b 9", "vdi read -s 9", "vdi object map a -i 9", "node list -p 9"])
def test_no_number_is_too_long_to_be_refused(filled: FakeSheep, words: str) -> None:
    done = shell(line(filled, words.replace("9", "9" * 5000)))
    assert done.returncode in (1, 64)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words", ["vdi list", "vdi read a", "vdi export a -", "vdi tree", "node list", "vdi list --json"]
)
def test_output_that_cannot_be_written(filled: FakeSheep, words: str) -> None:
    full = shell(f"{line(filled, words)} > /dev/full")
    assert (full.returncode, full.stderr) == (2, b"dog: cannot write the output: No space left on device\n")
    early = shell(f"{line(filled, words)} | true; echo ${{PIPESTATUS[0]}}")
    assert early.stderr == b"", "whoever closes the pipe has had enough"
    assert early.stdout in (b"0\n", b"1\n")
    closed = shell(f"{line(filled, words)} <&- >&- 2>&-")
    assert closed.returncode == 0


def test_input_that_is_closed(filled: FakeSheep) -> None:
    before = filled.content(filled.vid("a"))
    for words in ("vdi write a 0 512", "vdi rollback -s 1 a"):
        filled.snapshot("a")
        done = shell(f"{line(filled, words)} <&-")
        assert (done.returncode, done.stderr) == (0, b"")
    assert filled.content(filled.vid("a")) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_and_undoes_what_was_begun(filled: FakeSheep, number: signal.Signals, status: int) -> None:
    """An import in the middle: the volume is deleted again, and nothing is said."""
    port = str(filled.address[1])
    dog = subprocess.Popen(
        [BIN / "dog", "vdi", "import", "-p", port, "new", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert dog.stdin is not None
    try:
        dog.stdin.write(os.urandom(8 * MIB))
        dog.stdin.flush()
        end = time.monotonic() + LIMIT_S
        while not any(inode.name == b"new" for inode in filled._headers()):
            assert time.monotonic() < end
            time.sleep(0.01)
        dog.send_signal(number)
        out, err = dog.communicate(timeout=LIMIT_S)
    finally:
        dog.kill()
        dog.wait()
    assert (dog.returncode, out, err) == (status, b"", b"")
    assert not any(inode.name == b"new" for inode in filled._headers())


# -- files


def test_export_leaves_devices_and_links_what_they_are(filled: FakeSheep, tmp_path: Path) -> None:
    data = filled.content(filled.vid("a"))
    pipe, file, link = tmp_path / "pipe", tmp_path / "file", tmp_path / "link"
    os.mkfifo(pipe)
    done = shell(f"umask 027; {line(filled, f'vdi export a {pipe}')} & cat {pipe}; wait %1")
    assert done.stdout == data
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    link.symlink_to(file)
    assert shell(f"umask 027; {line(filled, f'vdi export a {link}')}").returncode == 0
    assert link.is_symlink()
    assert file.read_bytes() == data
    assert file.stat().st_mode & 0o777 == 0o640
    file.chmod(0o604)
    assert shell(line(filled, f"vdi export volume1 {file}")).returncode == 0
    assert (file.stat().st_mode & 0o777, file.stat().st_size) == (0o604, 4 * MIB)
    refused = shell(line(filled, "vdi export a /dev/full"))
    assert (refused.returncode, refused.stderr) == (1, b"Failed to export a: No space left on device\n")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("vdi import new /nonexistent", "Failed to read /nonexistent: No such file or directory"),
        ("vdi import new /tmp", "Failed to read /tmp: Is a directory"),
        ("vdi export a /nonexistent/file", "Failed to export a: No such file or directory"),
        ("vdi export a /tmp", "Failed to export a: Is a directory"),
        ("cluster snapshot list /nonexistent/deep", "/nonexistent/deep: No such file or directory"),
    ],
)
def test_paths_that_do_not_work(filled: FakeSheep, words: str, text: str) -> None:
    done = shell(line(filled, words))
    assert done.returncode
    assert done.stderr.decode().splitlines()[0] == text
    assert not Path("/nonexistent").exists()


# -- servers that are none


@contextmanager
def listening(answer: bytes | None) -> Iterator[int]:
    """A port where every connection gets `answer` to its first bytes and is closed (None: at once)."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            with sock:
                if answer is not None:
                    sock.recv(65536)
                    sock.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


@pytest.mark.parametrize(
    "answer",
    [None, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", b"\xff" * 48, bytes(48)],
)
@pytest.mark.parametrize("words", ["vdi list", "node list", "vdi read x"])
def test_something_else_listens_there(answer: bytes | None, words: str) -> None:
    noun, verb, *rest = words.split()
    with listening(answer) as port:
        done = run([BIN / "dog", noun, verb, "-p", str(port), *rest], check=False, seconds=LIMIT_S)
    if answer != bytes(48) or words != "vdi list":  # 48 zeros are a good answer: no volumes
        assert done.returncode in (1, 2)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert words == "vdi read x" or f"127.0.0.1:{port}".encode() in done.stderr
    assert b"Traceback" not in done.stderr


def test_what_is_no_sheep_is_not_said_to_be_killed() -> None:
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(48)) as port:
        done = run([BIN / "dog", "node", "kill", "-l", "-p", str(port)], check=False, seconds=LIMIT_S)
    said = f"dog: 127.0.0.1:{port}: an answer that nobody asked for; is that a sheep?\n"
    assert (done.returncode, done.stderr.decode()) == (2, said)


def test_a_silent_server_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(connection, "SILENCE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        held: list[socket.socket] = []

        def hang_up_later() -> None:
            held.append(server.accept()[0])
            time.sleep(0.3)
            held[0].close()

        threading.Thread(target=hang_up_later, daemon=True).start()
        assert main(["node", "list", "-p", str(port)]) == 2
    said = ["no answer from {} yet; waiting", "Failed to get node list: {}: Connection reset by peer"]
    assert capfd.readouterr().err.splitlines() == [line.format(f"127.0.0.1:{port}") for line in said]
