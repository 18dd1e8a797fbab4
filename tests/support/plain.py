"""Imported first: the tests' own process takes the plain modules, in which bugs can be planted.

The daemons that tests start run what users run, the compiled hot path where there is one. With SHEEPDOG_COMPILED=1 in
the environment the tests' process does so too.
"""

from __future__ import annotations

import os

_VARIABLE = "SHEEPDOG_COMPILED"

_wanted = os.environ.get(_VARIABLE)
os.environ[_VARIABLE] = "0" if _wanted is None else _wanted
import sheepdog  # noqa: E402  (it looks at the variable)

COMPILED = sheepdog.COMPILED
if _wanted is None:
    del os.environ[_VARIABLE]
