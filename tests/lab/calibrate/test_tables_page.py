"""What ships and what is claimed of it are of one fit: machines.json, the dated figures, docs/accuracy.md."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from poise.lab.calibrate.tables.defaults import UNTUNED
from poise.machine.presets import PEAKS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    return tables


@pytest.fixture(scope="module")
def figures(script):
    return json.loads(script.newest().read_text("utf-8"))


@pytest.fixture(scope="module")
def machines():
    return json.loads(files("poise").joinpath("data/machines.json").read_text("utf-8"))


def test_the_page_is_what_the_command_makes_of_the_newest_figures(script, figures):
    assert script.PAGE.read_text("utf-8") == script.page(figures, script.newest().name)


def test_what_is_claimed_is_of_the_constants_that_ship(figures, machines):
    assert (machines["source"], machines["sha256"], machines["fitted"]) == (
        figures["source"], figures["sha256"], figures["date"],
    )  # fmt: skip
    for row, claim in zip(machines["kernels"], figures["kernels"], strict=True):
        names = ("gpu", "type", "engine", "kernel", "version", "rows", "shapes")
        assert [row[name] for name in names] == [claim[name] for name in names]
        assert row["error"] == pytest.approx(claim["unseen_shapes"], rel=0.01)
        assert row["read_factor"] == pytest.approx(claim["read_factor"], rel=0.01)
    claims = {(row["gpu"], row["library"], row["reach"], row["way"]): row["model"] for row in figures["links"]}
    for row in machines["links"]:
        found = claims[row["gpu"], row["library"], row["reach"], "dispatch"]
        assert row["dispatch"]["error"] == pytest.approx(found, rel=0.01)


def test_one_kernel_is_the_default_and_none_that_is_untuned(machines):
    default = [(row["gpu"], row["type"], row["engine"]) for row in machines["kernels"] if row["default"]]
    assert len(default) == len(set(default)) >= 40
    assert all(row["read_factor"] <= UNTUNED for row in machines["kernels"] if row["default"])
    slow = {(row["gpu"], row["type"], row["engine"]) for row in machines["kernels"]} - set(default)
    assert {("h100", "fp8", "vllm"), ("h200", "fp8", "vllm")} <= slow
    assert {row["gpu"] for row in machines["kernels"]} == set(PEAKS)


def test_links_say_how_far_they_reach_and_which_are_doubtful(machines):
    for row in machines["links"]:
        assert row["doubtful"] == (row["reach"] == "nodes")
        for way in ("dispatch", "combine"):
            assert (row[way]["inter_bytes_per_s"] is not None) == (row["reach"] == "nodes")
            assert row[way]["error"] < 0.3 and row[way]["start_s"] > 0 and row[way]["intra_bytes_per_s"] > 1e11


def test_a_figure_that_is_missed_is_said(script, figures):
    said = script.wanted_table(figures)
    for key, (text, limit, word) in script.WANTED.items():
        value = script.reached(figures)[key]
        good = value <= limit if word == "at most" else value >= limit
        assert next(line for line in said.splitlines() if text in line).endswith("| yes |" if good else "| **no** |")
    assert said.count("**no**") == 2, "another number of misses: say so in docs/log.md"
