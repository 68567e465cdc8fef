"""The planning hook of vLLM's proposal #49700, in the forms it had: fields, refusals, what was committed, lost ranks."""

import importlib
from dataclasses import dataclass, make_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests.engines import engine_stubs
from tests.engines.test_policy import loads_of, tokens
from tests.engines.test_vllm_plugin import OneMap, switch_on, their_maps
from tests.engines.turn_cases import Planner

from poise.engines.plugins import policy, vllm_hooks, vllm_plugin
from poise.engines.plugins.vllm_hooks import CommitLedger
from poise.planning.placement import Placement
from poise.util.errors import CommunicationError, OptionError


@dataclass(frozen=True)
class EplbTopology:
    num_groups: int
    num_nodes: int
    num_ranks: int


@dataclass(frozen=True)
class EplbRebalanceContext:
    load_window_cpu: torch.Tensor
    physical_to_logical_map_cpu: torch.Tensor
    topology: EplbTopology
    num_replicas: int
    cpu_group: Any = None


@dataclass(frozen=True)
class EplbPlan:
    physical_to_logical_map: torch.Tensor


@dataclass(frozen=True)
class WithActive(EplbRebalanceContext):
    active_ranks: Any = None


class State:
    pass


class WithState:
    """``plan_rebalance(context, policy_state)``: one policy, a state a model."""

    def create_state(self, num_moe_layers):
        return State()

    def plan_rebalance(self, context, policy_state):
        assert isinstance(policy_state, State)
        return EplbPlan(theirs(context))

    def on_layer_committed(self, policy_state, plan, layer_idx):
        assert isinstance(policy_state, State)


class OfOneModel:
    """``plan_rebalance(context)``: a policy object a model."""

    def plan_rebalance(self, context):
        return EplbPlan(theirs(context))

    def on_layer_committed(self, plan, layer_idx):
        pass


class Early:
    """``rebalance_experts(context, policy_state)``."""

    def create_state(self, num_moe_layers):
        return State()

    def rebalance_experts(self, context, policy_state):
        return EplbPlan(theirs(context))

    def on_layer_committed(self, policy_state, plan, layer_idx):
        pass


FORMS = (WithState, OfOneModel, Early)


def theirs(context):
    load = context.load_window_cpu.reshape(-1, *context.load_window_cpu.shape[-2:]).sum(dim=0)
    return their_maps(load, context.num_replicas, context.topology.num_ranks, False)


def context_of(load, old, ranks=4, kind=EplbRebalanceContext, **more):
    return kind(load, old, EplbTopology(1, 1, ranks), old.shape[1], **more)


class Model:
    """One model of an engine, whatever form the policy class has: plans, and commits layer by layer."""

    def __init__(self, policy_class, layers=3):
        self.policy = policy_class()
        named = getattr(policy_class, "create_state", None)
        bare = policy_class.__mro__[1] is OfOneModel
        self.state = () if bare else (named(self.policy, layers),)
        self.hook = "rebalance_experts" if policy_class.__mro__[1] is Early else "plan_rebalance"

    def plan(self, context):
        return getattr(self.policy, self.hook)(context, *self.state)

    def commit(self, plan, layer):
        self.policy.on_layer_committed(*self.state, plan, layer)


@pytest.fixture
def engine(monkeypatch):
    """vLLM with a policy class of the proposal, and poise registered: the class that answers."""
    with engine_stubs.borrowed("vllm"):

        def make(base, **more):
            values = {"EPLB_POLICIES": {"default": base}, "EplbPlan": EplbPlan}
            names = ("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.distributed.eplb.policy")
            engine_stubs.put({name: values for name in names})
            switch_on(monkeypatch, **more)
            vllm_plugin.register()
            return values["EPLB_POLICIES"]["default"]

        for name in ("POISE_EPLB", "POISE_STATIC_MAP"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(policy, "_said", set())
        yield make


OLD = torch.arange(20).remainder(16).repeat(3, 1)


@pytest.mark.parametrize("base", FORMS)
def test_every_form_gives_the_map_of_releases(engine, base):
    made = engine(base)
    assert issubclass(made, base) and made is not base
    load = torch.from_numpy(loads_of(3, 16)).to(torch.int32)
    window = torch.stack([load // 2, load - load // 2])
    plan = Model(made).plan(context_of(window, OLD))
    table = plan.physical_to_logical_map
    assert isinstance(plan, EplbPlan) and table.dtype == torch.int64 and table.device.type == "cpu"
    release = engine(OneMap).rebalance_experts(load, 20, 1, 1, 4, OLD)
    assert torch.equal(table, release)
    most = [tokens(load.numpy(), one.numpy(), 4).max(axis=1) for one in (table, OLD)]
    assert (most[0] < most[1]).any()
    assert torch.equal(
        Model(made).plan(context_of(load, OLD)).physical_to_logical_map, release
    )  # its first form: a sum


@pytest.mark.parametrize("base", FORMS)
def test_what_is_committed_must_be_what_was_planned(engine, base):
    made = engine(base)
    load = torch.from_numpy(loads_of(3, 16))
    model, other = Model(made), Model(made)
    plan = model.plan(context_of(load, OLD))
    for layer in range(3):
        model.commit(plan, layer)
    with pytest.raises(CommunicationError, match="layer 1 of 3 was moved once more"):
        model.commit(plan, 1)
    with pytest.raises(CommunicationError, match=r"layer 0 was moved to map \w+, poise planned"):
        model.commit(EplbPlan(OLD), 0)
    other.commit(EplbPlan(OLD), 0)  # vLLM's own plans are none of ours
    again = model.plan(context_of(load, plan.physical_to_logical_map))
    model.commit(again, 0)


def test_a_map_in_use_that_was_not_committed_is_said(engine, caplog):
    model = Model(engine(WithState))
    load = torch.from_numpy(loads_of(3, 16))
    plan = model.plan(context_of(load, OLD))
    model.commit(plan, 0)
    half = OLD.clone()
    half[0] = plan.physical_to_logical_map[0]
    with caplog.at_level("ERROR", "vllm.poise"):
        plan = model.plan(context_of(load, half))  # a move that stopped half-way is nothing strange
        assert not caplog.records
        model.commit(plan, 1)
        strange = half.clone()
        strange[2] = strange[2].flip(0)
        model.plan(context_of(load, strange))
    assert "layer 1 was committed with" in caplog.text and "2 of 3 layers differ" in caplog.text


def test_a_ledger_without_plans_finds_nothing():
    ledger, table = CommitLedger(), np.arange(6).reshape(2, 3)
    assert ledger.found(table) == ""
    ledger.plan(table, table[:, ::-1])
    assert ledger.found(table[:, :2]) == ""  # ranks came or went
    assert ledger.found(table) == "" and "layer 0" in ledger.found(table[::-1])


@pytest.mark.parametrize("lacking", [*vllm_hooks.FIELDS, *(f"topology.{name}" for name in vllm_hooks.TOPOLOGY)])
def test_fields_that_are_missing_are_named(lacking):
    def without(kind, values, name):
        kept = {key: value for key, value in values.items() if key != name}
        return make_dataclass(kind, kept)(**kept)

    topology = without("EplbTopology", {name: 1 for name in vllm_hooks.TOPOLOGY}, lacking.removeprefix("topology."))
    values = {"load_window_cpu": torch.ones((1, 3, 16)), "physical_to_logical_map_cpu": OLD, "topology": topology,
              "num_replicas": 20}  # fmt: skip
    with pytest.raises(OptionError, match=f"has no .*{lacking}") as error:
        vllm_hooks.read(without("EplbRebalanceContext", values, lacking))
    assert "#49700" in error.value.hint


@pytest.mark.parametrize("shape", [(16,), (0, 3, 16), (2, 1, 3, 16)])
def test_windows_of_other_shapes_are_refused(shape):
    with pytest.raises(OptionError, match="samples, layers, experts"):
        vllm_hooks.read(context_of(torch.ones(shape), OLD))


def test_other_hooks_end_the_start(engine):
    class Another(WithState):
        def plan_rebalance(self, loads, policy_state, more): ...

    with pytest.raises(OptionError, match=r"takes \(loads, policy_state, more\), poise knows \(context\) or"):
        engine(Another)

    class Classes(WithState):
        pass

    names = ("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.distributed.eplb.policy")
    engine_stubs.put({name: {"EPLB_POLICIES": {"default": Classes}} for name in names})
    with pytest.raises(OptionError, match="has no EplbPlan"):
        vllm_plugin.register()


@pytest.mark.parametrize("base", FORMS)
def test_numbers_that_do_not_fit_are_the_engines(engine, base):
    model = Model(engine(base, POISE_CLUSTER="1x8"))
    load = torch.from_numpy(loads_of(3, 16))
    plan = model.plan(context_of(load, OLD))
    assert torch.equal(plan.physical_to_logical_map, theirs(context_of(load, OLD)))
    model.commit(plan, 0)


@pytest.mark.parametrize("lost", [(0,), (3,), (1, 2)])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_lost_ranks_get_nothing_and_orphans_a_slot(engine, lost, as_tensor):
    """#39942: 4 ranks of 8 slots, 16 experts; of the map in use only what is on the ranks that are left counts."""
    model = Model(engine(WithState))
    old = torch.stack([torch.arange(32).remainder(16), torch.arange(32).flip(0).remainder(16), torch.arange(32) // 2])
    load = loads_of(3, 16)
    active = [rank not in lost for rank in range(4)]
    for dead in lost:
        old[0, dead * 8 : dead * 8 + 8] = -1
    more = {"active_ranks": torch.tensor(active) if as_tensor else active}
    table = model.plan(context_of(torch.from_numpy(load), old, kind=WithActive, **more)).physical_to_logical_map.numpy()
    on = table.reshape(3, 4, 8)
    assert (on[:, list(lost)] == -1).all()
    left = on[:, active]
    assert left.min() >= 0
    for layer in left:
        assert set(layer.ravel().tolist()) == set(range(16))
        assert all(len(set(rank.tolist())) == 8 for rank in layer)
    if len(lost) == 1:  # 24 slots for 16 experts
        count = np.stack([np.bincount(layer.ravel(), minlength=16) for layer in left])
        work = np.take_along_axis(load / count, left.reshape(3, -1), axis=1).reshape(3, 3, 8).sum(axis=2)
        assert (work.max(axis=1) < 1.4 * work.mean(axis=1)).all()


def test_all_active_is_as_if_nothing_was_said(engine):
    made = engine(WithState)
    load = torch.from_numpy(loads_of(3, 16))
    plain = Model(made).plan(context_of(load, OLD)).physical_to_logical_map
    said = Model(made).plan(context_of(load, OLD, kind=WithActive, active_ranks=torch.ones(4))).physical_to_logical_map
    assert torch.equal(plain, said)


@pytest.mark.parametrize("active, said", [([True] * 3, "must be 4 numbers"), ([0] * 4, "none of 4"), ([1, 0, 0, 0], "5 slots on"),
                                          ([2, 1, 1, 1], "of 0 and 1")])  # fmt: skip
def test_masks_that_do_not_fit(active, said):
    load = loads_of(3, 16)
    with pytest.raises(OptionError, match=said):
        policy.asked(load, 20, 1, 1, 4, OLD.numpy(), active_D=np.array(active))


def test_a_rank_that_came_back_is_planned_for(engine, monkeypatch, caplog):
    """Its slots are empty in the map in use: they are filled at once, and the planner has the call."""
    planner, made = together(monkeypatch), engine(WithState)
    old = torch.arange(32).remainder(16).repeat(3, 1)
    old[:, 16:24] = -1
    context = context_of(
        torch.from_numpy(loads_of(3, 16)), old, kind=WithActive, active_ranks=torch.ones(4), cpu_group=Group()
    )
    model = Model(made)
    with caplog.at_level("INFO", "vllm.poise"):
        table = model.plan(context).physical_to_logical_map
    assert "the planner has the loads now" in caplog.text and len(planner.asked) == 1
    assert table.min() >= 0 and torch.equal(table[:, :16], old[:, :16]) and torch.equal(table[:, 24:], old[:, 24:])
    assert all(len(set(row.tolist())) == 8 for row in table[:, 16:24])  # no copy twice on it
    planner.answers(planner.asked[0].answer())
    model.plan(context_of(context.load_window_cpu, table, cpu_group=Group()))
    assert len(planner.asked) == 2


@pytest.mark.parametrize("lost", [(0,), (1, 2)])
def test_a_static_map_puts_nothing_on_lost_ranks(engine, tmp_path, caplog, lost):
    rows = np.stack([np.random.default_rng(n).permutation(np.arange(32) % 16) for n in range(3)])
    Placement(rows, np.repeat(np.arange(4), 8), 16, 4, np.arange(3)).save(tmp_path / "p.npz")
    model = Model(engine(WithState, POISE_STATIC_MAP=str(tmp_path / "p.npz")))
    load, active = torch.from_numpy(loads_of(3, 16)), [rank not in lost for rank in range(4)]
    with caplog.at_level("INFO", "vllm.poise"):
        plan = model.plan(context_of(load, torch.from_numpy(rows), kind=WithActive, active_ranks=active))
    on = plan.physical_to_logical_map.numpy().reshape(3, 4, 8)
    assert (on[:, list(lost)] == -1).all() and all(
        set(layer.ravel().tolist()) == set(range(16)) for layer in on[:, active]
    )
    kept = on[:, active] == rows.reshape(3, 4, 8)[:, active]
    assert kept.mean() > 0.5 and f"counts on {len(lost)} ranks that are not there" in caplog.text
    back = context_of(load, plan.physical_to_logical_map, kind=WithActive, active_ranks=[True] * 4)
    assert (model.plan(back).physical_to_logical_map.numpy() == rows).all()


def test_a_static_map_on_too_few_ranks_leaves_the_answer_to_the_engine(engine, monkeypatch, tmp_path):
    rows = np.tile(np.arange(20) % 16, (3, 1))
    Placement(rows, np.repeat(np.arange(4), 5), 16, 4, np.arange(3)).save(tmp_path / "p.npz")
    model = Model(engine(WithState, POISE_STATIC_MAP=str(tmp_path / "p.npz")))
    context = context_of(torch.from_numpy(loads_of(3, 16)), OLD, kind=WithActive, active_ranks=[1, 1, 1, 0])
    assert torch.equal(model.plan(context).physical_to_logical_map, theirs(context))


class Group:
    """A process group of which this is the first rank; it counts how often it is talked over."""

    def __init__(self):
        self.calls = 0

    def rank(self):
        return 0

    def size(self):
        return 2


def together(monkeypatch):
    """The planner of this rank, of two that talk to each other; the other one has the same map in use, and no word."""
    call = importlib.import_module("poise.engines.plugins.vllm_call")

    def twice(tensor, group):
        group.calls += 1
        tensor[:2] *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", twice)
    planner = Planner()
    monkeypatch.setattr(call, "Aside", lambda: planner)
    return planner


def test_where_a_group_is_named_the_plan_comes_a_turn_later(engine, monkeypatch, caplog):
    """The context's group is talked over once a call; the first call keeps the map in use."""
    planner = together(monkeypatch)
    model, group = Model(engine(WithState)), Group()
    load = torch.from_numpy(loads_of(3, 16))
    with caplog.at_level("INFO", "vllm.poise"):
        first = model.plan(context_of(load, OLD, cpu_group=group))
        assert group.calls == 1 and torch.equal(first.physical_to_logical_map, OLD)
        assert "the planner has the loads now" in caplog.text
        planner.answers(planner.asked[0].answer())
        second = model.plan(context_of(load, OLD, cpu_group=group))
    assert group.calls == 2 and "a new map (said)" in caplog.text
    release = engine(OneMap).rebalance_experts(load, 20, 1, 1, 4, OLD)
    assert torch.equal(second.physical_to_logical_map, release)
