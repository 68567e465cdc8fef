"""What is run of SGLang: the prompts of vLLM's rows, by one process and by two ranks under maps of each kind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.engines_live.running import Asked, Ran, lines
from tests.engines_live.runs import RANKS, REDUNDANT, WORK, Runs, poise

CORES = f"0-{(os.cpu_count() or 1) - 1}"
REDUNDANT_SLOTS = {"ep_num_redundant_experts": REDUNDANT}
EVERY = 16
"""Passes from one rebalance to the next: one a round."""
EPLB = {
    **REDUNDANT_SLOTS, "enable_eplb": True, "eplb_rebalance_num_iterations": EVERY,
    "expert_distribution_recorder_buffer_size": EVERY,
}  # fmt: skip


class SglangRuns(Runs):
    """Runs of SGLang; all by the stand-in's plugin but the one process, which needs none."""

    def one(self, **more: Any) -> Asked:
        """Of one process."""
        return replace(super().one(), program="sglang_run.py", more={"settings": {}, "record": False}, **more)

    def served(self, name: str, settings: Mapping[str, Any], *, record: str = "", **environ: str) -> Ran:
        """A run of two ranks.

        Parameters
        ----------
        record : mode of SGLang's recorder, which then dumps to the folder of that name below the run's.
        """
        settings, environ = self._recorded(name, settings, record, environ)
        environ |= {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([CORES] * RANKS)}
        asked = replace(self.two(), program="sglang_run.py", environ=environ, more={"settings": dict(settings), "record": bool(record)})  # fmt: skip
        return self.run(name, asked)

    def server(
        self, name: str, settings: Mapping[str, Any], *, record: str = "", **environ: str
    ) -> tuple[Ran, list[tuple[Any, ...]]]:
        """A run of SGLang's server on two ranks, asked over HTTP, and the maps that ran on each of them."""
        settings, environ = self._recorded(name, settings, record, environ)
        maps = self.folder / name / "live.rank-{rank}"
        environ |= {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([CORES] * RANKS), "STAND_IN_MAPS": str(maps)}
        settings = {**settings, "tp_size": RANKS, "ep_size": RANKS}
        asked = replace(self.two(), ranks=1, program="sglang_http.py", environ=environ,
                        more={"settings": settings, "record": bool(record)})  # fmt: skip
        ran = self.run(name, asked)
        return ran, [lines(Path(str(maps).format(rank=rank)), "map") for rank in range(RANKS)]

    def _recorded(
        self, name: str, settings: Mapping[str, Any], record: str, environ: dict[str, str]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Settings and variables with those of the recorder, if it is asked for."""
        if not record:
            return dict(settings), environ
        dumps = self.dumps(name, record)
        dumps.mkdir(parents=True, exist_ok=True)
        recorder = {"expert_distribution_recorder_mode": record}
        return {**settings, **recorder}, {**environ, "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(dumps)}

    def dumps(self, name: str, mode: str) -> Path:
        """Where the recorder of a run dumps."""
        return self.folder / f"{name}-{mode}"

    @property
    def trivial(self) -> Ran:
        """The map that SGLang starts with, recorded."""
        return self.served("trivial", REDUNDANT_SLOTS, record="stat")

    @cached_property
    def plan(self) -> Path:
        """``poise plan`` of what SGLang's recorder dumped."""
        out, loads = self.folder / "plan.npz", self.folder / "loads.json"
        if not out.exists():
            assert self.trivial.fine, self.trivial.tail()
            poise("convert", self.dumps("trivial", "stat"), "-o", loads)
            poise("plan", loads, "--cluster", f"1x{RANKS}:h100", "--redundant", REDUNDANT, "--model", self.model / "config.json",
                  "--engine", "sglang", "--tokens-per-step", "64", "--work", WORK, "--no-verdict", "-o", out)  # fmt: skip
        return out

    @cached_property
    def exported(self) -> Path:
        """Its file for ``--init-expert-location``."""
        out = self.folder / "experts.json"
        if not out.exists():
            poise("export", self.plan, "--to", "sglang", "--model", self.model / "config.json", "-o", out)
        return out
