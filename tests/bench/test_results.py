"""Runs on frozen cases against what poise compare says, results files, and what several of them say together."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import poise
from poise.bench import run as bench_run
from poise.bench.cases import frozen_cases
from poise.bench.page import render_compared
from poise.bench.results import (
    LOST,
    SCHEMA,
    BenchResults,
    BenchRow,
    CaseResult,
    ComparedResults,
    SkippedCase,
    standings,
)
from poise.cli.terminal import SCHEMAS
from poise.report.view import Made
from poise.util.errors import NoResultError, OptionError

CASE = "W2 hot-rank, 1x8:h200, N = 1024, R = 0"
MADE = Made("2026-01-01 00:00 UTC", "poise 0", "poise bench")


@pytest.fixture(scope="module")
def case():
    """One that is run in a second, by two methods and a policy over the first."""
    return bench_run.run_case(frozen_cases()[CASE], None, ("lpt", "contiguous"), ("split",), over="lpt", work=1.0)


def without_clock(case):
    return replace(case, rows=tuple(replace(row, plan_seconds=None) for row in case.rows))


def test_a_row_is_that_of_a_comparison(case):
    frozen = frozen_cases()[CASE]
    found = poise.compare(
        frozen.judge.load(), frozen.cluster, fit=frozen.fit.load(), placements=("contiguous",), model=frozen.model,
        traffic=frozen.traffic, warm_up=frozen.warm_up, work=1.0,
    )  # fmt: skip
    held_out = found.replays["contiguous", "held-out"]
    row = next(row for row in case.rows if row.method == "contiguous")
    assert row.seconds == held_out.step_seconds_B.mean() and row.imbalance == held_out.imbalance > 2
    assert row.fitted_seconds == found.replays["contiguous", "in-sample"].step_seconds_B.mean()
    assert row.bound_seconds == held_out.bound_B.mean() <= row.seconds
    assert case.steps == len(held_out.bound_B) == 16 - frozen.warm_up
    assert case.hash == frozen.digest() and case.machine == frozen.cluster and "measured" in case.ground


def test_a_policy_changes_no_row_of_a_map_and_work_decides_all(case):
    alone = bench_run.run_case(frozen_cases()[CASE], None, ("lpt", "contiguous"), work=1.0)
    assert [row.method for row in case.rows] == ["lpt", "contiguous", "lpt + split"]
    assert without_clock(case).rows[:2] == without_clock(alone).rows
    assert case.rows[0].plan_seconds > 0 and case.rows[2].plan_seconds is None


def test_what_is_not_here_is_skipped_and_said():
    cases = [frozen_cases()[name] for name in (CASE, "llama-4 anatomy, other requests, 1x8:h200, N = 512, R = 0")]
    seen = list(bench_run.run(cases, None, ("contiguous",), work=1.0, command="poise bench"))
    assert [len(one.cases) for one in seen] == [1, 1] and [len(one.skipped) for one in seen] == [0, 1]
    assert seen[1].skipped[0].reason == "it needs llama4-maverick/anatomy.npz (--data FOLDER)"
    assert seen[1].versions["poise"] == poise.__version__ and seen[1].host["cpus"] >= 1
    for methods, policies in ((("contigous",), ()), (("contiguous",), ("spilt",))):
        with pytest.raises(OptionError, match="unknown"):
            next(bench_run.run(cases, None, methods, policies))
    with pytest.raises(OptionError, match="is no folder"):
        next(bench_run.run(cases, Path("no folder"), ("contiguous",)))


def results(*cases, **more):
    given = {"command": "c", "made": "m", "versions": {"poise": "1"}, "host": {"cpus": 2}, "work": 1.0} | more
    return BenchResults(**given, cases=cases)


def made_case(name, digest="0" * 64, **seconds):
    rows = tuple(BenchRow(method, value, value, 1.5, 2.0, 1.0, value, 0.1) for method, value in seconds.items())
    return CaseResult(name, digest, "1x8", "g", "m", 64, 0, 0, 3, rows)


def test_a_file_is_read_as_it_was_written(tmp_path, case):
    whole = replace(results(case, made_case("x", a=1.0)), skipped=(SkippedCase("y", "1" * 64, "why"),))
    whole.save(tmp_path / "r.json")
    assert BenchResults.load(tmp_path / "r.json") == whole
    assert next(iter(json.loads((tmp_path / "r.json").read_text()).items())) == ("schema", SCHEMA)
    assert SCHEMA == SCHEMAS["bench"]


WRONG = {
    "schema": (2, "this poise reads 1"), "command": (3, "command must be a text"), "versions": ([], "versions must be an object"),
    "work": (-1, "work must be a number from 0"), "cases": ({}, "cases must be a list"), "host": (None, "host must be an object"),
    "skipped": ([{}], "name must be a text"),
}  # fmt: skip
WRONG_CASE = {
    "name": ("x" * 3000, "name must be a text of at most"), "hash": ("abc", "is no sha256"), "tokens": (1.5, "whole number"),
    "steps": (True, "whole number"), "rows": ([3], "a row must be an object"), "notes": ("n", "notes must be a list"),
}  # fmt: skip
WRONG_ROW = {"seconds": ("1", "a number from"), "imbalance": (True, "a number from"), "plan_seconds": (-1, "a number from"),
             "method": (None, "must be a text"), "seconds_p99": (10**400, "a number from"), "bound_seconds": (1e300, "a number from")}  # fmt: skip


@pytest.mark.parametrize(
    ("where", "key"), [(where, key) for where, table in enumerate((WRONG, WRONG_CASE, WRONG_ROW)) for key in table]
)
def test_what_is_not_as_the_schema_says_is_refused(tmp_path, where, key):
    data = json.loads(json.dumps(results(made_case("x", a=1.0)).to_json()))
    value, said = (WRONG, WRONG_CASE, WRONG_ROW)[where][key]
    (data, data["cases"][0], data["cases"][0]["rows"][0])[where][key] = value
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(OptionError, match=said):
        BenchResults.load(tmp_path / "r.json")


def test_no_time_at_all_is_refused(tmp_path):
    results(made_case("x", a=0.0, b=1.0)).save(tmp_path / "r.json")
    with pytest.raises(OptionError, match="seconds must be a number from 1e-12"):
        BenchResults.load(tmp_path / "r.json")


def test_a_method_is_in_a_case_once(tmp_path):
    case = made_case("x", a=1.0)
    results(replace(case, rows=case.rows * 2)).save(tmp_path / "r.json")
    with pytest.raises(OptionError, match="case 'x' has method 'a' twice"):
        BenchResults.load(tmp_path / "r.json")


def test_a_case_is_in_a_file_once(tmp_path):
    results(made_case("x", a=1.0), made_case("x", a=2.0)).save(tmp_path / "r.json")
    with pytest.raises(OptionError, match="case 'x' comes twice"):
        BenchResults.load(tmp_path / "r.json")


def test_standings_by_hand():
    """b is best in two of three cases, by 10 and 20 %; c is beaten everywhere; d has one case, and none to beat it in."""
    found = standings([{"a": 1.0, "b": 0.9, "c": 2.0}, {"a": 1.0, "b": 0.8}, {"a": 1.0, "b": 1.25}, {"d": 1.0}])
    a, b, c = (next(one for one in found if one.name == name) for name in "abc")
    assert [one.name for one in found] == ["b", "a", "c"]
    assert (a.cases, a.lost, b.cases, b.lost, c.cases, c.lost) == (3, 2, 3, 1, 1, 1)
    assert b.lead == pytest.approx((0.1 + 0.2 - 0.25) / 3) and b.worst == pytest.approx(-0.25)
    assert c.lead == pytest.approx(1 - 2.0 / 0.9)
    just = standings([{"a": 1.0, "b": 1.0 - LOST * 0.99}])
    assert [one.lost for one in just] == [0, 0]


def test_files_of_other_cases_are_refused():
    one, other = results(made_case("x", a=1.0)), results(made_case("x", "1" * 64, a=1.0))
    with pytest.raises(OptionError, match=r"case 'x' is 000000000000\.\.\. in A and 111111111111\.\.\. in B"):
        ComparedResults.of([one, other], ["A", "B"])
    with pytest.raises(NoResultError, match="no case is in all of A, B"):
        ComparedResults.of([one, results(made_case("y", a=1.0))], ["A", "B"])
    with pytest.raises(OptionError, match="at least 2 results files, got 1"):
        ComparedResults.of([one], ["A"])


def test_files_side_by_side():
    one = results(made_case("x", a=2.0, b=3.0), made_case("y", a=2.0), made_case("z", a=1.0))
    two = results(made_case("x", a=1.0), made_case("y", a=1.8), work=2.0, versions={"poise": "2"})
    found = ComparedResults.of([one, two], ["A", "B"])
    assert found.cases == ("x", "y") and list(found.rows("x")) == ["A: a", "A: b", "B: a"]
    assert found.changes() == [("B", "a", pytest.approx(0.3), pytest.approx(0.1))]
    assert found.sentence().startswith("B: a is lost least often: 0 of 2 cases")
    assert found.sentence().endswith("1 methods have fewer cases and are not ranked with it.")
    assert found.notes == (
        "1 of 3 cases are not in every file: they are left out", "units of work a plan differ: A 1, B 2",
        "versions of poise differ: A 1, B 2",
    )  # fmt: skip
    said = json.loads(json.dumps(found.to_json()))
    assert said["standings"][0]["name"] == "B: a" and said["cases"][0]["rows"]["A: b"]["seconds"] == 3.0


def test_the_page_has_every_row_and_names_are_inert():
    evil = "<script>window.hacked = 1</script>"
    one, two = results(made_case(evil, **{evil: 2.0, "b": 3.0})), results(made_case(evil, **{evil: 1.0}), command=evil)
    page = render_compared(ComparedResults.of([one, two], [evil, "B"]), MADE)
    assert evil not in page.replace("<script>", "<script>", 1) and "&lt;script&gt;window.hacked" in page
    for text in ("Who loses least", "How far from the bound", "What changed", "Every case", "2000.000", "3000.000"):
        assert text in page
    assert asdict(one.cases[0].rows[0])["seconds"] == 2.0 and len(page) < 200_000
