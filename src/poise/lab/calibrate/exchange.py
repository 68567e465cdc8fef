"""Constants of :class:`poise.cost.exchange.ExchangeModel` from the exchanges that a cluster's constants come from.

    seconds = start + max(peer * peers, (bytes + evenness * min(crowding, bytes / 4)) / rate - credit)

With crowding and what decides each row given, it is linear: crowding is tried on a grid, the deciding part of each row
is taken from the last fit until nothing changes, and each fit has the least absolute relative deviations. A row weighs
the more the longer it lasts (by its root): long ones tell a rate, and they are what a layer's time is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.cost.exchange import RAMP, ExchangeModel
from poise.lab.calibrate.fit import FASTEST_BYTES_PER_S, SURE, LinkRow, least_deviations
from poise.util.errors import NoResultError

TRIED_BYTES = (0.0, *np.geomspace(1e4, 1e8, 49).tolist())
"""Crowding that is tried."""
MOST_CROWDING = 0.5
"""Crowding is at most this part of the fullest port's bytes in the longest row: more would be no end of a ramp."""
LEAST = 1e-16


@dataclass(frozen=True, slots=True, eq=False)
class ExchangeFit:
    """A model without its exchange of counts, seconds of one (median of the rows), and residuals of the rows, [R]."""

    model: ExchangeModel
    counts_s: float
    residual_R: NDArray[np.float64]


def fit_exchange(rows: Sequence[LinkRow]) -> ExchangeFit:
    """Constants from exchanges measured without counts; what counts add is apart, since all ranks wait for them.

    Raises
    ------
    NoResultError : no row carries bytes, or a time is not above 0.
    """
    inside, outside = np.array([(row.intra_bytes, row.inter_bytes) for row in rows]).T
    if not (inside.any() or outside.any()):
        raise NoResultError(f"none of {len(rows)} measured exchanges carried bytes", hint="two ranks or more")
    seconds = np.array([row.alone_s for row in rows])
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise NoResultError("an exchange without counts was not measured, or took no time")
    spread = np.array([max(0.0, row.alone_high_s - row.alone_low_s) for row in rows]) / seconds
    weight = SURE / (SURE + spread) * np.sqrt(seconds)
    peers = np.array([row.peers for row in rows])
    even = np.array([(row.intra_even, row.inter_even) for row in rows]).T
    bytes_CR, most = np.stack([inside, outside]), max(inside.max(), outside.max())
    tried = [crowding for crowding in TRIED_BYTES if crowding <= MOST_CROWDING * most]
    # if all ports are equally full in every row, credit and crowding are one number
    credit = bool(np.ptp(even[bytes_CR > 0]) > 0.01)
    best = min((_fit(one, credit, bytes_CR, even, peers, seconds, weight) for one in tried), key=lambda one: one.off)
    start, peer, near, far, near_credit, far_credit = best.value_P
    counts_s = float(np.median([row.counts_s for row in rows]))
    rates = [1 / slope if slope > 10 * LEAST else 0.0 for slope in (near, far)]
    near_rate, far_rate = (rate or max(rates) or FASTEST_BYTES_PER_S for rate in rates)  # no such links: the other's
    model = ExchangeModel(start, peer, near_rate, far_rate, best.crowding, near_credit, far_credit)
    return ExchangeFit(model, counts_s, best.residual_R)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """Weighted deviation; crowding; start, peer, seconds a byte and credit inside and between nodes; residuals."""

    off: float
    crowding: float
    value_P: NDArray[np.float64]
    residual_R: NDArray[np.float64]


def _fit(
    crowding: float,
    credit: bool,
    bytes_CR: NDArray[np.float64],
    even_CR: NDArray[np.float64],
    peers_R: NDArray[np.float64],
    seconds_R: NDArray[np.float64],
    weight_R: NDArray[np.float64],
) -> _Fit:
    """The best of a few rounds."""
    moved_CR = bytes_CR + even_CR * np.minimum(crowding, bytes_CR / RAMP)
    parts_PR = np.stack([peers_R, moved_CR[0], moved_CR[1]])
    decides_R = np.where(moved_CR.sum(axis=0) < bytes_CR.max() / 100, 0, np.where(bytes_CR[1] > bytes_CR[0] / 8, 2, 1))
    floor = np.array([0.0, 0.0, LEAST, LEAST, 0.0, 0.0])
    best = None
    for _ in range(8):
        by_PR = decides_R == np.arange(3)[:, None]
        design = np.concatenate([np.ones((1, len(seconds_R))), parts_PR * by_PR, -1.0 * credit * by_PR[1:]]).T
        value = np.where(design.any(axis=0), least_deviations(design, seconds_R, weight_R, floor), floor)
        shares_PR = value[1:4, None] * parts_PR
        shares_PR[1:] -= value[4:, None]
        residual = (value[0] + shares_PR.max(axis=0)) / seconds_R - 1
        off = float(weight_R @ np.abs(residual))
        if best is None or off < best.off:
            best = _Fit(off, crowding, value, residual)
        new = shares_PR.argmax(axis=0)
        if (new == decides_R).all():
            break
        decides_R = new
    assert best is not None
    return best
