"""Watching traffic, detecting drift, re-planning, and the moves that lead from one placement to the next."""
