"""What NEW_VDI asks for (protocol.md 8.3), and when it is refused. The executor does it."""

from __future__ import annotations

from typing import Any

from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.limits import MAX_SHIFT, MIN_SHIFT
from sheepdog.cluster.core.moves import MOVED_TAG
from sheepdog.cluster.core.vdi import VdiRecord, VdiTable

Values = dict[str, Any]


def as_it_is(operation: Values, working: VdiRecord) -> Values:
    """A snapshot of whichever VDI works under the name by now. What goes on has its size (which the executor takes from
    the inode) and, unless other copies are asked for, its redundancy."""
    like = {} if operation["copies"] else {"copies": working.copies, "policy": working.policy}
    return {**operation, **like, "base": working.vid}


def refusal_of(operation: Values, vdis: VdiTable, working: VdiRecord | None, base: VdiRecord | None) -> Result:
    """Why NEW_VDI cannot be done; SUCCESS if it can."""
    if not operation["name"]:
        return Result.INVALID_PARMS
    if operation["shift"] and not MIN_SHIFT <= operation["shift"] <= MAX_SHIFT:
        return Result.INVALID_PARMS
    if operation["policy"] and policy_of(operation["policy"]) is None:
        return Result.INVALID_PARMS
    if base is not None and base.store_policy:
        return Result.INVALID_PARMS  # nobody could tell whose the objects of a shared tree are
    if operation["snapshot"]:
        if working is None:
            return Result.NO_VDI
        if base is None:
            return Result.BASE_VDI_READ
        if _is_taken(operation.get("tag", "").encode("latin-1"), vdis, working):
            return Result.VDI_EXIST
    elif working is not None:
        return Result.VDI_EXIST
    elif operation["base"] and (base is None or base.deleted):
        return Result.BASE_VDI_READ
    return Result.SUCCESS


def _is_taken(tag: bytes, vdis: VdiTable, working: VdiRecord) -> bool:
    """A snapshot has the tag already. Those that a change of redundancy has left behind do not count."""
    return tag not in (b"", MOVED_TAG) and isinstance(vdis.lookup(working.name, tag, 0), VdiRecord)
