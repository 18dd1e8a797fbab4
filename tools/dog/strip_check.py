"""`dog vdi check` of erasure-coded volumes: every strip is asked for on the node where it should be (cli.md 2.6)."""

from __future__ import annotations

from collections.abc import Sequence

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.erasure import Buffer, PlainCoder, Policy
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NodeId, ObjectId
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import Failure
from sheepdog.tools.dog.output import text, warn


def check_strips(context: Context, oid: ObjectId, homes: Sequence[NodeId], policy: Policy, size: int) -> None:
    """Fixes missing strips of one object; says what cannot be fixed."""
    length = size // policy.data
    found: dict[int, Buffer] = {}
    for index, home in enumerate(homes):
        strip = _read(context, home, oid, index, length)
        if strip is not None:
            found[index] = strip
    lost = [index for index in range(policy.strips) if index not in found]
    if len(lost) > policy.parity:
        warn(f"failed to rebuild object {oid:016x}. {len(lost)} copies get lost, more than {policy.parity}")
        return
    coder = PlainCoder()
    rest = [index for index in sorted(found) if index >= policy.data or lost]
    sources = dict(sorted(found.items())[: policy.data])
    others = [index for index in rest if index not in sources]
    made = coder.decode(policy, sources, [*others, *lost])
    if any(bytes(strip) != bytes(found[index]) for index, strip in zip(others, made, strict=False)):
        warn(f"object {oid:016x} is inconsistent")
        return
    for index, strip in zip(lost, made[len(others) :], strict=True):
        try:
            admin.write_strip(context.node(homes[index]), oid, index, strip, context.epoch)
        except SheepError as error:
            warn(f"failed to repair {oid:016x}, copy index {index}: {text(error.result)}")
        else:
            print(f"fixed missing {oid:016x}, copy index {index}", flush=True)


def _read(context: Context, home: NodeId, oid: ObjectId, index: int, length: int) -> Buffer | None:
    try:
        return admin.read_strip(context.node(home), oid, index, length, context.epoch)
    except Unreachable:
        return None
    except SheepError as error:
        if error.result in (Result.OLD_NODE_VER, Result.NEW_NODE_VER):
            raise Failure("The node list has changed: please try again") from error
        raise Failure(f"failed to read {oid:016x} from {home}: {text(error.result)}") from error
