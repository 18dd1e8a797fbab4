"""`dog nbd`: volumes for NBD clients (QEMU, libvirt, the kernel)."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.errors import Result
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import text, warn

if TYPE_CHECKING:
    from sheepdog.frontends.nbd.exports import Export

LOOPBACK = ("127.", "::1", "localhost")


def serve(context: Context) -> int:
    """Becomes an NBD server for the named exports, or for every volume and snapshot."""
    from sheepdog.frontends.nbd.endpoints import endpoint_of
    from sheepdog.frontends.nbd.parameters import Parameters
    from sheepdog.frontends.nbd.serve import DEFAULT_MODE, MAX_THREADS, Server

    endpoint = endpoint_of(*_place(context))
    if not endpoint.is_unix and (context.flag("mode") or context.flag("group")):
        raise UsageFailure("--mode and --group are a socket's (--socket)")
    endpoint.tls.check_server()
    names = context.rest(0)
    for name in names:
        _check(context, name)
    if not names:
        admin.node_list(context.gateway())  # a wrong address is told now, not to every client
    server = Server(
        endpoint,
        Parameters(
            (context.host, context.port),
            names,
            exclusive=context.flag("exclusive"),
            spread=context.flag("spread"),
            swap=context.flag("swap"),
        ),
        read_only=context.flag("readonly"),
        mode=_number(context, "mode", 8, DEFAULT_MODE, 0o777),
        group=context.value("group"),
        threads=_number(context, "threads", 10, 0, MAX_THREADS),
    )
    known = endpoint.tls.keys or endpoint.tls.verify_peer
    if not endpoint.is_unix and not known and not str(endpoint).startswith(LOOPBACK):
        warn(f"Warning: whoever reaches {endpoint} can read and change the volumes (see --tls-verify-peer, --tls-psk)")
    listener = server.listen()
    print("\n".join(endpoint.uri(name) for name in names or [""]), flush=True)
    server.run(listener)


def uri(context: Context) -> int:
    """Prints how to reach an export, in the words of each client."""
    from sheepdog.frontends.nbd.endpoints import endpoint_of

    name = context.argument(0, "Please specify the VDI name")
    endpoint = endpoint_of(*_place(context), context.value("tls-hostname"))
    if lacks := endpoint.tls.client_lacks():
        warn(f"Warning: {lacks}")
    read_only = _check(context, name).is_snapshot or context.flag("readonly")
    words = {
        "uri": endpoint.uri(name),
        "qemu_drive": shlex.join(endpoint.drive(name, read_only)),
        "qemu_blockdev": shlex.join(endpoint.blockdev(name, read_only)),
        "libvirt": endpoint.libvirt(name, read_only),
        "nbd_client": shlex.join(endpoint.kernel(name)),
    }
    if context.json:
        import json

        print(json.dumps(words))
    elif context.raw:
        print(words["uri"])
    else:
        print(f"{words['uri']}\n")
        print(f"QEMU:\n  {words['qemu_drive']}\nor:\n  {words['qemu_blockdev']} -device virtio-blk-pci,drive=disk0\n")
        if not words["libvirt"]:
            print("libvirt and nbd-client know TLS with certificates only")
            return 0
        print("libvirt:\n" + "".join(f"  {line}\n" for line in words["libvirt"].splitlines()))
        print(f"Linux:\n  {words['nbd_client']}")
    return 0


def _place(context: Context) -> tuple[str, str, str, str, bool]:
    """Socket, address, certificates, keys, whether clients are verified: the arguments of `endpoint_of`."""
    for one, other in (("socket", "listen"), ("tls-certificates", "tls-psk")):
        if context.flag(one) and context.flag(other):
            raise UsageFailure(f"--{one} and --{other} exclude each other")
    if context.flag("tls-verify-peer") and not context.flag("tls-certificates"):
        raise UsageFailure("--tls-verify-peer needs --tls-certificates")
    words = [context.value(option) for option in ("socket", "listen", "tls-certificates", "tls-psk")]
    return words[0], words[1], words[2], words[3], context.flag("tls-verify-peer")


def _check(context: Context, name: str) -> Export:
    """What the name stands for; Failure if there is no such export."""
    from sheepdog.frontends.nbd.exports import readings

    result = int(Result.NO_VDI)
    for export in readings(name):
        try:
            admin.find(context.gateway(), export.name, export.tag, export.snap_id)
        except SheepError as error:
            result = error.result
            if result not in (Result.NO_VDI, Result.NO_TAG):
                break
        else:
            return export
    raise Failure(f"Failed to open {name}: {text(result)}")


def _number(context: Context, option: str, base: int, default: int, largest: int) -> int:
    value = context.value(option)
    if not context.flag(option):
        return default
    try:
        number = int(value, base)
    except ValueError:
        number = 0
    if not 0 < number <= largest:
        raise Failure(f"Invalid value '{value}' of --{option}", USAGE_ERROR)
    return number
