"""FasterMoE's shadow experts (PPoPP 2022, section 5.1; laekov/fastmoe).

After the gate, from exact loads
    Step 1  Latency without shadows: a * compute(Bmax) + 2a * send(Bmax), Bmax the tokens of the fullest device.
    Step 2  Experts by load, heaviest first: one more is sent to every device and its tokens stay at home. Latency =
            step 1's on the tokens left + the time to send the shadows chosen so far.
    Step 3  Stop at the first expert that does not lower it. Shadows are dropped after the step.

Published for training (a = 3 computes, 4 sends a layer), as under a training price; serving has one compute and two
sends, which ``training=True`` turns into the published ones. Chosen: a device needs a free step slot for each shadow it
does not hold, so at most M of them; static replicas of the others split evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.cost.compute import expert_times
from poise.stepwise.methods.hecate import nearest_rows
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy


@dataclass(frozen=True, slots=True)
class FasterMoE(StepPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "faster-moe"
    summary: ClassVar[str] = "FasterMoE: hot experts on all devices after the gate, while that lowers its latency"
    exact: ClassVar[bool] = True
    training: bool = False

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """Steps 1 to 3."""
        cluster, model = view.price.cluster, view.price.model
        computes, sends = (3.0, 4.0) if self.training or view.price.training else (1.0, 2.0)
        times = expert_times(cluster, model)
        per_token = computes * (times.compute_s + times.activation_s)
        per_token += sends * model.dispatch_bytes_per_token / cluster.slowest_bytes_per_s
        node_D = cluster.node_D

        def latency(holders: NDArray[np.bool_], shadows: int) -> tuple[float, NDArray[np.int64]]:
            rows = nearest_rows(load_SE, holders, node_D)
            fullest = float((rows.sum(axis=(0, 1)) / cluster.speed_D).max())
            return per_token * fullest + shadows * view.price.gathered_bytes / cluster.slowest_bytes_per_s, rows

        best, rows = latency(holders_ED, 0)
        held, shadows = holders_ED, 0
        for e in np.argsort(-load_SE.sum(axis=0), kind="stable"):
            wider = held.copy()
            wider[e] = True
            if (wider.sum(axis=0) > view.slots_D).any():
                break
            seconds, with_it = latency(wider, shadows + 1)
            if seconds >= best:
                break
            held, best, rows, shadows = wider, seconds, with_it, shadows + 1
        return StepPlan(held, rows.sum(axis=0), rows)
