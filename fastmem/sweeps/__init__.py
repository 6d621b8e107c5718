"""Grids of runs in a folder: scheduling, workers, rows."""
