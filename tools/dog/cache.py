"""`dog vdi cache` (cli.md 5) of nodes that have no object cache, which all are: nothing is kept back anywhere."""

from __future__ import annotations

from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.wire import header as wire
from sheepdog.cluster.wire.opcodes import Opcode, protocol_version
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import confirm, text
from sheepdog.tools.dog.values import snapshot_option
from sheepdog.tools.dog.volumes import find, name_of

INFO, PURGE = 0xB6, 0xB7  # of daemons that have a cache; the others refuse them
_PURGE_QUESTION = "This operation purges the cache of all the vdi. Continue? [yes/no]: "


def info(context: Context) -> None:
    try:
        context.gateway().call(bytearray(wire.REQUEST.pack(wire.Request(protocol_version(INFO), INFO))))
    except SheepError as error:
        raise Failure(f"failed to get cache information: {text(error.result)}") from error


def flush(context: Context) -> None:
    """Returns when everything acknowledged so far is durable."""
    _order(context, Opcode.FLUSH_VDI, _vid(context))


def delete(context: Context) -> None:
    _order(context, Opcode.FLUSH_DEL_CACHE, _vid(context))


def purge(context: Context) -> None:
    if context.optional(0) is None:
        confirm(_PURGE_QUESTION)
        _order(context, PURGE, Vid(0))
    else:
        _order(context, PURGE, _vid(context))


def _vid(context: Context) -> Vid:
    tag, snap_id = snapshot_option(context)
    return find(context.gateway(), name_of(context.argument(0)), tag, snap_id)


def _order(context: Context, opcode: int, vid: Vid) -> None:
    fields = wire.ObjectRequest(protocol_version(opcode), opcode, oid=int(vid) << 32)
    try:
        context.gateway().call(bytearray(wire.OBJECT_REQUEST.pack(fields)))
    except SheepError as error:
        raise Failure("failed to execute request") from error
