"""Constants of expert kernels and all-to-alls from public tables of GPU measurements, and how far they are off.

:mod:`.source` opens a folder or wheel of tables, :mod:`.loads` draws the loads they were timed on, :mod:`.ranks` sums
them up, :mod:`.kernels` reads kernel times, :mod:`.fit` fits a kernel's constants, :mod:`.judge` predicts rows that a
fit never saw, :mod:`.alltoall` does both for exchanges, :mod:`.result` writes ``machines.json`` and cluster files. What
came of it: docs/accuracy.md, by benchmarks/tables.py.
"""
