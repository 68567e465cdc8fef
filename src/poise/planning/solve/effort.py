"""What stages of planning cost, in nominal seconds of one core, from sizes alone: the same on every machine.

A budget is shared out by these, so that large traffic is searched on some of its steps and slow starts are left out,
rather than cut by a clock. Rates were measured on one core of a server; a factor of two does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from poise.cost.bound_compute import FINE
from poise.planning.problem import PlacementProblem
from poise.routing.batch import RoutingBatch

ROW, ROW_STATE = 3.5e-6, 4e-8
"""Seconds to find a distinct row of a token and layer, and to book one on one device or pick."""


@dataclass(frozen=True, slots=True)
class ProblemSizes:
    """Numbers of layers, experts, slots, devices, steps, tokens and picks."""

    layers: int
    experts: int
    slots: int
    devices: int
    steps: int
    tokens: int
    top_k: int

    @classmethod
    def of(cls, problem: PlacementProblem) -> ProblemSizes:
        """Of a problem."""
        batch = problem.batch
        tokens = 0 if batch.experts_TLK is None else len(batch.experts_TLK)
        return cls(batch.num_layers, batch.num_experts, int(problem.slots_D.sum()), problem.num_devices,
                   batch.num_steps, tokens, batch.top_k)  # fmt: skip

    @property
    def pairs(self) -> float:
        """Nominal seconds to count which experts of two layers, or of one, tokens choose together."""
        return 1.5e-8 * self.layers * self.tokens * self.top_k**2


def price_seconds(problem: PlacementProblem) -> float:
    """One :func:`poise.cost.step.batch_cost`; under ``near`` with its table of where each device's tokens go."""
    n = ProblemSizes.of(problem)
    steps = n.layers * n.steps * (2.4e-8 * (n.slots + 4 * n.devices) + 1e-4 * (problem.split == "exact"))
    each = 1.7e-8 * n.devices if problem.traffic == "stay" else 5e-8
    table = 8e-9 * n.layers * n.experts * n.devices * (problem.split == "near")
    return steps + n.layers * n.tokens * n.top_k * each + table


def bound_seconds(problem: PlacementProblem) -> float:
    """One :func:`poise.cost.bound.bound_terms`, and the least work of filled slots."""
    n = ProblemSizes.of(problem)
    filled = 0.0
    if problem.split == "even" and not problem.engine.empty_slots and n.slots > n.experts:
        parts = n.steps * n.experts * min(n.devices, n.slots - n.experts + 1)
        filled = 1.5e-8 * n.layers * min(parts, FINE)
    return 2.5e-8 * n.layers * n.steps * n.experts + 4e-7 * n.layers * n.tokens + filled


def state_seconds(problem: PlacementProblem) -> float:
    """The search's data and two of its states."""
    n = ProblemSizes.of(problem)
    loads = 3e-8 * n.layers * n.steps * (n.slots + 6 * n.devices)
    return loads + n.layers * n.tokens * (ROW + 2 * ROW_STATE * (n.top_k + n.devices))


def start_seconds(problem: PlacementProblem, name: str, seconds: float) -> float:
    """A method as a start of ``poise``, with a budget of some seconds of its own."""
    n = ProblemSizes.of(problem)
    offers = n.slots * n.devices  # each slot's expert to every device
    if name in ("poise-stay", "exflow"):
        return 1e-5 * n.layers * n.tokens**0.5 + 0.6 * min(seconds, 0.5 * n.layers)
    by_layer = {
        "flash-lb": max(6e-5 * n.slots, 5.5e-7 * offers),
        "swift-balance": 2e-5 * n.slots,
        "grace-moe": 1.2e-6 * n.experts**2,
        "coactivation": 4e-7 * n.experts**2,
        "moetuner-equal": 8e-7 * n.experts**2,
        "moetuner": 8e-7 * n.experts**2,
        "contiguous": 0.0,
        "round-robin": 0.0,
    }.get(name, min(3e-8 * offers, 2e-6 * n.slots + 3e-9 * offers))
    pairs = n.pairs if n.tokens and name in ("grace-moe", "coactivation", "moetuner-equal", "moetuner") else 0.0
    return n.layers * by_layer + pairs


def some_steps(problem: PlacementProblem, seconds: float, needed: float) -> PlacementProblem:
    """The problem on as many of its steps, spread evenly, as make what needs ``needed`` seconds take ``seconds``."""
    steps = problem.batch.num_steps
    kept = steps if needed <= seconds else max(1, ceil(steps * seconds / needed))
    return problem if kept == steps else replace(problem, batch=_thinned(problem, kept))


def _thinned(problem: PlacementProblem, kept: int) -> RoutingBatch:
    batch = problem.batch
    steps = (np.arange(kept) * batch.num_steps + batch.num_steps // 2) // kept
    weight_B = batch.weight_B[steps]
    if not weight_B.any():
        weight_B = np.ones(kept)
    tokens: dict[str, Any] = {}
    if batch.experts_TLK is not None and batch.start_B is not None:
        rows = np.concatenate([np.arange(*batch.start_B[b : b + 2]) for b in steps])
        tokens = {
            "experts_TLK": batch.experts_TLK[rows],
            "start_B": np.concatenate([[0], np.cumsum(np.diff(batch.start_B)[steps])]).astype(np.int64),
            "request_T": None if batch.request_T is None else batch.request_T[rows],
            "home_T": batch.home_of_tokens(problem.num_devices)[rows],
        }
    return replace(batch, load_BLE=batch.load_BLE[steps], weight_B=weight_B / weight_B.sum(),
                   drawn_from=batch.drawn_from or batch.num_steps, **tokens)  # fmt: skip
