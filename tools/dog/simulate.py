"""`dog simulate`: what the failure of nodes or zones would mean, computed with the shipped core. Changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sheepdog.cluster.client import admin
from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.ids import Member, NodeId
from sheepdog.cluster.core.limits import DEFAULT_VNODES, MAX_NODES
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.tools.dog.context import Context
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import human_size, parse_size
from sheepdog.tools.dog.progress import Progress
from sheepdog.tools.dog.values import parse_redundancy

if TYPE_CHECKING:  # a simulator is a lot to load for the other commands
    from sheepdog.cluster.sim.forecast import Plan, Rehearsal, Topology

DEFAULT_RATE = "200M"  # a SATA disk, or a link of 2 Gbit/s
DEFAULT_USED = "1T"
_TIB = 1 << 40


def simulate(context: Context) -> int:
    """Status 0: everything stays readable; 1: something does not, or a promise was broken in a rehearsal."""
    from sheepdog.cluster.sim.forecast import plan

    topology = _topology(context)
    failed = _failed(context, topology)
    rate = parse_size(context.value("rate", DEFAULT_RATE))
    seeds = _number(context, "seeds", 0)
    if rate <= 0:
        raise UsageFailure("--rate must be more than 0")
    found = plan(topology, failed, rate)
    rehearsal = _rehearse(topology, failed, seeds) if seeds else None
    if context.json:
        from sheepdog.tools.dog.records import print_json

        print_json(
            {"nodes": len(topology.members), "copies": topology.wide, "used": topology.used_bytes, "rate": rate}
            | {"plan": asdict(found), "rehearsal": None if rehearsal is None else asdict(rehearsal)}
        )
    else:
        _print_plan(topology, found, rate)
        if rehearsal is not None:
            _print_rehearsal(rehearsal)
    return int(found.unreadable > 0 or bool(rehearsal and rehearsal.violations))


# -- what there is ---------------------------------------------------------------------------------------------------


def _topology(context: Context) -> Topology:
    sources = [name for name in ("from-cluster", "topology", "nodes") if context.flag(name)]
    if len(sources) != 1:
        raise UsageFailure("one of --from-cluster, --topology and --nodes is needed")
    topology = {"from-cluster": _of_cluster, "topology": _of_file, "nodes": _of_numbers}[sources[0]](context)
    if context.flag("copies"):
        topology.copies, topology.policy = parse_redundancy(context.value("copies"))
    return topology


def _of_cluster(context: Context) -> Topology:
    """Nodes that do not answer count with what the others hold on average."""
    from sheepdog.cluster.sim.forecast import Topology

    info, _ = admin.cluster_info(context.gateway())
    topology = Topology(
        context.nodes(), info.copies, info.copy_policy, automatic=bool(info.cluster_flags & ClusterFlag.AUTO_VNODES)
    )
    used = []
    for node in topology.members:
        if node.vnodes:
            disk = admin.disk_usage(context.node(node.id))
            used.append(disk.size - disk.free)
    topology.used_bytes = sum(used)
    return topology


def _of_file(context: Context) -> Topology:
    from sheepdog.cluster.sim.forecast import Topology

    path = context.value("topology")
    try:
        values = json.loads(Path(path).read_text())
        members = [
            _member(
                number, int(node.get("zone", number)), int(node.get("vnodes", DEFAULT_VNODES)), node.get("size", "1T")
            )
            for number, node in enumerate(values["nodes"])
        ]
        copies, policy = parse_redundancy(str(values.get("copies", 3)))
        used = parse_size(str(values.get("used", DEFAULT_USED)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{path}: not a topology: {error!r}", USAGE_ERROR) from error
    return Topology(members, copies, policy, used)


def _of_numbers(context: Context) -> Topology:
    from sheepdog.cluster.sim.forecast import Topology

    nodes = _number(context, "nodes", 0)
    zones = _number(context, "zones", nodes)
    if not 0 < nodes <= MAX_NODES or not 0 < zones <= nodes:
        raise UsageFailure(f"1 to {MAX_NODES} nodes, in at most as many zones")
    members = [_member(number, number % zones, DEFAULT_VNODES, "1T") for number in range(nodes)]
    return Topology(members, used_bytes=parse_size(context.value("used", DEFAULT_USED)))


def _member(number: int, zone: int, vnodes: int, size: str) -> Member:
    address = bytes(12) + bytes([10, 0, number >> 8, number & 255])
    return Member(NodeId(address, 7000), zone, vnodes, parse_size(str(size)) or _TIB)


def _number(context: Context, name: str, default: int) -> int:
    word = context.value(name)
    if not word:
        return default
    if not (word.isascii() and word.isdigit()):
        raise UsageFailure(f"--{name} takes a number")
    return int(word)


def _failed(context: Context, topology: Topology) -> list[int]:
    """Indexes of the members that fail, ascending."""
    members = topology.members
    gone: dict[int, None] = {}
    for word in (context.value("fail")).split(","):
        kind, _, value = word.partition(":")
        if kind not in ("node", "zone") or not (value.isascii() and value.isdigit()):
            raise UsageFailure("--fail takes node:ID or zone:ZONE, several with commas")
        found = [
            index for index, member in enumerate(members) if (index if kind == "node" else member.zone) == int(value)
        ]
        if not found:
            raise Failure(f"there is no {kind} {value}", USAGE_ERROR)
        gone.update(dict.fromkeys(found))
    if len(gone) == len(members):
        raise Failure("nothing would be left", USAGE_ERROR)
    return sorted(gone)


# -- what comes of it ------------------------------------------------------------------------------------------------


def _rehearse(topology: Topology, failed: list[int], seeds: int) -> Rehearsal:
    from sheepdog.cluster.sim.forecast import MAX_REHEARSED, Rehearsal, rehearse_one

    storing = [index for index, member in enumerate(topology.members) if member.vnodes]
    failed = [index for index in failed if index in storing]
    if len(storing) > MAX_REHEARSED:
        raise Failure(
            f"only clusters of up to {MAX_REHEARSED} storing nodes are rehearsed; leave out --seeds", USAGE_ERROR
        )
    found = Rehearsal()
    with Progress("rehearsing", seeds) as bar:
        for seed in range(seeds):
            rehearse_one(topology, failed, seed, found)
            bar.advance(1)
    return found


def _print_plan(topology: Topology, found: Plan, rate: int) -> None:
    from sheepdog.cluster.sim.forecast import SAMPLE_OBJECTS

    names = ", ".join(str(index) for index in found.failed)
    code = policy_of(topology.policy) if topology.policy else None
    kept = f"{code.data}:{code.parity}" if code is not None else f"{topology.copies} copies"
    print(f"{len(topology.members)} nodes, {kept}, {human_size(topology.used_bytes)} in all; without node {names}:")
    print(f"  moves      {human_size(found.moved_bytes)}, to {len(found.receives)} nodes")
    for index in sorted(found.receives):
        more, held = human_size(found.receives[index]), human_size(found.holds[index])
        print(f"             node {index}: {more} more, then {held}")
    print(f"  takes      {_duration(found.seconds)} at least, if nothing else needs the disks and links")
    risks = [
        (found.unreadable, "cannot be read until a failed node is back"),
        (found.one_more, "cannot be read after one more failure, before that"),
        (found.narrow, "have fewer copies than wanted, also afterwards: too few zones are left"),
    ]
    for share, text in risks:
        if share:
            print(f"  at risk    {100 * share:.1f} % of the objects {text}")
    if not any(share for share, _ in risks):
        print("  at risk    nothing: every object stays readable, and after one more failure, too")
    print(
        f"Assumed: every node copies {human_size(rate)} in a second, the busiest one decides; objects are of one size."
    )
    print(f"Computed from the places of {SAMPLE_OBJECTS} random objects.")


def _print_rehearsal(found: Rehearsal) -> None:
    pauses = sorted(found.pauses_ns)
    middle, longest = pauses[len(pauses) // 2] / 1e9, pauses[-1] / 1e9
    print(f"Rehearsed {found.seeds} times with clients that write, {found.operations} requests:")
    print(f"  broken promises {len(found.violations)}, requests that ended with an error {found.errors}")
    print(f"  longest wait of a client: {middle:.2f} s in the middle run, {longest:.2f} s in the worst")
    print(
        "  (simulated time: deaths noticed within 0.12 s, links of 0.4 ms, few objects; a real engine may take seconds)"
    )
    for text in found.violations:
        print(f"  {text}")


def _duration(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
