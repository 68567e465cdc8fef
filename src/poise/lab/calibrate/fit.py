"""Constants from measured medians, by least absolute relative deviations (a linear programme).

Why absolute and not squared: a median over a handful of repeats is off now and then, and always to one side, when a
process waits for a core. Squares follow such a row, absolute deviations do not. Why relative: rows last from
microseconds to a second, and start-up is seen only in the short ones. A row weighs the less the more its own repeats
differ.

Links
    seconds = intra latency [+ inter latency if it crosses nodes] + peer latency * peers
              + max(intra bytes / intra rate, inter bytes / inter rate)
    The maximum is no linear term: which port decides a row is taken from the last fit until nothing changes.
Experts
    seconds = sum over active experts of g(tokens), g the nearest curve that rises and whose seconds per token fall
    (:mod:`poise.machine.curve` says why it has to). Both are linear in its knots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from poise.machine.curve import MeasuredCurve
from poise.util.errors import NoResultError, OptionError

FASTEST_BYTES_PER_S = 1e16
"""A rate that no row tells from infinity becomes this."""
LEAST_SLOPE = 0.01
"""The end of a curve rises by at least this part of its seconds per token: tokens beyond it must cost something."""
FEW_BYTES, FEW_WEIGHT = 4096, 3.0
"""Exchanges of few bytes weigh more: they alone show the start-up undiluted, and there are few of them."""
LONG = 4.0
"""Bytes dominate an exchange if they take so many times as long as its start-up."""
SURE = 0.05
"""A row whose quartiles lie this far apart, relatively, weighs half of one whose repeats are all alike."""
DECIDES = 0.9
"""One network port a node is taken for true if its deviations are below this part of those of one a device."""


@dataclass(frozen=True, slots=True)
class LinkRow:
    """One exchange, measured: half of a dispatch and a combine.

    Parameters
    ----------
    pattern : its name in :mod:`poise.lab.calibrate.patterns`.
    intra_bytes, inter_bytes, node_bytes, peers : see :class:`~poise.lab.calibrate.patterns.PortBytes`.
    seconds : from when the last rank begins until the last is done; median over repeats.
    low_s, high_s : quartiles of the repeats.
    repeats, rounds : repeats, and exchanges in each (there and back counts as one).
    alone_s : the same where no counts go before; median.
    intra_even, inter_even : mean over fullest port, see :class:`~poise.lab.calibrate.patterns.PortBytes`.
    alone_low_s, alone_high_s : quartiles of ``alone_s``.
    steady : enough repeats were left alone by others, and they agree (:mod:`poise.lab.emulate.quiet`).
    """

    pattern: str
    intra_bytes: float
    inter_bytes: float
    node_bytes: float
    peers: float
    seconds: float
    low_s: float = 0.0
    high_s: float = 0.0
    repeats: int = 1
    rounds: int = 1
    alone_s: float = 0.0
    intra_even: float = 1.0
    inter_even: float = 1.0
    alone_low_s: float = 0.0
    alone_high_s: float = 0.0
    steady: bool = True

    @property
    def counts_s(self) -> float:
        """What the counts add to a dispatch: their exchange, and that ranks leave it one after the other."""
        return max(0.0, 2.0 * (self.seconds - self.alone_s))


@dataclass(frozen=True, slots=True, eq=False)
class LinkFit:
    """Constants of links by their names in :class:`poise.machine.cluster.Cluster`; what was not measured is absent.

    Parameters
    ----------
    constants : latencies in seconds, rates in bytes/s.
    nic_shared : one network port a node.
    residual_R : float64 [R], modelled over measured seconds of each row, less 1.
    long_R : bool [R], rows in which bytes take four times as long as the start-up, or longer.
    by_network_R : bool [R], rows whose bytes take longest on the network.
    """

    constants: dict[str, float]
    nic_shared: bool
    residual_R: NDArray[np.float64]
    long_R: NDArray[np.bool_]
    by_network_R: NDArray[np.bool_]

    @property
    def unsure(self) -> tuple[str, ...]:
        """Rates that no row dominated by bytes tells: little but start-up stands behind them."""
        return tuple(name for name, rows_R in self.told.items() if not rows_R.any())

    @property
    def told(self) -> dict[str, NDArray[np.bool_]]:
        """Rows that tell a rate, bool [R] by the rate's name: bytes dominate them, and this class of links decides."""
        rows = {
            "intra_bytes_per_s": self.long_R & ~self.by_network_R,
            "inter_bytes_per_s": self.long_R & self.by_network_R,
        }
        return {name: rows_R for name, rows_R in rows.items() if name in self.constants}

    @property
    def worst(self) -> float:
        """Largest relative residual, without its sign."""
        return float(np.abs(self.residual_R).max())

    @property
    def worst_long(self) -> float:
        """The same of rows that bytes dominate; 0 if there are none."""
        return float(np.abs(self.residual_R[self.long_R]).max(initial=0.0))

    @property
    def typical(self) -> float:
        """Median of them."""
        return float(np.median(np.abs(self.residual_R)))


def fit_links(rows: Sequence[LinkRow], *, nic_shared: bool | None = False) -> LinkFit:
    """Constants of the links from measured exchanges.

    Parameters
    ----------
    rows : of one cluster.
    nic_shared : one network port a node. None: whichever explains the rows better; a node's port has to explain them
        by a tenth better, since even patterns do not tell the two apart.

    Raises
    ------
    NoResultError : no row carries bytes.
    """
    if nic_shared is not None:
        return _fit_links(rows, nic_shared)
    device, node = _fit_links(rows, False), _fit_links(rows, True)
    return node if np.abs(node.residual_R).sum() < DECIDES * np.abs(device.residual_R).sum() else device


def _fit_links(rows: Sequence[LinkRow], nic_shared: bool) -> LinkFit:
    seconds = np.array([row.seconds for row in rows])
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise NoResultError("a measured time is not above 0", hint="the machine's clock is too coarse: measure longer")
    spread = np.array([max(0.0, row.high_s - row.low_s) for row in rows]) / seconds
    few = np.array([row.intra_bytes + row.inter_bytes <= FEW_BYTES for row in rows])
    weight = SURE / (SURE + spread) * np.where(few, FEW_WEIGHT, 1.0)
    inside = np.array([row.intra_bytes for row in rows])
    outside = np.array([row.node_bytes if nic_shared else row.inter_bytes for row in rows])
    if not inside.any() and not outside.any():
        raise NoResultError(f"none of {len(rows)} measured exchanges carried bytes", hint="two ranks or more")
    crosses = outside > 0
    start = {  # one of two columns that are alike would be arbitrary
        "intra_latency_s": np.ones(len(rows)) * (not crosses.all()),
        "inter_latency_s": crosses.astype(float),
        "peer_latency_s": np.array([row.peers for row in rows], dtype=float) * (len({row.peers for row in rows}) > 1),
    }
    # both classes busy: the network decides until a fit says otherwise
    by_network, best, before = crosses, None, None
    for _ in range(50):
        columns = {
            **start,
            "intra_bytes_per_s": inside * ~by_network,
            "inter_bytes_per_s": outside * by_network,
        }
        columns = {name: column for name, column in columns.items() if column.any()}
        if before is None:  # rows of one class first: they alone tell the rates
            one_class = (inside > 0) != (outside > 0)
            use = one_class if all((column * one_class).any() for column in columns.values()) else one_class | True
        else:
            use = np.ones(len(rows), dtype=bool)
        design = np.stack(list(columns.values()), axis=1)
        floor = [1 / FASTEST_BYTES_PER_S if name.endswith("_per_s") else 0.0 for name in columns]
        found = dict(
            zip(columns, least_deviations(design[use], seconds[use], weight[use], np.array(floor)), strict=True)
        )
        wait = np.sum([found.get(name, 0.0) * column for name, column in start.items()], axis=0)
        near, far = found.get("intra_bytes_per_s", 0.0) * inside, found.get("inter_bytes_per_s", 0.0) * outside
        wire = np.maximum(near, far)
        residual = (wait + wire) / seconds - 1
        decided = crosses & (far >= near)
        if best is None or weight @ np.abs(residual) < weight @ np.abs(best[1]):
            best = (found, residual, wire >= LONG * wait, decided)
        if before is not None and (decided == by_network).all():
            break
        before, by_network = by_network, decided
    assert best is not None
    constants = {name: 1 / value if name.endswith("_per_s") else value for name, value in best[0].items()}
    return LinkFit(constants, nic_shared, *best[1:])


def least_deviations(
    design_RC: NDArray[np.float64],
    seconds_R: NDArray[np.float64],
    weight_R: NDArray[np.float64],
    floor_C: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Coefficients at or above the floor with the least weighted sum of |design @ x / seconds - 1|, float64 [C]."""
    relative = design_RC / seconds_R[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale
    rows, columns = relative.shape
    above = np.hstack([relative, -np.eye(rows)])
    below = np.hstack([-relative, -np.eye(rows)])
    done = linprog(
        np.concatenate([np.zeros(columns), weight_R]),
        A_ub=np.vstack([above, below]),
        b_ub=np.concatenate([np.ones(rows), -np.ones(rows)]),
        bounds=[*((low, None) for low in floor_C * scale), *[(0.0, None)] * rows],
    )
    return _solution(done)[:columns] / scale


def _solution(done: Any) -> NDArray[np.float64]:
    """What a linear programme found; these always have a solution unless numbers are out of all range."""
    if done.x is None:
        raise NoResultError(f"the fit failed: {done.message}")
    out: NDArray[np.float64] = done.x
    return out


@dataclass(frozen=True, slots=True)
class ComputeRow:
    """Experts, measured: ``tokens`` in all, evenly on ``active`` experts of one device.

    ``seconds`` is the median over repeats, then over ranks; ``low_s`` and ``high_s`` are the fastest and slowest rank.
    ``steady``: on every rank enough repeats were left alone by others, and they agree.
    """

    tokens: int
    active: int
    seconds: float
    low_s: float = 0.0
    high_s: float = 0.0
    steady: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class CurveFit:
    """An expert's curve, and how far the rows lie from it (modelled over measured, less 1; float64 [R])."""

    curve: MeasuredCurve
    residual_R: NDArray[np.float64]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """Largest relative residual, without its sign."""
        return float(np.abs(self.residual_R).max())


def fit_curve(rows: Sequence[ComputeRow], *, parameters: float, weight_bytes: float = 2.0) -> CurveFit:
    """The nearest curve the cost model can take, with a knot at every number of tokens per expert.

    Parameters
    ----------
    rows : two or more numbers of tokens per active expert.
    parameters, weight_bytes : of the expert.

    Raises
    ------
    OptionError : fewer than two different numbers of tokens per expert, or a time that is not above 0.
    """
    each = np.array([row.tokens / row.active for row in rows])
    seconds = np.array([row.seconds / row.active for row in rows])
    knots, place = np.unique(each, return_inverse=True)
    if len(knots) < 2 or not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise OptionError(f"a curve needs two numbers of tokens an expert and times above 0, got {len(knots)}")
    count, top = len(rows), len(knots)
    at = np.zeros((count, top))
    at[np.arange(count), place] = 1 / seconds
    rise, fall = np.zeros((top - 1, top)), np.zeros((top - 1, top))
    for i, ratio in enumerate(knots[1:] / knots[:-1]):
        rise[i, [i, i + 1]] = 1.0, -1.0
        fall[i, [i, i + 1]] = -ratio, 1.0
    rise[-1, -2] += LEAST_SLOPE * (knots[-1] / knots[-2] - 1)
    unit = seconds.mean()
    none, slack = np.zeros((2 * (top - 1), count)), np.eye(count)
    done = linprog(
        np.concatenate([np.zeros(top), np.ones(count)]),
        A_ub=np.vstack(
            [
                np.hstack([at * unit, -slack]),
                np.hstack([-at * unit, -slack]),
                np.hstack([np.vstack([rise, fall]), none]),
            ]
        ),
        b_ub=np.concatenate([np.ones(count), -np.ones(count), np.zeros(2 * (top - 1))]),
        bounds=[(seconds.min() / unit / 10, None)] * top + [(0.0, None)] * count,
    )
    value = _exactly(_solution(done)[:top] * unit, knots)
    residual = value[place] / seconds - 1
    curve = MeasuredCurve(knots, value, parameters, weight_bytes)
    return CurveFit(curve, residual, tuple(_remarks(curve, knots, seconds, place)))


def _exactly(value: NDArray[np.float64], knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """The solver's tolerance taken out: each knot within what the one before allows."""
    out = value.copy()
    for i, ratio in enumerate(knots[1:] / knots[:-1]):
        least = 1.0 + (LEAST_SLOPE * (ratio - 1.0) if i == len(knots) - 2 else 0.0)
        out[i + 1] = min(max(out[i + 1], out[i] * least), out[i] * ratio)
    return out


def _remarks(
    curve: MeasuredCurve, knots: NDArray[np.float64], seconds: NDArray[np.float64], place: NDArray[Any]
) -> list[str]:
    out = []
    mean = np.bincount(place, seconds) / np.bincount(place)
    moved = float(np.abs(curve.seconds_X / mean - 1).max())
    each = mean / knots
    dearest = float((each / np.minimum.accumulate(each)).max())
    if dearest > 1.1:
        out.append(
            f"seconds per token rise with tokens, up to {dearest:.2g} times: the cost model takes that smaller batches "
            f"one after the other would be as fast, so the curve lies up to {moved:.0%} from the measured means"
        )
    elif moved > 0.1:
        out.append(f"the curve lies up to {moved:.0%} from the measured means")
    if curve.per_token * knots[-1] < 0.3 * curve.seconds_X[-1]:
        out.append(
            f"at {knots[-1]:g} tokens an expert is still bound by memory: beyond that the curve is a guess; "
            "measure more tokens"
        )
    return out
