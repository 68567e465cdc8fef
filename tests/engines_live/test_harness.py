"""What the rows stand on: the stand-in refuses what it does not know, and a run that hangs ends, with stacks."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from tests.engines_live import checks, running
from tests.engines_live.environment import Engine
from tests.engines_live.running import Asked, Ran, run

HANGS = """
import faulthandler, signal, time
faulthandler.register(signal.SIGUSR1, all_threads=True)
def waits_for_nobody(): time.sleep(600)
print("started", flush=True)
waits_for_nobody()
"""


class Here(Engine):
    """This Python in place of an engine's."""

    @property
    def python(self) -> Path:
        return Path(sys.executable)


@pytest.mark.parametrize(
    ("engine", "found", "refused"),
    [(engine, found, refused) for engine, known, others in (
        ("vllm", "0.32.0", ("0.31.0", "0.33.0")), ("sglang", "0.5.23", ("0.5.22", "0.5.24")),
    ) for found, refused in ((known, False), *((other, True) for other in others))],
)  # fmt: skip
def test_stand_ins_refuse_releases_that_they_do_not_know(monkeypatch, engine, found, refused):
    """The stand-in refuses {engine} {found}: {refused}"""
    monkeypatch.syspath_prepend(str(running.SITE))
    try:
        stand_in = importlib.import_module(f"{engine}_cpu_stand_in")
        monkeypatch.setattr(importlib.import_module("cpu_stand_in"), "version", lambda name: found)
        with pytest.raises(SystemExit if refused else ImportError, match=found if refused else "vllm|torch|sglang"):
            stand_in.register()  # a known one goes on to the engine, which is not installed here
    finally:
        forget("cpu_stand_in", f"{engine}_cpu_stand_in")


def forget(*packages):
    for name in [name for name in sys.modules if name.startswith(packages)]:
        del sys.modules[name]


def test_what_sglang_lacks_is_there_for_sglang_alone(monkeypatch):
    """Modules that the stand-in puts in are seen by SGLang's own code, not by who asks what is installed; calls raise"""
    monkeypatch.syspath_prepend(str(running.SITE))
    missing = importlib.import_module("sglang_cpu_stand_in.missing")
    finder = missing._Finder()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    asks = "from sgl_kernel import anything"
    with pytest.raises(ImportError):
        exec(asks, {"__name__": "somebody.else"})
    theirs = {"__name__": "sglang.srt.some_module"}
    try:
        exec(asks, theirs)
        with pytest.raises(NotImplementedError, match="anything"):
            theirs["anything"]()
        with pytest.raises(ImportError):
            exec("import sgl_kernel.scalar_type", theirs)  # SGLang does without
    finally:
        forget("cpu_stand_in", "sglang_cpu_stand_in", "sgl_kernel")


def served(monkeypatch, tmp_path, phases, counted):
    """Rounds that serving.py serves, and what it notes of phases, where ``counted(served)`` is each rank's count of maps."""
    monkeypatch.syspath_prepend(str(running.HERE))
    serving = importlib.import_module("serving")
    rounds = []
    serving.serve(
        {"rounds": [[n] for n in range(4)], "out": str(tmp_path / "out"), "phases": phases},
        lambda prompts: rounds.append(prompts[0]) or [], lambda: {"maps": counted(len(rounds))[0]},
        lambda mine: [[mine[0] + count - counted(len(rounds))[0]] for count in counted(len(rounds))],
    )  # fmt: skip
    notes = [json.loads(line)["phase"] for line in (tmp_path / "out.phases.rank-0").read_text().splitlines()]
    return rounds, notes, serving.MOST


@pytest.mark.parametrize(("key", "last"), [("everywhere", 7), ("anywhere", 6)])
def test_rounds_are_served_until_maps_came(monkeypatch, tmp_path, key, last):
    """Rounds are served again until maps came, {key}"""
    phases = [{"rounds": [0, 1, 2, 3], key: {"maps": 3}}]
    rounds, notes, _ = served(monkeypatch, tmp_path, phases, lambda n: (n // 2, max(0, n - 1) // 2))
    assert rounds == [n % 4 for n in range(last)] and not notes[0]["short"]


def test_a_phase_whose_maps_do_not_come_ends_the_run(monkeypatch, tmp_path):
    """Where maps do not come the run ends after its most rounds, and later phases are not served"""
    phases = [{"rounds": [0, 1], "everywhere": {"maps": 1}}, {"rounds": [2, 3]}]
    rounds, notes, most = served(monkeypatch, tmp_path, phases, lambda n: (0, n))
    assert len(rounds) == 2 + most and set(rounds) == {0, 1} and [one["short"] for one in notes] == [True]


@pytest.mark.parametrize(
    ("came", "ends"),
    [({"turns": 20, "late": 19}, pytest.skip.Exception), ({"turns": 5}, pytest.skip.Exception),
     ({"turns": 20, "stays": 19}, pytest.fail.Exception), ({"turns": 20, "failed": 3, "given up": 17}, pytest.fail.Exception)],
)  # fmt: skip
def test_a_busy_machine_is_no_failure_and_a_planner_that_does_nothing_is(tmp_path, came, ends):
    """Maps that did not come, as {came}: {ends}"""
    phase = {"short": True, "rounds": 10, "began": {"turns": 7}, "ended": {**came, "turns": 7 + came["turns"]}}
    ran = Ran((0,), (tmp_path,), ((),), ((),), ((phase,),), ((),), 0.0)
    with pytest.raises((pytest.skip.Exception, pytest.fail.Exception)) as ended:  # a skip that is not asked for is none
        checks.came(ran)
    assert ended.type is ends


def test_a_phase_counts_from_its_own_begin(monkeypatch, tmp_path):
    """Maps that came before a phase are not what it waits for"""
    phases = [{"rounds": [0]}, {"rounds": [1], "everywhere": {"maps": 2}}]
    rounds, notes, _ = served(monkeypatch, tmp_path, phases, lambda n: (n, n))
    assert rounds == [0, 1, 1] and [one["rounds"] for one in notes] == [1, 2]


def test_a_run_that_hangs_ends_with_stacks(monkeypatch, tmp_path):
    """A run that says nothing any more is ended, with the stacks of its threads in its log"""
    (tmp_path / "one_run.py").write_text(HANGS)
    monkeypatch.setattr(running, "HERE", tmp_path)
    asked = Asked(tmp_path, [], ranks=2, poise=False, stand_in=False, forked=False)
    ran = run(Here("none==0"), asked, tmp_path / "run", limit_s=15.0)
    assert ran.codes == (None, None) and not ran.fine
    assert all("waits_for_nobody" in ran.said(rank) for rank in range(2))
