"""Records that are running totals: told from steps, refused, and taken apart where that is asked."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import poise
from poise.cli.main import app
from poise.engines.readers import ReadOptions, read_dump
from poise.routing.counters import differences, refuse_running
from poise.util.errors import OptionError, TraceError

SHAPE = (4, 16)


def steps(seed, count, least=0, most=500):
    return np.random.default_rng(seed).integers(least, most, (count, *SHAPE))


def running(load_BLE, anew=()):
    """Totals of steps; counters that begin anew before some of them."""
    out = load_BLE.copy()
    for at in range(1, len(out)):
        if at not in anew:
            out[at] += out[at - 1]
    return out


@given(seed=st.integers(0, 2**20), count=st.integers(3, 9))
@settings(max_examples=25, deadline=None)
def test_totals_are_told_and_steps_are_not(seed, count):
    load = steps(seed, count)
    refuse_running(load, np.arange(4), "x")
    with pytest.raises(TraceError, match=r"no count falls .* record 0, \d+ in the next"):
        refuse_running(running(load), np.arange(4), "x")
    np.testing.assert_array_equal(differences(running(load), "x")[0], load)


@given(seed=st.integers(0, 2**20), anew=st.sets(st.integers(3, 11), min_size=1, max_size=2))
@settings(max_examples=25, deadline=None)
def test_counters_that_began_anew(seed, anew):
    load = steps(seed, 12, 100, 200)  # a total of two steps is more than any one
    some = running(load, anew)
    falls = [at for at in range(1, 12) if some[at].sum() < some[at - 1].sum()]
    if set(falls) == anew:  # not two in a row, of which the second is no less
        with pytest.raises(TraceError, match="but where all begin anew"):
            refuse_running(some, np.arange(4), "x")
        got, notes = differences(some, "x")
        np.testing.assert_array_equal(got, load)
        assert f"{len(anew)} of them began anew" in notes


def test_what_is_no_proof_is_left_alone():
    one = steps(0, 1)[0] + 1
    for load in (
        np.stack([one, 2 * one]),  # a window twice as long
        np.stack([one, 9 * one] * 4),  # decode and prefill in turn
        np.stack([one] * 5),  # nothing changes
        np.stack([one, 2 * one, 2 * one - (np.arange(16) == 3)]),  # one count falls
        np.cumsum(np.ones((5, 1, 8)), axis=0),  # few counts
    ):
        refuse_running(load, np.arange(load.shape[1]), "x")


def test_unsigned_and_floating_totals(tmp_path):
    load = steps(1, 5, 0, 40)
    for kind in (np.uint8, np.uint32, np.float32):
        with pytest.raises(TraceError, match="running totals"):
            refuse_running(running(load).astype(kind), np.arange(4), "x")
    np.testing.assert_array_equal(differences(running(load).astype(np.uint16), "x")[0], load)


def files(folder, load_BLE):
    """The same records in several formats."""
    np.save(folder / "t.npy", load_BLE)
    (folder / "t.json").write_text(json.dumps({"logical_count": load_BLE.tolist()}))
    (folder / "h.json").write_text(
        json.dumps({"load_history": [{"logical_expert_load": x.tolist()} for x in load_BLE]})
    )
    rows = [f"{b},{i},{e},{load_BLE[b, i, e]}" for b, i, e in np.ndindex(load_BLE.shape)]
    (folder / "t.csv").write_text("\n".join(["step,layer,expert,count", *rows]))
    for at, one in enumerate(load_BLE):
        np.savetxt(folder / f"one{at}.csv", one, "%d", ",")
    np.savez(folder / "t.npz", counts=load_BLE, layers=np.arange(4))
    return [folder / "t.npy", folder / "t.json", folder / "h.json", folder / "t.csv", folder / "t.npz",
            [folder / f"one{at}.csv" for at in range(len(load_BLE))]]  # fmt: skip


def test_every_reader_asks_and_takes_the_answer(tmp_path):
    load = steps(2, 4, 1, 5000)
    for path in files(tmp_path, running(load)):
        more = {"format": "load-table", "ranks": "steps"} if isinstance(path, list) else {}
        with pytest.raises(TraceError, match=r"running totals, not steps .*\n?.*--counters running"):
            read_dump(path, options=ReadOptions(**more))
        dump = read_dump(path, options=ReadOptions(counters="running", **more))
        np.testing.assert_array_equal(dump.profile.load_BLE, load)
        assert any("differences were taken" in note for note in dump.notes)
        dump = read_dump(path, options=ReadOptions(counters="steps", **more))
        np.testing.assert_array_equal(dump.profile.load_BLE, running(load))
    for name in ("t.json", "t.npz"):
        with pytest.raises(TraceError, match="running totals"):
            poise.read(tmp_path / name)


def test_records_without_traffic_in_between_are_left_out(tmp_path):
    load = steps(3, 5, 1, 50)
    load[2] = 0
    np.save(tmp_path / "t.npy", running(load) + 5000)
    dump = read_dump(tmp_path / "t.npy", options=ReadOptions(counters="running"))
    assert dump.profile.num_steps == 4 and "1 of them, in which nothing came, were left out" in dump.notes


def test_a_total_that_falls_is_none(tmp_path):
    load = running(steps(4, 4, 1, 50))
    load[2, 3, 7] = 0
    np.save(tmp_path / "t.npy", load + 5000)
    with pytest.raises(TraceError, match=r"never falls, the 8. number of the 4. layer is \d+ in record 1 and 5000"):
        read_dump(tmp_path / "t.npy", options=ReadOptions(counters="running"))


@pytest.mark.parametrize("name", ["out.json", "out.npz"])
@pytest.mark.parametrize("said", ["steps", "running"])
def test_the_answer_goes_with_the_file(tmp_path, name, said):
    """Traffic that only grew is read again without a question."""
    load = running(steps(5, 4, 1, 5000))
    source, out = tmp_path / "t.npy", tmp_path / name
    np.save(source, load)
    assert CliRunner().invoke(app, ["convert", str(source), "-o", str(out)]).exit_code == 2
    done = CliRunner().invoke(app, ["convert", str(source), "--counters", said, "-o", str(out)])
    assert done.exit_code == 0, done.output
    want = load if said == "steps" else steps(5, 4, 1, 5000)
    np.testing.assert_array_equal(poise.read(out).load_BLE, want)


def test_options():
    with pytest.raises(OptionError, match="unknown counters 'total'"):
        ReadOptions(counters="total")


def test_tokens_are_no_counters(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "t.npy", rng.integers(0, 64, (3000, 6)))
    with pytest.raises(OptionError, match=r"--counters running: .* no records of loads"):
        read_dump(tmp_path / "t.npy", options=ReadOptions(counters="running"))
