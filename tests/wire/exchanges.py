"""Reads exchanges.txt: what unmodified clients and the original server said to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sheepdog.cluster.wire import header
from sheepdog.cluster.wire.layout import Layout

LAYOUTS: dict[str, Layout[Any]] = {
    "Request": header.REQUEST,
    "ObjectRequest": header.OBJECT_REQUEST,
    "VdiRequest": header.VDI_REQUEST,
    "ClusterRequest": header.CLUSTER_REQUEST,
    "Response": header.RESPONSE,
    "VdiResponse": header.VDI_RESPONSE,
    "ClusterDefaultResponse": header.CLUSTER_DEFAULT_RESPONSE,
    "NodeResponse": header.NODE_RESPONSE,
    "HashResponse": header.HASH_RESPONSE,
}


@dataclass
class Recorded:
    """One message: `fields` is the line that explains the header, `known` the recorded runs of the payload."""

    conversation: str
    is_request: bool
    header: bytes
    fields: str = ""
    payload_length: int = 0
    known: dict[int, bytes] = field(default_factory=dict)

    @property
    def layout(self) -> Layout[Any]:
        return LAYOUTS[self.fields.split()[0]]

    @property
    def payload(self) -> bytes:
        """The payload; what was not recorded is zero."""
        data = bytearray(self.payload_length)
        for offset, run in self.known.items():
            data[offset : offset + len(run)] = run
        return bytes(data)


def load() -> list[Recorded]:
    messages: list[Recorded] = []
    conversation = ""
    for line in Path(__file__).with_name("exchanges.txt").read_text().splitlines():
        words = line.split()
        if not words or words[0] == "#":
            continue
        if words[0] == "==":
            conversation = words[1]
        elif words[0] in "<>":
            messages.append(Recorded(conversation, words[0] == ">", bytes.fromhex("".join(words[1:]))))
        elif words[0] == "payload":
            messages[-1].payload_length = int(words[1])
            runs = [run.split(":") for run in words[2:]]
            messages[-1].known = {int(offset, 16): bytes.fromhex(data) for offset, data in runs}
        else:
            messages[-1].fields = line.strip()
    return messages


MESSAGES = load()
REQUESTS = [message for message in MESSAGES if message.is_request]
RESPONSES = [message for message in MESSAGES if not message.is_request]


def of(conversation: str) -> list[Recorded]:
    return [message for message in MESSAGES if message.conversation == conversation]
