"""The command line of sheepfs (cli.md 3), as getopt reads it: permuted, long names may be abbreviated."""

from __future__ import annotations

import getopt
from dataclasses import dataclass

from sheepdog.cluster.client.address import Address
from sheepdog.cluster.core.errors import UsageError
from sheepdog.frontends.sheepfs.control import parse_port

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7000
TRANSPORTS = ("auto", "direct", "pyfuse3")
TRY_HELP = "Try 'sheepfs --help' for help."

USAGE = """\
Usage: sheepfs [OPTION]... MOUNTPOINT
Shows the volumes of a Sheepdog cluster as files.

Options:
  -a, --address           address of a sheep (default: 127.0.0.1)
  -p, --port              port of that sheep (default: 7000)
  -d, --debug             log every request (implies -f)
  -f, --foreground        stay in the foreground, messages to stderr
  -k, --pagecache         volumes go through the kernel's page cache
  -o, --objectcache       ask the sheep to use its object cache
  -n                      accepted and ignored: no page cache is the default
  -h, --help              show this help
      --transport=NAME    how to talk to the kernel: direct (root only; carries
                          discards), pyfuse3, or auto (default: direct for root)
      --allow-remove      rm of MOUNTPOINT/volume/NAME or snapshot/NAME/TAG
                          deletes the volume, the snapshot

A volume is shown and taken away again by writing its name:
  echo web > MOUNTPOINT/vdi/mount
  mount -o loop MOUNTPOINT/volume/web /mnt
  umount /mnt
  echo web > MOUNTPOINT/vdi/unmount
  umount MOUNTPOINT

Snapshots are files in MOUNTPOINT/snapshot/NAME; mkdir there takes one:
  mkdir MOUNTPOINT/snapshot/web/monday
  mount -o loop,ro MOUNTPOINT/snapshot/web/monday /mnt
"""

_SHORT = "a:p:dfkonh"
_LONG = ["address=", "port=", "debug", "foreground", "pagecache", "objectcache", "help", "transport=", "allow-remove"]


@dataclass(slots=True)
class Options:
    mountpoint: str = ""
    address: Address = (DEFAULT_HOST, DEFAULT_PORT)
    debug: bool = False
    foreground: bool = False
    page_cache: bool = False
    object_cache: bool = False
    transport: str = "auto"
    may_remove: bool = False
    help: bool = False


def parse(arguments: list[str]) -> Options:
    """The options; `UsageError` with the text for stderr."""
    try:
        found, rest = getopt.gnu_getopt(arguments, _SHORT, _LONG)
    except getopt.GetoptError as problem:
        raise UsageError(f"{_complaint(problem)}\n{TRY_HELP}") from None
    options = Options()
    host, port = DEFAULT_HOST, DEFAULT_PORT
    for name, value in found:
        match name:
            case "-a" | "--address":
                host = value
            case "-p" | "--port":
                port = _port(value)
            case "-d" | "--debug":
                options.debug = options.foreground = True
            case "-f" | "--foreground":
                options.foreground = True
            case "-k" | "--pagecache":
                options.page_cache = True
            case "-o" | "--objectcache":
                options.object_cache = True
            case "-h" | "--help":
                options.help = True
                return options
            case "--allow-remove":
                options.may_remove = True
            case "--transport":
                if value not in TRANSPORTS:
                    raise UsageError(f"Invalid transport '{value}': must be one of {', '.join(TRANSPORTS)}")
                options.transport = value
    if len(rest) != 1:
        raise UsageError(TRY_HELP)
    options.mountpoint = rest[0]
    options.address = (host, port)
    return options


def _port(text: str) -> int:
    try:
        return parse_port(text)
    except ValueError as problem:
        raise UsageError(str(problem)) from None


def _complaint(problem: getopt.GetoptError) -> str:
    """The C library's wording."""
    if len(problem.opt) == 1:
        if "requires" in problem.msg:
            return f"sheepfs: option requires an argument -- '{problem.opt}'"
        return f"sheepfs: invalid option -- '{problem.opt}'"
    if "requires" in problem.msg:
        return f"sheepfs: option '--{problem.opt}' requires an argument"
    if "not a unique" in problem.msg:
        return f"sheepfs: option '--{problem.opt}' is ambiguous"
    if "must not" in problem.msg:
        return f"sheepfs: option '--{problem.opt}' doesn't allow an argument"
    return f"sheepfs: unrecognized option '--{problem.opt}'"
