"""The rare paths of core: which there are, and which a number of runs never took.

Core counts them with `Context.probe`. A path that no seed takes is a path that nobody has tested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files

_PROBE = re.compile(r'\bprobe\(\s*"([a-z_]+\.[a-z_]+)"')


def known_probes() -> list[str]:
    """The names of all probes in core's source."""
    found: dict[str, None] = {}
    for module in files("sheepdog.cluster.core").iterdir():
        if module.name.endswith(".py"):
            found.update(dict.fromkeys(_PROBE.findall(module.read_text())))
    return sorted(found)


def never_reached(counts: Mapping[str, int]) -> list[str]:
    """The probes that `counts` lacks."""
    return [name for name in known_probes() if not counts.get(name)]
