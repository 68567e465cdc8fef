"""Frozen cases, runs of any method or policy on them, and results files that can be compared."""
