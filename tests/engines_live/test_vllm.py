"""vLLM serves the same tokens whatever map runs, and runs the map that it was given."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.engines_live import models
from tests.engines_live.checks import came, maps_of, planned, same_tokens
from tests.engines_live.runs import AFTER, PROMPTS, RANKS, REDUNDANT, ROUNDS, SYNC, WORK, poise, recorded

from poise.planning.placement import Placement


def test_reference(runs, row):
    """One process without poise: the reference"""
    ran = runs.reference
    assert [len(answers) for answers in ran.tokens()] == [PROMPTS] * ROUNDS
    assert len({token for answers in ran.tokens() for answer in answers for token in answer}) > 100
    row(ran.seconds, f"{ROUNDS} rounds of {PROMPTS} prompts")


def test_merely_installed(runs, row):
    """One process beside poise installed and not asked, in a Python of its own: starts, and the same tokens"""
    ran = runs.run("installed", runs.one(forked=False))
    same_tokens(runs, ran, row)
    assert "poise plans" not in ran.said() and not ran.planned(0)


def test_stock(runs, row):
    """Two ranks, vLLM's own load balancer, poise installed and not asked"""
    ran = runs.stock
    changes = len(maps_of(ran)) - 1
    assert changes >= 2 and not ran.planned(0)
    same_tokens(runs, ran, row, f"; {changes} maps of its own")


@pytest.mark.parametrize("mode", ["static", "static_async"])
def test_static(runs, row, mode):
    """Two ranks under a plan's file, moved {mode}: the live map of both is the plan"""
    ran = getattr(runs, mode)
    if mode == "static_async":
        came(ran)
    maps, plan = maps_of(ran), Placement.load(runs.plan)
    assert np.array_equal(maps[-1], plan.slot_expert_LS)
    assert (maps[0] == np.arange(maps.shape[2]) % models.EXPERTS).all() and not np.array_equal(maps[0], maps[-1])
    said = planned(ran)
    assert len({line.split(" for ")[0] for line in said}) == 1, "a map of other loads is another one"
    same_tokens(runs, ran, row, f"; {mode}; plan = live map, {len(said)} rearrangements")


@pytest.mark.parametrize("mode", ["online", "online_async"])
def test_online(runs, row, mode):
    """Two ranks, poise plans {mode}: both come to the same maps, and move when prompts change"""
    ran = getattr(runs, mode)
    came(ran)
    maps, said = maps_of(ran), planned(ran)
    assert len(said) >= (9 if mode == "online" else 3), said
    assert len(maps) > 2, "it never moved"
    looked = [line for line in ran.said(1).splitlines() if "slots hold what their experts were" in line]
    assert looked, "no weights were looked at"
    waits = "the planner has the loads now" in ran.said(0)
    assert waits == (mode == "online")  # on a thread beside serving the planner is waited for
    same_tokens(
        runs, ran, row, f"; {mode}; {len(said)} rearrangements, {len(maps) - 1} changes of the live map, "
        f"{len(looked)} moved layers looked at"
    )  # fmt: skip


def test_cold_start(runs, row):
    """Two ranks, poise plans while serving waits, nothing compiled before: served as ever while the planner's process compiles"""
    environ = {"POISE_EPLB": "1", "NUMBA_CACHE_DIR": str(runs.folder / "nothing-compiled")}
    ran = runs.run("cold", runs.two(eplb=SYNC, environ=environ))
    assert "the planner has the loads now" in ran.said(0)
    assert "exit code" not in ran.said(0), "its process did not live to compile"
    late, maps = ran.said(0).count("the planner is late"), len(maps_of(ran)) - 1
    same_tokens(runs, ran, row, f"; its map was late at {late} rearrangements, {maps} changes of the live map")


def test_drift_moves(runs, row):
    """Other words from round 4 on: the online planner moves, and is better balanced on them than the map it left"""
    ran = runs.online
    came(ran)
    maps, load_LE = maps_of(ran), loads_of(runs.traffic(AFTER))
    first = ran.phases[0][0]["ended"]["changes"]
    assert len(maps) > first + 1, "it did not move"
    old, new = imbalance(maps[first], load_LE), imbalance(maps[-1], load_LE)
    row(0, f"imbalance on the new prompts {old:.3f} under the map before them, {new:.3f} under the last")
    assert new < old


def loads_of(trace):
    return np.stack(
        [np.bincount(trace.experts[:, layer].ravel(), minlength=trace.num_experts) for layer in range(models.LAYERS)]
    )


def imbalance(map_LS, load_LE):
    """Fullest over mean rank, mean over layers."""
    out = []
    for row, load in zip(map_LS, load_LE, strict=True):
        share = load[row] / np.bincount(row, minlength=len(load))[row]
        ranks = share.reshape(RANKS, -1).sum(axis=1)
        out.append(ranks.max() / ranks.mean())
    return float(np.mean(out))


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_relabelled(runs, row, ranks):
    """The same model under other expert ids, {ranks} rank(s), no load balancer"""
    placed = runs.folder / "placed"
    if not placed.exists():
        order = runs.folder / "order.npz"
        poise("plan", runs.plan.with_name("fitted.npz"), "--cluster", f"1x{RANKS}:h100", "--model", runs.model / "config.json",
              "--engine", "checkpoint", "--work", WORK, "--no-verdict", "-o", order)  # fmt: skip
        poise("export", order, "--to", "checkpoint", "--checkpoint", runs.model, "-o", placed)
        moved = Placement.load(order).slot_expert_LS
        assert not np.array_equal(moved, np.tile(np.arange(models.EXPERTS), (models.LAYERS, 1)))
    asked = runs.one(model=placed) if ranks == 1 else runs.two(model=placed)
    same_tokens(runs, runs.run(f"relabelled-{ranks}", asked), row, f"; {ranks} rank(s)")


def test_relabelled_olmoe(runs, row):
    """OLMoE, which vLLM does not balance: relabelled, the same tokens; recorded, the same traffic in the original's ids"""
    model, placed, order = runs.folder / "olmoe", runs.folder / "olmoe-placed", runs.folder / "olmoe.npz"
    if not model.exists():
        models.olmoe(model)
    rows = np.stack([np.random.default_rng(n).permutation(models.EXPERTS) for n in range(models.LAYERS)]).astype(
        np.int32
    )
    Placement(rows, np.repeat([0, 1], models.EXPERTS // 2), models.EXPERTS, RANKS, np.arange(models.LAYERS)).save(order)
    if not placed.exists():
        poise("export", order, "--to", "checkpoint", "--checkpoint", model, "-o", placed)
    one, other = (
        runs.run(f"olmoe-{path.name}", runs.one(model=path, rounds=runs.rounds[:2])) for path in (model, placed)
    )
    assert one.fine and other.fine, one.tail() + other.tail()
    assert one.tokens() == other.tokens()
    texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(runs.rounds[0], one.tokens()[0], strict=True)]
    ours, theirs = recorded(model, texts).experts, recorded(placed, texts).experts
    back = json.loads((placed / "poise-relabelling.json").read_text())
    order_LE = np.stack([np.sort(row.reshape(RANKS, -1), axis=1).ravel() for row in rows])
    assert back and np.array_equal(np.sort(order_LE[np.arange(models.LAYERS)[None, :, None], theirs]), np.sort(ours))
    row(
        one.seconds + other.seconds,
        f"{2 * PROMPTS} answers equal, {ours.shape[0] * ours.shape[1]} (token, layer) rows equal",
    )


def test_slots(runs):
    """The engine has the slots that the plan is for"""
    assert maps_of(runs.static).shape[1:] == (models.LAYERS, models.EXPERTS + REDUNDANT)
