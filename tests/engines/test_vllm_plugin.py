"""The vLLM plugin against stand-ins of every form of its policy interface, and against vLLM's own code from its wheels."""

import importlib
import logging
import tomllib
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engines import engine_stubs
from tests.engines.test_policy import fetched, loads_of, tokens, twice

from poise.engines.plugins import planner, policy, vllm_plugin
from poise.engines.plugins.policy import PolicySettings
from poise.planning.methods import eplb
from poise.planning.placement import Placement
from poise.util.errors import InputError, NoResultError, OptionError, PlacementError

QUICK = {"POISE_EPLB": "1", "POISE_TIME_LIMIT_S": "0.02"}


class Abstract(ABC):
    """As vLLM's: one class method."""

    @classmethod
    @abstractmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks): ...


def their_maps(weight, num_replicas, ranks, three):
    made = [torch.from_numpy(one) for one in eplb.rebalance_experts(weight.numpy(), num_replicas, 1, 1, ranks)]
    return tuple(made) if three else made[0]


class ThreeMaps(Abstract):
    """Releases 0.13."""

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks):
        return their_maps(weight, num_replicas, num_ranks, True)


class ThreeMapsAndOld(Abstract):
    """Releases 0.14 to before #36267."""

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices=None):
        return their_maps(weight, num_replicas, num_ranks, True)


class OneMap(Abstract):
    """Since #36267."""

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices=None):
        return their_maps(weight, num_replicas, num_ranks, False)


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for vLLM with a policy of the given form: its table."""
    with engine_stubs.borrowed("vllm"):

        def make(base):
            policies = {"default": base}
            names = ("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.distributed.eplb.policy")
            engine_stubs.put({name: {"EPLB_POLICIES": policies} for name in names})
            return policies

        for name in ("POISE_EPLB", "POISE_STATIC_MAP"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(policy, "_said", set())
        yield make


def switch_on(monkeypatch, **more):
    for name, value in {**QUICK, **more}.items():
        monkeypatch.setenv(name, value)


def test_the_entry_points_name_functions_that_are_there():
    groups = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(groups) == {"vllm.general_plugins", "sglang.srt.plugins"}
    for names in groups.values():
        module, _, function = names["poise"].partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("value", [None, "", "0"])
def test_installed_but_not_asked_for_changes_nothing(engine, monkeypatch, value):
    policies = engine(OneMap)
    if value is not None:
        monkeypatch.setenv("POISE_EPLB", value)
    vllm_plugin.register()
    assert policies == {"default": OneMap}


@pytest.mark.parametrize("base", [ThreeMaps, ThreeMapsAndOld, OneMap])
def test_every_form_of_the_interface(engine, monkeypatch, base):
    policies = engine(base)
    switch_on(monkeypatch)
    vllm_plugin.register()
    ours = policies["default"]
    vllm_plugin.register()  # vLLM may load plugins again
    assert policies["default"] is ours and issubclass(ours, base) and ours is not base
    load = torch.from_numpy(loads_of(3, 16)).to(torch.int32)
    old = torch.arange(20).remainder(16).repeat(3, 1)
    made = ours.rebalance_experts(load, 20, 1, 1, 4, *([] if base is ThreeMaps else [old]))
    theirs = base.rebalance_experts(load, 20, 1, 1, 4)
    if base is OneMap:
        made, theirs = (made,), (theirs,)
    assert [(one.dtype, one.device) for one in made] == [(one.dtype, one.device) for one in theirs]
    assert made[0].shape == theirs[0].shape == (3, 20)
    most = [tokens(load.numpy(), maps[0].numpy(), 4).max(axis=1) for maps in (made, theirs)]
    assert (most[0] <= most[1] * 1.002).all() or twice(theirs[0].numpy(), 4)  # a move must pay for itself
    if base is not OneMap:
        table, slots, replicas = (one.numpy() for one in made)
        assert slots.shape == (3, 16, 5) and (replicas.sum(axis=1) == 20).all()
        for layer, expert in np.ndindex(3, 16):
            where = slots[layer, expert][slots[layer, expert] >= 0]
            assert where.size == replicas[layer, expert] and (table[layer, where] == expert).all()


def test_what_fails_is_said_once_and_the_engine_answers(engine, monkeypatch, caplog):
    policies = engine(OneMap)
    switch_on(monkeypatch, POISE_CLUSTER="1x8")
    vllm_plugin.register()
    load = torch.from_numpy(loads_of(2, 16))
    with caplog.at_level(logging.WARNING, "vllm.poise"):
        for _ in range(3):
            made = policies["default"].rebalance_experts(load, 20, 1, 1, 4, None)
    assert torch.equal(made, OneMap.rebalance_experts(load, 20, 1, 1, 4))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1 and "8 devices, the engine 4 ranks" in said[0] and "own algorithm" in said[0]


ONE_RANK = (MemoryError, OSError, RuntimeError, NoResultError, OptionError, KeyError, TimeoutError)


@pytest.mark.parametrize("error, where", [*((one, "plan") for one in ONE_RANK), (MemoryError, "_in_grains")])
def test_an_error_that_other_ranks_may_not_have_raises(engine, monkeypatch, error, where):
    """A fallback here alone would send experts to where others do not wait for them."""
    policies = engine(OneMap)
    switch_on(monkeypatch)
    vllm_plugin.register()
    old, load = torch.arange(20).remainder(16).repeat(2, 1), torch.from_numpy(loads_of(2, 16))
    policies["default"].rebalance_experts(load, 20, 1, 1, 4, old)

    def fail(*_):
        raise error("on one rank")

    monkeypatch.setattr(planner if where == "plan" else policy, where, fail)
    with pytest.raises(error, match="on one rank"):
        policies["default"].rebalance_experts(load, 20, 1, 1, 4, old)


@pytest.mark.parametrize("groups", [None, 0])
def test_a_model_without_groups_on_two_nodes(engine, monkeypatch, groups):
    """vLLM's own algorithm divides by them."""
    policies = engine(OneMap)
    switch_on(monkeypatch)
    vllm_plugin.register()
    load = torch.from_numpy(loads_of(2, 16))
    made = [policies["default"].rebalance_experts(load, 20, g, 2, 4, None) for g in (groups, 1)]
    assert torch.equal(*made)


def test_a_static_map(engine, monkeypatch, tmp_path, caplog):
    policies = engine(OneMap)
    rows = np.array([[3, 0, 2, 1, 2, 0], [1, 0, 2, 2, 3, 0]])
    Placement(rows, np.repeat([0, 1], 3), 4, 2, np.array([1, 3])).save(tmp_path / "p.npz")
    monkeypatch.setenv("POISE_STATIC_MAP", str(tmp_path / "p.npz"))
    vllm_plugin.register()
    ours = policies["default"]
    (tmp_path / "p.npz").unlink()  # read once: neither a second call nor a rearrangement opens it again
    vllm_plugin.register()
    assert policies["default"] is ours
    for load in (torch.zeros((2, 4), dtype=torch.int32), torch.tensor([[9, 1, 1, 1]] * 2)):
        assert ours.rebalance_experts(load, 6, 1, 1, 2, None).tolist() == rows.tolist()
    draft = torch.tensor([[0, 1, 2, 3, 1, 0]])  # a draft model has other layers: its map stays
    with caplog.at_level(logging.WARNING, "vllm.poise"):
        assert ours.rebalance_experts(torch.ones((1, 4)), 6, 1, 1, 2, draft).tolist() == draft.tolist()
    assert "the map in use stays" in caplog.text


def test_what_is_wrong_at_the_start_ends_the_start(engine, monkeypatch, tmp_path):
    policies = engine(OneMap)
    monkeypatch.setenv("POISE_STATIC_MAP", str(tmp_path / "none.npz"))
    with pytest.raises(PlacementError, match="no such file"):
        vllm_plugin.register()
    monkeypatch.delenv("POISE_STATIC_MAP")
    switch_on(monkeypatch, POISE_TIME_LIMIT_S="soon")
    with pytest.raises(InputError, match="POISE_TIME_LIMIT_S"):
        vllm_plugin.register()
    assert policies == {"default": OneMap}
    switch_on(monkeypatch)

    class Another(OneMap):
        @classmethod
        def rebalance_experts(cls, loads, slots): ...

    engine(Another)
    with pytest.raises(OptionError, match="loads, slots"):
        vllm_plugin.register()
    engine(OneMap).clear()
    with pytest.raises(OptionError, match=r"0\.13"):
        vllm_plugin.register()


@pytest.mark.parametrize("version", ["0.33.0", "0.14.0"])
def test_behind_vllms_own_policy(vllm_wheel, monkeypatch, version):
    """Side by side with the default policy of the release; what each moves is counted."""
    root = vllm_wheel(version)
    with engine_stubs.borrowed("vllm"):
        engine_stubs.vllm(root)
        theirs = importlib.import_module("vllm.distributed.eplb.policy")
        default = theirs.EPLB_POLICIES["default"]
        switch_on(monkeypatch)
        vllm_plugin.register()
        ours = theirs.EPLB_POLICIES["default"]
        assert issubclass(ours, theirs.AbstractEplbPolicy) and issubclass(ours, default) and ours is not default
        old = torch.arange(40).remainder(32).repeat(3, 1)
        moved = []
        for seed in range(3):
            load = torch.from_numpy(loads_of(3, 32, seed)).to(torch.int32)
            made = [one.rebalance_experts(load, 40, 1, 1, 8, old) for one in (ours, default)]
            assert isinstance(made[0], tuple) == isinstance(made[1], tuple) == (version == "0.14.0")
            flat = [one if isinstance(one, tuple) else (one,) for one in made]
            for mine, its in zip(*flat, strict=True):
                assert (mine.shape, mine.dtype, mine.device) == (its.shape, its.dtype, its.device)
            most = [tokens(load.numpy(), maps[0].numpy(), 8).max(axis=1) for maps in flat]
            assert (most[0] <= most[1] * 1.002).all() or twice(flat[1][0].numpy(), 8)  # a move must pay for itself
            moved.append([fetched(old.numpy(), maps[0].numpy(), 8) for maps in flat])
        assert np.array(moved)[:, 0].sum() <= np.array(moved)[:, 1].sum()


def test_settings_are_those_of_the_class(engine, monkeypatch):
    policies = engine(OneMap)
    switch_on(monkeypatch, POISE_HORIZON_STEPS="77")
    vllm_plugin.register()
    assert policies["default"].poise_settings == PolicySettings(time_limit_s=0.02, horizon_steps=77.0)
