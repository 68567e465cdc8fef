"""poise bench on the command line, and docs/trace-format.md as written."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from poise.bench.cases import frozen_cases
from poise.bench.results import BenchResults
from poise.cli.main import app
from poise.planning.solve.solve import METHODS
from poise.routing.files import read
from poise.routing.npz import MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_MEMBERS, MAX_RATIO, MAX_UNPACKED_BYTES
from poise.routing.trace import FORMAT, MAX_EXPERTS
from poise.util.errors import TraceError

PAGE = (Path(__file__).parents[2] / "docs" / "trace-format.md").read_text("utf-8")
CASE = "W2 hot-rank, 1x8:h200"


def run(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_works_as_written(here):
    """Its trace is written by numpy alone; its commands write and compare results."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "sh", "sh"]
    exec(blocks[0][1], {})
    trace = read("trace.npz")
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (4096, 4, 8, 64)
    assert set(trace.home) == set(range(8)) == set(trace.step)
    commands = [shlex.split(line) for _, text in blocks[1:] for line in text.splitlines()]
    for words in commands:
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, (words, done.output)
    mine = BenchResults.load("mine.json")
    assert [row.method for row in mine.cases[0].rows] == ["contiguous", "lpt", "lpt + split"] and mine.work == 2
    assert "Who loses least" in Path("page.html").read_text() and "is lost least often" in done.output


def test_the_page_says_what_is_so():
    """Its bounds and its counts of cases, and every key of a results file."""
    assert f"E is at most {MAX_EXPERTS:,}" in PAGE and f"integer, optional | {FORMAT};" in PAGE
    assert f"unpack to {MAX_UNPACKED_BYTES >> 30} GiB" in PAGE and f"at most {MAX_RATIO} times" in PAGE
    assert (
        f"at most {MAX_MEMBERS} members, {MAX_DIMENSIONS}\ndimensions, headers of {MAX_HEADER_BYTES >> 10} KiB" in PAGE
    )
    assert f"There are {len(frozen_cases())}:" in PAGE
    firsts = [name.split()[0].rstrip(",") for name in frozen_cases()]
    for many, word in re.findall(r"^\| (\d+) `([\w-]+)`", PAGE, flags=re.M):
        assert int(many) == sum(first.startswith("W" if word == "W0" else word) for first in firsts), word
    made = {"schema": 1, **BenchResults("", "", {}, {}, 1.0, ()).to_json()}
    assert all(
        f"`{key}`" in PAGE for key in (*made, "name", "hash", "ground", "fitted_seconds", "plan_seconds", "reason")
    )


def test_another_format_is_refused_and_none_is_the_first(here):
    arrays = {"experts": np.zeros((4, 1), np.uint8), "num_experts": np.int32(2), "something_new": np.zeros(3)}
    np.savez("old.npz", **arrays)
    np.savez("new.npz", **arrays, format=np.int32(FORMAT + 1))
    np.savez("odd.npz", **arrays, format=np.zeros(2))
    assert read("old.npz").num_tokens == 4
    with pytest.raises(TraceError, match="is of format 2, this poise reads format 1"):
        read("new.npz")
    with pytest.raises(TraceError, match="format must be one whole number"):
        read("odd.npz")
    read("old.npz").save("saved.npz")
    with np.load("saved.npz") as saved:
        assert saved["format"] == FORMAT


def test_the_list_names_what_a_case_needs():
    got = run("--list", "--only", "anatomy, other requests, 1x8:h200, N = 512, R = 0", "--json")
    said = json.loads(got.stdout)
    assert said["schema"] == 1 and len(said["cases"]) == 1
    one = said["cases"][0]
    assert one["hash"] == frozen_cases()[one["name"]].digest()
    assert one["needs"][0][0] == "llama4-maverick/anatomy.npz" and len(one["needs"][0][1]) == 64
    assert "100 frozen cases" in run("--list").stdout and "llama4-maverick/" in run("--list").stdout


def test_results_are_written_after_every_case(here, monkeypatch):
    seen, save = [], BenchResults.save
    monkeypatch.setattr(BenchResults, "save", lambda self, path: (seen.append(len(self.cases)), save(self, path)))
    got = run(
        "--only", CASE, "--only", "W3 spread-hot, 1x8", "--method", "contiguous", "--work", 1, "-o", "r.json", "--json"
    )
    assert got.exit_code == 0 and seen == [1, 2]
    said = json.loads(got.stdout)
    assert said == json.loads((here / "r.json").read_text()) and said["schema"] == 1 and len(said["cases"]) == 2


WRONG = {
    ("--only", "nothing"): "no case has 'nothing' in its name",
    ("--only", CASE, "--method", "contigous"): "unknown method 'contigous'",
    ("--only", CASE, "--fast", "spilt"): "unknown policy 'spilt'",
    ("--only", CASE, "--data", "none"): "--data 'none' is no folder",
    ("r.json",): "results files means nothing for a run",
    ("--html", "p.html"): "--html means nothing for a run",
    ("--compare", "-o", "r.json"): "--output means nothing for --compare",
    ("--compare",): "at least 2 results files, got 0",
    ("--compare", "none.json", "none.json"): "cannot read 'none.json'",
    ("-o", "r.npz"): "does not end in .json",
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_is_wrong_is_said_before_any_work(here, words):
    got = run(*words)
    assert got.exit_code == 2 and WRONG[words] in " ".join(got.stderr.split()), got.output
    assert not list(here.iterdir())


def test_when_no_case_can_run_the_reason_is_said(here):
    got = run("--only", "anatomy, other requests, 1x8:h200, N = 512, R = 0", "--method", "contiguous", "-o", "r.json")
    said = " ".join(got.stderr.split())
    assert got.exit_code == 1 and "none of 1 cases ran: it needs llama4-maverick/anatomy.npz (--data FOLDER)" in said
    assert BenchResults.load("r.json").skipped


def test_every_method_that_can_be_named_has_a_row(here):
    """As long as it has a map for the case; those that have none are notes."""
    words = [word for name in METHODS for word in ("--method", name)]
    got = run("--only", CASE, *words, "--work", 0.1, "--json")
    assert got.exit_code == 0, got.output
    case = json.loads(got.stdout)["cases"][0]
    rows = {row["method"] for row in case["rows"]}
    left = {name for name in METHODS if any(note.startswith(f"{name} left out") for note in case["notes"])}
    assert rows | left >= set(METHODS) and len(rows) > 8
