"""Has the traffic changed? A permutation test on load shares with a stated false-alarm rate.

Tokens of one request choose alike, so counts scatter far more than independent tokens would and a chi-square test on
them alarms on nothing. Here only steps are exchanged, never tokens, so that the scatter between steps is whatever it
is: the two-sample permutation test (Fisher 1935; Pitman 1937), with p = (1 + exceedances) / (1 + permutations) as
Phipson and Smyth (2010, "Permutation P-values should never be zero") derive it.

Step 1  Cells: ``cell`` consecutive steps, of which the first ``gap`` are left out, summed. Requests that live through
        neighbouring steps tie these together; ``gap`` is the number of lags at which the reference steps are more
        alike than in the median random order (one gap too many costs tokens, one too few would cost the rate).
        Where no dependence reaches further than ``gap`` steps, cells are independent. Choice: cells of three gaps
        keep two thirds of the tokens; shorter ones, then smaller gaps, where there would be too few arrangements for
        the rate (see ``exact``).
Step 2  Statistic: with q[e] the share of expert e in all cells together, and w, r the mean of the cells' shares in the
        window and in the reference, T = mean over layers of sum_e (w[e] - r[e])^2 / q[e].
Step 3  Null: the same cells dealt at random into a window and a reference of the same sizes. Being a quadratic form
        in the cells' Gram matrix, T costs n^2 operations a permutation, whatever the number of experts.
Step 4  Alarm when p <= false_alarm_rate / looks.

What is promised: if cells are exchangeable, a look alarms with probability at most ``false_alarm_rate / looks``, over
the draw of the reference and of the window. Looks that share a reference are dependent (an odd reference makes all of
them likelier to alarm), but by the union bound ``looks`` of them, overlapping or not, give a false alarm with
probability at most ``false_alarm_rate``. With ``looks = 1`` the rate is that of one look, and k looks give k times the
rate false alarms on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.routing.batch import RoutingBatch
from poise.util.errors import OptionError, TraceError

ARRANGEMENTS = 20.0
"""Fewest arrangements of the cells, and permutations drawn, per expected exceedance of the threshold."""
FEWEST_PERMUTATIONS = 1_999
MAX_PERMUTATIONS = 200_000
_ELEMENTS = 4_000_000


@dataclass(frozen=True, slots=True)
class DriftVerdict:
    """One look.

    Parameters
    ----------
    drifted : the statistic is above the threshold; the same as p_value <= false_alarm_rate / looks.
    statistic : T, mean over layers of the squared distance of load shares (step 2).
    threshold : what T must exceed.
    p_value : share of the arrangements with a distance as large, at least 1 / (1 + permutations).
    worst_layer : the layer whose distance is largest relative to what chance gives it.
    """

    drifted: bool
    statistic: float
    threshold: float
    p_value: float
    worst_layer: int


def _loads(name: str, loads: RoutingBatch | NDArray[Any]) -> NDArray[np.float64]:
    load = np.asarray(loads.load_BLE if isinstance(loads, RoutingBatch) else loads, dtype=np.float64)
    if load.ndim != 3 or 0 in load.shape:
        raise TraceError(f"{name} must be loads [B, L, E] and not empty, got shape {load.shape}")
    if not np.isfinite(load).all() or load.min() < 0:
        raise TraceError(f"{name}: loads must be finite and at least 0")
    return load


def gram_LNN(load_NLE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products of the cells' share deviations, each expert divided by its share of all cells; [L, N, N].

    A cell without tokens in a layer deviates by nothing there.
    """
    total_NL = load_NLE.sum(axis=2)
    pooled_LE = load_NLE.sum(axis=0) / np.maximum(total_NL.sum(axis=0), 1e-300)[:, None]
    share = np.where(total_NL[:, :, None] > 0, load_NLE / np.maximum(total_NL, 1e-300)[:, :, None], pooled_LE)
    scale = np.where(pooled_LE > 0, 1 / np.sqrt(np.where(pooled_LE > 0, pooled_LE, 1.0)), 0.0)
    deviation_LNE = ((share - pooled_LE) * scale).transpose(1, 0, 2)
    out: NDArray[np.float64] = deviation_LNE @ deviation_LNE.transpose(0, 2, 1)
    return out


def correlated_lags(load_BLE: NDArray[np.float64], *, seed: int = 0, most: int | None = None) -> int:
    """Consecutive lags, from 1 on, at which steps are more alike than in half of all random orders.

    So low a bar errs on the side of a gap too many, which costs tokens; one too few would cost the rate.

    At most ``most`` lags are looked at (default an eighth of the steps).
    """
    steps = len(load_BLE)
    gram = gram_LNN(load_BLE).mean(axis=0)
    rng = np.random.default_rng([seed, 1])
    orders = np.stack([rng.permutation(steps) for _ in range(399)])
    for lag in range(1, 1 + (steps // 8 if most is None else min(most, steps - 2))):
        here = np.diagonal(gram, lag).mean()
        null = gram[orders[:, :-lag], orders[:, lag:]].mean(axis=1)
        if here <= np.median(null):
            return lag - 1
    return max(0, steps // 8 if most is None else min(most, steps - 2))


@dataclass(frozen=True, slots=True, eq=False)
class DriftTest:
    """A reference to compare windows with. Make one with :meth:`fit`; mathematics in the module docstring.

    Parameters
    ----------
    reference_NLE : float64 [N, L, E], loads of the reference's cells.
    window : steps of a window.
    false_alarm_rate : probability of at least one false alarm in ``looks`` looks.
    looks : see there.
    cell, gap : steps of a cell, and how many of them, the first, are left out.
    lags : lags at which the reference's steps are correlated.
    permutations : arrangements drawn at each look.
    seed : the same seed gives the same verdicts.
    """

    reference_NLE: NDArray[np.float64]
    window: int
    false_alarm_rate: float
    looks: int
    cell: int
    gap: int
    lags: int
    permutations: int
    seed: int

    @property
    def exact(self) -> bool:
        """The gap covers all lags found; otherwise the reference was too short for that and the rate is nominal."""
        return self.gap >= self.lags

    @classmethod
    def fit(
        cls,
        loads: RoutingBatch | NDArray[Any],
        window: int,
        false_alarm_rate: float = 0.01,
        *,
        looks: int = 1,
        gap: int | None = None,
        seed: int = 0,
    ) -> DriftTest:
        """Learn a reference.

        Parameters
        ----------
        loads : reference steps, float [B, L, E] or a batch, in the order they ran.
        window : steps of the windows that will be checked.
        false_alarm_rate, looks : see the class.
        gap : steps that dependence reaches; default: as found in the reference.
        seed : of the permutations.

        Raises
        ------
        TraceError : the loads are malformed.
        OptionError : a number is out of range, or the steps can be arranged in too few ways for the rate.
        """
        load = _loads("the reference", loads)
        if gap is not None and gap < 0:
            raise OptionError(f"gap must be at least 0, got {gap}")
        permutations = permutations_for(len(load), window, false_alarm_rate, looks)
        lags = correlated_lags(load, seed=seed, most=min(window, len(load) // 8)) if gap is None else gap
        gap_found, cell = _layout(lags, len(load), window, false_alarm_rate / looks)
        cells = _cells(load, cell, gap_found)
        cells.flags.writeable = False
        return cls(cells, window, false_alarm_rate, looks, cell, gap_found, lags, permutations, seed)

    def check(self, window: RoutingBatch | NDArray[Any]) -> DriftVerdict:
        """Compare a window, float [window, L, E] or a batch, with the reference; steps of both must not overlap.

        Raises
        ------
        TraceError : the window has another number of steps, layers or experts than the reference was fitted for.
        """
        load = _loads("the window", window)
        want = (self.window, *self.reference_NLE.shape[1:])
        if load.shape != want:
            raise TraceError(f"the window has [steps, layers, experts] {load.shape}, the test was fitted for {want}")
        cells = _cells(load, self.cell, self.gap)
        here, n = len(cells), len(cells) + len(self.reference_NLE)
        gram = gram_LNN(np.concatenate([cells, self.reference_NLE]))
        mean_gram = gram.mean(axis=0)
        contrast = np.where(np.arange(n) < here, 1 / here, -1 / (n - here))
        statistic_L = np.einsum("lij,i,j->l", gram, contrast, contrast)
        statistic = float(contrast @ mean_gram @ contrast)
        null = self._null(mean_gram, here)
        # Arrangements equal to the one seen must count although rounding tells them apart.
        exceed = int((null >= statistic * (1 - 1e-9)).sum())
        p_value = (1 + exceed) / (1 + null.size)
        allowed = math.floor(self.false_alarm_rate / self.looks * (null.size + 1) * (1 + 1e-12))
        square = float(contrast @ contrast)
        trace_L = np.trace(gram, axis1=1, axis2=2)
        chance_L = square / n * (trace_L - (gram.sum(axis=(1, 2)) - trace_L) / (n - 1))
        ratio_L = statistic_L / np.where(chance_L > 0, chance_L, np.inf)
        threshold = float(np.partition(null, null.size - allowed)[null.size - allowed])
        return DriftVerdict(1 + exceed <= allowed, statistic, threshold, p_value, int(np.argmax(ratio_L)))

    def _null(self, gram_NN: NDArray[np.float64], here: int) -> NDArray[np.float64]:
        """The statistic of every permutation."""
        n = len(gram_NN)
        rng = np.random.default_rng([self.seed, 2])
        parts = []
        for first in range(0, self.permutations, _ELEMENTS // n):
            rows = min(self.permutations - first, _ELEMENTS // n)
            order = rng.random((rows, n)).argpartition(here - 1, axis=1) if here < n else np.zeros((rows, n), int)
            contrast = np.full((rows, n), -1 / (n - here))
            np.put_along_axis(contrast, order[:, :here], 1 / here, axis=1)
            parts.append(((contrast @ gram_NN) * contrast).sum(axis=1))
        return np.concatenate(parts)


def permutations_for(steps: int, window: int, false_alarm_rate: float, looks: int = 1) -> int:
    """Permutations that a test with so many reference steps draws at each look.

    Raises
    ------
    OptionError : a number is out of range, or the rate is too small for the steps or for the permutations.
    """
    if not 0 < false_alarm_rate < 1 or looks < 1 or window < 1:
        raise OptionError(
            "false_alarm_rate must lie within 0 and 1, looks and window be at least 1, got "
            f"{false_alarm_rate}, {looks}, {window}"
        )
    rate = false_alarm_rate / looks
    _layout(0, steps, window, rate)
    permutations = int(min(MAX_PERMUTATIONS, max(FEWEST_PERMUTATIONS, math.ceil(ARRANGEMENTS / rate) - 1)))
    if rate * (permutations + 1) < 1:
        raise OptionError(
            f"{permutations} permutations cannot tell a rate of {rate:.2g} a look",
            hint="raise the false-alarm rate or lower looks",
        )
    return permutations


def _cells(load_BLE: NDArray[np.float64], cell: int, gap: int) -> NDArray[np.float64]:
    """Loads summed over cells, [N, L, E]; what does not fill a cell is left out at the beginning."""
    count = len(load_BLE) // cell
    shaped = load_BLE[len(load_BLE) - count * cell :].reshape(count, cell, *load_BLE.shape[1:])
    out: NDArray[np.float64] = shaped[:, gap:].sum(axis=1)
    return out


def _layout(lags: int, steps: int, window: int, rate: float) -> tuple[int, int]:
    """Gap and cell: the largest gap up to ``lags``, then the longest cell, that leave enough arrangements."""
    for gap in range(lags, -1, -1):
        for cell in range(max(1, 3 * gap), gap, -1):
            here, there = window // cell, steps // cell
            if here and there and math.comb(here + there, here) >= ARRANGEMENTS / rate:
                return gap, cell
    raise OptionError(
        f"{steps} reference steps and a window of {window} have {math.comb(steps + window, window)} arrangements, a "
        f"rate of {rate:.2g} a look needs {math.ceil(ARRANGEMENTS / rate)}",
        hint="give more steps or a higher rate",
    )
