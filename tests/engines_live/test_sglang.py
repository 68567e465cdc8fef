"""SGLang serves the same tokens whatever map runs, runs the map of our file, and rebalances to our planner's maps."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tests.engines_live import models
from tests.engines_live.checks import maps_of, near, same_tokens
from tests.engines_live.environment import SGLANG
from tests.engines_live.runs import PROMPTS, RANKS, ROUNDS, poise
from tests.engines_live.sglang_runs import EPLB, REDUNDANT_SLOTS, SglangRuns

from poise.planning.placement import Placement
from poise.routing import files


@pytest.fixture(scope="session")
def sglang(tmp_path_factory):
    """SGLang's runs by name, each made when a row asks for it first."""
    if not SGLANG.made:
        pytest.fail(f"{SGLANG.folder} is not there: python -m tests.engines_live.environment {SGLANG.requirement}")
    kept = os.environ.get("POISE_ENGINES_RUNS")
    folder = Path(kept) / "sglang" if kept else tmp_path_factory.mktemp("sglang")
    folder.mkdir(exist_ok=True)
    return SglangRuns(SGLANG, folder)


def counts_of(sglang):
    """Tokens of each expert [L, E], as ``poise record`` counts them."""
    experts = sglang.traffic().experts
    return np.stack(
        [np.bincount(experts[:, layer].ravel(), minlength=models.EXPERTS) for layer in range(models.LAYERS)]
    )


def test_reference(sglang, row):
    """SGLang, one process without poise: the reference of SGLang's rows"""
    ran = sglang.reference
    assert [len(answers) for answers in ran.tokens()] == [PROMPTS] * ROUNDS
    row(ran.seconds, f"{ROUNDS} rounds of {PROMPTS} prompts")


def test_two_engines_agree(sglang, runs, row):
    """SGLang's one process gives the tokens of vLLM's"""
    assert sglang.reference.tokens() == runs.reference.tokens()
    row(0, f"log-probabilities within {near(sglang.reference, runs.reference):.1g}")


def test_trivial(sglang, row):
    """SGLang, two ranks, its first map; what its recorder dumps, read by `poise convert`, equals `poise record`"""
    ran = sglang.trivial
    assert len(maps_of(ran)) == 1 and not ran.planned(0)
    loads = sglang.folder / "read.json"
    poise("convert", sglang.dumps("trivial", "stat"), "-o", loads)
    counted = files.read(loads).load_BLE.sum(axis=0)
    assert np.array_equal(counted, RANKS * counts_of(sglang))  # every rank has every token, and counts it
    same_tokens(sglang, ran, row, f"; {int(counted.sum())} picks recorded")


def test_planned(sglang, row):
    """SGLang, two ranks under our file by `--init-expert-location`: the live map of both is the plan"""
    ran = sglang.served("planned", {**REDUNDANT_SLOTS, "init_expert_location": str(sglang.exported)}, record="per_pass")
    maps, plan = maps_of(ran), Placement.load(sglang.plan)
    assert len(maps) == 1 and np.array_equal(maps[0], plan.slot_expert_LS)
    assert not np.array_equal(maps[0], np.array(sglang.trivial.maps[0][0]))
    assert verdict(sglang, "planned") == "live"
    same_tokens(sglang, ran, row, "; plan = live map; `poise verify` says live")


def test_not_planned(sglang, row):
    """SGLang, two ranks under its first map: `poise verify` says of the recorder's slots that the plan is not live"""
    ran = sglang.served("not-planned", REDUNDANT_SLOTS, record="per_pass")
    assert verdict(sglang, "not-planned") == "not-live"
    same_tokens(sglang, ran, row, "; not-live")


def verdict(sglang, name):
    said = poise("verify", sglang.plan, sglang.dumps(name, "per_pass"), "--json", codes=(0, 1))
    return json.loads(said)["verdict"]


@pytest.mark.parametrize("asked", [False, True], ids=["its own", "poise"])
def test_rebalances(sglang, row, asked):
    """SGLang, two ranks, rebalanced by its EPLB manager, with poise asked: {asked}: ranks come to the same maps"""
    ran = sglang.served("online" if asked else "stock", EPLB, **({"POISE_EPLB": "1"} if asked else {}))
    changes = len(maps_of(ran)) - 1
    assert changes >= 2
    assert ran.planned(0) == ran.planned(1) and len(ran.planned(0)) == (ROUNDS - 1 if asked else 0)
    same_tokens(sglang, ran, row, f"; {len(ran.planned(0))} maps of poise, {changes} changes of the live map")


@pytest.mark.parametrize("kind", ["its first map", "our file"])
def test_server(sglang, row, kind):
    """SGLang's server on two ranks, asked and recorded over HTTP, {kind}: tokens, map and counts are as asked for"""
    planned = kind == "our file"
    name, file = ("server-planned", {"init_expert_location": str(sglang.exported)}) if planned else ("server", {})
    ran, maps = sglang.server(name, {**REDUNDANT_SLOTS, **file}, record="stat")
    assert len(maps[0]) == 1 and maps[0] == maps[1]
    wanted = Placement.load(sglang.plan).slot_expert_LS if planned else np.array(sglang.trivial.maps[0][0])
    assert np.array_equal(np.array(maps[0][0]), wanted)
    loads = sglang.folder / f"{name}.json"
    poise("convert", sglang.dumps(name, "stat"), "-o", loads)
    assert np.array_equal(files.read(loads).load_BLE.sum(axis=0), RANKS * counts_of(sglang))
    same_tokens(sglang, ran, row, "; by its own scheduler, what its recorder dumps equals `poise record`")


def test_server_rebalances(sglang, row):
    """SGLang's server on two ranks, asked over HTTP, rebalanced by its EPLB manager with poise's planner"""
    ran, maps = sglang.server("server-online", EPLB, POISE_EPLB="1")
    said = Counter(ran.planned(0))
    assert maps[0] == maps[1] and len(maps[0]) >= 3
    assert said and not any(count % RANKS for count in said.values()), "ranks plan alike, in one log"
    same_tokens(
        sglang,
        ran,
        row,
        f"; by its own scheduler, {said.total() // RANKS} maps of poise, {len(maps[0]) - 1} changes of the live map",
    )
