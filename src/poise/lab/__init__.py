"""Measuring: several nodes emulated on one machine, and the constants of a cluster."""
