"""`dog vdi setattr|getattr` (cli.md 2.6)."""

from __future__ import annotations

import os
import sys

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.errors import SheepError
from sheepdog.cluster.core.attributes import Attribute
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.limits import ATTRIBUTE_SIZE
from sheepdog.cluster.wire.opcodes import Flags
from sheepdog.tools.dog.context import Context, Unreachable
from sheepdog.tools.dog.options import Failure, UsageFailure
from sheepdog.tools.dog.output import text
from sheepdog.tools.dog.volumes import name_of

EXISTS, MISSING = 3, 5
MAX_KEY, MAX_VALUE = 255, 65535


def set_attribute(context: Context) -> None:
    """Sets, creates (-x) or deletes (-d) an attribute; the value comes from stdin if it is not given."""
    name = name_of(context.argument(0))
    word = context.argument(1, "Please specify the attribute key")
    key = _key(word)
    flags = Flags.ATTR_CREATE
    value = b""
    if context.flag("delete"):
        flags = Flags.ATTR_DELETE
    else:
        if context.flag("exclusive"):
            flags |= Flags.ATTR_EXCLUSIVE
        given = context.optional(2)
        value = sys.stdin.buffer.read(MAX_VALUE + 1) if given is None else os.fsencode(given)
        if len(value) > MAX_VALUE:
            raise Failure(f"The attribute value is too long, it has at most {MAX_VALUE} bytes")
    try:
        admin.attribute_id(context.gateway(), Attribute(name, key=key, value=value).pack(), 0, flags)
    except SheepError as error:
        if error.result == Result.VDI_EXIST:
            raise Failure(f"The attribute '{word}' already exists", EXISTS) from error
        raise _missing(error, word) from error


def get_attribute(context: Context) -> None:
    """The value, with no newline."""
    name = name_of(context.argument(0))
    word = context.argument(1, "Please specify the attribute key")
    payload = Attribute(name, key=_key(word)).pack()
    try:
        connection = context.gateway()
        oid = admin.attribute_id(connection, payload, 0, 0)
        found = Attribute.unpack(admin.read_object(connection, oid, 0, ATTRIBUTE_SIZE))
    except SheepError as error:
        raise _missing(error, word) from error
    except Unreachable as error:
        raise Failure(code=MISSING) from error
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json({"name": os.fsdecode(name), "key": word, "value": os.fsdecode(found.value)})
        return
    sys.stdout.buffer.write(found.value)


def _key(word: str) -> bytes:
    key = os.fsencode(word)
    if not 0 < len(key) <= MAX_KEY:
        raise UsageFailure(f"The attribute key has 1 to {MAX_KEY} bytes")
    return key


def _missing(error: SheepError, key: str) -> Failure:
    if error.result == Result.NO_OBJ:
        return Failure(f"Attribute '{key}' not found", MISSING)
    if error.result in (Result.NO_VDI, Result.NO_TAG):
        return Failure("VDI not found", MISSING)
    return Failure(f"Failed to find attribute '{key}': {text(error.result)}")
