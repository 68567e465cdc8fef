"""How a placement does on a window of traffic: balance, load of every device, modelled and least possible seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.bound import bound_terms
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.routing.batch import RoutingBatch


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A placement on a window.

    Parameters
    ----------
    layer_ids_L : int32 [L], decoder layers.
    imbalance : max / mean tokens over devices, mean over steps and layers with tokens.
    imbalance_L : float64 [L], the same layer by layer; NaN where a layer had no tokens.
    relative_LD : float64 [L, D], tokens of the whole window over the layer's mean; 1 where it had none.
    seconds : modelled seconds of a step's MoE layers, mean over steps.
    """

    layer_ids_L: NDArray[np.int32]
    imbalance: float
    imbalance_L: NDArray[np.float64]
    relative_LD: NDArray[np.float64]
    seconds: float


def judge(window: RoutingBatch, placement: Placement, problem: PlacementProblem) -> Judged:
    """A placement on a window, with the problem's machine, model, traffic model and split."""
    cost = problem.pricing.cost(window, placement.count_LED())
    imbalance_BL = cost.imbalance_BL()
    busy_BL = np.isfinite(imbalance_BL)
    filled = np.where(busy_BL, imbalance_BL, 0.0)
    times_L = busy_BL.sum(axis=0)
    imbalance_L = np.where(times_L > 0, filled.sum(axis=0) / np.maximum(times_L, 1), np.nan)
    tokens_LD = cost.tokens_BLD.sum(axis=0)
    mean_L1 = tokens_LD.mean(axis=1, keepdims=True)
    relative_LD = np.where(mean_L1 > 0, tokens_LD / np.where(mean_L1 > 0, mean_L1, 1.0), 1.0)
    overall = float(filled.sum() / busy_BL.sum()) if busy_BL.any() else 1.0
    seconds = float(window.weight_B @ cost.seconds_BL.sum(axis=1))
    return Judged(window.layer_ids_L, overall, imbalance_L, relative_LD, seconds)


def bound_seconds(window: RoutingBatch, problem: PlacementProblem) -> float:
    """Seconds of a step's MoE layers that no placement with the problem's slots, and no split, can beat."""
    p = problem
    bound = bound_terms(window, p.cluster, p.model, traffic=p.traffic, slots_D=p.slots_D, blind=p.split != "near")
    return float(window.weight_B @ bound.seconds_BL.sum(axis=1))
