"""Many independent windows of traffic from few starts of vLLM, each to be verified by itself.

A *world* is a few words, so that few experts are hot. A world's plan is made of a sample of its words. A *window* is
prompts of its own of the same words, so no window's tokens are those of the plan's sample, or of another window. An
engine serves all windows of its start one after the other; the log of a window is what it said meanwhile, its traffic
what ``poise record`` counts of its prompts and answers. A start under a plan serves the windows of that plan's world, as
an engine takes one map; the start without serves all. The model has LAYERS layers: over four, which other rows have,
some map made at random is nearly always as well balanced as a plan, and nothing can be told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tests.engines_live import models
from tests.engines_live.checks import came, maps_of
from tests.engines_live.running import Asked, Ran
from tests.engines_live.runs import SYNC, Runs, planned, recorded

from poise.planning.placement import Placement

LAYERS = 12
WORLDS, EACH = (3, 4, 5, 6), 12
"""Words of each world, and windows of each."""
PROMPTS, LENGTHS, ANSWER = 48, (40, 80, 120, 160), 4
"""Of a window: prompts, tokens of each (in turn, window by window), and tokens of an answer."""
STAYS = {**SYNC, "step_interval": 1_000_000}
"""The load balancer is on, and no rearrangement comes while it serves: the map of the start runs."""


def texts(seed: int, words: int, count: int, tokens: int) -> list[list[int]]:
    """Prompts of a world's words, which its number of words chooses."""
    known = 3 + np.random.default_rng(words).choice(models.WORDS - 3, size=words, replace=False)
    return np.random.default_rng(seed).choice(known, size=(count, tokens)).tolist()


class WindowRuns(Runs):
    """Runs that serve windows; of world w those of numbers ``w * EACH`` and on."""

    layers = LAYERS

    @cached_property
    def rounds(self) -> list[list[list[int]]]:
        return [
            texts(1000 * words + n, words, PROMPTS, LENGTHS[n % len(LENGTHS)]) for words in WORLDS for n in range(EACH)
        ]

    def one(self, **more: Any) -> Asked:
        return replace(super().one(**more), max_tokens=ANSWER)

    def plan_of(self, world: int) -> Path:
        """``poise plan`` of 32 prompts of 100 tokens of its words."""
        trace, out = self.folder / f"fitted-{world}.npz", self.folder / f"plan-{world}.npz"
        if not out.exists():
            recorded(self.model, texts(WORLDS[world], WORLDS[world], 32, 100)).save(trace)
            planned(self, trace, out)
        return out

    def with_plan(self, world: int) -> Ran:
        """Two ranks under a world's plan: all its windows, once the plan runs."""
        mine = list(range(world * EACH, (world + 1) * EACH))
        phases = [{"rounds": mine[:1], "everywhere": {"settled": 1}}, {"rounds": mine}]
        environ = {"POISE_STATIC_MAP": str(self.plan_of(world))}
        ran = self.run(f"with-{world}", self.two(max_tokens=ANSWER, eplb=SYNC, environ=environ, phases=phases))
        came(ran)
        maps = maps_of(ran)
        assert len(maps) == 2 and np.array_equal(maps[1], Placement.load(self.plan_of(world)).slot_expert_LS)
        return ran

    @property
    def without(self) -> Ran:
        """Two ranks, the windows of all worlds, under the engine's first map."""
        ran = self.run("without", self.two(max_tokens=ANSWER, eplb=STAYS))
        assert ran.fine and len(maps_of(ran)) == 1, ran.tail()
        return ran

    def logs_of(self, ran: Ran) -> Iterator[tuple[int, Path]]:
        """Number and log of each window of a run; what was served until the plan ran is none."""
        before, *each = re.split(r"ROUND \d+\n", ran.said())
        who = "".join(f"{line}\n" for line in ran.said().splitlines() if "poise plans" in line)
        first = ran.phases[0][0]["rounds"] if len(ran.phases[0]) > 1 else 0
        for number, text in list(zip(ran.numbers[0], each, strict=True))[first:]:
            log = self.folder / f"window-{ran.logs[0].parent.name}-{number}.log"
            log.write_text(before + who + text)
            yield number, log

    def traffic_of(self, number: int) -> Path:
        """Of a window, by its prompts and the reference's answers."""
        out = self.folder / f"traffic-{number}.npz"
        if not out.exists():
            self.traffic([number]).save(out)
        return out
