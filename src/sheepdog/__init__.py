"""Sheepdog: a distributed block store, made anew in Python."""
