"""What must be true of the strips of a healthy cluster: one of each on every replica, and parity that fits the data."""

from __future__ import annotations

from sheepdog.cluster.core.erasure import PlainCoder
from sheepdog.cluster.core.ids import NO_VERSION, STRIP_SHIFT, ObjectId, oid_name, plain_oid, strip_index
from sheepdog.cluster.sim.cluster import SimCluster
from sheepdog.cluster.sim.copy import Copy
from sheepdog.cluster.sim.history import Violation


def strips_fit(cluster: SimCluster) -> None:
    """Violation for strips that are missing, twice, of different versions, or that do not encode to the parity."""
    context = cluster.machines[0].node.context
    placement = context.placement
    found: dict[ObjectId, dict[int, Copy]] = {}
    holders: dict[ObjectId, list[int]] = {}
    for machine in cluster.machines:
        for oid, copy in machine.disk.copies().items():
            if not oid >> STRIP_SHIFT:
                continue
            whole = plain_oid(oid)
            strips = found.setdefault(whole, {})
            if strip_index(oid) in strips:
                raise Violation(f"strip {oid_name(oid)} is on two nodes, one of them {machine.name}")
            strips[strip_index(oid)] = copy
            holders.setdefault(whole, []).append(placement.index_of[machine.id])
    for oid, strips in sorted(found.items()):
        policy = context.policy_of(oid)
        if policy is None:
            raise Violation(f"object {oid:016x} has strips, but is not coded")
        replicas = placement.replicas(oid)
        if sorted(holders[oid]) != sorted(replicas):
            raise Violation(f"object {oid:016x} has strips on members {holders[oid]}, belongs on {list(replicas)}")
        versions = {strip: tuple(copy.version) for strip, copy in sorted(strips.items())}
        if len(set(versions.values())) != 1 or tuple(NO_VERSION) in versions.values():
            raise Violation(f"object {oid:016x}: versions of its strips {versions}")
        if any(copy.rotten for copy in strips.values()):
            raise Violation(f"object {oid:016x} has rotten strips")
        blocks = {number for copy in strips.values() for number in copy.blocks}
        data = {strip: strips[strip] for strip in sorted(strips)[: policy.data]}
        others = [strip for strip in sorted(strips) if strip not in data]
        for number in sorted(blocks):
            units = {strip: copy.blocks.get(number, bytes(4096)) for strip, copy in data.items()}
            for strip, made in zip(others, PlainCoder().decode(policy, units, others), strict=True):
                if bytes(made) != strips[strip].blocks.get(number, bytes(4096)):
                    raise Violation(
                        f"object {oid:016x}: block {number} of strip {strip} does not fit strips {list(data)}"
                    )
