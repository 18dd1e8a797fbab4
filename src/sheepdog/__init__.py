"""Sheepdog: a distributed block store, made anew in Python."""

from sheepdog import compiled as _compiled

COMPILED = _compiled.enable()
"""Whether this process runs the compiled hot path."""
