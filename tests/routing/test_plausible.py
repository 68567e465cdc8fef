"""Loads that cannot be what they say: layers and experts exchanged in formats that name them, counts that wrapped."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import poise
from poise.cli.main import app
from poise.engines.readers import ReadOptions, read_dump
from poise.util.errors import TraceError

LAYERS, EXPERTS = 4, 16


def loads(seed=0, tokens=40_000, layers=LAYERS):
    """Every layer has as many pairs, as in a run."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(tokens, rng.dirichlet(np.ones(EXPERTS))) for _ in range(layers)])


def write(folder, name, load_LE):
    path = folder / name
    cells = [(i, e, int(load_LE[i, e])) for i, e in np.ndindex(load_LE.shape)]
    if name == "t.pt":
        torch.save({"rank": 0, "logical_count": torch.tensor(load_LE)}, path)
    elif name == "t.npz":
        np.savez(path, counts=load_LE, layers=np.arange(len(load_LE)))
    else:
        path.write_text({
            "t.json": lambda: json.dumps({"logical_count": load_LE.tolist()}),
            "h.json": lambda: json.dumps({"load_history": [{"logical_expert_load": load_LE.tolist()}]}),
            "n.json": lambda: json.dumps({str(i): {str(e): n for j, e, n in cells if j == i} for i in range(len(load_LE))}),
            "t.csv": lambda: "layer,expert,count\n" + "".join(f"{i},{e},{n}\n" for i, e, n in cells),
            "r.json": lambda: json.dumps([{"layer": i, "expert": e, "count": n} for i, e, n in cells]),
        }[name]())  # fmt: skip
    return path


@pytest.mark.parametrize("name", ["t.pt", "t.npz", "t.json", "h.json", "n.json", "t.csv", "r.json"])
def test_exchanged_axes_are_refused_whatever_names_them(tmp_path, name):
    load = loads()
    np.testing.assert_array_equal(read_dump(write(tmp_path, name, load)).profile.load_BLE[0], load)
    path = write(tmp_path, name, load.T)
    said = r"every expert has 40000 tokens, and layers from \d+ to \d+: it seems that layers and experts are exchanged"
    with pytest.raises(TraceError, match=said):
        read_dump(path)
    if name in ("t.npz", "t.json"):
        with pytest.raises(TraceError, match=said):
            poise.read(path)
    else:
        name = {"t.pt": "sglang-stat", "h.json": "load-history", "n.json": "load-table"}.get(name, "load-csv")
        assert read_dump(path, options=ReadOptions(format=name)).profile.num_layers == EXPERTS


@pytest.mark.parametrize("ending", ["json", "npz"])
@pytest.mark.parametrize("name", ["t.npz", "t.json", "t.csv"])
def test_what_was_said_of_the_axes_goes_with_the_file(tmp_path, name, ending):
    """Loads that only look exchanged: their format is named once, and the file that is written reads everywhere."""
    path, out, again = write(tmp_path, name, loads().T), tmp_path / f"out.{ending}", tmp_path / f"again.{ending}"
    form = {"t.npz": "poise", "t.json": "sglang-stat", "t.csv": "load-csv"}[name]
    assert CliRunner().invoke(app, ["convert", str(path), "-o", str(out)]).exit_code == 2
    for words in ([path, "--format", form, "-o", out], [out, "-o", again]):
        done = CliRunner().invoke(app, ["convert", *map(str, words)])
        assert done.exit_code == 0, done.output
    for found in (out, again):
        np.testing.assert_array_equal(poise.read(found).load_BLE[0], loads().T)
        assert read_dump(found).profile.num_layers == EXPERTS
    assert CliRunner().invoke(app, ["inspect", str(again)]).exit_code == 0


def test_even_loads_and_layers_of_unlike_sizes_are_no_sign(tmp_path):
    for load in (
        np.outer([3, 5, 7, 9], np.ones(EXPERTS, int)),  # even in every layer
        loads() * np.array([[1], [2], [3], [4]]),  # chunks
        loads(layers=2).T[:, :2],  # two columns
    ):
        path = write(tmp_path, "t.json", load)
        assert poise.read(path).num_layers == read_dump(path).profile.num_layers == len(load)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("name", ["t.npy", "t.pt"])
def test_counts_that_wrapped_are_refused(tmp_path, kind, name):
    bits = 8 * np.dtype(kind).itemsize
    whole = loads(tokens=40 << bits)
    for load, wrapped in ((whole.astype(kind), True), (whole // 64 % (1 << bits), False), (whole, False)):
        if name == "t.npy":
            np.save(tmp_path / name, load)
        else:
            torch.save(torch.from_numpy(load), tmp_path / name)
        if wrapped:
            with pytest.raises(
                TraceError, match=rf"counts of uint{bits} wrapped: layer \d has \d+ pairs, layer \d \d+"
            ):
                read_dump(tmp_path / name, options=ReadOptions(num_experts=EXPERTS))
        else:
            assert read_dump(tmp_path / name, options=ReadOptions(num_experts=EXPERTS)).profile.num_layers == LAYERS
