"""The command line as a user meets it: streams, exit codes, files, JSON."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from poise.cli import demo as demo_command
from poise.cli.main import app
from poise.engines import sglang
from poise.planning.placement import Placement
from poise.routing.files import read
from poise.routing.profile import load_LE, skew_L
from poise.routing.shipped import FOLDER, Shipped, balance, shipped
from poise.routing.synthetic import zipf_trace
from poise.routing.trace import RoutingTrace

ROW = {"name", "imbalance", "imbalance_p99", "cross_device_share", "cross_node_share", "step_seconds", "efficiency",
       "moved_bytes_per_step"}  # fmt: skip


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    zipf_trace(num_tokens=600, num_layers=3, num_experts=12, top_k=2, stickiness=0.4).save(path)
    return path


@pytest.fixture(scope="module")
def plan_file(trace):
    path = trace.with_name("p.npz")
    got = run("plan", trace, "-c", "2x2", "-r", 4, "--time-limit", 0.1, "-o", path)
    assert got.exit_code == 0, got.output
    return path


def test_plan_prints_the_promised_numbers_and_writes_the_placement(trace, tmp_path):
    got = run(
        "plan", trace, "--cluster", "2x2", "--redundant", 4, "--time-limit", 0.1, "-o", tmp_path / "p.npz", "--json"
    )
    assert got.exit_code == 0 and "wrote" in got.stderr
    data = json.loads(got.stdout)
    assert {"objective", "lower_bound", "gap", "seconds", "imbalance"} <= set(data)
    assert 0 < data["lower_bound"] <= data["objective"]
    assert data["gap"] == pytest.approx(1 - data["lower_bound"] / data["objective"])
    assert Placement.load(tmp_path / "p.npz").num_slots == 16


def test_every_method_plans_or_says_why_not(trace, tmp_path):
    for method in ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner", "moetuner-equal", "poise"):
        got = run("plan", trace, "-c", "1x4", "--method", method, "--time-limit", 0.1, "-o", tmp_path / f"{method}.npz")
        assert got.exit_code in (0, 1), got.output
        assert (tmp_path / f"{method}.npz").exists() == (got.exit_code == 0)
    got = run("plan", trace, "-c", "1x4", "--method", "exact", "-o", tmp_path / "exact.npz")
    assert got.exit_code == 1 and "hint" in got.stderr and not (tmp_path / "exact.npz").exists()


def test_compare_prints_rows_for_every_part(trace, plan_file):
    got = run("compare", trace, "-c", "2x2", "-r", 4, "-p", "contiguous", "-p", "eplb", "-p", plan_file,
              "--judge", f"other={trace}", "--json")  # fmt: skip
    assert got.exit_code == 0, got.stderr
    data = json.loads(got.stdout)
    assert {row["name"] for row in data["rows"]} == {"contiguous", "eplb", "p", "bound"}
    judged = {(row["name"], row["part"]): row["judged_on"] for row in data["rows"]}
    assert judged["eplb", "held-out"] == "held-out" and judged["p", "in-sample"] == "in-sample"
    # p was planned on all of it, eplb on the half that "other" holds too
    assert {judged[key] for key in (("p", "held-out"), ("p", "other"), ("eplb", "other"))} == {"fitted on this traffic"}
    for row in data["rows"]:
        assert set(row) >= ROW and set(row["step_seconds"]) == {"mean", "p50", "p99"} and 0 < row["efficiency"] <= 1


def test_compare_fits_on_what_it_is_told(trace):
    got = run("compare", f"{trace}#half=second", "--fit", f"{trace}#half=first", "-c", "1x4", "-p", "lpt", "--json")
    plain = run("compare", trace, "-c", "1x4", "-p", "lpt", "--json")
    rows = [[row for row in json.loads(g.stdout)["rows"] if row["name"] == "lpt"] for g in (got, plain)]
    assert [row["imbalance"] for row in rows[0]] == [row["imbalance"] for row in rows[1]]


def test_compare_tells_what_it_left_out(tmp_path):
    zipf_trace(num_tokens=300, num_layers=3, num_experts=7, top_k=1).save(tmp_path / "t.npz")
    got = run("compare", tmp_path / "t.npz", "-c", "1x2", "-p", "contiguous", "-p", "moetuner", "--time-limit", 1)
    assert got.exit_code == 0 and "moetuner left out" in got.stdout and "--engine none shows it" in got.stdout
    got = run("compare", tmp_path / "t.npz", "-c", "1x2", "-p", "contiguous", "-p", "moetuner", "--time-limit", 1,
              "--engine", "none")  # fmt: skip
    assert got.exit_code == 0 and "moetuner left out" in got.stdout and "21 experts" in got.stdout


def test_html_report(trace, tmp_path):
    got = run("compare", trace, "-c", "1x4", "-p", "contiguous", "-p", "lpt", "--html", tmp_path / "r.html")
    assert got.exit_code == 0 and (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_export(plan_file, tmp_path):
    got = run("export", plan_file, "--to", "sglang", "--num-hidden-layers", 5, "-o", tmp_path / "m.json", "--json")
    assert got.exit_code == 0 and json.loads(got.stdout)["redundant"] == 4
    assert "--ep-num-redundant-experts 4" in " ".join(got.stderr.split())
    back = sglang.read(tmp_path / "m.json", num_devices=4)
    assert back.slot_expert_LS.shape == (5, 16)
    assert run("export", plan_file, "--to", "npz", "-o", tmp_path / "q.npz").exit_code == 0
    assert Placement.load(plan_file).diff(Placement.load(tmp_path / "q.npz")).fetched == 0


def test_inspect(trace, tmp_path):
    got = run("inspect", trace, "--json")
    data = json.loads(got.stdout)
    assert (data["tokens"], data["layers"], data["experts"], data["top_k"]) == (600, 3, 12, 2)
    assert len(data["per_layer"]) == 3 and data["per_layer"][0]["information_to_next_nats"] > 0
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": [[0, 0], [1, 3]]}))
    data = json.loads(run("inspect", tmp_path / "l.json", "--json").stdout)
    assert data["per_layer"][0]["layer"] == 1 and data["per_layer"][0]["max_over_mean"] == 1.5
    assert "information to next" in run("inspect", trace).stdout


def test_inspect_of_many_layers_shows_the_most_skewed_first(tmp_path):
    """60 layers fill three screens; of loads nothing is known of tokens, so no column is empty."""
    loads = [[100, 100, 100, 100 + layer] for layer in range(60)]
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": loads}))
    said = run("inspect", tmp_path / "l.json").stdout
    rows = [int(found) for found in re.findall(r"^\W*(\d+) \u2502", said, flags=re.M)]
    assert rows == list(range(59, 35, -1)) and "36 more layers" in said and "information" not in said
    assert "at most 1.39 (layer 59)" in said


def bad_files(folder):
    np.savez(folder / "pickled.npz", experts=np.array([{}], dtype=object))
    np.savez(folder / "range.npz", experts=np.array([[5]]), num_experts=np.array(3))
    np.savez(folder / "missing.npz", other=np.array([1]))
    np.savez(folder / "nan.npz", experts=np.array([[np.nan]]))
    np.savez(folder / "shape.npz", experts=np.zeros((2, 2, 2, 2), np.uint8))
    good = folder / "good.npz"
    RoutingTrace(np.zeros((50, 2), np.uint8), 4).save(good)
    (folder / "cut.npz").write_bytes(good.read_bytes()[:-40])
    (folder / "cut.json").write_text('{"logical_count": [[1')
    (folder / "cycle.yaml").write_text("devices_per_node: &x [*x]")
    (folder / "huge.yaml").write_text("x: " + "y" * 2**20)
    return good


@pytest.mark.parametrize(
    "name", ["pickled.npz", "range.npz", "missing.npz", "nan.npz", "shape.npz", "cut.npz", "cut.json", "none.npz"])  # fmt: skip
def test_bad_traces_exit_with_2_and_write_nothing(tmp_path, name):
    bad_files(tmp_path)
    before = sorted(tmp_path.iterdir())
    for words in (["plan", tmp_path / name, "-c", "1x2", "-o", tmp_path / "p.npz"], ["inspect", tmp_path / name],
                  ["compare", tmp_path / name, "-c", "1x2", "--html", tmp_path / "r.html"]):  # fmt: skip
        got = run(*words)
        assert got.exit_code == 2 and "error:" in got.stderr and not got.stdout, got.output
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [["-c", "9"], ["-c", "cycle.yaml"], ["-c", "huge.yaml"], ["-c", "none.yaml"], ["-c", "1x2:none"],
     ["-c", "1x2", "-m", "none"], ["-c", "1x2", "-m", "mixtral-8x7b"],
     ["-c", "1x2", "-r", "-1"], ["-c", "1x2", "-r", "5"],
     ["-c", "1x2", "--traffic", "teleport"], ["-c", "1x2", "--split", "odd"], ["-c", "1x2", "--order", "odd"],
     ["-c", "1x2", "-n", "0"], ["-c", "1x2", "--time-limit", "0"], ["-c", "1x2", "--time-limit", "nan"],
     ["-c", "1x2", "--method", "magic"], ["-c", "1x2", "--seed", "x"], []],
)  # fmt: skip
def test_bad_options_exit_with_2_and_write_nothing(tmp_path, monkeypatch, words):
    good = bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    got = run("plan", good, *words, "-o", "p.npz")
    assert got.exit_code == 2 and got.stderr and not got.stdout, got.output
    assert sorted(tmp_path.iterdir()) == before


def test_bad_placements_and_targets(plan_file, tmp_path):
    (tmp_path / "cut.npz").write_bytes(plan_file.read_bytes()[:-30])
    for words in ([tmp_path / "cut.npz", "--to", "npz"], [plan_file, "--to", "vllm"],
                  [plan_file, "--to", "sglang"], [plan_file, "--to", "sglang", "--num-hidden-layers", 2], [tmp_path / "none.npz", "--to", "npz"]):  # fmt: skip
        got = run("export", *words, "-o", tmp_path / "x")
        assert got.exit_code == 2 and not (tmp_path / "x").exists(), got.output
    assert run("plan", "none.npz", "-c", "1x2", "-o", tmp_path / "no" / "p.npz").exit_code == 2


def test_a_real_process_keeps_stdout_for_data(tmp_path):
    command = [sys.executable, "-m", "poise.cli", "compare"]
    flat = tmp_path / "flat.npz"  # loads on which ILP 1 needs the solver, whose banner must not reach stdout
    rng = np.random.default_rng(0)
    RoutingTrace(rng.choice(9, (400, 2), p=np.arange(3, 12) / 63).astype(np.uint8), 9).save(flat)
    command += [str(flat), "-c", "1x4", "-p", "moetuner-equal", "--json", "--time-limit", "2"]
    got = subprocess.run(command, capture_output=True, text=True)
    assert got.returncode == 0 and got.stdout.startswith("{") and json.loads(got.stdout)["rows"]
    got = subprocess.run([*command[:4], "none.npz", "-c", "1x4"], capture_output=True, text=True)
    assert got.returncode == 2 and "Traceback" not in got.stderr


@pytest.fixture(scope="module")
def computed():
    return {}


@pytest.fixture
def demo_once(monkeypatch, computed):
    """``poise demo`` without options that change figures computes them for the first of its tests; what is written is all its own."""

    def once(name):
        make = getattr(demo_command, name)

        def made(*words, **more):
            if name not in computed:
                computed[name] = make(*words, **more)
            return computed[name]

        monkeypatch.setattr(demo_command, name, made)

    for name in ("compared", "what_if"):
        once(name)


def test_demo(tmp_path, demo_once):
    files_ = "--html", tmp_path / "r.html", "-o", tmp_path / "p.npz"
    data = json.loads(run("demo", *files_, "--json").stdout)
    assert {row["judged_on"] for row in data["rows"]} == {"in-sample", "held-out", "dictionary text"}
    rows = data["summary"]["parts"]["held-out"]
    assert [row["name"] for row in rows] == ["contiguous", "eplb", "poise", "poise + poise-near", "bound"]
    ms = [row["ms_per_step"] for row in rows]
    assert ms[-1] == min(ms) and rows[0]["saved"] is None and rows[2]["saved"][0] == pytest.approx(1 - ms[2] / ms[0])
    assert (tmp_path / "r.html").stat().st_size < 2e6
    assert Placement.load(tmp_path / "p.npz").num_slots == 40
    assert data["summary"]["slot_bytes_per_rank"] > 0, "EPLB off has no redundant slot"


def test_demo_of_all_methods_and_of_other_text(tmp_path, monkeypatch):
    read_ = []
    monkeypatch.setattr(demo_command, "shipped", lambda name: (read_.append(name), shipped(name))[1])
    words = ["demo", "--html", tmp_path / "r.html", "--all", "--even", "--domain", "dictionary", "--work", 3, "--json"]
    got = run(*words)
    assert set(read_) == {"demo_trace"}
    data = json.loads(got.stdout)
    names = {row["name"] for row in data["rows"]}
    assert {"contiguous", "round-robin", "lpt", "eplb", "moetuner-equal", "poise", "bound"} <= names
    assert "python text" in {row["judged_on"] for row in data["rows"]}
    assert "one of english" in run("demo", "--domain", "latin").stderr


def test_the_first_screen_and_the_readme_say_the_same(tmp_path, demo_once):
    got = run("demo", "--html", tmp_path / "r.html").stdout
    for words in ("EPLB off: contiguous blocks", "bound: nothing can be faster", "when traffic turns to dictionary text",
                  "Price of poise's map", "at least", "Nothing here ran on a GPU", "By batch", "POISE_STATIC_MAP"):  # fmt: skip
        assert words in got, words
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("\u2502")[1:-1]] for line in got.splitlines() if line.startswith("\u2502")
    ]
    assert len(rows) == 10, "five maps on two kinds of traffic"
    for (_, _, ms, saved, _), (_, _, _, turned, _) in zip(rows[:5], rows[5:], strict=True):
        table = next(line for line in readme.splitlines() if line.startswith("|") and ms in line)
        assert saved in table and turned in table, (ms, saved, turned)
    told = {r"at least ([\d.]+)%": "at least {} %", r"([\d.]+) GiB to move once": "moves {} GiB once",
            r"paid back after (\d+) steps": "after {} steps", r"take ([\d.]+) GiB a GPU": "takes {} GiB a GPU",
            r"saves -([\d.]+)% at 64": "loses {} %"}  # fmt: skip
    for words, there in told.items():
        assert there.format(re.search(words, got)[1]) in " ".join(readme.split()), words


@pytest.mark.parametrize("name", get_args(Shipped))
def test_the_shipped_traces_are_good_enough(name):
    data = json.loads(run("inspect", FOLDER / f"{name}.npz", "--json").stdout)
    assert data["layers"] >= 8 and data["experts"] >= 32 and data["top_k"] >= 2 and len(data["domains"]) == 5
    assert max(row["dead_share"] for row in data["per_layer"]) <= 0.05
    for row in data["per_layer"][:-1]:
        assert row["information_to_next_nats"] > 10 * row["shuffled_nats"]
    assert isinstance(read(FOLDER / f"{name}.npz"), RoutingTrace)


def test_the_skewed_trace_is_more_skewed_than_the_even_one():
    """Mixed text: of single kinds even a model that was trained to be even has more."""
    skew, even = (skew_L(load_LE(one.experts, one.num_experts)) for one in map(shipped, ("demo_skewed", "demo_trace")))
    assert skew[1:].mean() > 1.3 * even[1:].mean() and float(balance("demo_skewed")) < float(balance("demo_trace"))
