"""What a command line of `sheep` asks for, checked. Imports nothing heavy: mistakes are told at once.

Messages are those that scripts know; paths are made absolute here, since a daemon changes its directory.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.host import gnu_options, usage

DEFAULT_PATH = "/tmp"
DEFAULT_PORT = 7000
MAX_U16 = 65_535
MAX_U32 = 4_294_967_295
MIN_JOURNAL_BYTES = 64 << 20  # smaller ones would be switched all the time
MAX_JOURNAL_BYTES = 8 << 30  # two segments, in which 32 bits say the place
MIN_CACHE_BYTES, MAX_CACHE_BYTES = 10 << 20, 4_194_304 << 30  # 2^32 MB

LOG_LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
LOG_FORMATS = ("default", "server", "json")
LOG_DESTINATIONS = ("default", "syslog", "stdout")
THREAD_KEYS = ("net", "gway", "io", "peer", "reclaim", "gway_fwd", "remove", "remove_peer", "recovery", "async")

_SHORT = "b:c:Dfghi:j:l:np:P:q:r:R:uvV:w:Wx:y:z:"
_LONG = {
    "bindaddr": "b",
    "cache": "w",
    "cluster": "c",
    "directio": "D",
    "foreground": "f",
    "gateway": "g",
    "help": "h",
    "http": "r",
    "ioaddr": "i",
    "journal": "j",
    "log": "l",
    "max-dynamic-threads": "x",
    "myaddr": "y",
    "nosync": "n",
    "pidfile": "P",
    "port": "p",
    "recovery": "R",
    "upgrade": "u",
    "version": "v",
    "vnodes": "V",
    "wildcard-recovery": "W",
    "wq-threads": "w",
    "zone": "z",
}
_SIZE = re.compile(r"(\d+)(?:\.(\d*))?([bkmgtp]?)", re.IGNORECASE | re.ASCII)


class Refused(UsageError):
    """A mistake whose answer also has a part for standard output."""

    def __init__(self, text: str, output: str) -> None:
        super().__init__(text)
        self.output = output


@dataclass(frozen=True, slots=True)
class IoAddress:
    """-i: a second address for traffic between nodes."""

    host: str
    port: int = DEFAULT_PORT


@dataclass(frozen=True, slots=True)
class JournalOptions:
    """-j; `directory` None: the metadata directory."""

    size_bytes: int
    directory: str | None = None
    skip: bool = False


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """-w size=...; `directory` None: `cache` in the metadata directory."""

    size_bytes: int
    directory: str | None = None
    direct_io: bool = False


@dataclass(frozen=True, slots=True)
class LogOptions:
    """-l; `level` as in syslog; `directory` None: the metadata directory."""

    level: int = LOG_LEVELS.index("info")
    format: str = "server"
    destination: str = "default"
    directory: str | None = None


@dataclass(frozen=True, slots=True)
class RecoveryOptions:
    """-R: at most `objects` in each `interval_ms`."""

    objects: int
    interval_ms: int


@dataclass(frozen=True, slots=True)
class Options:
    """One start of a sheep. All paths are absolute."""

    metadata: str = DEFAULT_PATH
    disks: tuple[str, ...] = ()
    driver: str = "local"
    """`NAME[:ARGUMENT]`, for drivers.registry.create."""
    bind_address: str | None = None
    my_address: str | None = None
    port: int = DEFAULT_PORT
    io_address: IoAddress | None = None
    foreground: bool = False
    gateway: bool = False
    vnodes: int | None = None
    """Fixed number of points on the ring; None: by the size of the disks."""
    zone: int | None = None
    """None: from the node's address."""
    direct_io: bool = False
    nosync: bool = False
    journal: JournalOptions | None = None
    cache: CacheOptions | None = None
    log: LogOptions = LogOptions()
    pid_file: str | None = None
    recovery: RecoveryOptions | None = None
    upgrade: bool = False
    wildcard_recovery: bool = False
    threads: tuple[tuple[str, int], ...] = ()
    max_dynamic_threads: int | None = None

    def without_effect(self) -> tuple[str, ...]:
        """One line for each option given that is accepted but changes nothing in this version."""
        too_large = self.journal is not None and self.journal.size_bytes > MAX_JOURNAL_BYTES
        given = (
            ("-j", too_large, f"what its size has beyond {MAX_JOURNAL_BYTES >> 30}G is not used"),
            ("-u", self.upgrade, "there is no older store layout to migrate"),
            ("-w", bool(self.threads), "thread numbers are chosen by the daemon"),
            ("-W", self.wildcard_recovery, "recovery always looks at every node"),
            ("-x", self.max_dynamic_threads is not None, "thread numbers are chosen by the daemon"),
        )
        return tuple(f"option {letter} has no effect: {why}" for letter, is_given, why in given if is_given)


def parse(
    program: str,
    arguments: Sequence[str],
    drivers: Sequence[str],
    default_driver: Callable[[], str] = lambda: "local",
    absent: Mapping[str, str] = MappingProxyType({}),
) -> Options | str:
    """Options, or a text for standard output (help, version). UsageError, Refused.

    `program` is named in messages about the form of options; `drivers` are the membership drivers that can be used
    here, `absent` tells what others need. `default_driver` is asked only when it matters.
    """
    options = Options(driver="")
    operands: list[str] = []
    try:
        for letter, argument in gnu_options.read(program, arguments, _SHORT, _LONG, operands):
            if letter == "h":
                return usage.help_text(_shown(default_driver))
            if letter == "v":
                return usage.version_text(drivers)
            if letter == "c":
                options = replace(options, driver=_driver(argument, drivers, absent))
            elif letter in _FLAGS:
                options = _FLAGS[letter](options)
            else:
                options = _VALUES[letter](options, argument)
    except gnu_options.OptionError as error:
        if error.missing in usage.EXTENDED:
            raise Refused(str(error), usage.EXTENDED[error.missing]) from None
        raise UsageError(f"{error}\nTry 'sheep --help' for more information.") from None
    if options.gateway and options.vnodes is not None:
        raise UsageError("Options '-g' and '-V' can not be both specified")
    if len(operands) > 1:
        raise UsageError(f"Only one PATH is taken, '{operands[1]}' is too many (disks are separated by commas)")
    paths = [os.path.abspath(path) for path in (operands or [DEFAULT_PATH])[0].split(",") if path]
    if not paths:
        raise UsageError("PATH is empty")
    return replace(options, metadata=paths[0], disks=tuple(paths[1:]), driver=options.driver or default_driver())


def parse_size(text: str) -> int:
    """Bytes of `10`, `1.5G`, `4k`: powers of 1024. UsageError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(
            f"Invalid size '{text}'\n"
            "You may use B, K, M, G, T or P suffixes for bytes, kilobytes, megabytes, "
            "gigabytes, terabytes and petabytes."
        )
    whole, fraction, suffix = match[1], match[2] or "", match[3].upper()
    unit = 1 << 10 * "BKMGTP".index(suffix or "B")
    size: int = int(whole + fraction) * unit // 10 ** len(fraction)
    return size


def _number(text: str, low: int, high: int) -> int | None:
    """A decimal number within the range; None for anything else."""
    if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        return None
    return int(text)


def _is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return True
    return False


def _pieces(text: str) -> Iterator[tuple[str, str, str]]:
    """(piece, key, value) of a comma separated argument; a key keeps its `=`."""
    for piece in text.split(","):
        key, equals, value = piece.partition("=")
        if piece:
            yield piece, key + equals, value


def _bind_address(options: Options, text: str) -> Options:
    if not _is_address(text):
        raise UsageError(f"Bad address '{text}'")
    return replace(options, bind_address=text)


def _shown(default_driver: Callable[[], str]) -> str:
    """The default driver's name; help is given also while nobody can tell it."""
    try:
        return default_driver()
    except UsageError:
        return "not known now"


def _driver(text: str, drivers: Sequence[str], absent: Mapping[str, str]) -> str:
    name, _, argument = text.partition(":")
    if name not in drivers:
        why = f": {absent[name]}" if name in absent else ""
        raise Refused(f"Invalid cluster driver '{text}'{why}", f"\n{usage.features_text(drivers)}")
    return f"local:{os.path.abspath(argument)}" if name == "local" and argument else text


def _io_address(options: Options, text: str) -> Options:
    host, port = "(null)", DEFAULT_PORT
    for piece, key, value in _pieces(text):
        if key == "host=":
            host = value
        elif key == "port=":
            number = _number(value, 1, MAX_U16)
            if number is None:
                raise UsageError(f"Bad port '{value}'")
            port = number
        else:
            raise UsageError(f"invalid option {piece}")
    if not _is_address(host):
        raise UsageError(f"Bad addr: '{host}'")
    return replace(options, io_address=IoAddress(host, port))


def _journal(options: Options, text: str) -> Options:
    size: int | None = None
    directory: str | None = None
    skip = False
    for piece, key, value in _pieces(text):
        if key == "size=":
            size = parse_size(value)
            if size < MIN_JOURNAL_BYTES:
                raise UsageError(f"invalid size {value}, must be bigger than {MIN_JOURNAL_BYTES >> 20}(M)")
        elif key == "dir=":
            directory = os.path.abspath(value)
        elif key == "skip":
            skip = True
        else:
            raise UsageError(f"invalid option {piece}")
    if size is None:
        raise UsageError("you must specify size for journal")
    return replace(options, journal=JournalOptions(size, directory, skip))


def _log(options: Options, text: str) -> Options:
    log = options.log
    for piece, key, value in _pieces(text):
        if key == "level=":
            if value not in LOG_LEVELS:
                table = "".join(f"\t{number}  {name}\n" for number, name in enumerate(LOG_LEVELS))
                raise Refused(f"Invalid log level '{value}'", f"Available log levels:\n{table}")
            log = replace(log, level=LOG_LEVELS.index(value))
        elif key == "format=":
            if value not in LOG_FORMATS:
                names = "\n\t".join(LOG_FORMATS)
                raise UsageError(f"invalid log format: {value}\nvalid options are:\n\t{names}")
            log = replace(log, format=value)
        elif key == "dst=":
            if value not in LOG_DESTINATIONS:
                raise UsageError(f"invalid type of log destination: {value}")
            log = replace(log, destination=value)
        elif key == "dir=":
            if not os.path.isdir(value):
                raise UsageError(
                    f"{value}: {'Not a directory' if os.path.exists(value) else 'No such file or directory'}"
                )
            log = replace(log, directory=os.path.abspath(value))
        else:
            raise UsageError(f"invalid option {piece}")
    if log.directory is not None and log.destination != "default":
        raise UsageError(f"logdir ({log.directory}) is specified but logging destination is {log.destination}")
    return replace(options, log=log, foreground=options.foreground or log.destination == "stdout")


def _port(options: Options, text: str) -> Options:
    number = _number(text, 1, MAX_U16)
    if number is None:
        raise UsageError(f"Invalid port number '{text}'")
    return replace(options, port=number)


def _http(_options: Options, _text: str) -> Options:
    raise UsageError("Option '-r' is not available: this build has no HTTP object service")


def _recovery(options: Options, text: str) -> Options:
    values = {"max=": 0, "interval=": 0}
    for piece, key, value in _pieces(text):
        if key not in values:
            raise UsageError(f"invalid option {piece}")
        number = _number(value, 0, MAX_U32)
        if number is None:
            raise UsageError(f"Invalid recovery option '{piece}': must be an integer between 0 and {MAX_U32}")
        values[key] = number
    limits = RecoveryOptions(values["max="], values["interval="])
    return replace(options, recovery=limits if limits.objects and limits.interval_ms else None)


def _vnodes(options: Options, text: str) -> Options:
    number = _number(text, 1, MAX_U16)
    if number is None:
        raise UsageError(f"Invalid number of vnodes '{text}': must be an integer between 1 and {MAX_U16}")
    return replace(options, vnodes=number)


def _threads_or_cache(options: Options, text: str) -> Options:
    """-w: thread numbers since 1.0, the object cache before; told apart by their keys."""
    cache_keys = ("size=", "dir=", "directio")
    is_cache = text.startswith("object:")
    text = text.removeprefix("object:")
    threads = [piece for piece, key, _ in _pieces(text) if key not in cache_keys]
    cache = [(key, value) for _, key, value in _pieces(text) if key in cache_keys]
    options = _threads(options, ",".join(threads))
    if is_cache or cache:
        options = replace(options, cache=_cache(cache))
    return options


def _threads(options: Options, text: str) -> Options:
    counts = dict(options.threads)
    for piece, key, value in _pieces(text):
        name = key.removesuffix("=")
        if name not in THREAD_KEYS or name == key:
            raise UsageError(f"invalid option {piece}")
        number = _number(value, 1, MAX_U32)
        if number is None:
            raise UsageError(f"Invalid number of threads '{value}': must be an integer between 1 and {MAX_U32}")
        counts[name] = number
    return replace(options, threads=tuple(counts.items()))


def _cache(pieces: Sequence[tuple[str, str]]) -> CacheOptions:
    values = dict(pieces)
    if "size=" not in values:
        raise UsageError("object cache size is not set")
    size = parse_size(values["size="])
    if not MIN_CACHE_BYTES <= size <= MAX_CACHE_BYTES:
        raise UsageError(f"Invalid cache option '{values['size=']}': size must be between between 10M and 4194304G")
    directory = os.path.abspath(values["dir="]) if "dir=" in values else None
    return CacheOptions(size, directory, "directio" in values)


def _max_threads(options: Options, text: str) -> Options:
    number = _number(text, 1, MAX_U32)
    if number is None:
        raise UsageError(f"Invalid number of threads '{text}': must be an integer between 1 and {MAX_U32}")
    return replace(options, max_dynamic_threads=number)


def _my_address(options: Options, text: str) -> Options:
    if not _is_address(text):
        raise UsageError(f"Invalid address: '{text}'")
    return replace(options, my_address=text)


def _zone(options: Options, text: str) -> Options:
    number = _number(text, 0, MAX_U32)
    if number is None:
        raise UsageError(f"Invalid zone id '{text}': must be an integer between 0 and {MAX_U32}")
    return replace(options, zone=number)


_FLAGS = {
    "D": lambda options: replace(options, direct_io=True),
    "f": lambda options: replace(options, foreground=True),
    "g": lambda options: replace(options, gateway=True),
    "n": lambda options: replace(options, nosync=True),
    "u": lambda options: replace(options, upgrade=True),
    "W": lambda options: replace(options, wildcard_recovery=True),
}
_VALUES = {
    "b": _bind_address,
    "i": _io_address,
    "j": _journal,
    "l": _log,
    "p": _port,
    "P": lambda options, text: replace(options, pid_file=os.path.abspath(text)),
    "q": _threads,
    "r": _http,
    "R": _recovery,
    "V": _vnodes,
    "w": _threads_or_cache,
    "x": _max_threads,
    "y": _my_address,
    "z": _zone,
}
