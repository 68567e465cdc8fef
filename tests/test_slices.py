"""What CI runs beside the tests: every piece of ``make test-all`` on some day, one a day, and failures are told."""

import datetime
import re
import subprocess
from pathlib import Path

import pytest
from benchmarks import parity, slices
from benchmarks.slices import CASES, MANY, PROBLEMS, Piece, of_day, pieces, run
from tests.conftest import seconds_of_files

ROOT = Path(__file__).parents[1]
OF_RANKS = ("tests/train/test_support.py", "tests/serve/test_serve.py", "tests/train/test_runs.py")
CELLS = 1248
"""Of the parity matrix; any number would do."""


def words(script):
    return [piece.words[1:] for piece in pieces() if piece.words[0] == script]


def test_every_day_has_one_piece_and_every_piece_a_day():
    names = [piece.name for piece in pieces()]
    assert len(set(names)) == len(names)
    first = datetime.date(2026, 12, 20)
    days = [of_day(first + datetime.timedelta(day)).name for day in range(len(names))]
    assert sorted(days) == sorted(names)
    for piece in pieces():
        assert piece.words[0] == "-m" or (ROOT / piece.words[0]).is_file(), piece


def test_together_they_are_all_problems_and_all_cells():
    problems = [
        seed
        for count, first in words("benchmarks/engine_rules.py")
        for seed in range(int(first), int(first) + int(count))
    ]
    assert sorted(problems) == list(range(PROBLEMS))
    whole = {word: set() for word in parity.WHOLE}
    for (word,) in words("benchmarks/parity.py"):
        if word == "steady":
            whole[word] |= {0}
            continue
        world, every, first, dtype = parity.part(word)
        key = f"{world}:{dtype}".removesuffix(":float64")
        cells = set(range(first, CELLS, every))
        assert not whole[key] & cells, word
        whole[key] |= cells
    assert whole.pop("steady") == {0} and all(cells == set(range(CELLS)) for cells in whole.values())


def test_files_with_few_examples_are_those_that_get_many():
    using = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
             if re.search(r"import .*\b(few_or|many_only)\b|^    (few_or|many_only),$", path.read_text("utf-8"), re.MULTILINE)}  # fmt: skip
    assert using - {"tests/test_slices.py"} == {*MANY, *OF_RANKS}
    assert set(OF_RANKS) <= set(CASES)
    many = [piece.words for piece in pieces() if piece.environment.get("POISE_MANY")]
    assert all(any(file in words for words in many) for file in (*MANY, *CASES))


def test_make_test_all_is_all_of_them_and_ci_runs_one():
    make, ci = (ROOT / "Makefile").read_text("utf-8"), (ROOT / ".ci" / "run").read_text("utf-8")
    assert re.search(r"^test-all: test\n\t.*benchmarks/slices\.py --all$", make, re.MULTILINE)
    stages = re.findall(r"^stage (.*)$", ci, re.MULTILINE)
    assert stages == ["make check", "make test", "make slice"] and "set -euo pipefail" in ci
    assert re.search(r"^slice: setup\n\t.*benchmarks/slices\.py$", make, re.MULTILINE)


@pytest.mark.parametrize(
    ("code", "limit_s", "said"),
    [
        ("pass", 600, "fine"),
        ("raise SystemExit(3)", 600, "FAILED with 3"),
        ("import time; time.sleep(600)", 0.1, "not over after"),
    ],
)
def test_a_piece_tells_how_it_went(code, limit_s, said, capfd):
    assert run(Piece("one", ("-c", code)), limit_s) == (said == "fine")
    out = capfd.readouterr().out
    assert f"piece one: -c {code}" in out and said in out


def test_one_failure_of_many_is_exit_code_1(monkeypatch, capsys):
    every = [Piece(name, ("-c", f"raise SystemExit({code})")) for name, code in (("a", 0), ("b", 1), ("c", 0))]
    monkeypatch.setattr(slices, "pieces", lambda: every)
    for arguments, code in (["--all"], 1), (["--piece", "a"], 0), (["--piece", "b"], 1), (["--list"], 0):
        monkeypatch.setattr("sys.argv", ["slices.py", *arguments])
        assert slices.main() == code, arguments
    monkeypatch.setattr("sys.argv", ["slices.py", "--date", "2026-12-20"])
    assert slices.main() == (of_day(datetime.date(2026, 12, 20)).name == "b")
    assert "piece of 2026-12-20, one of 3" in capsys.readouterr().out


def test_seconds_of_files_are_those_of_all_phases():
    def report(name, when, duration):
        return pytest.TestReport(name, ("", 0, ""), {}, "passed", None, when, duration=duration)

    reports = [report("a.py::x", "setup", 1.0), report("a.py::y[1]", "call", 2.0), report("b.py::x", "teardown", 4.0)]
    assert seconds_of_files([*reports, "a warning"]) == {"a.py": 3.0, "b.py": 4.0}


def test_ci_stops_at_the_first_stage_that_fails(tmp_path):
    """The script itself, with a ``make`` that fails in its second stage."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("chromium", "tc"):
        (tools / name).symlink_to("/bin/true")
    (tools / "make").write_text('#!/bin/sh\necho "made $1"\ntest "$1" != "$FAILS"\n')
    (tools / "make").chmod(0o755)
    for fails, made in (("test", ["check", "test"]), ("none", ["check", "test", "slice"]), ("check", ["check"])):
        done = subprocess.run(["bash", str(ROOT / ".ci" / "run")], env={"PATH": f"{tools}:/usr/bin:/bin", "FAILS": fails},
                              capture_output=True, text=True)  # fmt: skip
        assert (done.returncode == 0) == (fails == "none"), done.stderr
        assert re.findall(r"^made (\w+)$", done.stdout, re.MULTILINE) == made
        assert len(re.findall(r"^--- make \w+: (?:fine|FAILED with 1), \d+ s$", done.stdout, re.MULTILINE)) == len(made)
