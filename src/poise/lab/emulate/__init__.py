"""Several nodes on one machine: N nodes of D devices as real processes with limited links and a device clock.

``spec`` says what, ``launch`` runs a script on it, ``clock`` makes computing take as long as a curve says, ``selftest``
measures whether the machine keeps it all. docs/emulation.md: what such a run shows and what it does not.
"""

from poise.lab.emulate.clock import DeviceClock, ExpertCurve
from poise.lab.emulate.launch import EmulatedRun, RankError, RankResult, run
from poise.lab.emulate.spec import EmulatedCluster

__all__ = ["DeviceClock", "EmulatedCluster", "EmulatedRun", "ExpertCurve", "RankError", "RankResult", "run"]
