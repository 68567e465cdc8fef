"""One rank fails: the engine goes on, or ends with a reason, within a limit, and no token that it gave was wrong."""

from __future__ import annotations

import pytest
from tests.engines_live.checks import came, maps_of, planned, right
from tests.engines_live.runs import ALL, ASYNC, NEW, PROMPTS, ROUNDS, SYNC


def ends(ran):
    return ", ".join("ended by the launcher" if code is None else f"exit code {code}" for code in ran.codes)


FAULTS = {
    "call": (1, "failed", "asked for by the test"),
    "planner": (0, "failed", "the planner failed"),
    "killed": (0, "failed", "the planner's process ended with exit code -9"),
    "late": (0, "late", "the planner is late"),
}
"""On which rank, how its turns end, and what it says; what runs the planner is the first rank's."""


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planner_fails(runs, row, fault, mode):
    """{fault}: from the third map on, {mode}: all ranks keep the map in use, say so, and serve on"""
    if (fault, mode) == ("late", "async"):
        pytest.skip("on a thread beside serving the planner is waited for")
    rank, word, said = FAULTS[fault]
    phases = [{"rounds": ALL, "everywhere": {"turns": 4}, "anywhere": {f"since the fault: {word}": 2}}]
    asked = runs.two(eplb=SYNC if mode == "sync" else ASYNC, environ={"POISE_EPLB": "1"}, phases=phases,
                     environ_of={rank: {"STAND_IN_FAULT": f"{fault}:3"}})  # fmt: skip
    ran = runs.run(f"{fault}-{mode}", asked)
    rounds = right(runs, ran)
    came(ran)
    assert rounds >= ROUNDS and said in ran.said(rank) and "the map in use stays" in ran.said(1 - rank), ran.tail()
    assert len(planned(ran)) >= 4
    row(ran.seconds, f"{mode}: {ends(ran)}; all {rounds} rounds answered, none wrong; {len(maps_of(ran)) - 1} moves")


def test_map_file_missing_on_one_rank(runs, row):
    """The file of the static map is missing on one rank: the start ends there, and says why"""
    asked = runs.two(eplb=SYNC, environ=runs.file, environ_of={1: {"POISE_STATIC_MAP": str(runs.folder / "none.npz")}})
    ran = runs.run("missing", asked)
    assert right(runs, ran) == 0
    assert ran.codes[1] not in (0, None) and "none.npz" in ran.said(1) and "PlacementError" in ran.said(1), ran.tail()
    row(ran.seconds, ends(ran))


def test_worker_killed(runs, row):
    """One rank is killed amid the second round"""
    amid = {1: {"STAND_IN_FAULT": f"worker:{NEW + NEW // 2}"}}
    ran = runs.run("killed", runs.two(eplb=SYNC, environ={"POISE_EPLB": "1"}, environ_of=amid))
    assert ran.codes[1] == -9 and ran.codes[0] != 0, ran.tail()
    assert right(runs, ran) == 1, "it was the second round"
    row(ran.seconds, f"{ends(ran)}; {len(ran.rounds[0])} rounds of {PROMPTS} answered, none wrong")
