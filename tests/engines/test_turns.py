"""One rank plans aside: all ranks take its map at the same turn, or none does, whatever happens to it."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engines.turn_cases import EXPERTS, RANKS, TRIVIAL, Together, call, same, shuffled

from poise.engines.plugins import aside as aside_module
from poise.engines.plugins import turns
from poise.engines.plugins.aside import Aside
from poise.engines.plugins.policy import usable_map, warm_up
from poise.engines.plugins.turns import (
    FAILED,
    FIRST,
    GIVEN_UP,
    LATE,
    MIXED,
    MOST_LATE,
    MOST_SILENT,
    MOST_TRIED,
    NEW,
    OTHER,
    STAYS,
)  # fmt: skip
from poise.util.errors import CommunicationError, NoResultError


def test_a_map_is_taken_at_the_turn_after_its_loads():
    ranks, new = Together(), shuffled(TRIVIAL)
    table, word = same(ranks.turn(call()))
    assert word == FIRST and (table == TRIVIAL).all()
    ranks.planner.answers(new)
    table, word = same(ranks.turn(call(seed=1)))
    assert word == NEW
    np.testing.assert_array_equal(table, new)
    assert len(ranks.planner.asked) == 2 and not any(one.asked or one.started for one in ranks.others)
    np.testing.assert_array_equal(ranks.planner.asked[1].old_LS, new)  # moves are priced from what runs by then
    np.testing.assert_array_equal(ranks.planner.asked[1].load_LE, call(seed=1).load_LE)


def test_a_late_map_is_taken_when_it_is_there():
    ranks, new = Together(), shuffled(TRIVIAL)
    ranks.turn(call())
    for _ in range(2):
        table, word = same(ranks.turn(call(seed=1)))
        assert word == LATE and (table == TRIVIAL).all()
    assert len(ranks.planner.asked) == 1  # who is late is not asked again
    ranks.planner.answers(new)
    table, word = same(ranks.turn(call(seed=2)))
    assert word == NEW and (table == new).all()


def test_nothing_is_planned_of_steps_under_two_maps():
    """vLLM tells all counted steps by the map in use: of those before it moved they are another expert's."""
    ranks, first, second = Together(), shuffled(TRIVIAL, 1), shuffled(TRIVIAL, 2)

    def turn(in_use):
        return same(ranks.turn(call(in_use), in_use, settles=3))[1]

    assert turn(TRIVIAL) == FIRST
    ranks.planner.answers(first)
    assert turn(TRIVIAL) == NEW and len(ranks.planner.asked) == 2, "these loads were all of one map"
    ranks.planner.answers(second)
    assert turn(first) == NEW and len(ranks.planner.asked) == 2
    assert [turn(second) for _ in range(2)] == [MIXED, MIXED] and len(ranks.planner.asked) == 2
    assert turn(second) == FIRST and len(ranks.planner.asked) == 3


def test_nor_beside_serving():
    ranks, new = Together(), shuffled(TRIVIAL)
    ask = ranks.planner.ask

    def soon(one):
        coming = ask(one)
        ranks.planner.answers(new)
        return coming

    ranks.planner.ask = soon
    words = [same(ranks.turn(call(table), table, waits=True, settles=2))[1] for table in (TRIVIAL, new, new, new)]
    assert words == [NEW, MIXED, STAYS, STAYS]


def test_who_is_late_too_often_is_ended():
    ranks = Together()
    for _ in range(MOST_LATE):
        ranks.turn(call())
        assert ranks.planner.ended == 0
    ranks.turn(call())
    assert ranks.planner.ended == 1
    ranks.planner.answers(error=CommunicationError("the planner's process ended with exit code -9"))
    taken = ranks.turn(call())
    assert same(taken)[1] == FAILED and "exit code -9" in taken[0].said
    assert len(ranks.planner.asked) == 2


def test_who_never_answered_is_left_to_compile_for_longer():
    """Ended, it would begin again, and never come to a map where rearrangements are seconds apart."""
    assert MOST_SILENT > 8 * MOST_LATE
    ranks, new = Together(), shuffled(TRIVIAL)
    ranks.planner.answered = False
    for _ in range(MOST_SILENT):
        ranks.turn(call())
    assert ranks.planner.ended == 0 and len(ranks.planner.asked) == 1
    ranks.planner.answers(new)
    assert same(ranks.turn(call()))[1] == NEW
    ranks.planner.answered = False
    for late in range(1, MOST_SILENT + 1):
        assert same(ranks.turn(call(new), new))[1] == LATE and ranks.planner.ended == (late == MOST_SILENT)


HANGS = [sys.executable, "-c", "import sys; sys.stdin.buffer.read()"]
"""Takes what it is asked, and never answers."""


def counted(monkeypatch, start=subprocess.Popen):
    """The processes that are started from now on, in their order."""
    started = []

    def kept(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(aside_module.subprocess, "Popen", kept)
    return started


class Slow(subprocess.Popen):
    """Looks as if it ran until ``gone`` is set."""

    gone: threading.Event

    def poll(self):
        return super().poll() if self.gone.is_set() else None

    def wait(self, timeout=None):
        assert self.gone.wait(60)
        return super().wait(timeout)


class Lingers(Aside):
    """Whose ended process is there, and is seen to run, until the first rank has decided what it does at the next turn."""

    def __init__(self, command):
        super().__init__(command)
        self.gone, self.closing = threading.Event(), False

    def start(self):  # what a turn begins with that goes on at all
        self.gone.set()
        super().start()

    def end(self):
        if not self.closing:
            self.gone.clear()
        super().end()

    def close(self):
        self.closing = True
        self.gone.set()
        super().close()

    def process(self, *args, **kwargs):
        started = Slow(*args, **kwargs)
        started.gone = self.gone
        return started


@pytest.mark.parametrize("lingers", [False, True], ids=["gone at once", "gone later"])
@pytest.mark.parametrize("waits", [False, True], ids=["while serving waits", "beside serving"])
def test_processes_that_hang_in_their_first_call_are_given_up(monkeypatch, waits, lingers):
    """Every turn ends, all ranks agree on each, and after the last one there is no process."""
    monkeypatch.setattr(turns, "LONGEST_S", 0.2)
    planner = (Lingers if lingers else Aside)(HANGS)
    started = counted(monkeypatch, planner.process) if lingers else counted(monkeypatch)
    ranks, words, said = Together(planner), [], set()
    try:
        while GIVEN_UP not in words and len(words) < MOST_TRIED * (30 if waits else 100 * MOST_SILENT):
            taken = ranks.turn(call(), waits=waits)
            table, word = same(taken)
            assert (table == TRIVIAL).all()
            words.append(word)
            said.add(taken[0].said)
        assert words[-1] == GIVEN_UP and len(started) == MOST_TRIED == planner.fruitless
        assert any(("no answer in 0 s" if waits else "exit code -9") in one for one in said), said
        assert waits or words.count(LATE) >= MOST_TRIED * MOST_SILENT
        for _ in range(3):
            assert same(ranks.turn(call(), waits=waits))[1] == GIVEN_UP
        assert len(started) == MOST_TRIED == planner.fruitless
    finally:
        planner.close()


def test_the_map_in_use_stays_where_the_planner_finds_nothing():
    ranks = Together()
    ranks.turn(call())
    ranks.planner.answers(TRIVIAL.copy())
    table, word = same(ranks.turn(call()))
    assert word == STAYS and (table == TRIVIAL).all()


@pytest.mark.parametrize("rank", range(RANKS))
def test_an_error_of_one_rank_keeps_the_map_on_all(rank):
    """Without a turn together the others would wait for it, or move without it."""
    ranks, new = Together(), shuffled(TRIVIAL)
    ranks.turn(call())
    ranks.planner.answers(new)
    taken = ranks.turn(call(), errors={rank: MemoryError("here")})
    table, word = same(taken)
    assert word == FAILED and (table == TRIVIAL).all()
    assert "MemoryError: here" in taken[rank].said and "1 ranks" in taken[rank - 1].said
    table, word = same(ranks.turn(call()))
    if rank == 0:  # its planner was not asked meanwhile: the map is as good as before
        assert word == NEW and (table == new).all()
    else:
        assert word in (OTHER, LATE) and (table == TRIVIAL).all()


@pytest.mark.parametrize("bad", [{}, {1: MemoryError("here")}, {0: MemoryError("here")}])
def test_lost_ranks_and_an_error_of_one_that_is_left(bad):
    """Who had it cannot place what the lost rank held: then nobody does."""
    lost = TRIVIAL.copy()
    lost[:, 3:6] = [5, 4, 3]
    one = call(lost, active_D=np.array([1, 0, 1, 1]))
    table, word = same(Together().turn(one, lost, errors=bad))
    assert word == (FAILED if bad else FIRST)
    assert (table == lost).all() if bad else (table[:, 3:6] == -1).all() and (table != lost)[:, [0, 1, 2]].any()


def test_a_map_in_use_that_is_none_is_named():
    one = replace(call(), old_LS=None)
    taken = Together().turn(one)
    assert same(taken)[1] == FAILED and "none of 12 slots for 8 experts" in taken[0].said


def test_a_map_made_from_another_one_is_not_taken():
    """The engine did not go where it was sent: #47206 skips small gains, an asynchronous move may stop half-way."""
    ranks, now = Together(), shuffled(TRIVIAL, 5)
    ranks.turn(call())
    ranks.planner.answers(shuffled(TRIVIAL))
    table, word = same(ranks.turn(call(now), now))
    assert word == OTHER and (table == now).all()
    ranks.planner.answers(shuffled(TRIVIAL, 3))
    assert same(ranks.turn(call(now), now))[1] == NEW


@pytest.mark.parametrize("rank", range(RANKS))
def test_ranks_with_different_maps_all_see_it(rank):
    """Whatever they are: also where one rank's number is the mean of the others'."""
    ranks, new = Together(), shuffled(TRIVIAL)
    ranks.turn(call())
    ranks.planner.answers(new)
    taken = ranks.turn(call(), maps={rank: shuffled(TRIVIAL, 9)})
    assert {one.word for one in taken} == {FAILED} and all("different maps" in one.said for one in taken)
    ranks = Together()
    three = {n: shuffled(TRIVIAL, n) for n in range(RANKS)}
    assert {one.word for one in ranks.turn(call(), maps=three)} == {FAILED}


def test_a_map_that_lacks_an_expert_is_nobodys():
    ranks = Together()
    ranks.turn(call())
    ranks.planner.answers(TRIVIAL * 0)
    table, word = same(ranks.turn(call()))
    assert word == FAILED and (table == TRIVIAL).all()


def test_before_anything_was_served_nobody_plans():
    ranks = Together()
    nothing = replace(call(), load_LE=np.zeros((2, EXPERTS)))
    assert same(ranks.turn(nothing))[1] == FIRST
    assert ranks.planner.started == 1 and not ranks.planner.asked


def test_who_need_not_hurry_waits_for_the_map_of_these_loads():
    ranks = Together()
    new = shuffled(TRIVIAL)
    ask = ranks.planner.ask

    def soon(one):
        coming = ask(one)
        coming.set_result(type("Answer", (), {"table_LS": new, "said": ""})())
        return coming

    ranks.planner.ask = soon
    table, word = same(ranks.turn(call(), waits=True))
    assert word == NEW and (table == new).all()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["answers", "late", "fails", "wrong"]), st.integers(-1, RANKS - 1), st.booleans()),
                max_size=8))  # fmt: skip
def test_no_rank_ever_differs(events):
    ranks, now = Together(), TRIVIAL
    for seed, (event, bad, refused) in enumerate(events):
        errors = {} if bad < 0 else {bad: MemoryError("x")}
        table, word = same(ranks.turn(call(now, seed), now, errors=errors))
        assert usable_map(table, 2, EXPERTS, 12) is not None and (word == NEW or (table == now).all())
        if not refused:  # else the engine stays where it is
            now = table
        if ranks.planner.coming and not ranks.planner.coming[-1].done():
            if event == "answers":
                ranks.planner.answers(shuffled(TRIVIAL, seed))
            elif event == "wrong":
                ranks.planner.answers(TRIVIAL * 0 + 1)
            elif event == "fails":
                ranks.planner.answers(error=NoResultError("x"))


# ---- the process itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aside():
    warm_up()  # what is compiled here the process finds
    one = Aside()
    yield one
    one.close()


def test_the_process_plans_what_would_be_planned_here(aside):
    for seed in range(3):
        got = aside.ask(call(seed=seed)).result(300)
        np.testing.assert_array_equal(got.table_LS, call(seed=seed).answer())
        assert "gains" in got.said or "stays" in got.said


def test_an_error_in_the_process_is_told_and_the_next_call_answered(aside):
    with pytest.raises(NoResultError, match="lacks an expert"):
        aside.ask(replace(call(), slots=11)).result(300)
    assert aside.ask(call()).result(300).table_LS.shape == TRIVIAL.shape


def test_a_killed_process_is_told_and_started_anew(aside):
    aside.ask(call()).result(300)
    first = aside.pid
    os.kill(first, signal.SIGSTOP)
    coming = aside.ask(call())
    time.sleep(0.1)
    assert not coming.done()
    os.kill(first, signal.SIGKILL)
    with pytest.raises(CommunicationError, match="exit code -9"):
        coming.result(300)
    assert aside.fruitless == 0  # it had answered before
    coming = aside.ask(call())
    assert coming.result(300).table_LS.shape == TRIVIAL.shape
    assert aside.pid != first and aside.answered
    assert not Aside().answered


def test_processes_that_went_without_an_answer_are_counted(tmp_path):
    """Each once; an answer of a later one, as where what they share was in the way, starts the count anew."""
    now = tmp_path / "now"
    code = f"import os, sys; os.path.exists({str(now)!r}) or sys.exit(3); from poise.engines.plugins.child import main; main()"
    one = Aside([sys.executable, "-c", code])
    for number in range(1, 4):
        with pytest.raises(CommunicationError, match="exit code 3"):
            one.ask(call()).result(60)
        assert one.fruitless == one.fruitless == number
    now.touch()
    assert one.ask(call()).result(300).table_LS.shape == TRIVIAL.shape and one.fruitless == 0
    one.close()
    assert one.fruitless == 0


def test_the_count_is_right_while_the_next_process_is_started(monkeypatch):
    """A thread starts it while the next turn asks: neither counts twice, nor is there a moment without a process."""
    one, seen = Aside([sys.executable, "-c", "raise SystemExit(3)"]), []

    def looked(does):
        def done(*args, **kwargs):
            seen.append((one.pid is not None, one.fruitless, one.answered))
            return does(*args, **kwargs)

        return done

    monkeypatch.setattr(aside_module.subprocess, "Popen", looked(aside_module.subprocess.Popen))
    monkeypatch.setattr(aside_module, "_over", looked(aside_module._over))
    for number in range(3):
        seen.clear()
        with pytest.raises(CommunicationError, match="exit code 3"):
            one.ask(call()).result(60)
        until_started = seen[: 2 if number else 1]  # the last one is let go, the next is started
        assert until_started == [(number > 0, number, False)] * len(until_started)
    one.close()


def test_what_nobody_waits_for_any_more_starts_no_process():
    """Else the process after the last one that is tried would be left."""
    one, others = Aside(HANGS), set(threading.enumerate())
    first = one.ask(call())
    while one.pid is None:
        time.sleep(0.01)
    second = one.ask(call())
    assert first.running() and second.cancel() and not first.cancel()
    pid = one.pid
    one.end()
    with pytest.raises(CommunicationError, match="exit code -9"):
        first.result(60)
    one.close()  # behind the thread of the second
    for thread in set(threading.enumerate()) - others:
        thread.join(60)
    assert one.pid == pid and one.fruitless == 1


def test_who_is_ended_while_its_process_starts_is_ended(monkeypatch):
    """There is only the one before to be killed then: the next one would be waited for, by ``close`` too, for ever."""
    one, starts, begins = Aside(HANGS), threading.Event(), threading.Event()
    start = subprocess.Popen

    def slow(*args, **kwargs):
        starts.set()
        assert begins.wait(60)
        return start(*args, **kwargs)

    monkeypatch.setattr(aside_module.subprocess, "Popen", slow)
    for number in (1, 2):
        starts.clear(), begins.clear()
        coming = one.ask(call())
        assert starts.wait(60)
        one.end()
        begins.set()
        try:
            with pytest.raises(CommunicationError, match="exit code -9"):
                coming.result(60)
        finally:
            one.end()
        assert one.fruitless == number
    one.close()


def test_what_was_asked_of_a_process_that_is_ended_starts_no_other():
    """Two models have one planner: a call of the other one would begin a process after the last one that is tried."""
    one = Aside(HANGS)
    first = one.ask(call())
    while one.pid is None:
        time.sleep(0.01)
    second, pid = one.ask(call()), one.pid
    one.end()
    for coming, said in ((first, "exit code -9"), (second, "ended before this call came to it")):
        with pytest.raises(CommunicationError, match=said):
            coming.result(60)
    assert one.pid == pid and one.fruitless == 1
    one.close()


def test_a_process_that_never_answers(tmp_path):
    """Not poise, not there, or gone at once."""
    for command in ([sys.executable, "-c", "pass"], [sys.executable, "-c", "print('hello')"], [str(tmp_path / "none")]):
        with pytest.raises((CommunicationError, FileNotFoundError)):
            Aside(command).ask(call()).result(60)
    other = Aside(
        [sys.executable, "-c", "import pickle, sys; sys.stdout.buffer.write(pickle.dumps(3)); sys.stdin.read()"]
    )
    with pytest.raises(CommunicationError, match="answered with int, not with a map"):
        other.ask(call()).result(60)
    other.close()
