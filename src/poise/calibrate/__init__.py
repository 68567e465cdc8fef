"""Measured constants of a machine: link rates, start-up times and an expert's curve, fitted and written as a cluster.

:mod:`~poise.calibrate.patterns` says which exchanges are measured, :mod:`~poise.calibrate.links` and
:mod:`~poise.calibrate.compute` measure on the ranks, :mod:`~poise.calibrate.ranks` runs all of it,
:mod:`~poise.calibrate.fit` fits and :mod:`~poise.calibrate.result` writes. docs/calibrate.md: how to run it.
"""
