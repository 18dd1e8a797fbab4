"""Members by node: found among thousands with every message of the order."""

from __future__ import annotations

from sheepdog.cluster.core.ids import Member
from sheepdog.cluster.core.state import node_key


class MemberIndex:
    """Made anew when it is asked about other members than before: they are replaced as a whole when any changes."""

    def __init__(self) -> None:
        self._members: tuple[Member, ...] = ()
        self._by_key: dict[str, Member] = {}

    def find(self, members: tuple[Member, ...], key: str) -> Member | None:
        """The member of a node (`state.node_key`)."""
        if members is not self._members:
            self._members, self._by_key = members, {node_key(member.id): member for member in members}
        return self._by_key.get(key)
