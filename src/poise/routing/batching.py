"""Requests -> steps: which tokens share a forward pass (DESIGN section 5, "Steps")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.routing.batch import HOMES, Homes, RoutingBatch, count_loads
from poise.routing.files import join
from poise.routing.trace import LoadProfile, RoutingTrace, row_blocks
from poise.util.compiled import compiled
from poise.util.errors import OptionError

Order = Literal["interleaved", "file"]
ORDERS: tuple[Order, ...] = ("interleaved", "file")
MOST_LOADS, MOST_HELD = 1 << 24, 1 << 26
"""Most loads [B, L, E] and picks [T, L, K] of a batch, 128 MiB each: of more steps some are drawn."""
MOST_PICKS = 64
"""Experts that a token has at most."""


@compiled
def _interleave(start_R, draws, first_at, is_decode, live, per_step, steps):  # type: ignore[no-untyped-def]
    """Token of each place, int64 [steps, per_step], -1 = empty; requests come in the order of ``draws``."""
    out = np.full((steps, per_step), -1, np.int64)
    slot_request = np.full(live, -1, np.int64)
    slot_at = np.zeros(live, np.int64)
    drawn = 0
    turn = 0
    for b in range(steps):
        filled = 0
        for s in range(live):
            if slot_request[s] < 0:
                slot_request[s] = draws[drawn % draws.size]
                slot_at[s] = first_at[drawn] if drawn < first_at.size else start_R[slot_request[s]]
                drawn += 1
        for phase in range(2):  # decoding requests give one token each, then prefill chunks fill the step
            for i in range(live):
                s = (turn + i) % live
                r = slot_request[s]
                if r < 0 or filled == per_step:
                    continue
                end = start_R[r + 1]
                if phase == 0 and is_decode[slot_at[s]]:
                    out[b, filled] = slot_at[s]
                    filled += 1
                    slot_at[s] += 1
                elif phase == 1 and not is_decode[slot_at[s]]:
                    while slot_at[s] < end and not is_decode[slot_at[s]] and filled < per_step:
                        out[b, filled] = slot_at[s]
                        filled += 1
                        slot_at[s] += 1
                if slot_at[s] == end:
                    slot_request[s] = -1
        turn = (turn + 1) % live
    return out


def default_tokens_per_step(num_tokens: int) -> int:
    """N when the user names none: sixteen steps' worth of the trace, 64 to 4096 tokens."""
    return int(min(4096, max(min(64, num_tokens), num_tokens // 16)))


def make_batch(
    traces: RoutingTrace | LoadProfile | Sequence[RoutingTrace | LoadProfile],
    *,
    tokens_per_step: int | None = None,
    order: Order = "interleaved",
    live_requests: int | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    steps: int | None = None,
    sample: bool = True,
    homes: Homes | None = None,
) -> RoutingBatch:
    """Batch traffic into steps.

    Of traffic so large that its steps would hold more than :data:`MOST_LOADS` loads or :data:`MOST_HELD` picks, a part
    of the steps is taken, as many as that allows: the batch's ``drawn_from`` and its words say so. What all steps have
    together, as their mean size, is of all.

    Parameters
    ----------
    traces : one or several traces, or load profiles.
    tokens_per_step : N. Default: the recorded ``step`` where there is one, else :func:`default_tokens_per_step`; a
        load profile without N keeps its recorded mass, every step scaled to the mean one.
    order : ``interleaved``: C live requests, drawn with a seed, again and again once exhausted; every step takes one
        token of each decoding request, then prefill chunks. ``file``: N consecutive rows.
    live_requests : C, default N.
    max_steps : most steps. Default: as many as use about every token once.
    steps : so many steps, requests drawn again as often as it takes (interleaved order only).
    homes : which rank each token is at home on (:meth:`RoutingBatch.home_of_tokens`). Default: as the trace has it
        recorded, else ``equal``.
    sample : the part that is taken of large traffic: one of each so many steps, drawn with the seed; else the first
        steps, one after another, as a fast loop needs them.

    Raises
    ------
    OptionError : a number is below 1, the order is unknown, or loads without N are frequencies.
    """
    for name, value in (
        ("tokens_per_step", tokens_per_step),
        ("live_requests", live_requests),
        ("max_steps", max_steps),
        ("steps", steps),
    ):
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    if homes is not None and homes not in HOMES:
        raise OptionError(f"unknown homes {homes!r}", hint=f"one of {', '.join(HOMES)}")
    if order not in ORDERS:
        raise OptionError(f"unknown order {order!r}", hint=f"one of {', '.join(ORDERS)}")
    trace = traces if isinstance(traces, RoutingTrace | LoadProfile) else join(list(traces))
    if isinstance(trace, RoutingTrace) and homes is not None:
        trace = replace(trace, home=None)
    if isinstance(trace, LoadProfile):
        return _profile_batch(trace, tokens_per_step, max_steps, _Sample(seed, sample))
    if tokens_per_step is None and trace.step is not None:
        ids, step_T = np.unique(trace.step, return_inverse=True)
        token = np.argsort(step_T, kind="stable")
        size = np.bincount(step_T)[:max_steps]
        words = f"recorded steps, {min(ids.size, size.size)} steps"
        return _batch(trace, token[: size.sum()], size, words, _Sample(seed, sample), homes)
    per_step = tokens_per_step or default_tokens_per_step(trace.num_tokens)
    many = steps
    steps = max(1, trace.num_tokens // per_step)
    if order == "file":
        steps = -(-trace.num_tokens // per_step)
        steps = min(steps, max_steps or steps)
        token = np.arange(min(trace.num_tokens, steps * per_step))
        size = np.bincount(token // per_step)
        return _batch(trace, token, size, f"file order, N = {per_step}, {steps} steps", _Sample(seed, sample), homes)
    steps = many or min(steps, max_steps or steps)
    live = min(live_requests or per_step, per_step * max(1, steps))
    places = _places(trace, per_step, live, steps, seed)
    size = (places >= 0).sum(axis=1)
    words = f"interleaved requests, N = {per_step}, C = {live}, {steps} steps, seed {seed}"
    return _batch(trace, places[places >= 0], size, words, _Sample(seed, sample), homes)


@dataclass(frozen=True, slots=True)
class _Sample:
    """Which of many steps are taken."""

    seed: int
    apart: bool

    def of(self, steps: int, most: int) -> NDArray[np.int64] | None:
        """Numbers of at most ``most`` of ``steps`` steps, ascending; None: all."""
        most = max(1, most)
        if steps <= most:
            return None
        if not self.apart:
            return np.arange(most)
        bounds = np.arange(most + 1) * steps // most
        return np.random.default_rng(self.seed).integers(bounds[:-1], bounds[1:])

    def words(self, taken: int) -> str:
        """For the order in a table's title: how many steps are taken, and how."""
        return f", of which {taken} {'are drawn, spread evenly' if self.apart else 'are taken, the first'}"


def _places(trace: RoutingTrace, per_step: int, live: int, steps: int, seed: int) -> NDArray[np.int64]:
    by_request = np.argsort(trace.request, kind="stable")
    _, start = np.unique(trace.request[by_request], return_index=True)
    num = start.size
    bounds = np.append(start, trace.num_tokens).astype(np.int64)
    rng = np.random.default_rng(seed)
    rounds = 1 + (live + per_step * steps) // max(1, num)
    # Once all requests were drawn, draws are with replacement.
    draws = np.concatenate([rng.permutation(num), rng.integers(num, size=num * min(rounds, 50))])
    is_decode = np.ascontiguousarray(trace.is_decode[by_request])
    # The first live requests are met in the middle of their answer, as a server in use would meet them: no warm-up.
    first = draws[np.arange(live) % draws.size]
    middle = bounds[first] + rng.integers(bounds[first + 1] - bounds[first])
    first_at = np.where(is_decode[middle], middle, bounds[first])
    got = _interleave(bounds, draws, first_at, is_decode, live, per_step, steps)
    return np.where(got >= 0, by_request[got], -1)


def _batch(
    trace: RoutingTrace, token: NDArray[Any], size_B: NDArray[Any], order: str, sample: _Sample, homes: Homes | None
) -> RoutingBatch:
    total, each = size_B.size, trace.num_layers * trace.top_k
    most = min(MOST_LOADS // (trace.num_layers * trace.num_experts), MOST_HELD * total // (token.size * each))
    taken = sample.of(total, most)
    if taken is not None:
        order += sample.words(taken.size)
        token = token[np.isin(np.repeat(np.arange(total), size_B), taken)]
        size_B = size_B[taken]
    start = np.concatenate([[0], np.cumsum(size_B)]).astype(np.int64)
    experts = np.ascontiguousarray(trace.experts[token])
    steps, load = size_B.size, count_loads(experts, size_B, trace.num_experts)
    request_T = _in_turn(trace.request[token])
    return RoutingBatch(
        load, np.full(steps, 1.0 / steps), trace.top_k, trace.layer_ids, experts, start, request_T,
        None if trace.home is None else trace.home[token].copy(),
        f"{order}, homes {'as recorded' if trace.home is not None else (homes or HOMES[0]).replace('-', ' ')}",
        None if taken is None else total, homes or HOMES[0],
        None if trace.domain is None else trace.domain[token][np.unique(request_T, return_index=True)[1]],
    )  # fmt: skip


def _in_turn(request_T: NDArray[Any]) -> NDArray[np.int32]:
    """Requests numbered from 0 by first appearance, so that home ranks dealt in turn reach every rank."""
    _, first, number = np.unique(request_T, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first)).astype(np.int32)[number]


def _shares(load: NDArray[Any], mass: NDArray[np.float64]) -> bool:
    """Whether fractions add up to 100, or to as many as a token may have experts, in every layer: its sums ``mass``."""
    sum_ = float(mass.mean())
    if load.dtype.kind != "f" or all((load[rows] == np.floor(load[rows])).all() for rows in row_blocks(load)):
        return False
    if not np.allclose(mass, sum_, rtol=0.01):
        return False
    return abs(sum_ - 100) <= 1 or (sum_ <= MOST_PICKS and abs(sum_ - round(sum_)) <= 0.01)


def _profile_batch(
    profile: LoadProfile, tokens_per_step: int | None, max_steps: int | None, sample: _Sample
) -> RoutingBatch:
    load = profile.load_BLE[:max_steps]
    idle = 0.0 if profile.idle_BL is None else profile.idle_BL[:max_steps]
    mass_BL = load.sum(axis=2, dtype=np.float64) + idle
    mass = mass_BL.max(axis=1)
    kept = np.flatnonzero(mass > 0)
    mass = mass[kept]
    if tokens_per_step is None and float(mass.max()) <= profile.top_k * (1 + 1e-6):
        raise OptionError(
            f"the loads of a layer sum to {float(mass.max()):.6g}, no more than one token: frequencies, not tokens",
            hint="say how many tokens a step has: --tokens-per-step N",
        )
    if tokens_per_step is None and _shares(load, mass_BL[mass_BL > 0]):
        raise OptionError(
            f"the loads of every layer sum to {float(mass.max()):.6g}, in fractions: shares of tokens, not tokens",
            hint="say how many tokens a step has: --tokens-per-step N",
        )
    target = float(mass.mean()) if tokens_per_step is None else float(tokens_per_step * profile.top_k)
    words = "recorded mass, each scaled to the mean" if tokens_per_step is None else f"scaled to N = {tokens_per_step}"
    total, taken = kept.size, sample.of(kept.size, MOST_LOADS // (profile.num_layers * profile.num_experts))
    if taken is not None:
        kept, mass, words = kept[taken], mass[taken], words + sample.words(taken.size)
    scaled = load[kept].astype(np.float64)
    scaled *= (target / mass)[:, None, None]
    return RoutingBatch(
        scaled, np.full(len(scaled), 1.0 / len(scaled)), profile.top_k, profile.layer_ids,
        order=f"{total} recorded loads as steps, {words}", drawn_from=None if taken is None else total,
    )  # fmt: skip
