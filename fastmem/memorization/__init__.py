"""Estimates with intervals from arrays of bits: memorized bits, capacity, the scaling law."""
