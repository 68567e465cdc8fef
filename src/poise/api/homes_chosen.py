"""Which rank serves which request, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from poise.api.asked import problem_of
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget, Limit
from poise.planning.homes import BAND, POLICIES
from poise.planning.problem import PlacementProblem, Progress
from poise.replay.homes import HomeStudy, study_homes
from poise.replay.rows import silent_defaults
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.sources import TrafficSource, load
from poise.routing.trace import RoutingTrace
from poise.util.errors import OptionError
from poise.util.words import close_to


def homes(
    trace: TrafficSource | Sequence[TrafficSource],
    cluster: str | Path | Cluster,
    *,
    redundant: int = 0,
    slots: Sequence[int] | None = None,
    model: str | ModelSpec | None = None,
    traffic: DataFlow | None = None,
    split: Split | None = None,
    engine: str = "any",
    tokens_per_step: int | None = None,
    policy: str | None = None,
    band: float = BAND,
    time_limit_s: Limit = 60.0,
    work: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> HomeStudy:
    """Whether it pays to choose which rank serves which request, planned on half of the requests, judged on the others.

    Parameters
    ----------
    policy : one of :data:`poise.planning.homes.POLICIES`; default: the better one on the fitted requests.
    band : a rank takes requests while it has less than so much more than the mean tokens of all.
    time_limit_s, work : seconds or units of work for all placements together.

    Other parameters as in :func:`plan`.

    Raises
    ------
    InputError : the input is wrong, or has no requests. NoResultError : no placement was found.
    """
    found = load(trace)
    if not isinstance(found, RoutingTrace):
        raise OptionError(
            f"homes are chosen for requests, and {found.name} has loads only", hint="give a routing trace"
        )
    if policy is not None and policy not in POLICIES:
        raise OptionError(f"unknown policy {policy!r}", hint=close_to(policy, POLICIES))
    if not 0 <= band < np.inf:
        raise OptionError(f"the band must be at least 0 and finite, got {band}")
    model = ModelSpec.parse(model) if isinstance(model, str) else model

    def batched(part: RoutingTrace) -> RoutingBatch:
        return make_batch(part, tokens_per_step=tokens_per_step, seed=seed)

    def made(batch: RoutingBatch) -> PlacementProblem:
        return problem_of(batch, cluster, redundant, slots, model, traffic, split, engine)

    fit, held_out = found.split_requests()
    budget = Budget.of(time_limit_s, work)
    out = study_homes(fit, held_out, batched, made, budget, policy=policy, band=band, seed=seed, progress=progress)
    return replace(out, defaults=silent_defaults(found, model, tokens_per_step, batched(held_out)))
