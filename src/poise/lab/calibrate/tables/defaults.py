"""Which of several measured kernels an engine takes for a GPU and a type when nobody says otherwise.

vLLM and SGLang choose by the model too: vLLM in ``fused_moe/oracle/`` (on Blackwell FlashInfer's TRT-LLM kernels before
CUTLASS before Triton, monolithic ones before modular), SGLang in ``server_args`` (``moe_runner_backend`` *auto*). The
collector ran the engine's own choice and wrote its name down: no shape of a table is with two kernels but where the
number of ranks decides. So the default is the kernel that was chosen for most shapes, and of two such the one with
most rows. TensorRT-LLM's tables hold kernels nobody has by default: ``MoeConfig.backend`` *AUTO* is CUTLASS but for
gpt-oss (``ModelConfig.resolve_moe_backend``).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from poise.lab.calibrate.tables.fit import KernelFit
from poise.lab.calibrate.tables.kernels import KernelRows

AUTO = {"trtllm": "cutlass"}
"""Part of the name of the kernel that an engine's automatic choice is, if it is among those measured."""
UNTUNED = 4.5
"""Times the ideal seconds of reading weights from which on a kernel counts as untuned: 4-bit weights that a kernel
reads as 16-bit ones take 3.8."""


def untuned(fit: KernelFit) -> bool:
    """Whether weights are read so slowly that the engine was timed without the configuration it would run with."""
    return fit.read_factor > UNTUNED


def default_kernels(found: Iterable[tuple[KernelRows, KernelFit]]) -> set[tuple[str, str, str, str]]:
    """Names (GPU, type, engine, kernel) of the kernels that engines take by default; none that is untuned."""
    by: dict[tuple[str, str, str], list[KernelRows]] = {}
    for rows, fit in found:
        if not untuned(fit):
            by.setdefault((rows.gpu, rows.type, rows.engine), []).append(rows)

    def rank(rows: KernelRows) -> tuple[bool, int, int]:
        auto = AUTO.get(rows.engine, "") in rows.kernel
        return auto, len(np.unique(rows.shape_R4, axis=0)), len(rows.seconds_R)

    return {max(candidates, key=rank).name for candidates in by.values()}
