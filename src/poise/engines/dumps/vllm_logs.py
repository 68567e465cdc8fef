"""Balance that engines log step by step.

vLLM (``log_balancedness`` of ``--eplb-config``; distributed/eplb/eplb_state.py)
    ``EPLB step: %d for model %s: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f``: tokens of the mean rank over
    those of the fullest, both summed over layers; 0 where no token came.
SGLang (``--expert-balancedness-report-mode``, before that ``--enable-expert-distribution-metrics``)
    ``[Expert Balancedness] forward_pass_id=%d current_pass_balancedness=%.3f``: the ratio of each layer, mean over
    layers, dense ones counted as 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import listed
from poise.errors import TraceError
from poise.files import open_regular

NUMBER = r"(\d{1,20}(?:\.\d{1,20})?)"
VLLM = re.compile(
    rf"EPLB step: \d{{1,20}}(?: for model (\S{{1,200}}))?[:,] "
    rf"avg_tokens={NUMBER}, max_tokens={NUMBER}, balancedness={NUMBER}"
)
SGLANG = re.compile(
    rf"\[Expert Balancedness\] forward_pass_id=\d{{1,20}} (?:\S{{1,80}} )?current_pass_balancedness={NUMBER}"
)
MARKS = ("EPLB step: ", "[Expert Balancedness]")
MAX_LINE = 1 << 16
MAX_LINES = 1 << 27


def is_log(part: Part) -> bool:
    """Whether some line tells a balance."""
    return any(True for _ in _found(part.path))


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """The balances of one model in order; where a log has several, those of the one with most lines."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for part in parts:
        for engine, model, value in _found(part.path):
            values[engine, model].append(value)
    if not values:
        raise TraceError("no line of it tells a balance", hint="vLLM: log_balancedness in --eplb-config")
    engine, model = max(values, key=lambda key: len(values[key]))
    balance = np.array(values[engine, model])
    if balance.max() > 1.001:
        raise TraceError(f"a balance of {balance.max()}, at most 1 is possible")
    notes = []
    others = [name or "an unnamed model" for _, name in values if (_, name) != (engine, model)]
    if others:
        notes.append(f"balances of {listed(others)} were left out")
    busy = balance > 0
    if not busy.any():
        raise TraceError("all balances are 0: no token came")
    if not busy.all():
        notes.append(f"{(~busy).sum()} steps without tokens were left out")
    return EngineDump(engine, "balance-log", balance_B=np.minimum(balance[busy], 1.0), notes=tuple(notes))


def _found(path: Path) -> Iterator[tuple[str, str, float]]:
    """(engine, model, balance) of each line that has one."""
    with open_regular(path, TraceError) as stream:
        for _ in range(MAX_LINES):
            raw = stream.readline(MAX_LINE)
            if not raw:
                return
            line = raw.decode("utf-8", "replace")
            if MARKS[0] in line and (match := VLLM.search(line)):
                yield "vllm", match[1].rstrip(":") if match[1] else "", float(match[4])
            elif MARKS[1] in line and (match := SGLANG.search(line)):
                yield "sglang", "", float(match[1])
