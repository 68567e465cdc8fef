"""Replay of traffic on placements, comparison, report."""
