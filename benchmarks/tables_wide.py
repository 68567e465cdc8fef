"""Rows with and without EPLB (``wideep_moe_perf``): does the model tell what balancing gains, and what a slot costs?

The constants are fitted to rows *without* EPLB of other model shapes, and predict both. Beside the model stand the
datasheet's roofline and token counts alone (the imbalance that planners usually minimise).

These tables were drawn before 2026-04-19, by another rule than :mod:`poise.lab.calibrate.tables.loads` has: what was
left over went to the emptiest experts one by one, those of the last rank first where many are equal. Below one token an
expert that piles work on one rank, and makes EPLB look better. EPLB: greedy replication and longest-first placement on
the very loads that are timed (an oracle).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.lab.calibrate.tables.fit import DATASHEET, KernelWork
from poise.lab.calibrate.tables.judge import folds, held_out_seconds
from poise.lab.calibrate.tables.kernels import TYPES, KernelRows, alpha_of, gpu_name, ideal_work
from poise.lab.calibrate.tables.loads import Counts, draw_counts, fullest_first
from poise.lab.calibrate.tables.ranks import KnownLoads, Workload, mean_vector, rank_loads
from poise.lab.calibrate.tables.source import TableSource, numbers
from poise.util.errors import OptionError

COLUMNS = (
    "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "num_slots", "moe_tp_size",
    "moe_ep_size", "distribution", "latency",
)  # fmt: skip
DRAWS = 20
"""Rows are of one draw, which nobody knows: the model predicts the mean of many."""
PREDICTORS = ("model", "datasheet", "tokens")


@dataclass(frozen=True, slots=True, eq=False)
class WideRows(KernelRows):
    """Rows of one GPU of the wide-EP table; ``slots_R`` int [R] is -1 without EPLB."""

    slots_R: NDArray[np.int64]


def read_wide(source: TableSource) -> list[WideRows]:
    """All wide-EP tables of GPUs that poise knows. OptionError: a table cannot be read, or there is none."""
    out = []
    for place in source.tables("moe", "wideep_moe_perf"):
        gpu = gpu_name(place.gpu)
        if gpu is None:
            continue
        data = source.columns(place, COLUMNS)
        whole = {name: numbers(data[name], name, place.key, least=1).astype(np.int64) for name in COLUMNS[1:9]}
        words, kinds = data["distribution"].astype(str), np.unique(data["moe_dtype"].astype(str))
        if len(kinds) != 1 or kinds[0] not in TYPES:
            raise OptionError(f"{place.key} has the types {', '.join(kinds)}, one known type is needed")
        name, weight_bytes = TYPES[str(kinds[0])]
        eplb = np.char.endswith(words, "_eplb")
        seconds = numbers(data["latency"], "latency", place.key, least=0.0) / 1e3
        out.append(WideRows(
            gpu, name, place.engine, "wide-EP", place.version, weight_bytes,
            np.stack([whole[key] for key in ("hidden_size", "inter_size", "num_experts", "topk")], axis=1),
            whole["moe_ep_size"], whole["num_tokens"], np.array([alpha_of(str(word), place.key) for word in words]),
            seconds, np.where(eplb, whole["num_slots"], -1),
        ))  # fmt: skip
    if not out:
        raise OptionError(f"{source.path} has no table wideep_moe_perf of a GPU that poise knows")
    return out


def _left_over_to_lowest(count: Counts, over: int, missing: int, cap: int) -> Counts:
    """The old rule for pairs left over: the lowest first (the last of equals), the order kept as it was before."""
    rising = np.argsort(-count, kind="stable")[::-1]
    for expert in rising:
        if over <= 0:
            break
        given = min(over, cap - int(count[expert]))
        count[expert] += given
        over -= given
    rising, turn = np.argsort(-count, kind="stable")[::-1], 0
    while missing != 0:
        expert = rising[turn % len(rising)]
        turn += 1
        if missing > 0 and count[expert] < cap:
            count[expert] += 1
            missing -= 1
        elif missing < 0:
            count[expert if count[expert] > 0 else int(count.argmax())] -= 1
            missing += 1
    return count


def old_power_law_load(
    tokens: int, experts: int, top_k: int, ranks: int, alpha: float, rng: np.random.Generator
) -> Counts:
    """As :func:`poise.lab.calibrate.tables.loads.power_law_load`, by the rule before 2026-04-19."""
    count = _left_over_to_lowest(*draw_counts(tokens, experts, top_k, alpha, rng), tokens)
    return fullest_first(count.reshape(ranks, -1))


def eplb_slots(load_E: NDArray[np.int64], slots: int, ranks: int) -> NDArray[np.float64]:
    """Tokens of every slot, float [ranks, slots / ranks], the fullest rank first.

    Each slot beyond E goes to the expert whose replicas have most tokens each; then slots, the fullest first, go to the
    rank that has fewest tokens and still a place.
    """
    replicas = np.ones(len(load_E), np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for _ in range(slots - len(load_E)):
        _, expert = heap[0]
        replicas[expert] += 1
        heapq.heapreplace(heap, (-float(load_E[expert]) / replicas[expert], expert))
    each = np.sort(np.repeat(load_E / replicas, replicas))[::-1]
    held: list[list[float]] = [[] for _ in range(ranks)]
    open_ranks = [(0.0, rank) for rank in range(ranks)]
    for load in each.tolist():
        total, rank = heapq.heappop(open_ranks)
        held[rank].append(load)
        if len(held[rank]) < slots // ranks:
            heapq.heappush(open_ranks, (total + load, rank))
    slot_RS = np.array(held)
    fullest = int(slot_RS.sum(axis=1).argmax())
    return np.concatenate([slot_RS[fullest : fullest + 1], np.delete(slot_RS, fullest, axis=0)])


def eplb_load(
    tokens: int, experts: int, top_k: int, ranks: int, alpha: float, slots: int, rng: np.random.Generator
) -> Counts:
    """One draw of tokens of every slot, int [slots], after EPLB knew it: sums to N * K, the fullest rank first."""
    count = _left_over_to_lowest(*draw_counts(tokens, experts, top_k, alpha, rng), tokens)
    slot = eplb_slots(count, slots, ranks).reshape(-1)
    whole = np.floor(slot).astype(np.int64)
    missing = tokens * top_k - int(whole.sum())
    whole[np.argsort(-(slot - whole), kind="stable")[:missing]] += 1
    return whole


def wide_vector(work: Workload) -> NDArray[np.float64]:
    """What the load of the timed rank comes to, with EPLB's slots (``work.slots``) or without (-1)."""
    slots = work.slots
    if slots > 0:
        return mean_vector(work, slots // work.ranks, DRAWS, lambda rng: eplb_load(*work[:5], slots, rng))
    own = work.experts // work.ranks
    return mean_vector(work, own, DRAWS, lambda rng: old_power_law_load(*work[:5], rng))


def wide_work(rows: WideRows, known: KnownLoads) -> KernelWork:
    """Ideal seconds and measured ones; loads by the rule of before 2026-04-19."""
    works = [work._replace(slots=slots) for work, slots in zip(rows.workloads(), rows.slots_R.tolist(), strict=True)]
    known.update({work: wide_vector(work) for work in dict.fromkeys(works) if work not in known and work.alpha})
    loads = rank_loads(works, known)
    return ideal_work(rows.gpu, rows.weight_bytes, rows.shape_R4, loads, loads.tokens_R, rows.seconds_R)


@dataclass(frozen=True, slots=True, eq=False)
class Ratios:
    """Pairs of rows that differ in EPLB (or in slots) alone: seconds of the first over the second, above 1 a gain.

    Parameters
    ----------
    gpu_P : of each pair.
    tokens_each_P : tokens an expert, N * K / E.
    measured_P : ratio of measured seconds.
    predicted_P : by :data:`PREDICTORS`.
    """

    gpu_P: NDArray[np.str_]
    tokens_each_P: NDArray[np.float64]
    measured_P: NDArray[np.float64]
    predicted_P: dict[str, NDArray[np.float64]]

    def take(self, index: NDArray[np.bool_]) -> Ratios:
        """These pairs only."""
        predicted = {name: value[index] for name, value in self.predicted_P.items()}
        return Ratios(self.gpu_P[index], self.tokens_each_P[index], self.measured_P[index], predicted)

    def figures(self, least: float = 0.03) -> dict[str, float]:
        """Mean gains (geometric), errors of the ratio, and how often the sign is right where it differs by
        ``least``.
        """
        clear = np.abs(np.log(self.measured_P)) > least
        out = {
            "pairs": float(len(self.measured_P)),
            "measured": float(np.exp(np.log(self.measured_P).mean())),
            "loses": float((self.measured_P < 1).mean()),
        }
        for name, value in self.predicted_P.items():
            right = np.sign(np.log(value)) == np.sign(np.log(self.measured_P))
            out[f"{name}_mean"] = float(np.exp(np.log(value).mean()))
            out[f"{name}_mape"] = float(np.abs(value / self.measured_P - 1.0).mean())
            out[f"{name}_sign"] = float(right[clear].mean()) if clear.any() else float("nan")
        return out


def ratios(rows: WideRows, work: KernelWork) -> tuple[Ratios, Ratios]:
    """Without over with EPLB, and 256 over 288 slots both with EPLB; the model fitted without the pair's shape and
    EPLB.
    """
    bare = rows.slots_R < 0
    shape_R = np.unique(rows.shape_R4, axis=0, return_inverse=True)[1].reshape(-1)
    predicted = {
        "model": _left_out(work, bare, shape_R),
        "datasheet": DATASHEET.seconds(work),
        "tokens": work.loads.pairs_R,
    }
    key = [
        (*shape, ranks, tokens, alpha)
        for shape, ranks, tokens, alpha in zip(
            rows.shape_R4.tolist(), rows.ranks_R.tolist(), rows.tokens_R.tolist(), rows.alpha_R.tolist(), strict=True
        )
    ]
    at: dict[tuple[object, ...], dict[int, list[int]]] = {}
    for index, (one, slots) in enumerate(zip(key, rows.slots_R.tolist(), strict=True)):
        at.setdefault(one, {}).setdefault(slots, []).append(index)
    eplb = [(found[-1], [i]) for found in at.values() if -1 in found for s in found if s > 0 for i in found[s]]
    redundant = [(found[256], found[288]) for found in at.values() if 256 in found and 288 in found]
    return _pairs(rows, predicted, eplb), _pairs(rows, predicted, redundant)


def _left_out(work: KernelWork, bare: NDArray[np.bool_], shape_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """Seconds by constants fitted to the rows without EPLB of all other shapes."""
    out = np.full(len(bare), np.nan)
    fold = folds(shape_R, int(shape_R.max()) + 1)
    for one in np.unique(fold):
        # held_out_seconds judges a fold by fits to the others: rows with EPLB are judged and never fitted
        fitted, judged = bare & (fold != one), fold == one
        both = work.take(np.concatenate([np.flatnonzero(fitted), np.flatnonzero(judged)]))
        group = np.repeat([1, 0], [int(fitted.sum()), int(judged.sum())])
        if fitted.any():
            out[judged] = held_out_seconds(both, group)[group == 0]
    return out


def _pairs(
    rows: WideRows, predicted: dict[str, NDArray[np.float64]], pairs: list[tuple[list[int], list[int]]]
) -> Ratios:
    def ratio(value: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([value[first].mean() / value[second].mean() for first, second in pairs])

    first = np.array([pair[0][0] for pair in pairs], dtype=np.int64)
    each = rows.tokens_R[first] * rows.shape_R4[first, 3] / rows.shape_R4[first, 2]
    return Ratios(
        np.full(len(pairs), rows.gpu), each, ratio(rows.seconds_R),
        {name: ratio(value) for name, value in predicted.items()},
    )  # fmt: skip


def together(parts: list[Ratios]) -> Ratios:
    """Pairs of several GPUs."""
    return Ratios(
        np.concatenate([part.gpu_P for part in parts]), np.concatenate([part.tokens_each_P for part in parts]),
        np.concatenate([part.measured_P for part in parts]),
        {name: np.concatenate([part.predicted_P[name] for part in parts]) for name in PREDICTORS},
    )  # fmt: skip
