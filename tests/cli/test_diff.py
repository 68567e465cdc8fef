"""poise diff as a user meets it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from poise.cli.main import app
from poise.control.moves import move_list
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement

LAYERS, EXPERTS, DEVICES = 24, 32, 8
MODEL, CLUSTER = "gpt-oss-20b", "2x4:h100"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("diff"), np.random.default_rng(0)
    plain = np.tile(np.repeat(np.arange(DEVICES), EXPERTS // DEVICES), (LAYERS, 1))
    other = plain.copy()
    for layer in range(3, 9):
        other[layer] = rng.permutation(other[layer])
    other[20] = np.roll(other[20], 1)
    paths = folder / "before.npz", folder / "after.npz"
    for path, device_LE in zip(paths, (plain, other), strict=True):
        Placement.from_devices(device_LE, DEVICES).save(path)
    return paths


def test_json_has_every_number(files):
    got = run("diff", *files, "--model", MODEL, "--cluster", CLUSTER, "--staging", 2, "--json")
    assert got.exit_code == 0, got.output
    data = json.loads(got.stdout)
    before, after = (Placement.load(path) for path in files)
    spec, cluster, diff = ModelSpec.parse(MODEL), Cluster.parse(CLUSTER), before.diff(after)
    assert (data["fetched"], data["dropped"]) == (diff.fetched, diff.dropped) and diff.fetched > 50
    assert data["moved_bytes"] == pytest.approx(diff.moved_bytes(spec.expert_bytes))
    assert [row["arrive"] for row in data["layers"]] == diff.fetched_L.tolist()
    assert [row["layer"] for row in data["layers"]] == list(range(LAYERS))
    near, far = data["links"]["inside_node"], data["links"]["between_nodes"]
    home, goal = before.slot_device_S[before.slot_expert_LS.argsort()], after.count_LED().argmax(axis=2)
    moved = home != goal
    assert (
        near["experts"] == (moved & (home // 4 == goal // 4)).sum() and near["experts"] + far["experts"] == moved.sum()
    )
    assert near["bytes"] + far["bytes"] == pytest.approx(data["moved_bytes"])
    rounds = move_list(before, after, expert_bytes=spec.expert_bytes, staging=2, node_D=cluster.node_D)
    assert data["rounds"] == {"count": len(rounds.rounds), "seconds": rounds.seconds(cluster), "staging": 2,
                              "turns": rounds.turns, "fewest_turns": rounds.fewest_turns}  # fmt: skip
    assert 0 < data["link_seconds"] <= data["rounds"]["seconds"]
    most = [data["layers"][layer]["arrive"] for layer in data["most"]]
    assert most == sorted(most, reverse=True) and set(data["most"]) == {*range(3, 9), 20}


def test_on_a_terminal(files):
    got = run("diff", *files, "--model", MODEL, "--cluster", CLUSTER)
    assert (
        got.exit_code == 0 and "experts to fetch" in got.stdout and "links need" in got.stdout and "GiB" in got.stdout
    )
    bare = run("diff", *files)
    assert bare.exit_code == 0 and "experts to fetch" in bare.stdout
    assert "GiB" not in bare.stdout and "links need" not in bare.stdout
    same = run("diff", files[0], files[0], "--json")
    data = json.loads(same.stdout)
    assert (data["fetched"], data["dropped"], data["moved_bytes"], data["links"], data["most"]) == (
        0,
        0,
        None,
        None,
        [],
    )
    assert "Nothing to fetch" in run("diff", files[0], files[0]).stdout


def test_bad_input_exits_with_2_and_says_the_numbers(files, tmp_path):
    small = tmp_path / "small.npz"
    Placement.from_devices(np.zeros((2, 4), int), 2).save(small)
    shifted = tmp_path / "shifted.npz"
    ids = np.arange(LAYERS) + 1
    Placement.from_devices(np.zeros((LAYERS, EXPERTS), int), DEVICES, layer_ids_L=ids).save(shifted)
    for words, said in (
        ((files[0], small), "32"),
        ((files[0], shifted), "decoder layer"),
        ((files[0], tmp_path / "none.npz"), "no such file"),
        ((*files, "-c", "1x4"), "4 devices"),
        ((*files, "-m", "mixtral-8x7b"), "32 experts"),
        ((*files, "-m", "nothing"), "unknown model"),
        ((*files, "--staging", "1"), "--model"),
        ((*files, "--staging", "0", "-m", MODEL, "-c", CLUSTER), "at least 1"),
        ((files[0], shifted, "--staging", "1", "-m", MODEL, "-c", CLUSTER), "decoder layer"),
    ):
        got = run("diff", *words)
        assert got.exit_code == 2 and not got.stdout and said in " ".join(got.stderr.split()), (words, got.output)
