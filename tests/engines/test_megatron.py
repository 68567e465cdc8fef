"""Orders for Megatron-LM and DeepSpeed: the same layer computed from reordered state, split over ranks as they do."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from poise.engines.checkpoints.megatron import apply_order_to_state, rename_deepspeed_files, write_order
from poise.engines.checkpoints.permutation import permutation
from poise.planning.placement import Placement
from poise.util.errors import ModelError, OptionError, PlacementError

EXPERTS, DEVICES, HIDDEN, INNER, TOP_K = 8, 4, 6, 5, 3
NAMES = {  # framework -> first and second weight of expert N, router weight, its bias
    "sequential": ("decoder.layers.4.mlp.experts.local_experts.{}.linear_fc1.weight", "decoder.layers.4.mlp.experts.local_experts.{}.linear_fc2.weight",
                   "decoder.layers.4.mlp.router.weight", "decoder.layers.4.mlp.router.expert_bias"),
    "grouped": ("decoder.layers.4.mlp.experts.linear_fc1.weight{}", "decoder.layers.4.mlp.experts.linear_fc2.weight{}",
                "decoder.layers.4.mlp.router.weight", "decoder.layers.4.mlp.router.expert_bias"),
    "deepspeed": ("h.4.mlp.deepspeed_moe.experts.deepspeed_experts.{}.fc1.weight", "h.4.mlp.deepspeed_moe.experts.deepspeed_experts.{}.fc2.weight",
                  "h.4.mlp.deepspeed_moe.gate.wg.weight", None),
}  # fmt: skip


def placement(seed=0, layers=(4,)) -> Placement:
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(EXPERTS) for _ in layers]
    return Placement(np.array(rows), np.arange(EXPERTS) * DEVICES // EXPERTS, EXPERTS, DEVICES, np.array(layers))


def state_of(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second, router, bias = NAMES[kind]

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    out = {
        "decoder.layers.4.mlp.shared_experts.linear_fc1.weight": random(INNER, HIDDEN),
        router: random(EXPERTS, HIDDEN),
    }
    if bias:
        out[bias] = random(EXPERTS)
    for e in range(EXPERTS):
        out[first.format(e)], out[second.format(e)] = random(INNER, HIDDEN), random(HIDDEN, INNER)
    return out


def forward(kind: str, state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token-choice MoE layer over expert-parallel ranks, each with a contiguous block: output, tokens of each rank."""
    first, second, router, bias = NAMES[kind]
    scores = torch.sigmoid(x @ state[router].T)
    chosen = (scores + state[bias] if bias else scores).topk(TOP_K).indices
    gate = scores.gather(1, chosen)
    gate = gate / gate.sum(1, keepdim=True)
    out, load = torch.zeros_like(x), torch.zeros(DEVICES)
    for rank in range(DEVICES):
        block = EXPERTS // DEVICES
        for e in range(rank * block, (rank + 1) * block):
            token, k = torch.where(chosen == e)
            out[token] += gate[token, k, None] * (
                torch.relu(x[token] @ state[first.format(e)].T) @ state[second.format(e)].T
            )
            load[rank] += len(token)
    return out, load


@pytest.mark.parametrize("kind", NAMES)
def test_the_layer_computes_the_same_and_ranks_get_their_load(kind):
    plan = placement()
    order = permutation(plan)[0]
    state = state_of(kind)
    x = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, load = forward(kind, state, x)
    new = apply_order_to_state(state, order)
    after, new_load = forward(kind, new, x)
    assert float((before - after).norm() / before.norm()) <= 1e-12
    assert state.keys() == new.keys()
    # what the ranks compute is what the plan's devices hold
    scores = torch.sigmoid(x @ state[NAMES[kind][2]].T)
    bias = state[NAMES[kind][3]] if NAMES[kind][3] else 0
    tokens = torch.bincount((scores + bias).topk(TOP_K).indices.ravel(), minlength=EXPERTS)
    assert new_load.tolist() == [float(tokens[plan.experts_of(0, d)].sum()) for d in range(DEVICES)] != load.tolist()
    # the comparison can fail
    wrong = {**new, NAMES[kind][2]: state[NAMES[kind][2]]}
    assert float((before - forward(kind, wrong, x)[0]).norm() / before.norm()) > 1e-2
    arrays = apply_order_to_state({name: tensor.numpy() for name, tensor in state.items()}, order.tolist())
    assert all(np.array_equal(arrays[name], tensor.numpy()) for name, tensor in new.items())


@pytest.mark.parametrize("framework", ["megatron", "deepspeed"])
def test_the_file(framework, tmp_path):
    plan = placement(layers=(3, 9))
    write_order(plan, tmp_path / "order.json", framework=framework)
    assert json.loads((tmp_path / "order.json").read_text()) == {
        "format": "poise-expert-order", "version": 1, "framework": framework, "num_experts": 8, "ep_size": 4,
        "experts_per_rank": 2, "layers": {str(layer): row for layer, row in zip((3, 9), permutation(plan).tolist(), strict=True)},
    }  # fmt: skip
    with pytest.raises(OptionError, match="unknown framework 'fairseq'"):
        write_order(plan, tmp_path / "no", framework="fairseq")
    with pytest.raises(PlacementError, match="routing group"):
        write_order(plan, tmp_path / "no", framework=framework, num_groups=4)
    with pytest.raises(PlacementError, match="9 slots for 8"):
        write_order(
            Placement(np.array([[*range(8), 0]]), np.arange(9) // 3, 8, 3), tmp_path / "no", framework=framework
        )
    assert not (tmp_path / "no").exists()


RECIPE = next(
    block
    for block in re.findall(
        r"```python\n(.*?)```",
        (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text("utf-8"),
        flags=re.DOTALL,
    )
    if "rename_deepspeed_files" in block
)


def test_deepspeed_files_load_on_their_ranks(tmp_path, monkeypatch):
    """Two MoE layers as DeepSpeed saves them; reordered as the docs say, and read as its ranks read them."""
    plan = placement(1, layers=(2, 4))
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    states = [state_of("deepspeed", seed) for seed in (0, 1)]
    key = re.compile(r".*deepspeed_experts\.(\d+)\..*")
    for layer, state in enumerate(states):
        for e in range(EXPERTS):
            part = {name: tensor for name, tensor in state.items() if (m := key.match(name)) and int(m[1]) == e}
            torch.save(part, old / f"layer_{layer}_expert_{e}_mp_rank_00_model_states.pt")
    gate = NAMES["deepspeed"][2]
    gates = [gate.replace("h.4.", f"h.{layer}.") for layer in (2, 10)]
    assert len({*gates}) == 2
    torch.save(
        {"module": {name: state[gate] for name, state in zip(gates, states, strict=True)}},
        old / "mp_rank_00_model_states.pt",
    )
    write_order(plan, tmp_path / "order.json", framework="deepspeed")
    monkeypatch.chdir(tmp_path)
    exec(RECIPE, {"folder": "old", "target": "new"})
    assert {path.name for path in new.iterdir()} == {path.name for path in old.iterdir()}
    routers = torch.load(new / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    x = torch.randn(32, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for layer, state in enumerate(states):
        whole = {gate: routers[gates[layer]]}
        for rank in range(DEVICES):
            for local in range(2):
                expert = 2 * rank + local
                part = torch.load(new / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt", weights_only=True)
                assert len(part) == 2 and all(f"deepspeed_experts.{expert}." in name for name in part)
                whole |= part
        before, _ = forward("deepspeed", state, x)
        assert float((before - forward("deepspeed", whole, x)[0]).norm() / before.norm()) <= 1e-12


@pytest.mark.parametrize("kind, act, match", [
    ("grouped", lambda s: s.update({"decoder.layers.4.mlp.experts.weight1": torch.zeros(6, 80)}), "it is not known whether"),
    ("grouped", lambda s: s.update({"decoder.layers.4.mlp.experts.linear_fc1._extra_state": torch.zeros(0)}), "it is not known whether"),
    ("grouped", lambda s: s.pop("decoder.layers.4.mlp.router.weight"), "8 of 8 experts and no router"),
    ("grouped", lambda s: s.update({"decoder.layers.4.mlp.router.weight": torch.zeros(7, HIDDEN)}), r"shape \(7, 6\) for 8"),
    ("grouped", lambda s: s.update({"decoder.layers.4.mlp.experts.linear_fc1.weight8": torch.zeros(1)}), "the order has 8"),
    ("sequential", lambda s: [s.pop(name) for name in list(s) if "local_experts.5." in name], "7 of 8 experts and a router"),
    ("sequential", lambda s: s.update({"decoder.layers.5.mlp.router.weight": torch.zeros(8, 6)}), "experts of 2 modules"),
    ("deepspeed", lambda s: s.update({"h.4.mlp.deepspeed_moe.gate.other": torch.zeros(8)}), "it is not known whether"),
])  # fmt: skip
def test_states_that_are_not_understood_are_refused(kind, act, match):
    state = state_of(kind)
    act(state)
    with pytest.raises(ModelError, match=match):
        apply_order_to_state(state, permutation(placement())[0])


def test_orders_and_files_that_do_not_fit():
    for order in ([0, 1, 1], [1, 2, 3], [0.0, 1.0], [[0, 1]]):
        with pytest.raises(PlacementError, match="lists each of its"):
            apply_order_to_state({}, order)
    name = "layer_0_expert_{}_mp_rank_00_model_states.pt"
    with pytest.raises(ModelError, match=r"layer 0 has files of 1 of 2 experts"):
        rename_deepspeed_files([name.format(0)], [[1, 0]])
    with pytest.raises(ModelError, match="orders for 1 layers of 2"):
        rename_deepspeed_files([name.format(2)], [[1, 0]])
    assert rename_deepspeed_files([name.format(0), name.format(1), "latest"], [[1, 0]]) == {
        name.format(0): name.format(1), name.format(1): name.format(0),
    }  # fmt: skip
