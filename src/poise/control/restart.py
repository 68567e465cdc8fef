"""What an engine runs against what it would run after a restart, and whether the restart pays. Pure.

An engine that takes a map only when it starts runs the old one until then, however good the new one is. A restart costs
the seconds in which nothing is served; it pays if the steps of the horizon save more than these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise.cost.step import BatchCost
from poise.routing.batch import RoutingBatch
from poise.util.words import percent


@dataclass(frozen=True, slots=True)
class Restart:
    """Two placements on the same steps.

    Parameters
    ----------
    imbalance_running, imbalance_after : max / mean tokens over devices, of what runs and of the newest placement.
    seconds_running, seconds_after : modelled seconds of a step's MoE layers.
    horizon_steps : steps that the newest placement is expected to serve.
    restart_seconds : without serving, that a restart costs; None: not known.
    measured : the seconds are of a whole step, as the engine's own metrics say, not modelled.
    """

    imbalance_running: float
    imbalance_after: float
    seconds_running: float
    seconds_after: float
    horizon_steps: float
    restart_seconds: float | None = None
    measured: bool = False

    @classmethod
    def of(
        cls,
        running: BatchCost,
        after: BatchCost,
        batch: RoutingBatch,
        horizon_steps: float,
        restart_seconds: float | None,
    ) -> Restart:
        """Of the costs of both placements on a batch."""
        now, then = (float(batch.weight_B @ cost.seconds_BL.sum(axis=1)) for cost in (running, after))
        return cls(imbalance_of(running), imbalance_of(after), now, then, horizon_steps, restart_seconds)

    @property
    def gain_seconds(self) -> float:
        """Modelled seconds saved in a step."""
        return self.seconds_running - self.seconds_after

    @property
    def gain(self) -> float:
        """The same as a share of the seconds before."""
        return self.gain_seconds / self.seconds_running if self.seconds_running > 0 else 0.0

    @property
    def steps_to_win_back(self) -> float | None:
        """Steps whose savings make up for the restart; None: its price is not known, or nothing is saved."""
        if self.restart_seconds is None or self.gain_seconds <= 0:
            return None
        return self.restart_seconds / self.gain_seconds

    @property
    def pays(self) -> bool | None:
        """Whether the horizon saves more than the restart costs; None: the price is not known."""
        if self.gain_seconds <= 0:
            return False
        steps = self.steps_to_win_back
        return None if steps is None else steps < self.horizon_steps

    def sentence(self) -> str:
        """The verdict in words."""
        head = f"imbalance {self.imbalance_running:.3f} running, {self.imbalance_after:.3f} after a restart"
        if self.gain_seconds <= 0:
            return f"{head}, which saves nothing of a step: not worth a restart"
        of = "step as measured" if self.measured else "step's MoE layers"
        head += f", which saves {percent(self.gain)} of a {of}, {1e3 * self.gain_seconds:,.2f} ms"
        steps = self.steps_to_win_back
        if steps is None:
            return f"{head}; price of a restart not known: give --restart-seconds"
        price = f"{self.restart_seconds:g} s without serving are won back in {steps:,.0f} steps"
        worth = "worth" if self.pays else "not worth"
        return f"{head}; {price}, the horizon is {self.horizon_steps:,.0f}: {worth} a restart"


def imbalance_of(cost: BatchCost) -> float:
    """Max / mean tokens over devices, mean over steps and layers with tokens; 1 without any."""
    imbalance_BL = cost.imbalance_BL()
    busy = imbalance_BL[np.isfinite(imbalance_BL)]
    return float(busy.mean()) if busy.size else 1.0
