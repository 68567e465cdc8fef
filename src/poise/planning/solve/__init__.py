"""Solvers, bounds, and the one door to every method."""
