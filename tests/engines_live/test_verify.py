"""``poise verify`` on the logs of engines that ran the plan, and of engines that ran something else."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from math import ceil

import pytest
from tests.engines_live import models
from tests.engines_live.runs import ALL, ROUNDS, SYNC, Runs, planned, poise, recorded

WITH = ("static", "static_async")
WITHOUT = ("stock", "online", "online_async", "unmoved")
PARTS = 3
"""Of a round's log, each verified by itself."""
LINE = re.compile("EPLB step: ")


def said_of(runs: Runs, log, plan, rounds) -> str:
    """The word of ``poise verify``."""
    traffic = runs.folder / f"traffic-{'-'.join(map(str, rounds))}.npz"
    if not traffic.exists():
        runs.traffic(rounds).save(traffic)
    out = poise(
        "verify", plan, log, "--traffic", traffic, "--model", runs.model / "config.json", "--json", codes=(0, 1)
    )
    found = json.loads(out)
    assert found["evidence"] == "balance"
    return found["verdict"]


@pytest.mark.parametrize(("runs_it", "word"), [(True, "live"), (False, "not-live")])
def test_decided_where_the_plan_matters(runs, row, runs_it, word):
    """verify where four words make few experts hot, so that plan and no plan differ by more than 5 %: live, and not-live"""
    skewed = [models.prompts(8, 200, seed=300, words=4)] * 6
    one = runs.run("skewed-reference", runs.one(rounds=skewed, max_tokens=2))
    assert one.fine, one.tail()
    traffic, plan = runs.folder / "skewed.npz", runs.folder / "skewed-plan.npz"
    if not plan.exists():
        texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(skewed[0], one.tokens()[0], strict=True)]
        recorded(runs.model, texts).save(traffic)
        planned(runs, traffic, plan)
    eplb = SYNC if runs_it else {**SYNC, "step_interval": 100_000}
    asked = runs.two(rounds=skewed, max_tokens=2, eplb=eplb, environ={"POISE_STATIC_MAP": str(plan)})
    ran = runs.run(f"skewed-{word}", asked)
    assert ran.fine and ran.tokens(0) == ran.tokens(1) == one.tokens(), ran.tail()
    found = json.loads(poise("verify", plan, ran.logs[0], "--traffic", traffic, "--model", runs.model / "config.json",
                             *(() if runs_it else ("--balancer-off",)), "--json", codes=(0, 1)))  # fmt: skip
    balance = found["balance"]
    row(
        ran.seconds,
        f"{found['verdict']}: measured {balance['measured']:.3f}, plan {balance['predicted']:.3f}, none {balance['without_plan']:.3f}",
    )
    assert abs(balance["predicted"] / balance["without_plan"] - 1) >= 0.05 and found["verdict"] == word, found[
        "sentence"
    ]


def run_of(runs: Runs, name):
    """Its run; ``unmoved``: the load balancer is on, and no rearrangement comes while it serves."""
    if name == "unmoved":
        eplb = {**SYNC, "step_interval": 100_000}
        return runs.run("unmoved", runs.two(eplb=eplb, environ=runs.file))
    return getattr(runs, name)


def parts_of(runs: Runs, ran):
    """Parts of the log after its first round, with what the log says before the first round, and their rounds."""
    start, *rounds = re.split(r"ROUND \d+\n", ran.said())
    assert len(rounds) == len(ran.numbers[0]) >= ROUNDS
    who = "".join(line + "\n" for line in ran.said().splitlines() if "poise plans" in line)
    for place, (number, text) in enumerate(zip(ran.numbers[0][1:], rounds[1:], strict=True), 1):
        lines = [line for line in text.splitlines() if LINE.search(line)]
        size = len(lines) // PARTS
        for part in range(PARTS):
            log = runs.folder / f"part-{ran.logs[0].parent.name}-{place}-{part}.log"
            log.write_text(start + who + "\n".join(lines[part * size : (part + 1) * size]) + "\n")
            yield log, [number]


@pytest.mark.parametrize("name", WITH)
def test_whole_log_with_the_plan(runs, row, name):
    """verify on the whole log of a run with the plan, no better balanced there than no plan: never not-live"""
    word = said_of(runs, run_of(runs, name).logs[0], runs.plan, ALL)
    row(0, f"{name}: {word}")
    assert word != "not-live"


@pytest.mark.parametrize("name", WITHOUT)
def test_whole_log_without_the_plan(runs, row, name):
    """verify on the whole log of a run without the plan: never live"""
    word = said_of(runs, run_of(runs, name).logs[0], runs.plan, ALL)
    row(0, f"{name}: {word}")
    assert word != "live"


def test_parts_of_logs(runs, row):
    """verify on parts of logs, a third of a round each: no false word in 40 with the plan and 40 without"""
    words = {kind: Counter(
        said_of(runs, log, runs.plan, rounds)
        for name in names for log, rounds in islice(parts_of(runs, run_of(runs, name)), ceil(40 / len(names)))
    ) for kind, names in (("with", WITH), ("without", WITHOUT))}  # fmt: skip
    assert all(count.total() >= 40 for count in words.values())
    row(
        0,
        "; ".join(
            f"{kind} the plan: " + ", ".join(f"{n} {word}" for word, n in sorted(count.items()))
            for kind, count in words.items()
        ),
    )
    assert not words["with"]["not-live"] and not words["without"]["live"], words
