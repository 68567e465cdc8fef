"""Several nodes on one machine: N nodes of D devices as real processes with limited links and a device clock.

:mod:`~poise.emulate.spec` says what, :mod:`~poise.emulate.launch` runs a script on it, :mod:`~poise.emulate.clock`
makes computing take as long as a curve says, :mod:`~poise.emulate.selftest` measures whether the machine keeps it
all. docs/emulation.md: what such a run shows and what it does not.
"""

from poise.emulate.clock import DeviceClock, ExpertCurve
from poise.emulate.launch import EmulatedRun, RankError, RankResult, run
from poise.emulate.spec import EmulatedCluster

__all__ = ["DeviceClock", "EmulatedCluster", "EmulatedRun", "ExpertCurve", "RankError", "RankResult", "run"]
