"""One rank fails: the engine goes on, or ends with a reason, within a limit, and no token that it gave was wrong."""

from __future__ import annotations

import pytest
from tests.engines_live.runs import ASYNC, PROMPTS, ROUNDS, SYNC


def given_were_right(runs, ran):
    """How many rounds were answered, on the rank that answered most; all that was is the reference's."""
    for rank in range(len(ran.codes)):
        tokens = ran.tokens(rank)
        assert tokens == runs.reference.tokens()[: len(tokens)], f"rank {rank}\n{ran.tail()}"
    return max(len(rounds) for rounds in ran.rounds)


def ends(ran):
    return ", ".join("ended by the launcher" if code is None else f"exit code {code}" for code in ran.codes)


FAULTS = {
    "call": (1, "asked for by the test"),
    "planner": (0, "the planner failed"),
    "killed": (0, "the planner's process ended with exit code -9"),
    "late": (0, "the planner is late"),
}
"""On which rank, and what it says; what runs the planner is the first rank's."""


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planner_fails(runs, row, fault, mode):
    """{fault}: from the third map on, {mode}: all ranks keep the map in use, say so, and serve on"""
    if (fault, mode) == ("late", "async"):
        pytest.skip("on a thread beside serving the planner is waited for")
    rank, said = FAULTS[fault]
    asked = runs.two(eplb=SYNC if mode == "sync" else ASYNC, environ={"POISE_EPLB": "1"},
                     environ_of={rank: {"STAND_IN_FAULT": f"{fault}:3"}})  # fmt: skip
    ran = runs.run(f"{fault}-{mode}", asked)
    assert given_were_right(runs, ran) == ROUNDS and ran.fine, ran.tail()
    assert said in ran.said(rank) and "the map in use stays" in ran.said(1 - rank), ran.tail()
    assert ran.maps[0] == ran.maps[1], "ranks ran different maps"
    assert ran.planned(0) == ran.planned(1) and len(ran.planned(0)) >= 4
    row(ran.seconds, f"{mode}: {ends(ran)}; all {ROUNDS} rounds answered, none wrong; {len(ran.maps[0]) - 1} moves")


def test_map_file_missing_on_one_rank(runs, row):
    """The file of the static map is missing on one rank: the start ends there, and says why"""
    asked = runs.two(eplb=SYNC, environ=runs.file, environ_of={1: {"POISE_STATIC_MAP": str(runs.folder / "none.npz")}})
    ran = runs.run("missing", asked)
    assert given_were_right(runs, ran) == 0
    assert ran.codes[1] not in (0, None) and "none.npz" in ran.said(1) and "PlacementError" in ran.said(1), ran.tail()
    row(ran.seconds, ends(ran))


def test_worker_killed(runs, row):
    """One rank is killed amid the second round"""
    ran = runs.run("killed", runs.two(eplb=SYNC, environ={"POISE_EPLB": "1"}), kill=1)
    assert ran.codes[1] == -9 and ran.codes[0] != 0, ran.tail()
    assert given_were_right(runs, ran) < ROUNDS
    row(ran.seconds, f"{ends(ran)}; {len(ran.rounds[0])} rounds of {PROMPTS} answered, none wrong")
