"""poise watch: alarms after the traffic changed and not before, follows a growing file, and writes what it adopts."""

import json
import os
import sys
import time
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import typer
from tests.helpers import few_or
from typer.testing import CliRunner

from poise import api
from poise.cli.watch import watch
from poise.planning.placement import Placement
from poise.routing.batching import make_batch
from poise.routing.files import join
from poise.routing.trace import RoutingTrace
from poise.util.errors import TraceError
from poise.watch.sources import LEAST_TOKENS, UNREADABLE_POLLS, Tail

records = sys.modules["poise.cli.watch_options"]
N, WINDOW, EVERY = 96, 12, 6
LAYERS = 3
"""The last of the eight of the trace, where kinds of text differ most: the way to every plan is priced layer by layer."""
# Slow enough that computing decides, so that balance is worth something.
SLOW = "nodes: 2\ndevices_per_node: 4\nflops_per_s: 1e9\nintra_latency_s: 0.0\ninter_latency_s: 0.0\n"


def run(*words):
    app = typer.Typer()
    app.command()(watch)

    @app.callback()
    def root() -> None:
        pass

    return CliRunner().invoke(app, ["watch", *(str(word) for word in words)])


def first_rows(trace, size) -> RoutingTrace:
    """The first rows."""
    return trace.rows(np.arange(trace.num_tokens) < size)


def mixed(trace, seed):
    """The trace's requests in random order: traffic of one kind from beginning to end."""
    ids = trace.requests()
    rank = dict(zip(np.random.default_rng(seed).permutation(ids).tolist(), range(len(ids)), strict=True))
    order = np.argsort([rank[r] for r in trace.request.tolist()], kind="stable")
    names = ("experts", "request", "is_decode", "domain")
    return replace(trace, **{name: getattr(trace, name)[order] for name in names})


@pytest.fixture(scope="module")
def parts():
    whole = api.load(files("poise") / "data" / "demo_trace.npz")
    demo = replace(whole, experts=whole.experts[:, -LAYERS:], layer_ids=None)
    return [mixed(demo.select(domains=[name]), seed) for seed, name in enumerate(("english", "python"))]


@pytest.fixture(scope="module")
def both(parts):
    return join(parts)


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "slow.yaml").write_text(SLOW)
    return tmp_path / "slow.yaml"


def options(cluster, *more, method="lpt"):
    return ["-c", cluster, "-r", 8, "-n", N, "--window", WINDOW, "--every", EVERY, "--method", method, *more]


def lines(got, event):
    return [x for x in map(json.loads, got.stdout.splitlines()) if x["event"] == event]


def check_alarms(got, change):
    looks = lines(got, "look")
    alarms = [look["step"] for look in looks if look["alarm"]]
    assert alarms and change < alarms[0] <= change + WINDOW and not any(step <= change for step in alarms)
    tested = [look for look in looks if look["p_value"] is not None]
    assert len([look for look in tested if look["step"] <= change]) >= 5
    assert all(look["alarm"] == (look["p_value"] <= 0.01) for look in tested)
    return alarms


def test_it_alarms_after_the_change_and_not_before_and_a_new_placement_is_written(both, parts, cluster, tmp_path):
    both.save(tmp_path / "t.npz")
    got = run(tmp_path / "t.npz", *options(cluster, "--once", "--json", "-o", tmp_path / "p.npz"))
    assert got.exit_code == 0, got.output
    change = parts[0].num_tokens // N
    alarm = check_alarms(got, change)[0]
    looks, plans = lines(got, "look"), lines(got, "plan")
    assert [look["step"] for look in looks] == list(range(EVERY, both.num_tokens // N + 1, EVERY))
    assert [plan["reason"] for plan in plans][:2] == ["first", "drift"] and plans[1]["step"] == alarm
    assert plans[0]["accepted"] and plans[0]["predicted_gain"] > 0 and plans[0]["rounds"] > 0
    assert plans[0]["bytes"] == plans[0]["moves"] * 3 * 2048 * 1024 * 2
    assert plans[-1]["accepted"] == (plans[-1]["file"] is not None)
    kept = Placement.load(tmp_path / "p.npz")
    assert kept.num_slots == 40 and kept.num_devices == 8
    before = [look["imbalance"] for look in looks if look["step"] <= 4 * WINDOW]
    after = [look["imbalance"] for look in looks if 5 * WINDOW < look["step"] <= change]
    assert np.mean(after) < 0.9 * np.mean(before)


def test_the_same_file_gives_the_same_lines_and_people_get_words(parts, cluster, tmp_path):
    join([first_rows(part, size * N) for part, size in zip(parts, (60, 30), strict=True)]).save(tmp_path / "t.npz")
    one, two = (run(tmp_path / "t.npz", *options(cluster, "--once")) for _ in range(2))
    assert one.exit_code == 0 and one.stdout == two.stdout
    assert "ALARM" in one.stdout and "plan (first)" in one.stdout and "steps watched" in one.stderr


def test_a_growing_file_is_followed_and_torn_writes_are_tried_again(both, parts, cluster, tmp_path, monkeypatch):
    """The file grows by some hundred rows between looks; every other time it is caught half written."""
    path = tmp_path / "t.npz"
    sizes = [*range(700, both.num_tokens, few_or(2600, 6000)), both.num_tokens]
    first = first_rows(both, sizes[0])
    first.save(path)
    todo = [(size, torn) for size in sizes[1:] for torn in (True, False)]
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if todo:
            size, torn = todo.pop(0)
            first_rows(both, size).save(path)
            if torn:
                path.write_bytes(path.read_bytes()[: -len(waits) * 20 - 40])
        elif len(waits) > 2 * len(sizes) + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    # Planning is made to end at once: when a plan comes must not depend on how fast this machine is.
    real = records.ControlSettings
    monkeypatch.setattr(records, "ControlSettings", lambda **o: real(**{**o, "background": False}))
    got = run(path, *options(cluster, "--json", "--interval", 0.5, "-o", tmp_path / "p.npz"))
    assert got.exit_code == 0 and set(waits) == {0.5}, got.output
    check_alarms(got, parts[0].num_tokens // N)
    both.save(path)
    whole = run(path, *options(cluster, "--json", "--once", "-o", tmp_path / "q.npz"))
    assert [look["p_value"] for look in lines(got, "look")] == [look["p_value"] for look in lines(whole, "look")]
    assert Placement.load(tmp_path / "p.npz").diff(Placement.load(tmp_path / "q.npz")).fetched == 0


def test_following_plans_in_the_background(parts, cluster, tmp_path, monkeypatch):
    parts[0].save(tmp_path / "t.npz")
    nap, waits = time.sleep, []

    def sleep(seconds):
        waits.append(seconds)
        nap(0.05)
        if (tmp_path / "p.npz").exists() or len(waits) > 6000:  # five minutes
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    got = run(tmp_path / "t.npz", *options(cluster, "--json", "-o", tmp_path / "p.npz"))
    assert got.exit_code == 0 and lines(got, "plan")[0]["accepted"] and len(waits) < 6000
    assert Placement.load(tmp_path / "p.npz").num_slots == 40


def test_a_placement_in_use_keeps_its_slots_and_moves_come_in_parts(parts, cluster, tmp_path):
    trace = first_rows(parts[0], 54 * N)
    trace.save(tmp_path / "t.npz")
    words = ["-c", cluster, "-n", N, "--window", WINDOW, "--every", EVERY, "--method", "lpt", "--once", "--json",
             "--traffic", "home"]  # fmt: skip
    use = api.plan(trace, str(cluster), redundant=16, method="round-robin").placement
    use.save(tmp_path / "use.npz")
    got = run(tmp_path / "t.npz", *words, "-p", tmp_path / "use.npz", "--max-moves", 20, "-o", tmp_path / "p.npz")
    assert got.exit_code == 0, got.output
    plans = lines(got, "plan")
    assert all(plan["moves"] <= 20 for plan in plans) and any(plan["reason"] == "continued" for plan in plans)
    kept = Placement.load(tmp_path / "p.npz")
    np.testing.assert_array_equal(kept.slot_device_S, use.slot_device_S)
    assert use.diff(kept).fetched <= sum(plan["moves"] for plan in plans if plan["accepted"])


def test_load_profiles_are_watched_too(parts, cluster, tmp_path):
    a, b = (make_batch(part, tokens_per_step=N, order="file").load_BLE[:80] for part in parts)
    (tmp_path / "l.json").write_text(json.dumps({"logical_count": np.concatenate([a, b]).tolist()}))
    words = ["-c", cluster, "-r", 8, "--window", WINDOW, "--every", EVERY, "--method", "lpt", "--once", "--json"]
    got = run(tmp_path / "l.json", *words)
    assert got.exit_code == 0, got.output
    alarms = [look["step"] for look in lines(got, "look") if look["alarm"]]
    assert len(lines(got, "look")) == 160 // EVERY and 80 < alarms[0] <= 80 + WINDOW


def test_steps_are_given_once_and_only_whole_ones(parts, tmp_path):
    path, trace = tmp_path / "t.npz", first_rows(parts[0], 250)
    recorded = replace(trace, step=np.repeat(np.arange(25), 10).astype(np.int32))
    want = make_batch(trace, tokens_per_step=60, order="file").load_BLE[:4]
    rows, got = Tail(str(path), 60), []
    for size in (59, 130, 130, 239, 250):
        first_rows(trace, size).save(path)
        new = rows.steps(over=False)
        got += [] if new is None else list(new.load_BLE)
        assert len(got) == size // 60 and rows.steps(over=False) is None
    np.testing.assert_array_equal(got, want)
    tail = Tail(str(tmp_path / "r.npz"), None)
    first_rows(recorded, 95).save(tmp_path / "r.npz")  # the tenth step may still grow
    assert tail.steps(over=False).num_steps == 9
    recorded.save(tmp_path / "r.npz")
    np.testing.assert_array_equal(tail.steps(over=True).load_BLE, make_batch(recorded).load_BLE[9:])
    first_rows(trace, 60).save(path)
    with pytest.raises(TraceError, match="holds 60 rows, 250 were read"):
        rows.steps(over=False)


def test_the_first_few_rows_do_not_settle_what_a_step_is(parts, cluster, tmp_path):
    path, tail = tmp_path / "t.npz", Tail(str(tmp_path / "t.npz"), None)
    first_rows(parts[0], LEAST_TOKENS - 1).save(path)
    got = tail.poll()
    assert got.arrivals == () and got.notes == () and tail.tokens_per_step is None
    assert Tail(str(path), None).steps(over=True).num_steps == 1
    first_rows(parts[0], 40 * LEAST_TOKENS).save(path)
    got = tail.poll()
    assert tail.tokens_per_step == 40 * LEAST_TOKENS // 16 and got.arrivals[0].steps.num_steps == 16
    assert got.notes[0].startswith("steps of 160 tokens, chosen by the first 2560 rows") and tail.poll().notes == ()
    words = ["-c", cluster, "--once", "--method", "lpt"]
    said = run(path, *words, "--json")
    assert lines(said, "note") == [{"schema": 1, "event": "note", "message": got.notes[0], "files": []}]
    assert "steps of 160 tokens" in run(path, *words).stderr


def test_a_trace_that_is_too_young_ends_as_any_other(parts, cluster, tmp_path, monkeypatch):
    first_rows(parts[0], N - 1).save(tmp_path / "t.npz")

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    got = run(tmp_path / "t.npz", *options(cluster))
    assert got.exit_code == 0 and "0 steps watched" in got.stderr and "error" not in got.stderr
    got = run(tmp_path / "t.npz", *options(cluster, "--once"))
    assert got.exit_code == 2 and f"holds {N - 1} rows, less than a step of {N}" in " ".join(got.stderr.split())


def test_a_file_that_stays_broken_ends_the_watch(parts, cluster, tmp_path, monkeypatch):
    path, waits = tmp_path / "t.npz", []
    parts[0].save(path)
    path.write_bytes(path.read_bytes()[:-50])

    def sleep(seconds):
        waits.append(seconds)
        assert len(waits) < 50

    monkeypatch.setattr(time, "sleep", sleep)
    got = run(path, *options(cluster))
    assert got.exit_code == 2 and "error:" in got.stderr and len(waits) == UNREADABLE_POLLS - 1
    waits.clear()
    got = run(path, *options(cluster, "--once"))
    assert got.exit_code == 2 and not waits and not got.stdout


@pytest.mark.parametrize(
    "words",
    [["-c", "9"], ["--window", 0], ["--every", 0], ["--max-moves", 0], ["--false-alarm-rate", 0], ["--interval", 0],
     ["--false-alarm-rate", 1e-7], ["--horizon", 0], ["--method", "none"], ["--method", "moetuner"], ["-n", 0], ["-r", -1],
     ["-n", 10**6], ["--model", "none"], ["--traffic", "none"], ["--split", "none"], ["-o", "no/such/p.npz"],
     ["-p", "none.npz"], ["--time-limit", 0]],
)  # fmt: skip
def test_bad_options_exit_with_2(parts, tmp_path, words):
    first_rows(parts[0], 80 * N).save(tmp_path / "t.npz")
    before = sorted(tmp_path.iterdir())
    got = run(tmp_path / "t.npz", "-c", "2x4", "-n", N, "--window", 8, "--method", "lpt", "--once", "--json", *words)
    assert got.exit_code == 2 and got.stderr and "Traceback" not in got.output, got.output
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_fit_together_exits_with_2(parts, tmp_path):
    trace = first_rows(parts[0], 40 * N)
    trace.save(tmp_path / "t.npz")
    api.plan(trace, "1x4", method="contiguous").placement.save(tmp_path / "four.npz")
    for words in (["-p", tmp_path / "four.npz"], ["-p", tmp_path / "four.npz", "-r", 4]):
        got = run(tmp_path / "t.npz", "-c", "2x4", "--once", *words)
        assert got.exit_code == 2 and got.stderr and not got.stdout
    got = run(tmp_path / "none.npz", "-c", "2x4")
    assert got.exit_code == 2 and "no such file" in got.stderr


def test_a_folder_of_dumps_is_watched_and_maps_of_engines_are_kept(parts, cluster, tmp_path):
    (tmp_path / "dumps").mkdir()
    load = make_batch(parts[0], tokens_per_step=N, order="file").load_BLE
    for k in range(8):
        path = tmp_path / "dumps" / f"{k}.json"
        path.write_text(json.dumps({"logical_count": load[10 * k : 10 * k + 10].tolist()}))
        os.utime(path, (k, k))
    (tmp_path / "dumps" / "9.json").write_text("[")
    words = ["-c", cluster, "-r", 8, "--window", WINDOW, "--every", EVERY, "--method", "lpt", "--once", "--json"]
    exports = ["--export", f"sglang:{tmp_path / 'map.json'}", "--num-hidden-layers", LAYERS, "-o", tmp_path / "p.npz"]
    got = run(tmp_path / "dumps", *words, *exports)
    assert got.exit_code == 0, got.output
    plan = lines(got, "plan")[0]
    assert plan["accepted"] and plan["files"] == [str(tmp_path / "p.npz"), str(tmp_path / "map.json")]
    assert len(lines(got, "look")) == 80 // EVERY and "9.json" in lines(got, "problem")[0]["message"]
    kept, table = Placement.load(tmp_path / "p.npz"), json.loads((tmp_path / "map.json").read_text())
    assert table == {"physical_to_logical_map": kept.slot_expert_LS.tolist()}
    again = run(tmp_path / "dumps", *words[:2], *words[4:], "-p", tmp_path / "map.json")
    assert again.exit_code == 0 and lines(again, "look")[0]["imbalance"] < lines(got, "look")[0]["imbalance"]
    last = lines(got, "look")[-1]  # nothing was restarted: what was written is not what runs
    assert last["imbalance_running"] == last["imbalance"] > 1.05 * last["imbalance_after_restart"]
    assert plan["verdict"] == "for the next start" and plan["restart"]["pays"] is None
    assert last["restart"]["restart_seconds"] is None and "give --restart-seconds" in last["restart"]["verdict"]
    priced = run(tmp_path / "dumps", *words[:-1], *exports, "--restart-seconds", 1e9)
    assert "in use" not in priced.stdout and ": for the next start" in priced.stdout and "moving" not in priced.stdout
    assert "1e+09 s without serving" in priced.stdout and "not worth a restart" in priced.stdout
    assert (
        f"imbalance {last['imbalance_running']:.3f} running, {last['imbalance_after_restart']:.3f} after a restart"
        in priced.stdout
    )
    refused = run(tmp_path / "dumps", *words, "--restart-seconds", 60)
    assert refused.exit_code == 2 and "without --export or --sglang none is needed" in " ".join(refused.stderr.split())
    one = run(tmp_path / "dumps", *words, "--steps-per-dump", 3)
    assert one.exit_code == 0 and len(lines(one, "look")) == 24 // EVERY


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "name what to watch"), (["--sglang", "http://h:1"], "--dump-dir"), (["--dump-dir", "."], "name what to watch"),
     (["t.npz", "--sglang", "http://h:1", "--dump-dir", "."], "neither a trace"),
     (["--sglang", "http://h:1", "--dump-dir", ".", "--once"], "--once"),
     (["--sglang", "http://h:1", "--dump-dir", ".", "-r", 8], "how many redundant"),
     (["--sglang", "h:1", "--dump-dir", "."], "no address"), (["EMPTY", "--once"], "no dump with traffic"),
     (["EMPTY", "--export", "none:m.json"], "cannot keep"), (["EMPTY", "--export", "checkpoint:c"], "cannot keep"),
     (["EMPTY", "--export", "m.json"], "names no file"), (["EMPTY", "--export", "sglang:no/such/m.json"], "cannot write"),
     (["EMPTY", "--listen", "nowhere"], "cannot listen"), (["EMPTY", "--steps-per-dump", 0], "at least 1"),
     (["EMPTY", "-p", "none.json"], "none.json")],
)  # fmt: skip
def test_what_cannot_be_watched_exits_with_2(tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    got = run(*[tmp_path / "empty" if word == "EMPTY" else word for word in words], "-c", "2x4", "--method", "lpt")
    assert got.exit_code == 2 and said in " ".join(got.stderr.split()) and "Traceback" not in got.output, got.output
