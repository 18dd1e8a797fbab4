"""The same core in a seeded world, with faults and a checker."""
