"""What a controller decides and sees: plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poise.control.drift import DriftVerdict
from poise.control.moves import MoveList
from poise.control.restart import Restart
from poise.planning.placement import Placement

ControllerState = Literal["idle", "planning", "moving"]
Reason = Literal["first", "drift", "settled", "continued", "hurt"]


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What came of a plan.

    Parameters
    ----------
    step : steps that were observed when planning began.
    reason : ``first`` plan, ``drift``, ``settled`` (on the reference after a drift), ``continued`` (a further part),
        ``hurt`` (back to what ran before: the engine measured that it was faster).
    accepted : the gain over the horizon exceeds the cost.
    seconds_before, seconds_after : modelled seconds of a step's MoE layers on the judged steps; with ``hurt`` measured
        ones of a step.
    cost_seconds : that steps wait for the moves (with ``hurt`` for all that is left of the way back, of which they may
        be a part); 0 with ``at_start``.
    moves : what to do; ``moves.result`` is the placement they lead to.
    target : the plan as far as it pays, of which ``moves`` may be a part.
    restart : from what the engine runs to ``moves.result``, on the judged steps; None: accepted ones serve at once, or
        this one was not accepted.
    left_out : experts that the plan would have fetched too, and that would not have paid.
    """

    step: int
    reason: Reason
    accepted: bool
    seconds_before: float
    seconds_after: float
    cost_seconds: float
    moves: MoveList
    target: Placement
    restart: Restart | None = None
    left_out: int = 0

    @property
    def left(self) -> int:
        """Experts still to be fetched towards the plan after these moves."""
        return self.moves.result.diff(self.target).fetched

    @property
    def gain_seconds(self) -> float:
        """Modelled seconds saved in a step."""
        return self.seconds_before - self.seconds_after

    @property
    def predicted_gain(self) -> float:
        """The same as a share of the seconds before."""
        return self.gain_seconds / self.seconds_before if self.seconds_before > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What was seen after ``step`` steps: imbalance of what runs (max / mean tokens over the window), the drift test,
    and what a restart would change, where another placement than the newest runs.
    """

    step: int
    imbalance: float
    verdict: DriftVerdict | None
    state: ControllerState
    learning: bool
    restart: Restart | None = None

    @property
    def imbalance_after_restart(self) -> float:
        """The same of the newest placement, which may be the one that runs."""
        return self.imbalance if self.restart is None else self.restart.imbalance_after
