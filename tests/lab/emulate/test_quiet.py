"""Whether a measurement was left alone: by what this system tells, and by rule."""

import pytest

from poise.lab.emulate import quiet
from poise.lab.emulate.quiet import Meter, busy_s, held_s, left_alone, settle, waits_s, why_not


def test_this_system_tells_or_says_that_it_does_not(tmp_path, monkeypatch):
    before, busy = waits_s(), busy_s()
    assert held_s(before) >= 0 and (busy is None or busy > 0)
    others = Meter().others()
    assert others is None or others >= 0
    monkeypatch.setattr(quiet, "PROC", tmp_path)
    assert waits_s() == {} and held_s({}) == 0 and busy_s() is None and Meter().others() is None
    (tmp_path / "stat").write_text("cpu 1 2\ncpu0 1 2\n")
    assert busy_s() is None


def test_the_thread_that_waited_longest_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "PROC", tmp_path)

    def tell(**waits):
        for thread, seconds in waits.items():
            (tmp_path / "self/task" / thread).mkdir(parents=True, exist_ok=True)
            (tmp_path / "self/task" / thread / "schedstat").write_text(f"5 {int(seconds * 1e9)} 1\n")

    tell(one=1.0, two=4.0)
    before = waits_s()
    tell(one=1.5, two=4.1, new=9.0)
    assert held_s(before) == pytest.approx(0.5)


@pytest.mark.parametrize("cores", [1, 2])
def test_others_are_what_is_left_of_the_cores_work(cores, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(quiet, "PROC", tmp_path)
    monkeypatch.setattr(quiet.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(quiet.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(quiet.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(quiet, "own_s", lambda: now[0] - 100)  # this process keeps one core busy

    def tell(*busy):  # user, nice, system and steal are work, idle and interrupts are not
        lines = [f"cpu{core} {ticks} 0 0 7777 77 5 500 0 0 0" for core, ticks in enumerate(busy)]
        (tmp_path / "stat").write_text("cpu 1 1 1 1 1 1 1 1 1 1\n" + "\n".join(lines) + "\nintr 1 2 3\n")

    tell(1000, 1000)
    meter = Meter()
    now[0] += 10
    tell(2000, 1000)
    assert meter.others() == 0 and meter.others(4.0) == pytest.approx(0.6 / cores)
    tell(2000, 1500)
    assert meter.others() == pytest.approx(0.25 if cores == 2 else 0.0)  # the other core is not ours


def test_repeats_that_waited_do_not_count_and_too_few_are_said():
    took, held = [1.0, 3.0, 1.1, 3.1, 1.05, 3.2, 3.0], [0.0, 2.0, 0.1, 2.0, 0.0, 2.0, 2.0]
    assert left_alone(took, held) == [1.0, 1.1, 1.05] == settle(took, held)[0] and settle(took, held)[1]
    assert settle(took[:-3], held[:-3]) == (took[:-3], False)  # two of four
    assert settle([1.0], [0.0]) == ([1.0], True) and settle([1.0], [0.5]) == ([1.0], False)
    assert not settle([1.0, 1.0, 2.0, 2.0], [0.0] * 4)[1]  # nobody waited, and no two agree


def test_only_effect_and_cause_together_are_inconclusive():
    assert why_not([True] * 5, 0.9) == "" == why_not([], None)
    assert why_not([False] * 5, 0.02) == ""  # ranks that are more than the cores wait for each other
    assert "5 of 5 rows" in why_not([False] * 5, 0.6) and "60% of the cores" in why_not([False] * 5, 0.6)
    assert "nothing tells" in why_not([False] * 5, None)
    assert why_not([True, False], 0.6, spared=0.5) == "" and why_not([True, False], 0.6)
    assert why_not([True, False, False], 0.6, spared=0.5)
