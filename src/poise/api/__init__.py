"""plan, compare and verdict in one call: what the command line does, from Python."""

from poise.api.compared import DEFAULT_ROWS, compare, planning_verdict
from poise.api.homes_chosen import homes
from poise.api.judged import DECODE_A_RANK, PREFILL_A_RANK, verdict
from poise.api.planned import plan
from poise.planning.problem import deal_slots
from poise.routing.sources import load

__all__ = [
    "DECODE_A_RANK",
    "DEFAULT_ROWS",
    "PREFILL_A_RANK",
    "compare",
    "deal_slots",
    "homes",
    "load",
    "plan",
    "planning_verdict",
    "verdict",
]
