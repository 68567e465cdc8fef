"""Rows of the kernel tables (``moe_perf``) by GPU, type, engine and kernel, and their ideal seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from poise.lab.calibrate.tables.fit import KernelWork
from poise.lab.calibrate.tables.ranks import KnownLoads, RankLoads, Workload, rank_loads
from poise.lab.calibrate.tables.source import TablePlace, TableSource, numbers
from poise.machine.constants import peak_of
from poise.machine.presets import DEVICES, PEAKS
from poise.util.errors import OptionError

TYPES = {
    "bfloat16": ("bf16", 2.0),
    "fp8": ("fp8", 1.0),
    "fp8_block": ("fp8_block", 1.0),
    "nvfp4": ("nvfp4", 0.5 + 1 / 16),
    "w4a16_mxfp4": ("mxfp4", 0.5 + 1 / 32),
    "w4a8_mxfp4_mxfp8": ("mxfp4_mxfp8", 0.5 + 1 / 32),
    "int4_wo": ("int4", 0.5 + 2 / 128),
    "w4afp8": ("w4afp8", 0.5 + 2 / 128),
}
"""Name and bytes of a weight, scales of blocks included, of each type in the tables."""
OTHER_FORM = ("nongated", "situ_as_silu")
"""Kernels of experts without a gate, and of an activation that a stand-in was timed for."""
SGLANG_LOCAL = (0, 5, 14)
"""SGLang's release from which on its power-law rows were timed on the tokens of rank 0 alone."""
MIN_ROWS, MIN_SHAPES = 500, 2
"""Fewer do not show an error on unseen shapes: such groups are not listed."""
COLUMNS = (
    "kernel_source", "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size",
    "moe_ep_size", "distribution", "latency",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class KernelRows:
    """Measured rows of one kernel: of one rank, experts whole (no tensor parallelism inside them).

    Parameters
    ----------
    gpu : as poise's presets name it. type, engine, kernel, version : as in the tables, the type by poise's name.
    shape_R4 : int [R, 4], hidden, inner, experts, top-k.
    ranks_R, tokens_R : ranks that share the experts, and tokens of all of them together.
    alpha_R : exponent of the power law, 0 where loads are balanced.
    seconds_R : measured.
    """

    gpu: str
    type: str
    engine: str
    kernel: str
    version: str
    weight_bytes: float
    shape_R4: NDArray[np.int64]
    ranks_R: NDArray[np.int64]
    tokens_R: NDArray[np.int64]
    alpha_R: NDArray[np.float64]
    seconds_R: NDArray[np.float64]

    @property
    def name(self) -> tuple[str, str, str, str]:
        """GPU, type, engine, kernel."""
        return self.gpu, self.type, self.engine, self.kernel

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> KernelRows:
        """These rows only."""
        return replace(
            self, shape_R4=self.shape_R4[index], ranks_R=self.ranks_R[index], tokens_R=self.tokens_R[index],
            alpha_R=self.alpha_R[index], seconds_R=self.seconds_R[index],
        )  # fmt: skip

    def workloads(self) -> Iterator[Workload]:
        """What each row says of its load."""
        for (_, _, experts, top_k), ranks, tokens, alpha in zip(
            self.shape_R4.tolist(), self.ranks_R.tolist(), self.tokens_R.tolist(), self.alpha_R.tolist(), strict=True
        ):
            yield Workload(tokens, experts, top_k, ranks, alpha)


def gpu_name(folder: str) -> str | None:
    """The preset that a GPU of the tables is, if its peaks are known."""
    name = folder.removesuffix("_sxm")
    return name if name in PEAKS else None


def alpha_of(distribution: str, key: str) -> float:
    """Exponent of ``power_law_A``, 0 of ``balanced``; OptionError for anything else."""
    if distribution == "balanced":
        return 0.0
    match = re.fullmatch(r"power_law_(\d+(?:\.\d+)?)(?:_eplb)?", distribution)
    if not match or float(match[1]) in (0.0, 1.0):
        raise OptionError(f"{key} has the distribution {distribution[:40]!r}", hint="balanced or power_law_A, A not 1")
    return float(match[1])


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _rows_of(source: TableSource, place: TablePlace, gpu: str) -> Iterator[KernelRows]:
    data = source.columns(place, COLUMNS)
    whole = {name: numbers(data[name], name, place.key, least=1).astype(np.int64) for name in COLUMNS[2:9]}
    seconds = numbers(data["latency"], "latency", place.key, least=0.0) / 1e3
    kernel, kind = data["kernel_source"].astype(str), data["moe_dtype"].astype(str)
    keep = (whole["moe_tp_size"] == 1) & (seconds > 0) & (whole["num_experts"] % whole["moe_ep_size"] == 0)
    alpha = {word: alpha_of(str(word), place.key) for word in np.unique(data["distribution"][keep].astype(str))}
    shape = np.stack([whole[name] for name in ("hidden_size", "inter_size", "num_experts", "topk")], axis=1)
    for one in np.unique(kernel[keep]):
        if any(word in one for word in OTHER_FORM):
            continue
        for table_type in np.unique(kind[keep & (kernel == one)]):
            if table_type not in TYPES:
                continue
            index = keep & (kernel == one) & (kind == table_type)
            name, weight_bytes = TYPES[table_type]
            yield KernelRows(
                gpu, name, place.engine, str(one), place.version, weight_bytes, shape[index],
                whole["moe_ep_size"][index], whole["num_tokens"][index],
                np.array([alpha[word] for word in data["distribution"][index]]), seconds[index],
            )  # fmt: skip


def read_all_versions(source: TableSource) -> list[KernelRows]:
    """Every kernel of every release of every engine on GPUs that poise knows."""
    found: list[KernelRows] = []
    for place in source.tables("moe", "moe_perf"):
        gpu = gpu_name(place.gpu)
        if gpu is not None and not place.version.startswith("dev"):  # a build of some commit
            found += _rows_of(source, place, gpu)
    return found


def read_kernels(source: TableSource) -> list[KernelRows]:
    """The kernels that are fitted, sorted by name.

    For each GPU, engine and type of one version of the engine: the newest that has at least half as many rows as the
    one that has most. Groups of too few rows or shapes are left out.

    Raises
    ------
    OptionError : a table cannot be read, or nothing is left.
    """
    out = list(_of_one_version(read_all_versions(source)))
    if not out:
        raise OptionError(
            f"{source.path} has no kernel of {MIN_ROWS} rows and {MIN_SHAPES} shapes on a GPU that poise knows",
            hint=f"GPUs: {', '.join(PEAKS)}",
        )
    return sorted(out, key=lambda group: group.name)


def _of_one_version(found: Iterable[KernelRows]) -> Iterator[KernelRows]:
    by: dict[tuple[str, str, str], dict[str, list[KernelRows]]] = {}
    for group in found:
        by.setdefault((group.gpu, group.engine, group.type), {}).setdefault(group.version, []).append(group)
    for versions in by.values():
        count = {version: sum(len(group.seconds_R) for group in groups) for version, groups in versions.items()}
        enough = [version for version, rows in count.items() if 2 * rows >= max(count.values())]
        for group in versions[max(enough, key=version_key)]:
            if len(group.seconds_R) >= MIN_ROWS and len(np.unique(group.shape_R4, axis=0)) >= MIN_SHAPES:
                yield group


def given_tokens(group: KernelRows, loads: RankLoads) -> NDArray[np.float64]:
    """Tokens that the timed kernel was given, float [R].

    All tokens of all ranks, but in SGLang's later tables: there only those with an expert here, where loads are random.
    """
    everything = group.tokens_R.astype(float)
    if group.engine != "sglang" or version_key(group.version) < SGLANG_LOCAL:
        return everything
    return np.where(group.alpha_R > 0, loads.tokens_R, everything)


def ideal_work(
    gpu: str,
    weight_bytes: float,
    shape_R4: NDArray[np.int64],
    loads: RankLoads,
    given_R: NDArray[np.float64],
    seconds_R: NDArray[np.float64],
) -> KernelWork:
    """Ideal seconds of gated experts (three matrices), ``given_R`` tokens given to the kernel, beside what was
    measured.
    """
    hidden, inner = shape_R4[:, 0].astype(float), shape_R4[:, 1].astype(float)
    bandwidth = DEVICES[gpu]["memory_bytes_per_s"]
    parameters = 3.0 * hidden * inner
    moved = loads.pairs_R * (2.0 * hidden + 3.0 * inner) + 2.0 * given_R * hidden
    return KernelWork(
        parameters * weight_bytes / bandwidth, 2.0 * parameters / peak_of(gpu, weight_bytes), moved * 2.0 / bandwidth,
        loads, seconds_R,
    )  # fmt: skip


def kernel_work(group: KernelRows, known: KnownLoads) -> KernelWork:
    """All rows of a kernel, their loads drawn anew or taken from ``known``."""
    loads = rank_loads(group.workloads(), known)
    given = given_tokens(group, loads)
    return ideal_work(group.gpu, group.weight_bytes, group.shape_R4, loads, given, group.seconds_R)
