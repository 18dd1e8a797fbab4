"""Do the strips of an object fit each other? What no hash tells: each may be well by itself, and yet not what it should
be (a disk that lost a write, a fault of ours).

The scrub of the object's home asks, one range after another. All strips of a range are read between two writes. Those
that do not fit are made anew from the others, which is what a strip goes through that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.erasure import Coder, Policy
from sheepdog.cluster.core.home import Home
from sheepdog.cluster.core.ids import ObjectId, oid_name
from sheepdog.cluster.core.limits import STRIP_CHECK_BYTES
from sheepdog.cluster.core.messages import Buffer
from sheepdog.cluster.core.strip_home import NOBODY
from sheepdog.cluster.core.striping import UNIT


class Checked(NamedTuple):
    """What a look at one range found."""

    length: int  # of each strip; 0: there is nothing to compare here, or not now
    strips: int  # how many were read
    wrong: tuple[int, ...] = ()  # strips that do not fit, and are being made anew


NOT_CHECKED = Checked(0, 0)


class StripCheck:
    """Of one node; `home` gives its home machine of the present epoch."""

    def __init__(self, context: Context, home: Callable[[], Home | None]) -> None:
        self._context = context
        self._home = home

    def check(self, oid: ObjectId, offset: int, size: int, done: Callable[[Checked], None]) -> None:
        """Compares the strips of `oid` from `offset` on, a share of their `size`; not answered if the epoch ends."""
        home, policy = self._home(), self._context.policy_of(oid)
        if (
            home is None
            or policy is None
            or not home.active
            or self._context.placement.home(oid) != home.me
            or home.recovery.knows(oid)
            or not home.has_been(oid)
            or NOBODY in home.strips.layout(oid, policy)
        ):
            done(NOT_CHECKED)
            return
        length = min(max(UNIT, STRIP_CHECK_BYTES // policy.strips // UNIT * UNIT), size - offset)

        def read(have: dict[int, Buffer]) -> None:
            if len(have) < policy.strips or home.recovery.knows(oid):
                done(NOT_CHECKED)  # one cannot be read, and is being looked after
                return
            wrong = misfits(self._context.coder, policy, have)
            if wrong:
                self._make_anew(home, oid, policy, wrong)
            done(Checked(length, policy.strips, wrong))

        home.strips.read_all(oid, policy, offset, length, read)

    def _make_anew(self, home: Home, oid: ObjectId, policy: Policy, wrong: tuple[int, ...]) -> None:
        context = self._context
        context.probe("strips.misfit")
        layout = home.strips.layout(oid, policy)
        for strip in wrong:
            node = context.placement.nodes[layout[strip]]
            context.log(3, f"strip {strip} of {oid_name(oid)} on {node} does not fit the others: it is made anew")
        for strip in wrong:
            home.recovery.suspect(oid, layout[strip])


def misfits(coder: Coder, policy: Policy, have: Mapping[int, Buffer]) -> tuple[int, ...]:
    """The strips that are wrong, of one range of all strips.

    Where some parity fits the data it is the other parity. Where none does and there is more than one, a single data
    strip may be the one that all are at odds with; if none is, what clients read (the data) is kept and the parity
    made anew.
    """
    data = range(policy.data)
    units = [have[strip] for strip in data]
    wrong = _unlike(policy, have, coder.encode(policy, units))
    if len(wrong) < policy.parity or policy.parity == 1:
        return wrong
    for suspect in data:
        others = {strip: have[strip] for strip in (*data, policy.data) if strip != suspect}
        units[suspect] = coder.decode(policy, others, [suspect])[0]
        if not _unlike(policy, have, coder.encode(policy, units)):
            return (suspect,)
        units[suspect] = have[suspect]
    return wrong


def _unlike(policy: Policy, have: Mapping[int, Buffer], parity: list[Buffer]) -> tuple[int, ...]:
    """The parity strips that are not as they should be."""
    return tuple(strip for strip, right in enumerate(parity, policy.data) if bytes(have[strip]) != bytes(right))
