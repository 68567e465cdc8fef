"""Balance that engines log step by step.

vLLM (``log_balancedness`` of ``--eplb-config``; distributed/eplb/eplb_state.py)
    ``EPLB step: %d for model %s: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f``: tokens of the mean rank over
    those of the fullest, both summed over layers; 0 where no token came. Releases of a year (#22167, August 2025, to
    #51813, August 2026) took mean and most of *layers*, summed over ranks; :mod:`poise.engines.explain` tries both.
    The step counts up to the next rearrangement and starts anew with it.
SGLang (``--expert-balancedness-report-mode``, before that ``--enable-expert-distribution-metrics``)
    ``[Expert Balancedness] forward_pass_id=%d current_pass_balancedness=%.3f``: the ratio of each layer, mean over
    layers, dense ones counted as 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poise.engines.dump import BalanceLog, EngineDump, ReadOptions
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import listed
from poise.util.errors import TraceError
from poise.util.files import open_regular

NUMBER = r"(\d{1,20}(?:\.\d{1,20})?)"
VLLM = re.compile(
    rf"EPLB step: (\d{{1,20}})(?: for model (\S{{1,200}}))?[:,] "
    rf"avg_tokens={NUMBER}, max_tokens={NUMBER}, balancedness={NUMBER}"
)
SGLANG = re.compile(
    rf"\[Expert Balancedness\] forward_pass_id=\d{{1,20}} (?:\S{{1,80}} )?current_pass_balancedness={NUMBER}"
)
MARKS = ("EPLB step: ", "[Expert Balancedness]")
STATIC = re.compile(r"poise plans expert placement: .{0,4000}?static_map=StaticMap\(")
FALLBACK = re.compile(r"poise: .{0,4000}?'?s own algorithm answers")
SWITCH = re.compile(r"\benable_eplb=(True|False)\b")
MAX_LINE = 1 << 16
MAX_LINES = 1 << 27


@dataclass(frozen=True, slots=True)
class _BalanceLine:
    """A line that tells a balance; vLLM's with its step, mean and most, else 0."""

    engine: str
    model: str
    balance: float
    step: int = 0
    mean: float = 0.0
    most: float = 0.0


@dataclass(slots=True)
class _Balancer:
    """What the lines say of who makes maps."""

    off: bool = False

    def hear(self, line: str) -> None:
        """A static map of poise's plugin, or a switch that is off, until the engine's algorithm answers after all."""
        if "poise" in line:
            self.off = (self.off or STATIC.search(line) is not None) and FALLBACK.search(line) is None
        elif found := SWITCH.search(line):
            self.off = found[1] == "False"


def is_log(part: Part) -> bool:
    """Whether some line tells a balance."""
    return any(True for _ in _found(part.path, _Balancer()))


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """The balances of one model in order; where a log has several, those of the one with most lines."""
    values: dict[tuple[str, str], list[_BalanceLine]] = defaultdict(list)
    balancer = _Balancer()
    for part in parts:
        for line in _found(part.path, balancer):
            values[line.engine, line.model].append(line)
    if not values:
        raise TraceError("no line of it tells a balance", hint="vLLM: log_balancedness in --eplb-config")
    engine, model = max(values, key=lambda key: len(values[key]))
    lines = values[engine, model]
    balance = np.array([line.balance for line in lines])
    if balance.max() > 1.001:
        raise TraceError(f"a balance of {balance.max()}, at most 1 is possible")
    notes = []
    others = [name or "an unnamed model" for _, name in values if (_, name) != (engine, model)]
    if others:
        notes.append(f"balances of {listed(others)} were left out")
    mean, most = (np.array([getattr(line, name) for line in lines]) for name in ("mean", "most"))
    busy = (balance > 0) & ((mean > 0) & (most > 0) | (engine != "vllm"))
    if not busy.any():
        raise TraceError("all balances are 0: no token came")
    if not busy.all():
        notes.append(f"{(~busy).sum()} steps without tokens were left out")
    log = None
    if engine == "vllm":
        anew = np.diff([line.step for line in lines], prepend=lines[0].step) < 0
        log = BalanceLog(
            mean[busy], np.maximum(most, mean)[busy], np.cumsum(anew, dtype=np.int64)[busy], not balancer.off
        )
    elif balancer.off:
        log = BalanceLog(balance[busy], np.ones(int(busy.sum())), None, own_balancer=False)
    return EngineDump(engine, "balance-log", balance_B=np.minimum(balance[busy], 1.0), log=log, notes=tuple(notes))


def _found(path: Path, balancer: _Balancer) -> Iterator[_BalanceLine]:
    """Each line that tells a balance; the balancer hears the others."""
    with open_regular(path, TraceError) as stream:
        for _ in range(MAX_LINES):
            raw = stream.readline(MAX_LINE)
            if not raw:
                return
            line = raw.decode("utf-8", "replace")
            if MARKS[0] in line and (match := VLLM.search(line)):
                yield _BalanceLine("vllm", match[2].rstrip(":") if match[2] else "", float(match[5]), int(match[1]),
                            float(match[3]), float(match[4]))  # fmt: skip
            elif MARKS[1] in line and (match := SGLANG.search(line)):
                yield _BalanceLine("sglang", "", float(match[1]))
            elif "poise" in line or "enable_eplb=" in line:
                balancer.hear(line)
