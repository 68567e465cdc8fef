"""Seconds and bytes: what a routing costs under a placement."""
