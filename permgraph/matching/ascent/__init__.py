"""Coordinate ascent over the groups: its steps, its restarts, and what it keeps between them."""
