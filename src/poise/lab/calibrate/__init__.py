"""Measured constants of a machine: link rates, start-up times and an expert's curve, fitted and written as a cluster.

:mod:`~poise.lab.calibrate.patterns` says which exchanges are measured, :mod:`~poise.lab.calibrate.links` and
:mod:`~poise.lab.calibrate.compute` measure on the ranks, :mod:`~poise.lab.calibrate.ranks` runs all of it,
:mod:`~poise.lab.calibrate.fit` fits and :mod:`~poise.lab.calibrate.result` writes. docs/calibrate.md: how to run it.
"""
