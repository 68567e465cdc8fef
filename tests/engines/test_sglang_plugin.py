"""The SGLang plugin behind SGLang's own plugin registry and expert-location code, from its wheel."""

import importlib
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.engines import engine_stubs
from tests.engines.test_policy import loads_of, tokens, twice

from poise.engines.plugins import planner, policy, sglang_hook, sglang_plugin
from poise.util.errors import NoResultError, OptionError

LAYERS, EXPERTS, RANKS, REDUNDANT = 4, 16, 4, 8


@pytest.fixture
def engine(sglang_wheel, monkeypatch):
    """SGLang's algorithms and registry; gives its global state too."""
    for name in ("POISE_EPLB", "POISE_STATIC_MAP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(policy, "_said", set())
    state = engine_stubs.Settings()
    with engine_stubs.borrowed("sglang"):
        engine_stubs.sglang(sglang_wheel, ranks=RANKS, redundant=REDUNDANT, resources=state)
        algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
        location = importlib.import_module("sglang.srt.eplb.expert_location")
        registry = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
        registry.reset()
        yield SimpleNamespace(algorithms=algorithms, location=location, registry=registry, state=state)


def rebalanced(engine, loads):
    """What SGLang's manager calls when it rebalances."""
    shape = engine.location.ModelConfigForExpertLocation(num_layers=LAYERS, num_logical_experts=EXPERTS)
    model = SimpleNamespace(hf_config=None, get_model_config_for_expert_location=lambda config: shape)
    return engine.location.ExpertLocationMetadata.init_by_eplb(model, loads)


def loads(seed=0):
    """Five recorded steps; the first layer is dense."""
    made = np.stack([loads_of(LAYERS, EXPERTS, seed + step) for step in range(5)])
    made[:, 0] = 0
    return torch.from_numpy(made)


def test_not_asked_for_changes_nothing(engine):
    before = engine.algorithms.rebalance_experts
    sglang_plugin.register()
    engine.registry.apply_hooks()
    assert engine.algorithms.rebalance_experts is before


def test_the_registry_puts_our_maps_behind_every_algorithm(engine, monkeypatch):
    counted = loads()
    theirs = rebalanced(engine, counted)
    monkeypatch.setenv("POISE_EPLB", "1")
    monkeypatch.setenv("POISE_TIME_LIMIT_S", "0.02")
    sglang_plugin.register()
    engine.registry.apply_hooks()
    ours = rebalanced(engine, counted)
    total = counted.sum(dim=0).numpy()[1:]
    most = [tokens(total, made.physical_to_logical_map.numpy()[1:], RANKS).max(axis=1) for made in (ours, theirs)]
    assert (most[0] <= most[1] * (1 + 1e-6)).all() or twice(theirs.physical_to_logical_map.numpy()[1:], RANKS)
    table = ours.physical_to_logical_map
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        slots = ours.logical_to_all_physical_map[layer, expert]
        assert slots[slots >= 0].tolist() == torch.nonzero(table[layer] == expert).flatten().tolist()
        assert ours.logical_to_all_physical_map_num_valid[layer, expert] == (slots >= 0).sum()
    # the map in use is where the next one starts from: the same loads move nothing much
    engine.location.set_global_expert_location_metadata(ours)
    again = rebalanced(engine, counted)
    changed = (again.physical_to_logical_map != table).sum().item()
    assert changed < 0.2 * table.numel() and torch.equal(again.physical_to_logical_map[0], table[0])
    ours.update(again, update_layer_ids=list(range(LAYERS)))  # shapes and types fit the engine's own buffers
    assert torch.equal(ours.physical_to_logical_map, again.physical_to_logical_map)


def test_failures_and_dead_ranks_are_left_to_sglang(engine, monkeypatch, caplog):
    settings = policy.PolicySettings.from_environment({"POISE_CLUSTER": "1x3"})
    hook = sglang_hook.around(settings)
    given = dict(tokens_per_expert=loads(), num_physical_experts=EXPERTS + REDUNDANT,
                 num_local_physical_experts=(EXPERTS + REDUNDANT) // RANKS, num_groups=None, num_nodes=1)  # fmt: skip
    kinds = engine.algorithms.EplbAlgorithm
    with caplog.at_level(logging.WARNING, "sglang.poise"):
        for _ in range(2):
            made = hook(engine.algorithms.rebalance_experts, **given, algorithm=kinds.deepseek)
    want = engine.algorithms.rebalance_experts(**given, algorithm=kinds.deepseek)
    assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))
    assert caplog.text.count("3 devices, the engine 4 ranks") == 1
    answers = hook(lambda **arguments: arguments["algorithm"], **given, algorithm=kinds.elasticity_aware)
    assert answers is kinds.elasticity_aware


@pytest.mark.parametrize("error", [MemoryError, OSError, NoResultError, OptionError])
def test_an_error_that_other_ranks_may_not_have_raises(engine, monkeypatch, error):
    def fail(*_):
        raise error("on one rank")

    monkeypatch.setattr(planner, "plan", fail)
    hook = sglang_hook.around(policy.PolicySettings(time_limit_s=0.01))
    with pytest.raises(error, match="on one rank"):
        hook(engine.algorithms.rebalance_experts, loads(), EXPERTS + REDUNDANT, 6, None, 2, "deepseek_hierarchical")


@pytest.mark.parametrize("groups", [None, 0])
def test_a_model_without_groups_on_two_nodes(groups):
    hook = sglang_hook.around(policy.PolicySettings(time_limit_s=0.01))
    made = [hook(None, loads(), EXPERTS + REDUNDANT, 6, g, 2, "deepseek_hierarchical") for g in (groups, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_what_is_wrong_at_the_start_ends_the_start(engine, monkeypatch):
    """SGLang logs exceptions of plugins and starts: this rank without poise, others maybe with it."""
    monkeypatch.setenv("POISE_EPLB", "1")
    monkeypatch.setenv("POISE_TIME_LIMIT_S", "soon")
    with pytest.raises(SystemExit, match="POISE_TIME_LIMIT_S"):
        sglang_plugin.register()


@pytest.mark.parametrize("name", ["POISE_CANARY", "POISE_CANARY_DECODE"])
def test_a_canary_that_would_look_at_nothing_is_refused(engine, monkeypatch, name):
    for key, value in {"POISE_EPLB": "1", "POISE_PHASE": "decode", name: "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match="POISE_CANARY: nothing looks at weights under SGLang"):
        sglang_plugin.register()


def test_an_sglang_without_hooks_is_named(monkeypatch):
    monkeypatch.setenv("POISE_EPLB", "1")
    with engine_stubs.borrowed("sglang"):
        engine_stubs.put({"sglang": {}, "sglang.srt": {}})
        with pytest.raises(SystemExit, match="hook_registry"):
            sglang_plugin.register()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loads_in_any_unit_give_one_map(dtype):
    """Frequencies, tokens and thousands of them; many experts have equal loads."""
    hook = sglang_hook.around(policy.PolicySettings(time_limit_s=0.01))
    for seed in range(6):
        counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, (2, LAYERS, EXPERTS)))
        shares = counts.to(dtype) / counts.sum()
        maps = [hook(None, given, EXPERTS + REDUNDANT, 6, 1, 1, "deepseek") for given in (shares, shares * 1000)]
        assert all(torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(*maps, strict=True))
        assert not torch.equal(maps[0][0], torch.arange(EXPERTS + REDUNDANT).expand(LAYERS, -1) % EXPERTS)
