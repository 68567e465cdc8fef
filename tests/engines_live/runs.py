"""What is run: the same prompts by one process, and by two ranks under maps of vLLM, of a file, and of poise."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tests.engines_live import models
from tests.engines_live.environment import Engine
from tests.engines_live.running import Asked, Ran, read, run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from poise.cli.main import app
from poise.routing.trace import RoutingTrace
from poise.runtime.capture import Prompt, record

RANKS, REDUNDANT = 2, 4
ROUNDS, DRIFT = 8, 4
"""Rounds of eight prompts; from round DRIFT on they are of other words, so that other experts are hot."""
PROMPTS, WORDS, NEW = 8, 60, 16
INTERVAL, TURNS = 8, 2
"""Steps of the engine from one rearrangement to the next, and rearrangements a round."""
BEFORE, AFTER, ALL = list(range(DRIFT)), list(range(DRIFT, ROUNDS)), list(range(ROUNDS))
EPLB = {
    "num_redundant_experts": REDUNDANT,
    "window_size": INTERVAL,
    "step_interval": INTERVAL,
    "log_balancedness": True,
}
WORK = 30
"""Of a plan: a time limit makes another plan on a busy machine, and no more than the first map on a very busy one."""
SYNC, ASYNC = {**EPLB, "use_async": False}, {**EPLB, "use_async": True}
WINDOW = {"window_size": NEW * (ROUNDS - DRIFT)}
"""Loads of four rounds, one after the other: from any step on they are those of all prompts before, or after, the drift."""


class Ids:
    """A tokenizer of texts that are token ids."""

    pad_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


class Runs:
    """Runs of an engine on one checkpoint; each is made once, and read where the folder has it."""

    layers = models.LAYERS

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self._made: dict[str, Ran] = {}

    @cached_property
    def model(self) -> Path:
        folder = self.folder / "qwen3_moe"
        return folder if folder.exists() else models.qwen3_moe(folder, self.layers)

    @cached_property
    def rounds(self) -> list[list[list[int]]]:
        return [models.prompts(PROMPTS, 24 + n, seed=100 + n // DRIFT, words=WORDS) for n in range(ROUNDS)]

    def run(self, name: str, asked: Asked) -> Ran:
        """The run of a name, made now if it was not."""
        if name not in self._made:
            folder = self.folder / name
            over = (folder / "ended.json").exists()
            if not over:
                shutil.rmtree(folder, ignore_errors=True)
            self._made[name] = read(folder) if over else run(self.engine, asked, folder)
        return self._made[name]

    def one(self, **more: Any) -> Asked:
        """Of one process, without a load balancer or the stand-in."""
        return replace(Asked(self.model, self.rounds, ranks=1, stand_in=False, max_tokens=NEW), **more)

    def two(self, **more: Any) -> Asked:
        """Of two ranks."""
        return replace(Asked(self.model, self.rounds, ranks=RANKS, max_tokens=NEW), **more)

    @property
    def reference(self) -> Ran:
        """One process without poise."""
        ran = self.run("reference", self.one(poise=False))
        assert ran.fine, ran.tail()
        return ran

    @property
    def static(self) -> Ran:
        """The map of a file, moved while serving waits."""
        return self.run("static", self.two(eplb=SYNC, environ=self.file))

    @property
    def static_async(self) -> Ran:
        """The same in vLLM's background thread, until it runs."""
        phases = [{"rounds": ALL, "everywhere": {"settled": 1}}]
        return self.run("static-async", self.two(eplb=ASYNC, environ=self.file, phases=phases))

    @property
    def stock(self) -> Ran:
        """vLLM's own load balancer; poise is installed and not asked."""
        return self.run("stock", self.two(eplb=SYNC))

    @property
    def online(self) -> Ran:
        """poise plans, in a process of its own, a rearrangement ahead; weights are looked at after each move."""
        return self.run("online", self.drifting(SYNC))

    @property
    def online_async(self) -> Ran:
        """poise plans in a process that vLLM's background thread waits for."""
        return self.run("online-async", self.drifting(ASYNC))

    def drifting(self, eplb: dict[str, Any]) -> Asked:
        """poise plans: until a map came before other words do; until the loads are of those; until it has answered these."""
        phases = [
            {"rounds": BEFORE, "everywhere": {"changes": 1}},
            {"rounds": AFTER},
            {"rounds": AFTER, "everywhere": {"in time": 2}},  # the first may be of loads from before
        ]
        return self.two(eplb={**eplb, **WINDOW}, environ={"POISE_EPLB": "1", "POISE_CANARY": "1"}, phases=phases)

    @property
    def file(self) -> dict[str, str]:
        """The variable that names the plan's file."""
        return {"POISE_STATIC_MAP": str(self.plan)}

    # ---- what is known of the traffic ------------------------------------------------------------------------------

    def traffic(self, rounds: Sequence[int] = ALL) -> RoutingTrace:
        """Experts of all tokens that the engine computed in these rounds, as ``poise record`` sees them."""
        said = self.reference.tokens()
        texts = [
            [*prompt, *answer[:-1]] for n in rounds for prompt, answer in zip(self.rounds[n], said[n], strict=True)
        ]
        return recorded(self.model, texts)

    @cached_property
    def plan(self) -> Path:
        """A plan for the first rounds: ``poise plan``."""
        trace, out = self.folder / "fitted.npz", self.folder / "plan.npz"
        if out.exists():
            return out
        self.traffic(BEFORE).save(trace)
        planned(self, trace, out)
        return out


def planned(runs: Runs, trace: Path, out: Path) -> None:
    """``poise plan`` of a trace for these two ranks."""
    poise("plan", trace, "--cluster", f"1x{RANKS}:h100", "--redundant", REDUNDANT, "--model", runs.model / "config.json",
          "--engine", "vllm", "--work", WORK, "--no-verdict", "-o", out)  # fmt: skip


def recorded(model: Path, texts: list[list[int]]) -> RoutingTrace:
    """What ``poise record`` records of token ids."""
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype=torch.float32).eval()
    return record(loaded, Ids(), [Prompt(" ".join(map(str, one))) for one in texts])


def poise(*words: Any, codes: tuple[int, ...] = (0,)) -> str:
    """Output of a command."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code in codes, (words, done.output[-2000:], done.exception)
    return done.stdout
