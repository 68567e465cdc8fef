"""What the rows stand on: the stand-in refuses what it does not know, and a run that hangs ends, with stacks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from tests.engines_live import running
from tests.engines_live.environment import Engine
from tests.engines_live.running import Asked, run

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


@pytest.mark.parametrize(("found", "refused"), [("0.31.0", True), ("0.33.0", True), ("0.32.0", False)])
def test_stand_in_refuses_releases_that_it_does_not_know(monkeypatch, found, refused):
    """The stand-in refuses vLLM {found}: {refused}"""
    monkeypatch.syspath_prepend(str(running.HERE / "site"))
    stand_in = importlib.import_module("vllm_cpu_stand_in")
    monkeypatch.setattr(stand_in, "version", lambda name: found)
    monkeypatch.setattr(stand_in, "_filled", [])
    try:
        with pytest.raises(RuntimeError if refused else ImportError, match=found if refused else "vllm|torch"):
            stand_in.register()  # a known one goes on to vLLM, which is not installed here
    finally:
        for name in [name for name in sys.modules if name.startswith("vllm_cpu_stand_in")]:
            del sys.modules[name]


@pytest.mark.parametrize(("found", "refused"), [("0.5.22", True), ("0.5.24", True), ("0.5.23", False)])
def test_sglangs_stand_in_refuses_releases_that_it_does_not_know(monkeypatch, found, refused):
    """The stand-in refuses SGLang {found}: {refused}"""
    monkeypatch.syspath_prepend(str(running.HERE / "sglang_site"))
    stand_in = importlib.import_module("sglang_cpu_stand_in")
    monkeypatch.setattr(stand_in, "version", lambda name: found)
    monkeypatch.setattr(stand_in, "_filled", [])
    try:
        with pytest.raises(SystemExit if refused else ImportError, match=found if refused else "sglang"):
            stand_in.register()
    finally:
        for name in [name for name in sys.modules if name.startswith("sglang_cpu_stand_in")]:
            del sys.modules[name]


def test_what_sglang_lacks_is_there_for_sglang_alone(monkeypatch):
    """Modules that the stand-in puts in are seen by SGLang's own code, not by who asks what is installed; calls raise"""
    monkeypatch.syspath_prepend(str(running.HERE / "sglang_site"))
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
        for name in [name for name in sys.modules if name.startswith(("sglang_cpu_stand_in", "sgl_kernel"))]:
            del sys.modules[name]


def test_a_run_that_hangs_ends_with_stacks(monkeypatch, tmp_path):
    """A run that hangs is ended at its limit, with the stacks of its threads in its log"""
    (tmp_path / "one_run.py").write_text(HANGS)
    monkeypatch.setattr(running, "HERE", tmp_path)
    asked = Asked(tmp_path, [], ranks=2, poise=False, stand_in=False, forked=False)
    ran = run(Here("none==0"), asked, tmp_path / "run", limit_s=5.0)
    assert ran.codes == (None, None) and not ran.fine
    assert all("waits_for_nobody" in ran.said(rank) for rank in range(2))
