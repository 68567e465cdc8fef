"""A folder of dumps: each file once, oldest first, half-written ones again, broken ones counted and left."""

import json
import os

import numpy as np
import pytest

from poise.engines.dump import EngineDump, SlotRecord
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import ModelError, NoResultError, OptionError, TraceError
from poise.watch.sources import FILES_A_LOOK, LEAST_TOKENS, UNREADABLE_POLLS, DumpFolder


def read(path):
    """A dump of JSON: loads [B, L, E]."""
    try:
        return EngineDump(
            "test", "json", profile=LoadProfile(np.array(json.loads(path.read_text()))), recorded_layers=4
        )
    except ValueError as error:
        raise TraceError(f"not JSON: {error}") from None


def put(folder, name, loads, at):
    path = folder / name
    path.write_text(loads if isinstance(loads, str) else json.dumps(np.asarray(loads).tolist()))
    os.utime(path, (at, at))


def loads(got):
    return [arrival.steps.load_BLE[:, 0, 0].tolist() for arrival in got.arrivals]


def read_lines(path):
    """A dump of a line a step, whole at every line's end."""
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    return EngineDump("test", "lines", profile=LoadProfile(np.array(steps)))


def put_lines(folder, name, steps, at):
    put(folder, name, "".join(json.dumps(np.full((3, 4), value).tolist()) + "\n" for value in steps), at)


def test_files_are_taken_once_and_oldest_first(tmp_path):
    source = DumpFolder(tmp_path / "later", read=read)
    got = source.poll()
    assert not got.up and "cannot look into" in got.problems[0]
    source.folder.mkdir()
    for name, value, at in (("a", 3, 30), ("b", 1, 10), (".hidden", 9, 5), ("c", 2, 20)):
        put(source.folder, name, np.full((2, 3, 4), value), at)
    (source.folder / "sub").mkdir()
    assert source.poll().dumps == 0  # may still grow
    got = source.poll()
    assert got.up and loads(got) == [[1, 1], [2, 2], [3, 3]] and (got.dumps, got.errors) == (3, 0)
    assert got.arrivals[0].recorded_layers == 4 and source.poll().arrivals == ()
    put(source.folder, "d", np.full((1, 3, 4), 7), 1)
    assert [loads(source.poll()) for _ in range(2)] == [[], [[7]]]
    fresh = DumpFolder(source.folder, read=read)
    fresh.skip_present()
    assert fresh.poll().arrivals == fresh.poll().arrivals == ()


@pytest.mark.parametrize("delete", [False, True])
def test_a_dump_that_grows_is_read_once_it_does_not(tmp_path, delete):
    source = DumpFolder(tmp_path, read=read_lines, delete=delete)
    for size in (1, 2, 3):
        put_lines(tmp_path, "a", range(1, size + 1), 10 + size)
        assert source.poll().dumps == 0 and (tmp_path / "a").exists()
    assert loads(source.poll()) == [[1, 2, 3]] and (tmp_path / "a").exists() != delete
    assert source.poll().problems == ()
    put_lines(tmp_path, "b", [5], 20)
    assert loads(source.poll(whole=True)) == [[5]]


def test_a_dump_that_grows_after_it_was_read_is_told_once(tmp_path):
    put_lines(tmp_path, "old", [9], 5)
    source = DumpFolder(tmp_path, read=read_lines)
    source.skip_present()
    put_lines(tmp_path, "a", [1], 10)
    assert [source.poll().dumps for _ in range(2)] == [0, 1]
    put_lines(tmp_path, "a", [1, 2], 12)
    put_lines(tmp_path, "old", [9, 9], 12)
    told = [source.poll() for _ in range(3)]
    assert [len(got.problems) for got in told] == [1, 0, 0] and not any(got.dumps for got in told)
    assert told[0].problems[0].startswith("a changed after it was read")


def test_a_backlog_comes_in_parts_and_what_grows_meanwhile_waits(tmp_path):
    for k in range(2 * FILES_A_LOOK + 3):
        put(tmp_path, f"{k:02}", np.full((1, 3, 4), k + 1), k)
    source, got = DumpFolder(tmp_path, read=read), []
    assert not source.poll().more
    while True:
        got.append(source.poll())
        put(tmp_path, "z", np.ones((1, 3, 4)), 100)
        if not got[-1].more:
            break
    assert [look.dumps for look in got] == [FILES_A_LOOK, FILES_A_LOOK, 3]
    assert [x for look in got for [x] in loads(look)] == [k + 1 for k in range(2 * FILES_A_LOOK + 3)]
    assert [source.poll().dumps for _ in range(3)] == [0, 1, 0]


def test_half_written_files_are_tried_again_and_broken_ones_left(tmp_path):
    source = DumpFolder(tmp_path, read=read)
    for at, text in ((10, "[[[1, 2"), (11, "[[[1, 2], [3, 4")):
        put(tmp_path, "a", text, at)
        for got in (source.poll(), source.poll()):
            assert (got.dumps, got.errors, got.problems) == (0, 0, ())
    put(tmp_path, "a", [[[1, 2], [3, 4]]], 12)
    assert [loads(source.poll()) for _ in range(2)] == [[], [[1]]]
    put(tmp_path, "b", "[[[1", 20)
    put(tmp_path, "c", [[[5, 2]]], 30)
    source.poll()
    polls = [source.poll() for _ in range(UNREADABLE_POLLS + 2)]
    assert [p.errors for p in polls] == [0] * (UNREADABLE_POLLS - 1) + [1, 0, 0] and loads(polls[0]) == [[5]]
    assert polls[UNREADABLE_POLLS - 1].problems[0].startswith("left out: b: not JSON")
    put(tmp_path, "d", "[", 40)
    assert source.poll(last=True).errors == 1


def test_steps_without_load_are_left_out_and_few_of_many_are_watched(tmp_path):
    ring = np.zeros((9, 2, 4))
    ring[1:8, :, 0] = np.arange(1, 8)[:, None]
    put(tmp_path, "a", ring, 10)
    assert loads(DumpFolder(tmp_path, read=read).poll(last=True)) == [[1, 2, 3, 4, 5, 6, 7]]
    assert loads(DumpFolder(tmp_path, read=read, most_steps=3).poll(last=True)) == [[1, 4, 7]]
    scaled = DumpFolder(tmp_path, read=read, tokens_per_step=10).poll(last=True).arrivals[0].steps
    np.testing.assert_allclose(scaled.load_BLE.sum(axis=2), 10)
    with pytest.raises(OptionError, match="at least 1, got 0"):
        DumpFolder(tmp_path, read=read, most_steps=0)


def test_read_dumps_go_only_where_asked(tmp_path):
    put(tmp_path, "a", np.ones((1, 2, 4)), 10)
    put(tmp_path, "b", "[", 20)
    assert DumpFolder(tmp_path, read=read).poll(last=True).dumps == 1 and len(list(tmp_path.iterdir())) == 2
    assert DumpFolder(tmp_path, read=read, delete=True).poll(last=True).dumps == 1
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_tokens_and_maps_of_slots_pass_through(tmp_path):
    (tmp_path / "a").touch()
    trace = RoutingTrace(np.arange(24).reshape(12, 2) % 4, 4)
    slots = SlotRecord(np.arange(2, dtype=np.int32), np.zeros((2, 4), np.int32))
    dump = EngineDump("x", "y", trace=trace, slots=slots)
    got = DumpFolder(tmp_path, tokens_per_step=5, read=lambda path: dump).poll(last=True)
    assert got.arrivals[0].steps.has_tokens and got.arrivals[0].steps.num_steps == 3 and got.arrivals[0].slots is slots
    got = DumpFolder(tmp_path, read=lambda p: EngineDump("x", "y", slots=slots)).poll(last=True)
    assert got.arrivals[0].steps is None and got.arrivals[0].slots is slots and got.dumps == 1


def test_the_first_dump_alone_does_not_make_steps_tiny(tmp_path):
    sizes = {"a": 12, "b": 3 * LEAST_TOKENS}
    dump = {name: EngineDump("x", "y", trace=RoutingTrace(np.arange(2 * size).reshape(size, 2) % 4, 4))
            for name, size in sizes.items()}  # fmt: skip
    for at, name in enumerate(sizes):
        put(tmp_path, name, "", at)
    source = DumpFolder(tmp_path, read=lambda path: dump[path.name])
    got = source.poll(last=True)
    assert [arrival.steps.num_steps for arrival in got.arrivals] == [1, 3]
    assert len(got.notes) == 1 and got.notes[0].startswith(f"steps of {LEAST_TOKENS} tokens, chosen by the first 12")
    assert source.poll().notes == ()


def test_a_dump_of_an_idle_engine_is_no_error(tmp_path):
    torch = pytest.importorskip("torch")
    idle = {
        "rank": 0,
        "logical_count": torch.zeros((5, 3, 8), dtype=torch.int32),
        "average_utilization_rate_over_window": None,
    }
    torch.save(idle, tmp_path / "expert_distribution_recorder_1.0.pt")
    got = DumpFolder(tmp_path).poll(last=True)
    assert got.arrivals == () and (got.dumps, got.errors, got.problems) == (1, 0, ())


def test_a_foreign_model_ends_it_at_the_first_dump_only(tmp_path):
    def foreign(path):
        if path.name == "a":
            raise ModelError("the traffic has 8 experts")
        return read(path)

    (tmp_path / "a").touch()
    with pytest.raises(ModelError):
        DumpFolder(tmp_path, read=foreign).poll(last=True)
    (tmp_path / "a").unlink()
    put(tmp_path, "b", np.ones((1, 2, 4)), 10)
    source = DumpFolder(tmp_path, read=foreign)
    source.poll(last=True)
    (tmp_path / "a").touch()
    assert source.poll(last=True).errors == 1


def test_what_is_not_installed_is_said(tmp_path):
    (tmp_path / "a").touch()

    def needs(path):
        raise NoResultError("reading needs PyTorch")

    with pytest.raises(NoResultError):
        DumpFolder(tmp_path, read=needs).poll(last=True)


@pytest.mark.parametrize("ending", ["npy", "json"])
def test_dumps_of_counters_that_are_never_set_back_are_told_once(tmp_path, ending):
    load = np.random.default_rng(0).integers(1, 90, (9, 3, 16))
    for running in (False, True):
        source, notes = DumpFolder(tmp_path / f"{running}"), []
        source.folder.mkdir()
        for at, one in enumerate(load.cumsum(axis=0) if running else load):
            if ending == "npy":
                np.save(source.folder / f"{at}.npy", one + 5000)
            else:
                (source.folder / f"{at}.json").write_text(json.dumps({"logical_count": one.tolist()}))
            got = source.poll(last=True)
            assert len(got.arrivals) == 1 and not got.problems
            notes += [(at, note) for note in got.notes]
        assert [at for at, _ in notes] == [3] * running
        assert not notes or "running totals, not steps (layer" in notes[0][1]


@pytest.mark.parametrize("records", [1, 2, 3, 5, 9])
def test_records_of_one_dump_are_told_as_those_of_several(tmp_path, records):
    """Counters that are never set back are watched all the same, and told once; steps are not."""
    load = np.random.default_rng(1).integers(1, 90, (18, 3, 16))
    for name, count in (("steps", load), ("running", load.cumsum(axis=0)), ("said", load.cumsum(axis=0))):
        source, notes, seen = DumpFolder(tmp_path / name), [], 0
        source.folder.mkdir()
        said = {"counters": "steps"} if name == "said" else {}
        for first in range(0, 18, records):
            dump = {"logical_count": count[first : first + records].tolist(), **said}
            (source.folder / f"{first}.json").write_text(json.dumps(dump))
            got = source.poll(last=True)
            assert len(got.arrivals) == 1 and not got.problems
            seen += got.arrivals[0].steps.num_steps
            notes += got.notes
        assert seen == 18 and len(notes) == (name == "running")
