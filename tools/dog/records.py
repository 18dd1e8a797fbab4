"""JSON forms of what commands list. Keys are stable; sizes are bytes, times Unix seconds."""

from __future__ import annotations

import json
from typing import Any

from sheepdog.cluster.core.ids import Member


def print_json(value: Any) -> None:
    """The whole result of a command, as one JSON value."""
    print(json.dumps(value, indent=2))


def node_record(number: int, node: Member) -> dict[str, Any]:
    return {"id": number, "node": str(node.id), "vnodes": node.vnodes, "zone": node.zone, "space": node.space}
