"""Executors: the same result wherever pieces run, errors as the pieces raised them, and what names no executor refused."""

import importlib.util
import json
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import few_or
from typer.testing import CliRunner

from poise import api
from poise.cli.main import app
from poise.engines.readers import read_dump
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve import solve as solving
from poise.planning.solve.solve import METHODS
from poise.routing.batching import make_batch
from poise.routing.folder import counted, folder_profile, shard_profile, shards_of
from poise.routing.synthetic import zipf_trace
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import CommunicationError, NoResultError, OptionError, PoiseError, TraceError
from poise.util.executors import Serial, begun, cores, executor_of, hears, in_order, taken
from poise.util.wish import Wish

LOCAL = ["threads:2", "processes:2", "ray://local:2", "dask://local:2"]
NEEDS = {"ray": "ray", "dask": "distributed"}
TIMES = {"planning_seconds", "seconds", "plan_seconds"}


def skip_without(spec):
    module = NEEDS.get(spec.partition(":")[0])
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module", params=LOCAL)
def workers(request):
    skip_without(request.param)
    with executor_of(request.param) as executor:
        yield executor


def square(number):
    return number * number


def refuse(number):
    if number % 3 == 2:
        raise OptionError(f"{number} is refused", hint="give another")
    return number


def divide(number):
    return 1 / number


def die(number):
    os._exit(3)


def test_results_come_in_order_and_the_first_error_as_it_was_raised(workers):
    assert list(in_order(workers, square, range(100))) == [n * n for n in range(100)]
    found = in_order(workers, refuse, range(9))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OptionError) as caught:
        next(found)
    assert (caught.value.message, caught.value.hint) == ("2 is refused", "give another")
    with pytest.raises(ZeroDivisionError):
        taken(begun(workers, divide, 0))


def until_stopped(budget, started):
    """A piece of a plan whose work has no end."""
    Path(started).touch()
    while budget.left() > 0:
        time.sleep(0.01)
    return budget.stopped


def until_told(budget, started):
    """The same of compiled code, which looks at a flag alone."""
    flag = np.zeros(1, np.uint8)
    with budget.stops(flag):
        Path(started).touch()
        while not flag[0]:
            time.sleep(0.01)
    return budget.stopped


def until_ended(started):
    """A piece that looks at no wish, as those that read files."""
    Path(started).write_text(str(os.getpid()))
    time.sleep(1e6)


def wait_for(path, future):
    while not path.exists():
        assert not future.done(), taken(future)
        time.sleep(0.01)


@pytest.mark.parametrize("spec", ["processes:1", "threads:1"])
def test_a_piece_elsewhere_hears_that_its_plan_is_to_end(tmp_path, spec):
    with executor_of(spec) as executor:
        assert hears(executor)
        budget = Budget(1.0, work=1e9, executor=executor)
        first = begun(executor, until_stopped, budget.part(0.5), str(tmp_path / "started"))
        while not (tmp_path / "started").exists():
            assert not first.done(), taken(first)
            time.sleep(0.01)
        budget.stop()
        assert first.result(timeout=60).taken()
        late = begun(executor, until_stopped, budget.part(0.5), str(tmp_path / "late"))
        assert late.result(timeout=60).taken()


@pytest.mark.parametrize("piece", few_or([until_stopped, until_told], [until_told]))
def test_a_wish_is_seen_elsewhere_whoever_had_it_and_ends_its_own_plans_alone(tmp_path, piece):
    """As control-C comes to ``compare``: nobody asks a budget. The executor serves other plans, before and after."""
    with executor_of("processes:2") as executor:
        wishes = [Wish(), Wish()]
        budgets = [Budget(1.0, work=1e9, executor=executor, wish=wish) for wish in wishes]
        pieces = [begun(executor, piece, own.part(0.5), str(tmp_path / f"{at}")) for at, own in enumerate(budgets)]
        for at, future in enumerate(pieces):
            wait_for(tmp_path / f"{at}", future)
        wishes[0].end()
        assert pieces[0].result(timeout=60).taken()
        after = begun(
            executor, piece, Budget(1.0, work=1e9, executor=executor, wish=wishes[1]), str(tmp_path / "after")
        )
        wait_for(tmp_path / "after", after)
        assert not pieces[1].done() and not after.done() and not budgets[1].stopped
        wishes[1].end()
        assert pieces[1].result(timeout=60).taken() and after.result(timeout=60).taken()


def test_a_place_is_of_one_wish_that_is_alive():
    with executor_of("processes:1") as executor:
        wishes = [Wish() for _ in range(3)]
        places = [executor.place_of(wish) for wish in wishes]
        assert len({*places}) == 3 and [executor.place_of(wish) for wish in wishes] == places
        wishes[1].end()
        assert executor._seen[places].tolist() == [0, 1, 0]
        executor._free.clear()
        with pytest.raises(CommunicationError, match="room for one more"):
            executor.place_of(Wish())
        del wishes[1]
        again = Wish()
        assert executor.place_of(again) == places[1] and not executor._seen[places].any()


def test_an_error_ends_pieces_that_look_at_no_wish(tmp_path):
    with pytest.raises(KeyboardInterrupt), executor_of("processes:1") as executor:
        running, late = (begun(executor, until_ended, str(tmp_path / name)) for name in ("running", "late"))
        wait_for(tmp_path / "running", running)
        (worker,) = multiprocessing.active_children()
        raise KeyboardInterrupt
    assert wait([worker.sentinel], 60), "it goes on"  # its exit code is there for whoever asked the system first
    assert running.exception(60) and not (tmp_path / "late").exists()
    assert late.cancelled() or late.exception(60)


def test_control_c_does_not_end_a_worker_that_is_not_yet_there():
    """A terminal's comes to all processes, whatever they have loaded by then."""
    with executor_of("processes:1") as executor:
        first = begun(executor, square, 3)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGINT)
        assert taken(first) == 9
        os.kill(worker.pid, signal.SIGINT)
        assert taken(begun(executor, square, 4)) == 16
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Never(Executor):
    """Workers that cannot be told anything, and do not end."""

    def submit(self, fn, /, *args, **more):
        return Future()


def test_a_start_on_workers_that_do_not_hear_is_made_here():
    batch = make_batch(zipf_trace(num_tokens=200, num_layers=2, num_experts=8, top_k=2), tokens_per_step=50).at_home(4)
    problem = PlacementProblem(batch, Cluster.parse("1x4"), ModelSpec.generic(8, 2, batch.layer_ids_L), np.full(4, 2))
    executor = Never()
    assert not hears(executor)
    budget = Budget(1.0, work=1, executor=executor)
    starts = solving._Starts(problem, budget, 0)
    starts.begin(["contiguous"], {"contiguous": 0.0}, 1.0)
    budget.stop()
    problem.check(starts.take("contiguous"))


def test_a_dead_worker_is_named():
    with executor_of("processes:1") as executor, pytest.raises(CommunicationError, match="worker of the executor"):
        taken(begun(executor, die, 1))
    broken: Future = Future()
    broken.set_exception(BrokenProcessPool("gone"))
    with pytest.raises(CommunicationError, match="gone"):
        taken(broken)


def test_only_some_pieces_are_under_way():
    most = running = 0

    class Counting(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            nonlocal most, running
            running += 1
            most = max(most, running)
            return super().submit(fn, *args, **kwargs)

    with Counting(2) as executor:
        for _ in in_order(executor, square, range(500), workers=2):
            running -= 1
    assert most <= 8


@pytest.mark.parametrize(
    ("spec", "hint"),
    [("thread", "did you mean threads?"), ("proceses:2", "did you mean processes?"), ("rai://local", "did you mean ray?"),
     ("mpi", "one of serial"), ("threads:0", "one of serial"), ("threads:many", "one of serial"), ("serial:2", "one of serial"),
     ("ray", "ray://local"), ("dask:local", "dask://local"), ("ray://", "ray://local"), ("dask://local:x", "dask://local"), ("", "one of serial")],
)  # fmt: skip
def test_what_names_no_executor_is_refused(spec, hint):
    with pytest.raises(OptionError) as caught, executor_of(spec):
        pass
    assert hint in caught.value.hint


@pytest.mark.parametrize("spec", ["ray://local", "dask://local"])
def test_an_extra_that_is_missing_is_named(spec):
    kind = spec.partition(":")[0]
    if importlib.util.find_spec(NEEDS[kind]) is not None:
        pytest.skip(f"{NEEDS[kind]} is installed")
    with pytest.raises(NoResultError) as caught, executor_of(spec):
        pass
    assert f"poise-moe[{kind}]" in caught.value.hint


def test_serial_runs_at_once_and_here():
    with executor_of("serial") as executor:
        assert isinstance(executor, Serial)
        assert executor.submit(os.getpid).result() == os.getpid()
        assert isinstance(executor.submit(divide, 0).exception(), ZeroDivisionError)
    assert cores() >= 1


# Folders of shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("shards")
    for shard in range(12):
        zipf_trace(num_tokens=40 + shard, num_layers=3, num_experts=8, top_k=2, seed=shard).save(
            at / f"s{shard:02}.npz"
        )
    (at / "README").write_text("not a shard")
    return at


def test_a_folder_is_the_loads_of_its_shards_in_order_of_names(folder):
    found = folder_profile(folder)
    assert isinstance(found, LoadProfile) and found.num_steps == 12 and "12 shards" in found.name
    for shard, load_LE in enumerate(found.load_BLE):
        trace = api.load(folder / f"s{shard:02}.npz")
        by_hand = np.zeros((3, 8))
        for token, layer, k in np.ndindex(trace.experts.shape):
            by_hand[layer, trace.experts[token, layer, k]] += 1
        np.testing.assert_array_equal(load_LE, by_hand)
    assert found.top_k == 2
    same = api.load(folder)
    np.testing.assert_array_equal(same.load_BLE, found.load_BLE)


def test_a_folder_is_the_same_wherever_it_is_counted(folder, workers):
    serial, spread = folder_profile(folder), folder_profile(folder, workers)
    assert serial.load_BLE.tobytes() == spread.load_BLE.tobytes() and serial.load_BLE.dtype == spread.load_BLE.dtype
    assert (serial.name, serial.top_k, serial.notes) == (spread.name, spread.top_k, spread.notes)
    np.testing.assert_array_equal(serial.layer_ids, spread.layer_ids)


def test_picks_that_compute_nothing_are_counted_apart(tmp_path):
    rng = np.random.default_rng(0)
    experts = np.sort(np.argsort(rng.random((50, 2, 6)), axis=2)[:, :, :3], axis=2)[:, :, ::-1].astype(np.int16)
    experts = np.where(experts == 0, -1, experts)
    found = counted(RoutingTrace(experts, 6))
    np.testing.assert_array_equal(found.idle_BL, (experts == -1).sum(axis=(0, 2))[None])
    assert found.load_BLE.sum() + found.idle_BL.sum() == experts.size


def test_folders_that_hold_no_profile_are_named(tmp_path, workers):
    with pytest.raises(TraceError, match="0 files"):
        shards_of(tmp_path)
    with pytest.raises(TraceError, match="cannot read"):
        shards_of(tmp_path / "none")
    for name in ("a.npz", "b.npz"):
        zipf_trace(num_tokens=20, num_layers=2, num_experts=8, top_k=2, seed=1).save(tmp_path / name)
    (tmp_path / "b.npz").write_bytes(b"PK damaged")
    with pytest.raises(TraceError, match=r"b\.npz"):
        folder_profile(tmp_path, workers)
    with pytest.raises(TraceError, match=r"b\.npz"):
        shard_profile(tmp_path / "b.npz")
    zipf_trace(num_tokens=20, num_layers=2, num_experts=9, top_k=2, seed=1).save(tmp_path / "b.npz")
    with pytest.raises(TraceError, match="8 experts"):
        folder_profile(tmp_path, workers)


def test_dumps_are_opened_wherever(folder, tmp_path, workers):
    serial, spread = read_dump(folder), read_dump(folder, executor=workers)
    np.testing.assert_array_equal(serial.trace.experts, spread.trace.experts)
    assert serial.notes == spread.notes and "README" in serial.notes[0]
    (tmp_path / "x.npz").write_bytes(b"PK damaged")
    for executor in (None, workers):
        with pytest.raises(TraceError, match=r"x\.npz"):
            read_dump(tmp_path / "x.npz", executor=executor)


# Starts of a plan


def plan(executor, *, work=0.4, **named):
    trace = zipf_trace(num_tokens=400, num_layers=3, num_experts=16, top_k=2, seed=3)
    return api.plan(trace, "2x2:h100+datasheet", redundant=4, tokens_per_step=64, work=work, executor=executor, **named)


def test_a_plan_is_the_same_wherever_its_starts_are_made(workers):
    serial, spread = plan(None), plan(workers)
    assert len(serial.details["starts"]) > 5
    np.testing.assert_array_equal(serial.placement.slot_expert_LS, spread.placement.slot_expert_LS)
    assert serial.objective == spread.objective and serial.details == spread.details


@pytest.mark.parametrize("work", [0.002, 0.02, 0.1])
def test_starts_left_out_and_failed_are_the_same(work, monkeypatch):
    """A start that finds nothing leaves its share to the next ones, on any executor."""
    asked = []

    def fails(problem, *, time_limit_s, seed=0, progress=None):
        asked.append(1)
        raise NoResultError("none")

    for broken in ("eplb", "lpt"):
        monkeypatch.setitem(METHODS._own, broken, solving.Method(fails, "fails"))
    with ThreadPoolExecutor(3) as executor:
        serial, spread = plan(None, work=work), plan(executor, work=work)
    assert serial.details == spread.details and asked
    assert "eplb" not in serial.details["starts"]
    np.testing.assert_array_equal(serial.placement.slot_expert_LS, spread.placement.slot_expert_LS)


def test_commands_say_the_same_on_an_executor(folder, tmp_path):
    def run(*words):
        got = CliRunner().invoke(app, [str(word) for word in words])
        return got.exit_code, got.stdout, got.stderr

    made = []
    for spec in ("serial", "threads:2"):
        out = tmp_path / f"{spec[:3]}.npz"
        said = run("plan", folder, "-c", "1x4", "-r", 4, "--work", 0.1, "--no-verdict", "-o", out, "--executor", spec)
        assert said[0] == 0, said
        made.append(Placement.load(out).slot_expert_LS)
    np.testing.assert_array_equal(*made)
    assert run("inspect", folder, "--json") == run("inspect", folder, "--json", "--executor", "threads:2")
    traces = []
    for spec in ("serial", "threads:2"):
        assert run("convert", folder, "-o", tmp_path / "t.npz", "--executor", spec)[0] == 0
        traces.append(api.load(tmp_path / "t.npz").experts)
    np.testing.assert_array_equal(*traces)
    code, _, said = run("inspect", folder, "--executor", "thraeds")
    assert code == 2 and "did you mean threads?" in said


def test_comparisons_and_verdicts_say_the_same_on_an_executor(folder, tmp_path, monkeypatch):
    """Every budget of theirs has the executor that was named, and what they say does not depend on it."""
    budgets, made = [], solving._plan_once

    def seen(problem, budget, **named):
        budgets.append(budget.spread)
        return made(problem, budget, **named)

    def run(*words):
        budgets.clear()
        got = CliRunner().invoke(app, [*map(str, words), "--work", "0.1", "--json"])
        assert got.exit_code == 0, got.output
        return got.stdout, set(budgets)

    monkeypatch.setattr(solving, "_plan_once", seen)
    windows = [tmp_path / "monday.npz", tmp_path / "tuesday.npz"]
    for seed, path in enumerate(windows):
        zipf_trace(num_tokens=300, num_layers=4, num_experts=8, top_k=2, seed=seed).save(path)
    compare = ("compare", folder, "-c", "1x4", "-r", 4, "-p", "contiguous", "-p", "poise")
    verdict = ("verdict", *windows, "-c", "1x4:h200", "-m", "mixtral-8x7b", "-r", 4, "--phase", "decode", "-n", 64)
    for words in (compare, verdict):
        (serial, here), (spread, there) = run(*words), run(*words, "--executor", "threads:2")
        assert here == {False} and there == {True}
        one, other = json.loads(serial), json.loads(spread)
        assert without_times(one) == without_times(other)


def without_times(said):
    """What a command said, without the wall clock of its plans."""
    if isinstance(said, dict):
        return {key: without_times(value) for key, value in said.items() if key not in TIMES}
    return [without_times(value) for value in said] if isinstance(said, list) else said


def test_what_the_clock_cut_elsewhere_is_said_here():
    with ThreadPoolExecutor(2) as executor:
        budget = Budget(5.0, executor=executor)
        begin = solving._Starts(None, budget, 0)
        begin._futures["x"] = begun(executor, lambda: (None, frozenset({"a stage"})))
        assert begin.take("x") is None
    assert budget.cuts == {"a stage"}


def test_a_budget_elsewhere_has_what_is_left():
    now = [0.0]
    budget = Budget(10.0, now=lambda: now[0])
    now[0] = 4.0
    there = pickle.loads(pickle.dumps(budget))
    assert there.seconds == 10.0 and 5.9 < there.left() <= 6.0 and there.executor is None and not there.cuts
    of_work = pickle.loads(pickle.dumps(Budget(10.0, work=30.0).part(0.5)))
    assert (of_work.seconds, of_work.work, of_work.left()) == (0.5, 30.0, float("inf"))
    assert not Budget(1.0).spread and not Budget(1.0, executor=Serial()).spread


def test_errors_travel_whole():
    error = pickle.loads(pickle.dumps(OptionError("one", hint="two")))
    assert isinstance(error, PoiseError) and (error.message, error.hint) == ("one", "two")
