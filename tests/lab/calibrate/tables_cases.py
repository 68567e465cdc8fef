"""Small tables made of known constants, as a collector would have written them."""

from pathlib import Path

import numpy as np

from poise.lab.calibrate.tables.fit import KernelFit
from poise.lab.calibrate.tables.kernels import TYPES, KernelRows, ideal_work
from poise.lab.calibrate.tables.ranks import Workload, rank_loads

TRUE = KernelFit(start_s=30e-6, read_factor=1.2, compute_factor=1.8, activation_factor=3.0)
SHAPES = [(2048, 768, 64, 4), (4096, 1536, 128, 8), (3072, 1024, 64, 8), (2048, 1408, 64, 6)]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
RANKS = (1, 2, 4, 8)
ALPHAS = (0.0, 1.01, 1.2)
KNOWN: dict = {}
"""Loads that some test drew before."""


def rows(
    gpu="h200", table_type="bfloat16", engine="vllm", kernel="some_kernel", version="0.25.0", true=TRUE, noise=0.0
):
    """Rows of one kernel whose seconds follow ``true``, with a relative error of that deviation."""
    name, weight_bytes = TYPES[table_type]
    grid = [
        (shape, ranks, tokens, alpha) for shape in SHAPES for ranks in RANKS for tokens in TOKENS for alpha in ALPHAS
    ]
    shape = np.array([one[0] for one in grid])
    ranks, tokens = (np.array([one[i] for one in grid]) for i in (1, 2))
    alpha = np.array([one[3] for one in grid])
    loads = rank_loads((Workload(t, s[2], s[3], r, a) for s, r, t, a in grid), KNOWN)
    work = ideal_work(gpu, weight_bytes, shape, loads, tokens.astype(float), np.ones(len(grid)))
    seconds = true.seconds(work) * np.exp(noise * np.random.default_rng(1).standard_normal(len(grid)))
    return KernelRows(gpu, name, engine, kernel, version, weight_bytes, shape, ranks, tokens, alpha, seconds)


def columns(group: KernelRows) -> dict[str, list]:
    """The columns of a ``moe_perf`` table."""
    table_type = next(key for key, (name, _) in TYPES.items() if name == group.type)
    number = len(group.seconds_R)
    hidden, inner, experts, top_k = group.shape_R4.T.tolist()
    return {
        "kernel_source": [group.kernel] * number, "moe_dtype": [table_type] * number,
        "num_tokens": group.tokens_R.tolist(), "hidden_size": hidden, "inter_size": inner, "topk": top_k,
        "num_experts": experts, "moe_tp_size": [1] * number, "moe_ep_size": group.ranks_R.tolist(),
        "distribution": ["balanced" if a == 0 else f"power_law_{a:g}" for a in group.alpha_R.tolist()],
        "latency": (1e3 * group.seconds_R).tolist(),
    }  # fmt: skip


def write(path: Path, data: dict[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(data), path)


def write_kernel(folder: Path, group: KernelRows) -> Path:
    path = folder / f"{group.gpu}_sxm" / "moe" / group.engine / group.version / "moe_perf.parquet"
    write(path, columns(group))
    return path
