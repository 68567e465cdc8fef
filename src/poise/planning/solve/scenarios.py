"""Steps that the fitted traffic might as well have had: what keeps a plan from fitting the requests it happens to know.

A batch of large steps has few of them, and all share the requests that were recorded; a plan that is best for these
steps gains from chance (which requests meet, where they are at home) what other requests will not give it. So the
search looks at steps that are drawn anew. A block is what one request has in one step. Each drawn step gives every
request a weight of its own, exponential with mean 1 (the Bayesian bootstrap, Rubin 1981), takes blocks with
replacement by these weights until it has as many tokens as the steps have in the mean, and deals homes anew. Where
requests are of several domains, each domain has a weight of its own in every step beside, drawn likewise: that a
recording has as much of each does not say that steps will, and a map for the mean of all is right for none of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from poise.routing.batch import RoutingBatch, count_loads

DRAWN, MOST_DRAWN = 16, 64
"""Steps that are drawn for a search: as many as were given, but at least and at most so many."""
JUDGED = 8
"""Others, by which its answer is chosen."""
LEAST_REQUESTS = 16
"""Requests that must be known: fewer say nothing of others."""
UNSEEN = 1.0
"""Tokens that every expert is taken to have beside all that are known (Laplace's rule of succession), drawn for each
step anew. An expert that some requests left idle is read for others now and then: who is told that it never is puts
several such on one device, who is told that it always is sees no use in a replica that is seldom read."""


def can_be_drawn(batch: RoutingBatch) -> bool:
    """Whether tokens and enough requests are known, and homes are not recorded."""
    if batch.experts_TLK is None or batch.request_T is None or batch.start_B is None or batch.home_T is not None:
        return False
    return np.unique(batch.request_T).size >= LEAST_REQUESTS


def drawn_steps(batch: RoutingBatch, steps: int, seed: int) -> RoutingBatch:
    """So many steps drawn from a batch of which :func:`can_be_drawn` holds; equal weights.

    Their loads have draws of :data:`UNSEEN` tokens of every expert mixed in, and sum to those of their tokens.
    """
    assert batch.experts_TLK is not None and batch.request_T is not None and batch.start_B is not None
    rng = np.random.default_rng(seed)
    step_T = batch.step_T()
    order = np.lexsort((batch.request_T, step_T))  # stable: the tokens of a block stay in order
    key = step_T[order].astype(np.int64) * (int(batch.request_T.max()) + 1) + batch.request_T[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    size, request = np.diff(np.append(first, key.size)), batch.request_T[order[first]]
    known, own = np.unique(request, return_inverse=True)
    domains = 1
    if batch.domain_R is not None:
        names, domain = np.unique(batch.domain_R[known], return_inverse=True)
        domains = names.size
    tokens = max(1, round(float(batch.weight_B @ np.diff(batch.start_B))))
    rows: list[NDArray[np.int64]] = []
    for _ in range(steps):
        each = rng.exponential(size=known.size)
        if domains > 1:
            each *= rng.exponential(size=domains)[domain]
        weight = each[own] * batch.weight_B[step_T[order[first]]]
        picks = _until(rng, weight / weight.sum(), size, tokens)
        taken = np.concatenate([order[first[i] : first[i] + size[i]] for i in picks])[:tokens]
        rows.append(taken)
    token, counts = np.concatenate(rows), np.array([taken.size for taken in rows])
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    experts = np.ascontiguousarray(batch.experts_TLK[token])
    load = count_loads(experts, counts, batch.num_experts)
    mass = load.sum(axis=2, keepdims=True)
    load += rng.poisson(UNSEEN * tokens / step_T.size, load.shape) * (mass > 0)
    load *= mass / np.maximum(load.sum(axis=2, keepdims=True), 1e-9)
    return replace(
        batch, load_BLE=load, weight_B=np.full(steps, 1.0 / steps),
        experts_TLK=experts, start_B=start, request_T=batch.request_T[token],
        order=f"{steps} steps drawn from: {batch.order}", drawn_from=None,
    )  # fmt: skip


def _until(
    rng: np.random.Generator, share: NDArray[np.float64], size: NDArray[np.int64], tokens: int
) -> NDArray[np.int64]:
    """Blocks drawn with replacement until they have so many tokens."""
    picks = np.zeros(0, np.int64)
    each = max(1.0, float(share @ size))
    while size[picks].sum() < tokens:
        more = rng.choice(share.size, size=int(tokens / each) + 1, p=share)
        picks = np.concatenate([picks, more])
    enough = int(np.searchsorted(np.cumsum(size[picks]), tokens)) + 1
    return picks[:enough]
