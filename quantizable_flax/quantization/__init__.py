"""Grids, ranges, the tap, and layers that pass through it."""
