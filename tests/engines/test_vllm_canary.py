"""Weights are looked at after a move: what arrived must be what was loaded."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tests.engines import engine_stubs

from poise.engines.plugins import vllm_canary
from poise.engines.plugins.turns import TurnRanks
from poise.util.errors import CommunicationError, OptionError

STATE = "vllm.distributed.eplb.eplb_state"
EXPERTS, EACH = 4, 3


class Group:
    """Of one rank, which holds slots 3 to 5."""

    def rank(self):
        return 1

    def size(self):
        return 2


def weights(experts):
    """Two tensors of slots that hold these experts."""
    ids = torch.tensor(experts, dtype=torch.float32)
    return [ids[:, None].repeat(1, 5) + 0.5, ids[:, None, None].repeat(1, 2, 2) * 3 - 1]


def a_model(rows):
    model = SimpleNamespace(num_logical_experts=EXPERTS, expert_weights=[weights(row[EACH:]) for row in rows])
    return SimpleNamespace(physical_to_logical_map=torch.tensor(rows), model=model)


@pytest.fixture
def engine(monkeypatch):
    """vLLM's module, with the hook of the proposal or the functions of releases."""
    with engine_stubs.borrowed("vllm"):

        def make(hook, functions=True):
            class EplbState:
                def __init__(self):
                    self.model_states, self.told = {}, []

                def add_model(self, model, name="model"):
                    self.model_states[name] = model

            if hook:
                EplbState.on_layer_committed = lambda self, one, layer: self.told.append(layer)
            values = {"EplbState": EplbState}
            if functions:
                values |= {"_commit_eplb_maps": commit, "_commit_eplb_maps_for_layer": commit_one}
            engine_stubs.put({"vllm": {}, "vllm.distributed": {}, "vllm.distributed.eplb": {}, STATE: values})
            import sys

            return sys.modules[STATE]

        def commit(model_state, new_physical_to_logical_map):
            model_state.physical_to_logical_map.copy_(new_physical_to_logical_map)

        def commit_one(model_state, new_physical_to_logical_map, layer):
            model_state.physical_to_logical_map[layer].copy_(new_physical_to_logical_map)

        monkeypatch.setattr(vllm_canary, "cpu_group", Group)
        monkeypatch.setattr(vllm_canary, "ranks_of", lambda group: TurnRanks(1, 2, total))
        monkeypatch.setattr("tests.engines.test_vllm_canary.OTHER", [0, 0])
        TOTALS.clear()
        monkeypatch.setattr("poise.runtime.canary.gather", lambda mine, group: other_rank(mine))
        yield make


OTHER = [0, 0]
"""What the other rank has: new weights, a wrong expert."""
TOTALS = []


def total(mine):
    TOTALS.append(mine.tolist())
    return mine + OTHER


def other_rank(mine):
    """The numbers of both ranks; the other one's slots hold what this one's do not."""
    from poise.runtime.canary import fingerprint

    out = torch.zeros((2, len(mine)), dtype=torch.int64)
    out[1] = mine
    view = out[0].view(3, -1, EXPERTS)
    for expert in range(EXPERTS):
        view[:2, :, expert] = torch.tensor([1, fingerprint([one[0] for one in weights([expert])])])[:, None]
    return out


OLD = [[0, 1, 2, 3, 0, 1], [1, 2, 3, 0, 1, 2]]
NEW = [[0, 1, 2, 2, 0, 3], [1, 2, 3, 0, 3, 2]]


def moved(one, rows, wrong=()):
    """What vLLM's mover brings; ``wrong``: (layer, slot) of this rank that gets another expert's weights."""
    for layer, row in enumerate(rows):
        held = [(row[EACH + slot] + ((layer, slot) in wrong)) % EXPERTS for slot in range(EACH)]
        for tensor, now in zip(one.model.expert_weights[layer], weights(held), strict=True):
            tensor.copy_(now)


def in_place(module, state, one, layer, *, hook):
    """The engine says that a layer is in place."""
    if hook:
        one.physical_to_logical_map[layer] = torch.tensor(NEW[layer])
        state.on_layer_committed(one, layer)
    else:
        module._commit_eplb_maps_for_layer(one, new_physical_to_logical_map=torch.tensor(NEW[layer]), layer=layer)


@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("wrong", [(), [(1, 1)]])
def test_what_a_slot_holds_is_what_its_expert_was(engine, hook, wrong, caplog):
    module = engine(hook)
    vllm_canary.install()
    vllm_canary.install()  # vLLM may load plugins again
    state, one = module.EplbState(), a_model(OLD)
    state.add_model(one)
    moved(one, NEW, wrong)
    with caplog.at_level("INFO", "vllm.poise"):
        in_place(module, state, one, 0, hook=hook)
        assert "layer 0: 2 slots hold" in caplog.text
        if not wrong:
            in_place(module, state, one, 1, hook=hook)
            assert "layer 1: 1 slots hold" in caplog.text and state.told == ([0, 1] if hook else [])
            return
        with pytest.raises(CommunicationError, match="layer 1: slot 1 of rank 1 should hold expert 3"):
            in_place(module, state, one, 1, hook=hook)


def test_all_layers_at_once(engine):
    """vLLM's synchronous way."""
    module = engine(False)
    vllm_canary.install()
    state, one = module.EplbState(), a_model(OLD)
    state.add_model(one)
    moved(one, NEW, [(0, 0)])
    with pytest.raises(CommunicationError, match="layer 0: slot 0"):
        module._commit_eplb_maps(one, new_physical_to_logical_map=torch.tensor(NEW))
    assert TOTALS == [[0, 1]]  # once for all layers, also where the first is wrong


@pytest.mark.parametrize("hook", [True, False])
def test_what_one_rank_finds_raises_on_all(engine, monkeypatch, hook):
    """Who found nothing would go on into the next collective alone."""
    module = engine(hook)
    vllm_canary.install()
    state, one = module.EplbState(), a_model(OLD)
    state.add_model(one)
    moved(one, NEW)
    in_place(module, state, one, 0, hook=hook)
    monkeypatch.setattr("tests.engines.test_vllm_canary.OTHER", [0, 1])
    with pytest.raises(CommunicationError, match="1 ranks found experts with other weights"):
        in_place(module, state, one, 1, hook=hook)
    assert TOTALS == [[0, 0]] * 2


def test_an_error_of_one_rank_is_told_to_all_before_it_raises(engine, monkeypatch):
    module = engine(True)
    vllm_canary.install()
    state, one = module.EplbState(), a_model(OLD)
    state.add_model(one)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("poise.runtime.canary.Canary.wrong", fail)
    moved(one, NEW)
    with pytest.raises(CommunicationError, match="MemoryError"):
        in_place(module, state, one, 0, hook=True)
    assert TOTALS == [[0, 1]]


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("wrong", [(), [(1, 1)]])
def test_new_weights_are_numbered_anew(engine, monkeypatch, caplog, here, wrong):
    """A trainer's weight sync, seen by this rank or by the other one: the next move is not judged by old numbers."""
    module = engine(True)
    vllm_canary.install()
    state, one = module.EplbState(), a_model(OLD)
    one.model.load_weights = lambda weights: [t.mul_(2) for layer in one.model.expert_weights for t in layer]
    state.add_model(one)
    monkeypatch.setattr(
        "tests.engines.test_vllm_canary.weights", lambda held, plain=weights: [2 * t for t in plain(held)]
    )
    if here:
        one.model.load_weights(None)
    else:
        for layer in one.model.expert_weights:
            for tensor in layer:
                tensor.mul_(2)
        monkeypatch.setattr("tests.engines.test_vllm_canary.OTHER", [1, 0])
    moved(one, [NEW[0], OLD[1]])
    in_place(module, state, one, 0, hook=True)
    assert "this move goes unlooked" in caplog.text
    monkeypatch.setattr("tests.engines.test_vllm_canary.OTHER", [0, 0])
    moved(one, NEW, wrong)
    with nullcontext() if not wrong else pytest.raises(CommunicationError, match="layer 1: slot 1"):
        in_place(module, state, one, 1, hook=True)


def test_ranks_that_come_and_go_have_no_canary(engine):
    state_class = engine(True).EplbState
    vllm_canary.install()
    state = state_class()
    state.parallel_config = SimpleNamespace(enable_elastic_ep=True)
    with pytest.raises(OptionError, match="POISE_CANARY: ranks of elastic"):
        state.add_model(a_model(OLD))


def test_slots_whose_expert_stays_are_not_looked_at_again(engine, monkeypatch):
    module = engine(True)
    vllm_canary.install()
    state, one = module.EplbState(), a_model(OLD)
    state.add_model(one)
    monkeypatch.setattr("poise.runtime.canary.Canary.wrong", lambda self, arrived: pytest.fail("nothing moved"))
    state.on_layer_committed(one, 0)


def test_an_engine_that_says_nowhere_that_a_layer_is_in_place(engine):
    engine(False, functions=False)
    with pytest.raises(OptionError, match=r"neither EplbState\.on_layer_committed nor _commit"):
        vllm_canary.install()
