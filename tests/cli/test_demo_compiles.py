"""What the first demo compiles, and a second process that does half of it."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
from tests.helpers import many_only

from poise.cli import demo
from poise.util.compilation import COMPILATION

LISTED = """
import json, sys
from poise.util import compiled
found, load = set(), compiled._Cache.load_overload

def listed(self, signature, target):
    found.add((self._cache._py_func.__module__, self._cache._py_func.__qualname__, str(signature)))
    return load(self, signature, target)

compiled._Cache.load_overload = listed
try:
    {}
finally:
    json.dump(sorted(found), open(sys.argv[-1], "w"))
"""


def functions(code, path):
    """(module, function, signature) of what some code calls from Python, compiled before or not."""
    got = subprocess.run([sys.executable, "-c", LISTED.format(code), path], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    return {tuple(one) for one in json.loads(path.read_text())}


@many_only("a function that it lacks is compiled a moment later: no answer depends on it")
def test_the_second_process_compiles_what_the_fast_loop_needs(tmp_path):
    beside = functions("from poise.cli.demo import compile_fast_loop as f; f()", tmp_path / "beside.json")
    whole = functions("from poise.cli.demo import compared; compared(work=1.0)", tmp_path / "whole.json")
    loop = {one for one in whole if one[0].startswith("poise.stepwise")}
    assert len(loop) > 10 and loop <= beside, sorted(loop - beside)
    assert not {one for one in beside if one[0].startswith("poise.planning.solve.descent")}, "no planner"


class Beside:
    def __init__(self, command, **_):
        self.command, self.ended = command, []

    def kill(self):
        self.ended.append("killed")

    def wait(self):
        self.ended.append("waited")


@pytest.mark.parametrize("fails", [False, True], ids=["", "no process can be started"])
def test_it_is_started_only_where_something_compiles_and_is_gone_at_the_end(monkeypatch, fails):
    started, said = [], []

    def popen(command, **more):
        if fails:
            raise OSError("no process")
        started.append(Beside(command, **more))
        return started[-1]

    @contextmanager
    def cold():
        monkeypatch.setattr(COMPILATION, "count", 0)
        monkeypatch.setattr(COMPILATION, "on_first", lambda: said.append("compiling"))
        before = COMPILATION.on_first
        with demo._fast_loop_compiled_beside():
            yield
        assert COMPILATION.on_first is before

    monkeypatch.setattr(demo.subprocess, "Popen", popen)
    with cold():
        pass
    assert not started and not said
    with pytest.raises(KeyError), cold():
        COMPILATION.start("one")
        COMPILATION.start("two")
        raise KeyError
    COMPILATION.end("one")
    assert said == ["compiling"] and len(started) == (0 if fails else 1)
    assert all(one.ended == ["killed", "waited"] and "compile_fast_loop" in one.command[-1] for one in started)
