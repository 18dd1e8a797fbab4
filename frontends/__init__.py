"""Doors: how clients reach a volume."""
