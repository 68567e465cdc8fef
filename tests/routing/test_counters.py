"""Records that are running totals: told from steps, refused, and taken apart where that is asked."""

import json
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import poise
from poise.cli.main import app
from poise.engines.readers import ReadOptions, read_dump
from poise.routing.counters import differences, refuse_running
from poise.routing.files import join
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
    with pytest.raises(TraceError, match=r"no count falls .* record 0, \d+ in record 1\)"):
        refuse_running(running(load), np.arange(4), "x")
    np.testing.assert_array_equal(differences(running(load), "x")[0], load)


@given(seed=st.integers(0, 2**20), anew=st.sets(st.integers(3, 11), min_size=1, max_size=2))
@settings(max_examples=25, deadline=None)
def test_counters_that_began_anew(seed, anew):
    load = steps(seed, 12, 100, 200)  # a total of two steps is more than any one
    some = running(load, anew)
    assume(max(anew) - min(anew) != 1)  # not two in a row, of which the second is no less
    with pytest.raises(TraceError, match="but where all begin anew"):
        refuse_running(some, np.arange(4), "x")
    got, notes = differences(some, "x")
    np.testing.assert_array_equal(got, load)
    assert f"{len(anew)} of them began anew" in notes


@given(seed=st.integers(0, 2**20), few=st.integers(0, 15))
@settings(max_examples=25, deadline=None)
def test_totals_with_a_short_interval_are_told(seed, few):
    load = steps(seed, 8)
    load[4] = 0
    load[4].reshape(-1)[:few] = 1
    with pytest.raises(TraceError, match="running totals"):
        refuse_running(running(load), np.arange(4), "x")


def test_counters_of_few_experts_are_told_by_many_records():
    load = np.random.default_rng(0).poisson(300, (50, 1, 8))
    refuse_running(load, np.arange(1), "x")
    refuse_running(load[:3].cumsum(axis=0), np.arange(1), "x")
    with pytest.raises(TraceError, match="running totals"):
        refuse_running(load.cumsum(axis=0), np.arange(1), "x")


def test_records_without_tokens_show_nothing(tmp_path):
    """Two windows of which one is longer stay so with an empty record; totals that begin at 0 are totals."""
    load = steps(6, 5, 1, 90)
    load[0] = 0
    for some, told in ((np.stack([load[0], load[1], 3 * load[1]]), False), (running(load), True)):
        (tmp_path / "t.json").write_text(json.dumps({"logical_count": some.tolist()}))
        for reader in (poise.read, read_dump):
            if told:
                with pytest.raises(TraceError, match="of 4 records no count falls"):
                    reader(tmp_path / "t.json")
            else:
                reader(tmp_path / "t.json")


@given(seed=st.integers(0, 2**20), at=st.integers(2, 5), idle=st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_picks_beside_begin_anew_with_the_loads(seed, at, idle):
    """After a start both are as they are, though one of them may count more than before."""
    load = steps(seed, 6, 100, 200)
    idle_BL = np.random.default_rng(seed).integers(1, 5, (6, 4))
    idle_BL[at] = idle
    counted = [running(x, {at}) for x in (load, idle_BL)]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/columns.npy", np.concatenate([counted[0], counted[1][..., None]], axis=2))
        np.savez(f"{folder}/beside.npz", counts=counted[0], identity_count=counted[1])
        for name, more in (("columns.npy", {"num_experts": 16, "zero_experts": 1}), ("beside.npz", {})):
            profile = read_dump(f"{folder}/{name}", options=ReadOptions(counters="running", **more)).profile
            np.testing.assert_array_equal(profile.load_BLE, load)
            np.testing.assert_array_equal(profile.idle_BL, idle_BL)


def ranks_apart(folder, form):
    """Two ranks, of which the second began anew alone, as it is lost in their sum; and what came, added up."""
    mine = steps(7, 4, 100, 200)
    other = steps(8, 4, 1, 9)
    counted = running(mine), running(other, {2})
    assert (counted[0] + counted[1])[2].sum() > (counted[0] + counted[1])[1].sum()
    paths = []
    for rank, count in enumerate(counted):
        if form == "pt":  # a window a file
            for at, one in enumerate(count):
                paths.append(folder / f"w{at}_rank{rank}.expert-load.pt")
                table = torch.tensor(one)
                torch.save({"ep_rank": rank, "ep_size": 2, "physical_count": table, "logical_count": table,
                            "physical_to_logical_map": torch.arange(16).tile(4, 1)}, paths[-1])  # fmt: skip
            continue
        paths.append(folder / f"t_rank{rank}.{form}")
        if form == "json":
            paths[-1].write_text(json.dumps({"logical_count": count.tolist(), "rank": rank}))
        elif form == "npz":
            np.savez(paths[-1], counts=count, layers=np.arange(4))
        elif form == "csv":
            rows = [f"{b},{i},{e},{count[b, i, e]}" for b, i, e in np.ndindex(count.shape)]
            paths[-1].write_text("\n".join(["step,layer,expert,count", *rows]))
        else:
            np.save(paths[-1], count)
    return paths, mine + other


@pytest.mark.parametrize("form", ["json", "npz", "csv", "npy", "pt"])
def test_a_rank_that_began_anew_alone(tmp_path, form):
    paths, load = ranks_apart(tmp_path, form)
    options = ReadOptions(counters="running", ranks="sum", format="load-table" if form == "npy" else None)
    dump = read_dump(paths, options=options)
    np.testing.assert_array_equal(dump.profile.load_BLE, load)
    assert sum("1 of them began anew" in note for note in dump.notes) == 1
    if dump.slots is not None:
        np.testing.assert_array_equal(dump.slots.count_BLS, load)


@pytest.mark.parametrize("anew", [(), (2,)])
@pytest.mark.parametrize("ending", ["npz", "json"])
def test_ranks_with_picks_beside(tmp_path, ending, anew):
    """Each rank's totals are taken apart by themselves, its picks that compute nothing with its loads."""
    load = [steps(rank, 4, 100, 200) if rank else steps(rank, 4, 1, 9) for rank in range(2)]
    idle_BL = [np.random.default_rng(rank).integers(1, 90, (4, 4)) for rank in range(2)]
    idle_BL[0][2] = 1000  # more than before it began anew, which only its loads show
    paths = [tmp_path / f"rank{rank}.{ending}" for rank in range(2)]
    for rank, path in enumerate(paths):
        began = anew if rank == 0 else ()
        count, idle = running(load[rank], began), running(idle_BL[rank], began)
        if ending == "npz":
            np.savez(path, counts=count, identity_count=idle)
        else:
            path.write_text(
                json.dumps({"rank": rank, "logical_count": count.tolist(), "identity_count": idle.tolist()})
            )
    profile = read_dump(paths, options=ReadOptions(counters="running", ranks="sum")).profile
    np.testing.assert_array_equal(profile.load_BLE, load[0] + load[1])
    np.testing.assert_array_equal(profile.idle_BL, idle_BL[0] + idle_BL[1])
    assert read_dump(paths, options=ReadOptions(counters="steps", ranks="sum")).profile.num_steps == 4


def test_what_is_no_proof_is_left_alone():
    one = steps(0, 1)[0] + 1
    for load in (
        np.stack([one, 2 * one]),  # a window twice as long
        np.stack([one, 9 * one] * 4),  # decode and prefill in turn
        np.stack([one] * 5),  # nothing changes
        np.stack([one, 2 * one, 2 * one - (np.arange(16) == 3)]),  # one count falls
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
    again = tmp_path / f"again{out.suffix}"
    done = CliRunner().invoke(app, ["convert", str(out), "-o", str(again)])
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(poise.read(again).load_BLE, want)


@pytest.mark.parametrize("name", ["json", "npz"])
def test_one_record_files_that_say_so_are_steps(tmp_path, name):
    paths = []
    for at, one in enumerate(running(steps(9, 4, 1, 90))):
        paths.append(tmp_path / f"t{at}.{name}")
        if name == "json":
            paths[-1].write_text(json.dumps({"logical_count": one.tolist(), "counters": "steps"}))
        else:
            np.savez(paths[-1], counts=one, counters=np.array("steps"))
    assert join([poise.read(path) for path in paths]).num_steps == 4
    assert read_dump(paths, options=ReadOptions(ranks="steps")).profile.num_steps == 4
    np.savez(tmp_path / "t0.npz", counts=running(steps(9, 4, 1, 90))[0])  # one of them does not
    with pytest.raises(TraceError, match="running totals"):
        join([poise.read(path) for path in [tmp_path / "t0.npz", *paths[1:]]])


@pytest.mark.parametrize("name", ["t.json", "t.npz"])
def test_a_file_that_says_what_nobody_knows(tmp_path, name):
    """The user's word goes before the file's."""
    load, path = steps(10, 4, 1, 90), tmp_path / name
    if name == "t.json":
        path.write_text(json.dumps({"logical_count": running(load).tolist(), "counters": "running"}))
    else:
        np.savez(path, counts=running(load), counters=np.array("running"))
    for reader in (poise.read, read_dump):
        with pytest.raises(TraceError, match=r"'counters' can say 'steps', it says 'running'\n.*--counters running"):
            reader(path)
    np.testing.assert_array_equal(read_dump(path, options=ReadOptions(counters="running")).profile.load_BLE, load)
    assert read_dump(path, options=ReadOptions(counters="steps")).profile.num_steps == 4


def test_options():
    with pytest.raises(OptionError, match="unknown counters 'total'"):
        ReadOptions(counters="total")


def test_tokens_are_no_counters(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "t.npy", rng.integers(0, 64, (3000, 6)))
    with pytest.raises(OptionError, match=r"--counters running: .* no records of loads"):
        read_dump(tmp_path / "t.npy", options=ReadOptions(counters="running"))
