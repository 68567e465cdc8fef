"""Which maps explain a reported balance: each is simulated on the recorded loads, in passes of the real sizes. Pure.

A balance is a number without a signature: passes of eight tokens are as uneven under a good map as long ones are under
a bad one. So every map that could have run is asked what it would have given.

Step 1  Draw passes: tokens of the real sizes choose K experts each by the recorded loads. Where the traffic has a
        record for each reported pass these are the passes; where no size is known, only the limit of long passes is.
Step 2  Imbalance of all passes together under a map: sum of what the engine calls most over sum of what it calls mean.
        The loads are a sample themselves: the spread and the bias of that (bootstrap) widen it.
Step 3  A map explains the measured imbalance if it lies between what it gives, at error rate / 2 each side, and what it
        would give if tokens of a pass resembled one another so much that CLUMPED of them counted as one. Values within
        a tolerance of what a map gives count as explained by it.

vLLM's log is not what it is called in most releases: from #22167 (August 2025) to #51813 (August 2026) most and mean
are of layers, not of ranks. Either is tried where the numbers allow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Measure = Literal["ranks", "layers", "ratio"]
"""Most and mean: of ranks, summed over layers (vLLM); of layers, summed over ranks (vLLM, #22167 to #51813); of ranks,
their ratio averaged over layers and passes (SGLang)."""
DRAWS = 2_000
CLUMPED = 16.0
"""Tokens of a pass that resemble one another so much that they may count as one."""
LEAST_PASSES, MOST_PASSES, MOST_CELLS, MOST_DRAWN = 32, 256, 4_000_000, 1_000
PARTS = 32
"""Parts of the traffic whose differences tell how sure its loads are."""
FEWEST_PARTS, RESAMPLED = 8, 200
FEWEST_COUNTED = 16
"""Of fewer numbers a common divisor may be chance."""
MOST_TOP_K = 16


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one map does.

    Parameters
    ----------
    name : the map.
    balance : mean over most, as it would be reported.
    p_value : odds of a balance at least as far off, on the better side where passes are as drawn, on the worse side
        where they are clumped.
    explains : the map may have given what was measured.
    """

    name: str
    balance: float
    p_value: float
    explains: bool


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredTraffic:
    """What ran while the balance was measured.

    Parameters
    ----------
    parts_GLE : float64 [G, L, E], pairs of experts and tokens, in parts that are as independent as is known.
    top_k : K, None: unknown.
    passes_BLE : float64 [B, L, E], the very passes that were reported; None: not recorded.
    """

    parts_GLE: NDArray[np.float64]
    top_k: int | None = None
    passes_BLE: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reported:
    """A measured balance.

    Parameters
    ----------
    measure : what most and mean are of.
    most_B, mean_B : float64 [B], of each pass; ratio: 1, and the reported balance.
    pairs_B : float64 [B], pairs of experts and tokens of one layer; None: unknown.
    dense : layers that count as balanced (SGLang).
    """

    measure: Measure
    most_B: NDArray[np.float64]
    mean_B: NDArray[np.float64]
    pairs_B: NDArray[np.float64] | None = None
    dense: int = 0

    @property
    def balance(self) -> float:
        """Mean over fullest device, all passes together."""
        return float(self.mean_B.sum() / self.most_B.sum())


def explained(
    reported: Reported,
    traffic: MeasuredTraffic,
    shares: Mapping[str, NDArray[np.float64]],
    *,
    error_rate: float,
    tolerance: float,
) -> tuple[Explanation, ...]:
    """How each map does at explaining a reported balance.

    Parameters
    ----------
    reported, traffic : what was measured, on what.
    shares : float64 [L, E, D] by name, each device's share of each expert's pairs, in the traffic's layers.
    error_rate : odds that a map is said not to explain what it gave, in [0.001, 0.5].
    tolerance : relative; see step 3.
    """
    rng = np.random.default_rng(0)
    exact = traffic.passes_BLE is not None
    loads_PLE = _drawn(reported, traffic, 1.0, rng)
    clumped_PLE = None if exact or reported.pairs_B is None else _drawn(reported, traffic, CLUMPED, rng)
    doubted_RLE = None if exact else _resampled(traffic, rng)
    passes = len(reported.most_B)
    draws = passes if exact or reported.pairs_B is None else max(1, int(1 / (1 / passes + 1 / len(loads_PLE))))
    pick_RN = rng.integers(0, len(loads_PLE), (DRAWS, min(draws, len(loads_PLE), MOST_DRAWN)))
    at_R = rng.integers(0, RESAMPLED, DRAWS)
    measured = 1.0 / reported.balance
    out = []
    for name, share_LED in shares.items():
        most_P, mean_P = _figures(loads_PLE, share_LED, reported)
        given_R = _of(most_P, mean_P, pick_RN)
        high_R = given_R if exact else None
        if clumped_PLE is not None:
            high_R = _of(*_figures(clumped_PLE, share_LED, reported), pick_RN)
        if doubted_RLE is not None:  # basic bootstrap: the true loads lie as far on the other side
            whole_most, whole_mean = _figures(traffic.parts_GLE.sum(axis=0, keepdims=True), share_LED, reported)
            most_R, mean_R = _figures(doubted_RLE, share_LED, reported)
            off_R = (most_R / mean_R) / (whole_most / whole_mean)
            given_R = np.maximum(1.0, given_R * (2.0 - np.minimum(off_R, 1.5)[at_R]))
        centre = float(most_P.sum() / mean_P.sum())
        low = (1 + int((given_R <= measured * (1 + 1e-9)).sum())) / (DRAWS + 1)
        high = 1.0 if high_R is None else (1 + int((high_R >= measured * (1 - 1e-9)).sum())) / (DRAWS + 1)
        p_value = min(1.0, 2 * min(low, high))
        near = abs(measured / centre - 1.0) <= tolerance
        out.append(Explanation(name, 1.0 / centre, p_value, near or p_value >= error_rate))
    return tuple(out)


def steady(reported: Reported, traffic: MeasuredTraffic, share_LED: NDArray[np.float64], *, error_rate: float) -> bool:
    """Whether passes differ from one another no more than clumped ones do under a map: noise does.

    True where there is one pass, or passes of unknown size.
    """
    if len(reported.most_B) < 2 or (reported.pairs_B is None and traffic.passes_BLE is None):
        return True
    rng = np.random.default_rng(1)
    most_P, mean_P = _figures(_drawn(reported, traffic, CLUMPED, rng), share_LED, reported)
    pick_RN = rng.integers(0, len(most_P), (DRAWS, min(len(most_P), len(reported.most_B))))
    spread_R = (mean_P / most_P)[pick_RN].std(axis=1)
    seen = float((reported.mean_B / reported.most_B).std())
    return seen <= float(np.quantile(spread_R, 1 - error_rate)) + 0.01


def measures_of(
    mean_B: NDArray[np.float64], layers: int, devices: int, top_k: int | None
) -> dict[Measure, NDArray[np.float64]]:
    """What vLLM's mean may be of, and the pairs of a pass's layer that follow, float64 [B]: numbers have to come out
    whole, and multiples of K where that decides. Both, where neither fits (padding, tokens without experts).
    """
    scale: dict[Measure, float] = {"ranks": devices / layers, "layers": 1.0}
    pairs = {name: mean_B * factor for name, factor in scale.items()}

    def fits(name: Measure, unit: int) -> bool:
        off_B = np.abs(pairs[name] / unit - np.rint(pairs[name] / unit)) * unit
        return bool((off_B <= 0.0051 * scale[name] + 1e-6 * pairs[name]).mean() >= 0.99)

    for unit in (top_k or 1, 1):
        if found := {name: pairs[name] for name in pairs if fits(name, unit)}:
            return found
    return pairs


def copies_of(most_B: NDArray[np.float64], devices: int) -> int:
    """How often the engine counted each pair: ranks that share tokens by tensor parallelism count all of them, each
    (vLLM 0.32 on two ranks did), so that every number is a multiple of how many they are. The same number again tells
    nothing: a few batches that repeat have a common divisor by chance.
    """
    if len(np.unique(most_B)) < FEWEST_COUNTED:
        return 1
    return int(np.gcd(np.gcd.reduce(np.rint(most_B).astype(np.int64)), devices))


def _drawn(
    reported: Reported, traffic: MeasuredTraffic, clumped: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Passes, pairs of experts [P, L, E]: the recorded ones, drawn ones, or one that is endless."""
    if traffic.passes_BLE is not None:
        return traffic.passes_BLE
    total_LE = traffic.parts_GLE.sum(axis=0)
    share_LE = total_LE / total_LE.sum(axis=1, keepdims=True)
    if reported.pairs_B is None:
        return total_LE[None]
    size = int(np.clip(MOST_CELLS // total_LE.size, LEAST_PASSES, MOST_PASSES))
    at = np.linspace(0, len(reported.pairs_B) - 1, size).round().astype(np.int64)
    pairs_P11 = np.sort(reported.pairs_B)[at][:, None, None]
    most_k = min(MOST_TOP_K, int(1.0 / share_LE.max()))  # unknown: the largest leaves least to chance
    top_k = max(1, min(traffic.top_k or most_k, most_k))
    tokens_P11 = np.maximum(1, np.rint(pairs_P11 / top_k / clumped)).astype(np.int64)
    if top_k == 1:
        drawn = rng.multinomial(tokens_P11[:, :, 0], share_LE).astype(np.float64)
    else:
        drawn = rng.binomial(tokens_P11, np.minimum(1.0, top_k * share_LE)).astype(np.float64)
    sum_PL1 = drawn.sum(axis=2, keepdims=True)
    drawn = np.where(sum_PL1 > 0, drawn / np.maximum(sum_PL1, 1.0), share_LE)
    return drawn * pairs_P11


def _resampled(traffic: MeasuredTraffic, rng: np.random.Generator) -> NDArray[np.float64]:
    """The loads as another sample of the same traffic might have them, [RESAMPLED, L, E]."""
    parts = len(traffic.parts_GLE)
    if parts >= FEWEST_PARTS:
        weight_RG = rng.multinomial(parts, np.full(parts, 1 / parts), RESAMPLED).astype(np.float64)
        return np.tensordot(weight_RG, traffic.parts_GLE, axes=1)
    total_LE = traffic.parts_GLE.sum(axis=0)
    pairs_L = np.maximum(1, np.rint(total_LE.sum(axis=1))).astype(np.int64)
    return rng.multinomial(pairs_L, total_LE / total_LE.sum(axis=1, keepdims=True),
                           (RESAMPLED, len(pairs_L))).astype(np.float64)  # fmt: skip


def _figures(
    load_PLE: NDArray[np.float64], share_LED: NDArray[np.float64], reported: Reported
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Most and mean of each pass under a map, float64 [P] each."""
    load_LPD = np.matmul(load_PLE.transpose(1, 0, 2), share_LED)
    if reported.measure == "layers":
        return load_LPD.max(axis=0).sum(axis=1), load_LPD.mean(axis=0).sum(axis=1)
    most_LP, mean_LP = load_LPD.max(axis=2), load_LPD.mean(axis=2)
    if reported.measure == "ranks":
        return most_LP.sum(axis=0), mean_LP.sum(axis=0)
    each_LP = np.where(most_LP > 0, mean_LP / np.maximum(most_LP, 1e-300), 1.0)
    layers = len(each_LP) + reported.dense
    return np.ones(each_LP.shape[1]), (each_LP.sum(axis=0) + reported.dense) / layers


def _of(most_P: NDArray[np.float64], mean_P: NDArray[np.float64], pick_RN: NDArray[np.int64]) -> NDArray[np.float64]:
    """Imbalance of draws of passes, float64 [R]."""
    found: NDArray[np.float64] = most_P[pick_RN].sum(axis=1) / mean_P[pick_RN].sum(axis=1)
    return found
