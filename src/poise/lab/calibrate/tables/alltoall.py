"""Start and rates of dispatch and combine from the tables of all-to-alls, by GPU, library and how far they reach.

    seconds = start + peer * (ranks - 1) [+ nodes_start across nodes]
              + max(bytes into one port inside the node / intra rate, bytes into one network port / inter rate)

Bytes of N tokens a rank, evenly drawn experts: DeepEP's low-latency kernels send each of the K copies of a token, its
normal kernels one to each rank that holds any of them. Dispatch is in fp8 with a scale for 128 values, combine in 16
bits. NCCL's all-to-all tells of bytes alone. Sources: the tests of deepseek-ai/DeepEP, which the collector ran;
``nccl-tests``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import gammaln

from poise.lab.calibrate.tables.judge import folds, mape
from poise.lab.calibrate.tables.kernels import gpu_name, version_key
from poise.lab.calibrate.tables.source import TablePlace, TableSource, numbers

Floats = NDArray[np.float64]
RANKS_A_NODE = {"gb200": 4}
"""Ranks of the one-node tables of DeepEP, where they are not 8."""
SMS = 24
"""Streaming multiprocessors that DeepEP's normal kernels were given in the rows taken here: its own test's number."""
LOSS = 0.02
"""Relative error from which on the loss grows linearly: with few rows and two constants, the mean error is what
counts."""


@dataclass(frozen=True, slots=True, eq=False)
class AllToAllRows:
    """Measured rows of one direction.

    Parameters
    ----------
    peers_R : other ranks. across_R : whether they are on several nodes.
    intra_R, inter_R : bytes into the fullest port inside the node, and into a rank's network port.
    seconds_R : measured.
    label_R : rows that are alike; a fold holds all of a label or none.
    experts_R : experts of the model, where the table has them.
    """

    peers_R: Floats
    across_R: NDArray[np.bool_]
    intra_R: Floats
    inter_R: Floats
    seconds_R: Floats
    label_R: NDArray[np.int64]
    experts_R: Floats | None = None

    def take(self, index: NDArray[np.bool_]) -> AllToAllRows:
        """These rows only."""
        return AllToAllRows(
            self.peers_R[index], self.across_R[index], self.intra_R[index], self.inter_R[index], self.seconds_R[index],
            self.label_R[index], None if self.experts_R is None else self.experts_R[index],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class AllToAllFit:
    """Constants of one direction; ``inter_bytes_per_s`` is None where all ranks are on one node."""

    start_s: float
    peer_s: float
    nodes_start_s: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float | None
    error: float = float("nan")

    def seconds(self, rows: AllToAllRows) -> Floats:
        """What the constants say of each row, float [R]."""
        port = rows.intra_R / self.intra_bytes_per_s
        if self.inter_bytes_per_s is not None:
            port = np.maximum(port, rows.inter_R / self.inter_bytes_per_s)
        return self.start_s + self.peer_s * rows.peers_R + self.nodes_start_s * rows.across_R + port


@dataclass(frozen=True, slots=True, eq=False)
class LinkRows:
    """Both directions of a library on a GPU; ``reach`` is node, nodes or domain (NVLink over several nodes)."""

    gpu: str
    library: str
    reach: str
    version: str
    dispatch: AllToAllRows
    combine: AllToAllRows

    @property
    def doubtful(self) -> bool:
        """Whether the rows' origin is in doubt: those of several nodes are the same for h100 and h200."""
        return self.reach == "nodes"


def fit_exchange_rows(rows: AllToAllRows) -> AllToAllFit:
    """Constants that fit best; those of which the rows tell nothing are 0 or None."""
    use = [
        True,
        bool(len(np.unique(rows.peers_R)) > 1),
        bool(rows.across_R.any()),
        True,
        bool((rows.inter_R > 0).any()),
    ]
    begin = np.log(np.array([12e-6, 0.1e-6, 5e-6, 250e9, 45e9])[use])

    def constants(log: Floats) -> AllToAllFit:
        values = np.zeros(5)
        values[use] = np.exp(log)
        start, peer, nodes, intra, inter = values.tolist()
        return AllToAllFit(start, peer, nodes, intra, inter if use[4] else None)

    def residual(log: Floats) -> Floats:
        out: Floats = np.log(constants(log).seconds(rows) / rows.seconds_R)
        return out

    found = least_squares(residual, begin, bounds=(begin - 6.0, begin + 6.0), loss="soft_l1", f_scale=LOSS)
    return constants(found.x)


def held_out_exchange(rows: AllToAllRows) -> Floats:
    """Each row as predicted by constants fitted to the rows of all other labels; NaN where there is no other."""
    fold, out = folds(rows.label_R, len(np.unique(rows.label_R))), np.full(len(rows.seconds_R), np.nan)
    for one in np.unique(fold):
        judged = fold == one
        if not judged.all():
            out[judged] = fit_exchange_rows(rows.take(~judged)).seconds(rows.take(judged))
    return out


def judged_exchange(rows: AllToAllRows) -> AllToAllFit:
    """Constants of all rows, with the error on rows that were left out of other fits."""
    return replace(fit_exchange_rows(rows), error=mape(held_out_exchange(rows), rows.seconds_R))


def ranks_hit(experts: Floats, top_k: Floats, ranks: int) -> Floats:
    """Mean number of ranks that hold any of a token's K different experts, all sets of K being as likely."""
    own = experts / ranks
    choose = gammaln(experts - own + 1) - gammaln(np.maximum(experts - own - top_k, 0) + 1)
    choose -= gammaln(experts + 1) - gammaln(experts - top_k + 1)
    return ranks * (1.0 - np.where(experts - own >= top_k, np.exp(choose), 0.0))


def _way_bytes(hidden: Floats) -> dict[str, Floats]:
    return {"dispatch": hidden * (1 + 4 / 128), "combine": 2.0 * hidden}


def _labels(*columns: Floats) -> NDArray[np.int64]:
    return np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def _read(source: TableSource, place: TablePlace, names: tuple[str, ...]) -> dict[str, Floats]:
    data = source.columns(place, names)
    return {name: numbers(data[name], name, place.key, least=0.0) for name in names}


def _deepep(source: TableSource, place: TablePlace, gpu: str, kind: str) -> Iterator[LinkRows]:
    """DeepEP's tables: one node each of the version that has many shapes, several nodes of the one that has them."""
    low = kind == "ll"
    times = {way: f"{way}_avg_t_us" if low else f"{way}_transmit_us" for way in ("dispatch", "combine")}
    names = ("node_num", "hidden_size", "num_token", "num_topk", "num_experts", *times.values())
    data = _read(source, place, names if low else (*names, "dispatch_sms", "combine_sms"))
    keep = np.full(len(data["node_num"]), True) if low else (data["dispatch_sms"] == SMS) & (data["combine_sms"] == SMS)
    many = bool((data["node_num"] > 1).any())
    if many and not low:
        return  # rows across nodes contradict each other (docs/accuracy.md)
    data = {name: column[keep] for name, column in data.items()}
    a_node = RANKS_A_NODE.get(gpu, 8)
    tokens, ranks = data["num_token"], a_node * data["node_num"]
    if low:  # a copy to the rank of each expert
        intra, inter = data["num_topk"] * (a_node - 1) / ranks, data["num_topk"] * (ranks - a_node) / ranks
    else:
        intra = ranks_hit(data["num_experts"], data["num_topk"], a_node) * (a_node - 1) / a_node
        inter = np.zeros(len(tokens))
    label = _labels(data["node_num"]) if many else _labels(data["hidden_size"], data["num_topk"], data["num_experts"])
    ways = {}
    for way, size in _way_bytes(data["hidden_size"]).items():
        # low-latency messages carry a header of 16 bytes besides
        size = size + 16.0 if low and way == "dispatch" else size
        ways[way] = AllToAllRows(
            ranks - 1, data["node_num"] > 1, tokens * intra * size, tokens * inter * size, data[times[way]] / 1e6,
            label, data["num_experts"],
        )  # fmt: skip
    yield LinkRows(gpu, "deepep-ll" if low else "deepep-normal", "nodes" if many else "node", place.version, **ways)


def _nccl(source: TableSource, place: TablePlace, gpu: str) -> Iterator[LinkRows]:
    data = source.columns(place, ("op_name", "nccl_dtype", "num_gpus", "message_size", "latency"))
    ranks = numbers(data["num_gpus"], "num_gpus", place.key, least=1)
    here = data["op_name"].astype(str) == "alltoall"
    if not here.any():
        return
    keep = here & (ranks == ranks[here].max())
    item = np.where(data["nccl_dtype"].astype(str) == "half", 2.0, 1.0)  # sizes are in elements
    sent = numbers(data["message_size"], "message_size", place.key, least=1) * item * (ranks - 1) / ranks
    seconds = numbers(data["latency"], "latency", place.key, least=0.0) / 1e3
    zero = np.zeros(int(keep.sum()))
    rows = AllToAllRows(ranks[keep] - 1, zero > 0, sent[keep], zero, seconds[keep], _labels(sent[keep]))
    yield LinkRows(gpu, "nccl", "node", place.version, rows, rows)


def _nvlink_domain(source: TableSource, place: TablePlace, gpu: str) -> Iterator[LinkRows]:
    """TensorRT-LLM's exchanges over an NVLink domain of several nodes: a copy to each rank that holds any expert."""
    names = ("op_name", "kernel_source", "moe_dtype", "num_tokens", "hidden_size", "topk", "moe_ep_size", "latency")
    data = source.columns(place, names)
    op, kernel = data["op_name"].astype(str), data["kernel_source"].astype(str)
    weight = np.array(
        [{"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}.get(str(one), np.nan) for one in data["moe_dtype"]]
    )
    number = {name: numbers(data[name], name, place.key, least=0.0) for name in names[3:]}
    ranks = number["moe_ep_size"]
    for word, library in (("NVLinkOneSided", "one-sided"), ("NVLinkTwoSided", "two-sided")):
        ways = {}
        for way in ("dispatch", "combine"):
            keep = (kernel == word) & (op == f"alltoall_{way}") & (ranks >= 4) & (number["latency"] > 0)
            if keep.sum() < 2:
                break
            size = number["hidden_size"] * (weight if way == "dispatch" else 2.0)
            sent = number["num_tokens"] * np.minimum(ranks, number["topk"]) * (1 - 1 / ranks) * size
            zero = np.zeros(int(keep.sum()))
            ways[way] = AllToAllRows(
                ranks[keep] - 1, zero > 0, sent[keep], zero, number["latency"][keep] / 1e3, _labels(ranks[keep])
            )
        if len(ways) == 2:
            yield LinkRows(gpu, library, "domain", place.version, **ways)


def read_links(source: TableSource) -> list[LinkRows]:
    """All tables of all-to-alls on GPUs that poise knows, the newest version of each; sorted."""
    found: dict[tuple[str, str, str], LinkRows] = {}

    def add(rows: Iterator[LinkRows]) -> None:
        for one in rows:
            key = (one.gpu, one.library, one.reach)
            if key not in found or version_key(one.version) > version_key(found[key].version):
                found[key] = one

    for kind, name in (("ll", "wideep_deepep_ll_perf"), ("normal", "wideep_deepep_normal_perf")):
        for place in source.tables("comm", name):
            if (gpu := gpu_name(place.gpu)) is not None:
                add(_deepep(source, place, gpu, kind))
    for place in source.tables("comm", "nccl_perf"):
        if (gpu := gpu_name(place.gpu)) is not None:
            add(_nccl(source, place, gpu))
    for place in source.tables("comm", "trtllm_alltoall_perf"):
        if (gpu := gpu_name(place.gpu)) is not None:
            add(_nvlink_domain(source, place, gpu))
    return [found[key] for key in sorted(found)]
