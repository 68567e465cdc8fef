"""Files of several ranks are one workload, or a question; a rank that is missing is named with what nobody counted."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from typer.testing import CliRunner

from poise import api
from poise.cli.main import app
from poise.engines.readers import ReadOptions, read_dump, read_slot_map
from poise.routing.ranks import absent, spans
from poise.routing.trace import RoutingTrace
from poise.util.errors import OptionError, TraceError

PASSES, LAYERS, EXPERTS, RANKS = 3, 4, 32, 4
FULL = np.random.default_rng(0).poisson(np.random.default_rng(1).gamma(0.5, 40, (1, LAYERS, EXPERTS)),
                                        (PASSES, LAYERS, EXPERTS))  # fmt: skip
PERMUTED = np.argsort(np.random.default_rng(2).random((LAYERS, EXPERTS)), axis=1)
PARTS = np.random.default_rng(3).multinomial(FULL, [1 / RANKS] * RANKS).transpose(3, 0, 1, 2)
ALLOW = ReadOptions(allow_missing_ranks=True)


def own(rank, columns_LE=None):
    """What a rank counts of its own experts: a block, or a block of a map that was rearranged."""
    mine = np.arange(EXPERTS) // (EXPERTS // RANKS) == rank
    return np.where(mine if columns_LE is None else mine[columns_LE], FULL, 0)


def stat(folder, ranks, made, key=True, suffix="pt"):
    for path in folder.iterdir():
        path.unlink()
    for rank in ranks:
        count = {"logical_count": torch.from_numpy(made(rank).astype(np.int32)), **({"rank": rank} if key else {})}
        if suffix == "pt":
            torch.save(count, folder / f"s{rank}.pt")
        else:
            (folder / f"s{rank}.json").write_text(json.dumps({**count, "logical_count": made(rank).tolist()}))
    return sorted(folder.iterdir())


def per_pass(folder, ranks, made, lacks=()):
    for path in folder.iterdir():
        path.unlink()
    for rank in ranks:
        records = [{"forward_pass_id": 7 + b, "rank": rank, "global_physical_count": torch.from_numpy(made(rank)[b])}
                   for b in range(PASSES) if (rank, b) not in lacks]  # fmt: skip
        torch.save({"records": records, "last_physical_to_logical_map": torch.arange(EXPERTS).repeat(LAYERS, 1)},
                   folder / f"d{rank}.pt")  # fmt: skip
    return folder


def tensorrt(folder, ranks, made, **meta):
    for path in folder.iterdir():
        path.unlink()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 2, **meta}))
    for rank in ranks:
        save_file(
            {f"{b}_{i}": np.ascontiguousarray(made(rank)[b, i]) for b in range(PASSES) for i in range(LAYERS)},
            folder / f"rank{rank}.safetensors",
        )
    return folder


@pytest.mark.parametrize("suffix", ["pt", "json"])
@pytest.mark.parametrize("key", [True, False])
def test_ranks_that_count_their_own_experts_add_up(tmp_path, key, suffix):
    for columns in (None, PERMUTED):
        files = stat(tmp_path, range(RANKS), lambda rank: own(rank, columns), key, suffix)  # noqa: B023
        np.testing.assert_array_equal(read_dump(files).profile.load_BLE, FULL)
        if suffix == "json":
            np.testing.assert_array_equal(api.load(files).load_BLE, FULL)


def test_what_may_be_read_in_two_ways_is_asked(tmp_path):
    for key in (True, False):
        files = stat(tmp_path, range(RANKS), lambda rank: PARTS[rank], key, "json")
        with pytest.raises(TraceError, match=r"4 files .* may be parts of the same passes, .*\nhint: .*--ranks sum"):
            read_dump(files)
        np.testing.assert_array_equal(read_dump(files, options=ReadOptions(ranks="sum")).profile.load_BLE, FULL)
        steps = read_dump(files, options=ReadOptions(ranks="steps")).profile.load_BLE
        np.testing.assert_array_equal(steps, PARTS.reshape(-1, LAYERS, EXPERTS))
        if key:
            with pytest.raises(TraceError, match="4 files of ranks 0 to 3"):
                api.load(files)
        else:  # documented: workloads of one plan
            np.testing.assert_array_equal(api.load(files).load_BLE, steps)
    with pytest.raises(TraceError, match="4 files"):  # shares of each rank's own tokens are no counts
        read_dump(stat(tmp_path, range(RANKS), lambda rank: own(rank) / own(rank).sum(), True, "json"))
    with pytest.raises(OptionError, match="sglang-detail says itself"):
        read_dump(per_pass(tmp_path, [0], own), options=ReadOptions(ranks="steps"))
    with pytest.raises(OptionError, match="unknown reading"):
        ReadOptions(ranks="mean")


def test_copies_and_files_of_one_rank(tmp_path):
    files = stat(tmp_path, range(RANKS), lambda rank: FULL)  # the engine has summed them
    np.testing.assert_array_equal(read_dump(files).profile.load_BLE, FULL)
    two = stat(tmp_path, range(RANKS), lambda rank: PARTS[rank // 2])  # two ranks share their tokens
    np.testing.assert_array_equal(
        read_dump(two, options=ReadOptions(ranks="sum")).profile.load_BLE, PARTS[0] + PARTS[1]
    )
    for i, path in enumerate(stat(tmp_path, range(2), lambda rank: PARTS[rank])):
        torch.save({"rank": 0, "logical_count": torch.from_numpy(PARTS[i])}, path)
    np.testing.assert_array_equal(read_dump(tmp_path).profile.load_BLE, PARTS[:2].reshape(-1, LAYERS, EXPERTS))
    files = stat(tmp_path, range(2), lambda rank: own(rank)[: PASSES - rank])
    with pytest.raises(TraceError, match="rank 1 recorded 2 steps, rank 0 3"):
        read_dump(files)


@pytest.mark.parametrize("gone", [[0], [2], [3], [1, 2, 3]])
def test_a_missing_rank_is_named_with_what_nobody_counted(tmp_path, gone):
    there = [rank for rank in range(RANKS) if rank not in gone]
    columns = spans(sorted(column for rank in gone for column in range(8 * rank, 8 * rank + 8)))
    wanted = f"ranks? {spans(gone)} of 4 (is|are) missing: "
    for write, what in ((stat, "experts"), (per_pass, "slots"), (tensorrt, "experts")):
        made = write(tmp_path, there, own)
        with pytest.raises(
            TraceError, match=wanted + f"{what} {columns} are counted by none.*\nhint: .*--allow-missing"
        ):
            read_dump(made)
        allowed = read_dump(made, options=ALLOW)
        np.testing.assert_array_equal(allowed.profile.load_BLE, sum(own(rank) for rank in there))
        assert any("missing" in note for note in allowed.notes)
    with pytest.raises(TraceError, match="missing"):
        api.load(stat(tmp_path, there, own, True, "json"))


def test_missing_ranks_of_a_map_that_was_rearranged(tmp_path):
    for there, text in (
        ([0, 1, 3], "rank 2 of 4 is missing"),
        ([0, 1, 2], "3 ranks have up to 8 experts each, others"),
    ):
        with pytest.raises(TraceError, match=text):
            read_dump(stat(tmp_path, there, lambda rank: own(rank, PERMUTED)))


def test_ranks_with_tokens_of_their_own(tmp_path):
    for folder in (per_pass, tensorrt):
        there = folder(tmp_path, range(RANKS), lambda rank: PARTS[rank])
        np.testing.assert_array_equal(read_dump(there).profile.load_BLE, FULL)
        with pytest.raises(TraceError, match="rank 2 of 4 is missing: what its tokens chose is counted nowhere"):
            read_dump(folder(tmp_path, [0, 1, 3], lambda rank: PARTS[rank]))
        # a rank whose tokens another one has: 2 and 3 share theirs
        twins = read_dump(folder(tmp_path, [0, 1, 3], lambda rank: PARTS[rank // 2]))
        np.testing.assert_array_equal(twins.profile.load_BLE, PARTS[0] + PARTS[1])
    with pytest.raises(TraceError, match="rank 3 of 4 is missing"):  # forks say how many there are
        read_dump(tensorrt(tmp_path, [0, 1, 2], lambda rank: PARTS[rank], ep_size=4))
    alone = read_dump(per_pass(tmp_path, [1], lambda rank: PARTS[rank]))
    assert any("rank 1 alone was read" in note for note in alone.notes)
    for path, rank in ((tmp_path / "one", 0), (tmp_path / "other", 1)):
        path.mkdir()
        tensorrt(path, [0], lambda _: PARTS[rank])  # noqa: B023
    (path / "meta_info.json").unlink()
    with pytest.raises(TraceError, match="two files of rank 0 hold different counts of iteration 0 in layer 0"):
        read_dump([tmp_path / "one", path])


def test_passes_that_a_rank_lacks(tmp_path):
    dump = read_dump(per_pass(tmp_path, range(RANKS), own, {(1, 2)}))  # it stopped a pass earlier
    np.testing.assert_array_equal(dump.profile.load_BLE, FULL[:2])
    assert "passes that not all ranks recorded were left out: 9" in dump.notes
    with pytest.raises(TraceError, match="rank 1 lacks passes 8 of 7 to 9"):
        read_dump(per_pass(tmp_path, range(RANKS), own, {(1, 1)}))
    halves = {(0, 0), (1, 0), (0, 2), (1, 1)}
    with pytest.raises(TraceError, match="rank 0 lacks passes 9 of 8 to 9"):  # no pass was recorded by both
        read_dump(per_pass(tmp_path, range(2), lambda rank: PARTS[rank], halves))
    per_pass(tmp_path, [0], lambda rank: PARTS[1]).joinpath("d0.pt").rename(tmp_path / "other")
    records = torch.load(tmp_path / "other")
    per_pass(tmp_path, [0], lambda rank: PARTS[0])
    torch.save(records, tmp_path / "other")
    with pytest.raises(TraceError, match="two files of rank 0 hold different counts of pass 7 in layer 0"):
        read_dump(tmp_path)
    twin = per_pass(tmp_path, range(2), lambda rank: FULL, {(0, 1)})  # its copy has it
    np.testing.assert_array_equal(read_dump(twin).profile.load_BLE, FULL)
    assert (read_slot_map(per_pass(tmp_path, [3], own) / "d3.pt").map_LS == np.arange(EXPERTS)).all()


def tokens(folder, ranks, held):
    """Records per token of one pass: all ranks have the same tokens, each with the experts that it holds."""
    chosen = np.argsort(np.random.default_rng(5).random((LAYERS, 40, EXPERTS)), axis=2)[:, :, :2]
    for path in folder.iterdir():
        path.unlink()
    for rank in ranks:
        ids = np.where((chosen // 8 == rank) | (not held), chosen, -1)
        record = {"forward_pass_id": 0, "rank": rank, "input_ids": list(range(40)) if held else [rank] * 40,
                  "positions": list(range(40)), "extend_seq_lens": [40], "forward_mode": 1,
                  "topk_ids_of_layer": torch.from_numpy(ids.astype(np.int32))}  # fmt: skip
        torch.save({"records": [record], "last_physical_to_logical_map": torch.arange(EXPERTS).repeat(LAYERS, 1)},
                   folder / f"t{rank}.pt")  # fmt: skip
    return chosen


def test_tokens_of_a_missing_rank(tmp_path):
    chosen = tokens(tmp_path, range(RANKS), True)
    np.testing.assert_array_equal(read_dump(tmp_path).trace.experts, chosen.transpose(1, 0, 2))
    tokens(tmp_path, [0, 1, 2], True)
    with pytest.raises(
        TraceError, match="rank 3 of 4 is missing: slots 24 to 31 are counted by none, in layer 0 the only"
    ):
        read_dump(tmp_path)
    tokens(tmp_path, [0, 2], False)
    with pytest.raises(TraceError, match="rank 1 of 3 is missing: what its tokens"):
        read_dump(tmp_path)
    assert read_dump(tmp_path, options=ALLOW).trace.num_tokens == 80


def test_tokenspeed_says_how_many_ranks_there_are(tmp_path):
    def write(names, ranks, size=3):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, rank in zip(names, ranks, strict=True):
            count = torch.from_numpy(PARTS[len(list(tmp_path.iterdir()))][0])
            known = {} if rank is None else {"ep_rank": rank, "ep_size": size}
            torch.save({"physical_count": count, "logical_count": count, **known}, tmp_path / name)
        return tmp_path

    np.testing.assert_array_equal(read_dump(write("abc", [0, 1, 2])).profile.load_BLE[0], PARTS[:3, 0].sum(axis=0))
    with pytest.raises(TraceError, match="rank 2 of 3 is missing"):
        read_dump(write("ab", [0, 1]))
    with pytest.raises(TraceError, match="rank 1 lacks windows 1"):
        read_dump(write("abc", [0, 0, 1], 2))
    with pytest.raises(TraceError, match="2 of 2 files name no ep_rank"):
        read_dump(write("ab", [None, None]))
    for reading, windows in (("sum", 1), ("steps", 2)):
        found = read_dump(write("ab", [None, None]), options=ReadOptions(ranks=reading)).profile
        assert found.num_steps == windows and found.load_BLE.sum() == PARTS[:2, 0].sum()


def test_traces_of_several_homes(tmp_path):
    """Each rank's tokens of the same steps in a trace of its own."""
    for home in range(2):
        RoutingTrace(np.full((4, 1, 1), home), 2, step=np.array([0, 0, 1, 1]), home=np.full(4, home)).save(
            tmp_path / f"{home}.npz"
        )
    with pytest.raises(TraceError, match=r"homes 0, .* of homes 1, in the same steps"):
        api.load([tmp_path / "0.npz", tmp_path / "1.npz"])
    both = read_dump(tmp_path, options=ReadOptions(ranks="sum")).trace
    assert both.step.tolist() == [0] * 4 + [1] * 4 and both.experts.ravel().tolist() == [0, 0, 1, 1] * 2
    assert read_dump(tmp_path, options=ReadOptions(ranks="steps")).trace.step.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_options(tmp_path):
    out, parts = tmp_path / "out.json", tmp_path / "parts"
    parts.mkdir()
    stat(parts, [0, 1, 3], lambda rank: PARTS[rank])
    run = CliRunner()
    assert run.invoke(app, ["convert", str(parts), "-o", str(out)]).exit_code == 2
    assert run.invoke(app, ["convert", str(parts), "-o", str(out), "--ranks", "sum"]).exit_code == 2
    assert (
        run.invoke(app, ["convert", str(parts), "-o", str(out), "--ranks", "sum", "--allow-missing-ranks"]).exit_code
        == 0
    )
    assert json.loads(out.read_text())["logical_count"] == (PARTS[0] + PARTS[1] + PARTS[3]).tolist()


@given(ranks=st.sets(st.integers(0, 11), min_size=1), size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_ranks_whose_tokens_another_one_has_are_not_absent(ranks, size):
    groups = [group for block in range(12) if (group := {rank for rank in ranks if rank // size == block})]
    gone = absent(groups)
    assert not set(gone) & ranks and all(rank < max(ranks) for rank in gone)
    lost = {block for block in range(max(ranks) // size) if not any(rank // size == block for rank in ranks)}
    assert lost <= {rank // size for rank in gone} or (len(groups) == 1 and len(ranks) > 1)
