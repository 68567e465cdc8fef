"""plan -> export -> convert -> compare gives the figure of compare's row, for every target and every row."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tests.cli.test_cli import run
from tests.engines.checkpoint_cases import write_checkpoint
from tests.helpers import few_or

import poise
from poise.engines.dump import placement_of
from poise.engines.exports import TARGETS, ExportOptions
from poise.engines.readers import ReadOptions, read_dump
from poise.machine.model import ModelSpec
from poise.planning.engine_rules import ENGINES
from poise.planning.placement import EMPTY, Placement
from poise.planning.solve.solve import METHODS
from poise.routing.synthetic import zipf_trace
from poise.util.errors import PlacementError

LAYERS = (1, 2, 4)
MODEL = ModelSpec("small", 5, LAYERS, 8, 2, 2048, 1024)
ROWS = ("contiguous", "round-robin", "lpt", "eplb", "eplb-global", "moetuner-equal", "exflow", "grace-moe", "coactivation",
        "swift-balance", "flash-lb", "surplus-fill", "poise")  # fmt: skip
FEW = ("contiguous", "eplb", "eplb-global", "poise")
"""Whole blocks, replicas of one expert on several nodes, layers of other slots, and ours."""
ALL_ROWS_OF = few_or(set(TARGETS), {"sglang"})
WORK = few_or(3, 1)
ENGINE_OF = {"vllm-34811": "checkpoint", "vllm-49572": "vllm", "vllm-53022": "vllm", "vllm-hygon": "vllm", "npz": "any"}


def traffic(seed=0, layers=LAYERS):
    trace = zipf_trace(
        num_tokens=480, num_layers=3, num_experts=8, top_k=2, exponent=1.1, tokens_per_request=24, seed=seed
    )
    return replace(trace, layer_ids=np.array(layers))


def back(placement, target, folder):
    """What an engine's file holds, as poise reads it again."""
    if target == "checkpoint":
        made = folder / placement.method.replace(" ", "-")
        TARGETS[target].write(placement, made, ExportOptions(checkpoint=folder / "checkpoint"))
        return placement_of(read_dump(made), None, 8)
    path = folder / f"map{'.npz' if target == 'npz' else '.yaml' if 'tensorrt' in target else '.json'}"
    TARGETS[target].write(placement, path, ExportOptions(MODEL))
    if target == "npz":
        return Placement.load(path)
    said = target if target in ("vllm-49572", "vllm-53022") else None  # bare lists, of which layers they do not say
    slots = read_dump(path, options=ReadOptions(model=MODEL, format=said)).slots
    return Placement(slots.map_LS, np.repeat(np.arange(4), slots.map_LS.shape[1] // 4), 8, 4, slots.layer_ids_L)


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_exported_costs_what_was_priced(target, tmp_path):
    engine = ENGINE_OF.get(target, target)
    redundant = 4 if ENGINES[engine].replicas else 0
    model = MODEL
    if target == "checkpoint":  # of three layers, all of them MoE layers
        model = replace(MODEL, num_hidden_layers=3, moe_layer_ids=(0, 1, 2))
        write_checkpoint(tmp_path / "checkpoint", "minimax")
    options = {"model": model, "redundant": redundant, "engine": engine, "tokens_per_step": 96, "work": WORK}
    first, second = traffic(layers=model.moe_layer_ids).split_requests()
    rows = ROWS if target in ALL_ROWS_OF else FEW
    table = poise.compare(second, "2x2:h100", fit=first, placements=rows, **options)
    assert len(table.entries) >= len(rows) - 1
    held = []
    for entry in table.entries:
        assert (entry.placement.slot_expert_LS != EMPTY).all() and not entry.placement.has_duplicates
        try:
            held.append(replace(back(entry.placement, target, tmp_path), method=entry.name))
        except PlacementError as error:
            assert target == "vllm-34811" and "one list for all layers" in error.message
    assert held
    again = poise.compare(second, "2x2:h100", fit=first, placements=held, **options)
    for placement in held:
        for part in table.batches:
            mine, theirs = (got.replays[placement.method, part].step_seconds_B for got in (table, again))
            np.testing.assert_allclose(theirs, mine, rtol=1e-9)


def test_plan_gives_the_placement_of_its_row():
    first, second = traffic(3).split_requests()
    options = {"model": MODEL, "redundant": 4, "tokens_per_step": 96, "work": WORK}
    table = poise.compare(second, "2x2:h100", fit=first, placements=("contiguous", "lpt", "eplb", "poise"), **options)
    for entry in table.entries:
        if entry.name in METHODS:
            made = poise.plan(first, "2x2:h100", method=entry.name, **options).placement
            np.testing.assert_array_equal(made.slot_expert_LS, entry.placement.slot_expert_LS)
            assert made.fitted is not None and made.fitted.about["engine"] == "any"


def test_the_verdict_of_plan_is_that_of_its_file_once_exported(tmp_path):
    """On the command line, from end to end."""
    first, second = traffic(5).split_requests()
    for name, part in (("first", first), ("second", second)):
        part.save(tmp_path / f"{name}.npz")
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "qwen3_moe", "num_hidden_layers": 5, "mlp_only_layers": [0, 3], "num_experts": 8, '
                      '"num_experts_per_tok": 2, "hidden_size": 2048, "moe_intermediate_size": 1024}')  # fmt: skip
    common = ["-c", "2x2:h100", "-r", 4, "-m", config, "-n", 96, "--engine", "sglang", "--work", WORK]
    plan, exported, again = tmp_path / "p.npz", tmp_path / "map.json", tmp_path / "again.npz"
    assert run("plan", tmp_path / "first.npz", *common, "-o", plan, "--no-verdict").exit_code == 0
    assert run("export", plan, "--to", "sglang", "-m", config, "-o", exported).exit_code == 0
    assert run("convert", exported, "-m", config, "--devices", 4, "-o", again).exit_code == 0
    figures = []
    for row in ("poise", plan, again):
        got = run("compare", tmp_path / "second.npz", "--fit", tmp_path / "first.npz", *common, "-p", "contiguous", "-p", row,
                  "--json")  # fmt: skip
        rows = json.loads(got.stdout)["rows"]
        figures.append([r["step_seconds"]["mean"] for r in rows if r["name"] == getattr(row, "stem", row)])
    np.testing.assert_allclose(figures[1:], [figures[0]] * 2, rtol=1e-9)
