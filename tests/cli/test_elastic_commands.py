"""Placements of other numbers of devices as a user meets them: diff, plan --current, compare."""

import json

import numpy as np
import pytest
from tests.helpers import random_count
from typer.testing import CliRunner

from poise.cli.main import app
from poise.machine.model import ModelSpec
from poise.planning.elastic import RankMap
from poise.planning.placement import Placement

LAYERS, EXPERTS, MODEL = 3, 16, "gpt-oss-20b"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words):
    got = run(*words)
    assert got.exit_code == 0, got.output
    return json.loads(got.stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("elastic"), np.random.default_rng(0)
    for devices in (4, 6):
        Placement.from_counts(random_count(rng, LAYERS, EXPERTS, devices, 0.15)).save(folder / f"{devices}.npz")
    counts = rng.integers(1, 400, (4, LAYERS, EXPERTS)).tolist()
    (folder / "loads.json").write_text(json.dumps({"logical_count": counts}))
    return folder


@pytest.mark.parametrize(
    ("before", "after", "ranks"), [(4, 6, None), (6, 4, None), (6, 4, "0-1:0-1,3:2,5:3"), (4, 4, "0:0,1:1,3:3")]
)
@pytest.mark.parametrize("lost", [False, True])
def test_diff_says_who_fetches_what_from_whom(files, before, after, ranks, lost):
    old, new = Placement.load(files / f"{before}.npz"), Placement.load(files / f"{after}.npz")
    if lost and after > before:
        refused = run("diff", files / f"{before}.npz", files / f"{after}.npz", "--lost")
        assert refused.exit_code == 2 and "no rank leaves: 4 before, 6 after" in " ".join(refused.stderr.split())
        return
    words = [*(["--rank-map", ranks] if ranks else []), *(["--lost"] if lost else []), "--json"]
    data = answer("diff", files / f"{before}.npz", files / f"{after}.npz", "-c", f"2x{after // 2}:h100", *words)
    new_O = RankMap.parse(ranks, before, after).new_O.tolist()
    was = {b: a for a, b in enumerate(new_O) if b >= 0}
    gone = [a for a, b in enumerate(new_O) if b < 0]
    fetches = {
        (x, e, d) for x in range(LAYERS) for d in range(after) for e in new.experts_of(x, d)
        if d not in was or e not in old.experts_of(x, was[d])
    }  # fmt: skip
    said = {(row["layer"], e, to): source for row in data["layers"] for e, source, to in row["fetches"]}
    assert set(said) == fetches and data["fetched"] == len(fetches)
    held = {(x, e): {d for d in range(before) if e in old.experts_of(x, d)} for x in range(LAYERS) for e in range(16)}
    for (x, e, _), source in said.items():
        assert source in (held[x, e] - set(gone if lost else ()) or {None})
    about = data["ranks"]
    assert (about["before"], about["after"], about["leave"], about["lost"]) == (before, after, gone, lost)
    assert about["join"] == [d for d in range(after) if d not in was]
    assert about["fetched_by"] == [sum(d == to for _, _, to in fetches) for d in range(after)]
    onto_new = sum(d in about["join"] for _, _, d in fetches)
    assert about["onto_those_that_join"]["experts"] == onto_new
    assert about["onto_those_that_stay"]["experts"] == len(fetches) - onto_new
    alone = {(x, e) for (x, e), ranks in held.items() if ranks <= set(gone)}
    assert {tuple(pair) for pair in about["held_by_none_that_stays"]["which"]} == alone
    assert about["read_from_checkpoint"]["experts"] == sum((x, e) in alone for x, e, _ in fetches) * lost
    assert about["fetched_from_those_that_leave"]["experts"] == sum(source in gone for source in said.values())
    assert bool(about["assumed"]) == (bool(gone) and not lost)
    total = data["links"]["inside_node"]["experts"] + data["links"]["between_nodes"]["experts"]
    assert total + about["read_from_checkpoint"]["experts"] == len(fetches)
    assert data["most_on_device"]["device"] == int(np.argmax(about["fetched_by"]))


def test_rounds_and_bytes_on_old_and_new_clusters(files, tmp_path):
    spec, paths = ModelSpec.parse(MODEL), []
    for devices in (4, 6):
        rng = np.random.default_rng(devices)
        count = random_count(rng, len(spec.moe_layer_ids), spec.num_experts, devices, 0.1)
        paths.append(tmp_path / f"{devices}.npz")
        Placement.from_counts(count, layer_ids_L=np.array(spec.moe_layer_ids, np.int32)).save(paths[-1])
    words = ("-m", MODEL, "--staging", 2)
    grown = answer("diff", *paths, "-c", "2x3:h100", *words, "--json")
    shrunk = answer("diff", *paths[::-1], "-c", "2x3:h100", *words, "--json")
    apart = answer("diff", *paths[::-1], "-c", "1x4:h100", *words, "--json")
    for data in (grown, shrunk, apart):
        assert data["moved_bytes"] == pytest.approx(data["fetched"] * spec.expert_bytes)
        assert data["rounds"]["count"] > 1 and 0 < data["link_seconds"] <= data["rounds"]["seconds"]
    assert apart["ranks"]["assumed"] and not shrunk["ranks"]["assumed"]
    assert apart["links"]["between_nodes"]["experts"] == apart["ranks"]["fetched_from_those_that_leave"]["experts"] > 0
    text = run("diff", *paths[::-1], "-c", "1x4:h100", *words).stdout
    assert "ranks 4-5 leave" in text and "No rank that stays holds" in text and "on further nodes" in text
    text = run("diff", *paths[::-1], "-c", "1x4:h100", *words, "--lost").stdout
    assert "ranks 4-5 are lost" in text and "must be read from the checkpoint" in text
    assert "onto ranks that join" in run("diff", *paths, "-m", MODEL).stdout


def test_plan_prices_moves_from_other_devices_and_says_so(files):
    plan = ("plan", files / "loads.json", "--method", "swift-balance", "-o", files / "out.npz")
    for current, cluster, words in (
        ("4", "1x6", ()),
        ("6", "1x4", ()),
        ("6", "1x4", ("--rank-map", "0-1:0-1,3:2,5:3")),
    ):
        data = answer(*plan, "-c", cluster, "-r", 2, "--current", files / f"{current}.npz", *words, "--json")
        old, new = Placement.load(files / f"{current}.npz"), Placement.load(files / "out.npz")
        ranks = RankMap.parse(words[1] if words else None, old.num_devices, new.num_devices)
        diff = ranks.number(old).diff(new)
        moves = data["moves"]
        assert (moves["fetched"], moves["dropped"]) == (diff.fetched, diff.dropped) and diff.fetched > 0
        assert (moves["ranks_before"], moves["ranks_after"]) == (old.num_devices, new.num_devices)
        assert (moves["join"], moves["leave"]) == (ranks.join, ranks.leave)
        assert "cannot be replayed, so contiguous stands for it" in data["verdict"]
    text = run(*plan, "-c", "1x6", "-r", 2, "--current", files / "4.npz", "-m", "", "--no-verdict")
    assert text.exit_code == 2  # no such model
    text = run(*plan, "-c", "1x6", "-r", 2, "--current", files / "4.npz", "--no-verdict").stdout
    assert "4 ranks before, 6 after" in text and "onto ranks that join" in text
    same = answer(*plan, "-c", "1x6", "-r", 2, "--current", files / "out.npz", "--json")
    assert "current" in same["verdict"] and same["moves"]["join"] == []
    wrong = run(*plan, "-c", "1x6", "--rank-map", "0:0")
    assert wrong.exit_code == 2 and "--current" in wrong.stderr


def test_compare_has_a_row_that_says_it_is_mapped_and_what_moves(files):
    data = answer("compare", files / "loads.json", "-c", "1x6", "-r", 2, "-p", files / "4.npz", "-p", files / "4.npz",
                  "-p", "lpt", "--time-limit", 0.3, "--json")  # fmt: skip
    names = {row["name"] for row in data["rows"]}
    assert {"4 mapped to 6", "4 mapped to 6-2", "lpt"} <= names
    note = next(note for note in data["notes"] if note.startswith("4 mapped to 6:"))
    assert "a placement for 4 devices cannot be replayed on 6" in note and "lpt: " in note
    assert any("4 mapped to 6 does not say what it was fitted on" in note for note in data["notes"])
    run("plan", files / "loads.json", "-c", "1x4", "--method", "lpt", "--no-verdict", "-o", files / "own.npz")
    data = answer("compare", files / "loads.json", "-c", "1x6", "-p", files / "own.npz", "-p", "lpt", "--json")
    shares = {row["judged_on"]: row["fitted_share"] for row in data["rows"] if row["name"] == "own mapped to 6"}
    assert min(shares.values()) > 0.5 and len(shares) == 2
    empty = answer(
        "compare", files / "loads.json", "-c", "1x6", "-r", 2, "-p", files / "4.npz", "--engine", "none", "--json"
    )
    assert {row["name"] for row in empty["rows"]} == {"4 mapped to 6", "bound"}
    other = run("compare", files / "loads.json", "-c", "1x6", "-p", "nothing.npz")
    assert other.exit_code == 2


def test_other_layers_or_experts_are_refused(files, tmp_path):
    for shape in ((LAYERS, EXPERTS + 1), (LAYERS + 1, EXPERTS)):
        Placement.from_devices(np.zeros(shape, int), 1).save(tmp_path / "x.npz")
        for words in (
            ("diff", tmp_path / "x.npz", files / "4.npz"),
            ("plan", files / "loads.json", "-c", "1x6", "--current", tmp_path / "x.npz", "-o", tmp_path / "y.npz"),
            ("compare", files / "loads.json", "-c", "1x6", "-p", tmp_path / "x.npz"),
        ):
            got = run(*words)
            assert got.exit_code == 2 and str(shape[1]) in got.stderr, got.output
