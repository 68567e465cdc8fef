"""The stand-in (titan_model.py) beside torchtitan's own classes, and those under ``fully_shard_experts``; run where it is.

    PYTHONPATH=src:. TITAN_PYTHON tests/train/titan_real.py

One process. Prints a line for what held; anything that does not is an error.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[2])]
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tests.train import titan_model as ours  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402

from poise.train import fully_shard_experts  # noqa: E402
from poise.train.dispatched import PassThrough  # noqa: E402

DIM, HIDDEN, EXPERTS, TOP_K = 16, 24, 6, 2


def real(seed: int = 0) -> Any:
    """Torchtitan's MoE module with random weights."""
    from torchtitan.models.common import linear, moe, token_dispatcher

    dispatcher = token_dispatcher.LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    config = moe.MoE.Config(
        num_experts=EXPERTS,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS), token_dispatcher=dispatcher
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, gate=linear.Linear.Config(in_features=DIM, out_features=EXPERTS), top_k=TOP_K, route_norm=True
        ),
    )  # fmt: skip
    torch.manual_seed(seed)
    built = config.build()
    with torch.no_grad():
        for weight in built.parameters():
            weight.normal_(std=0.3)
    return built


def stand_in(theirs: Any) -> ours.MoE:
    """With the same weights, by their names."""
    mine = ours.MoE(DIM, HIDDEN, EXPERTS, TOP_K, True)
    wanted = {name: value for name, value in theirs.state_dict().items()}
    missing, unexpected = mine.load_state_dict(wanted, strict=False)
    assert list(missing) == ["shared_experts.weight"] and not unexpected, (missing, unexpected)
    mine.shared_experts = torch.nn.Identity()
    return mine


def same_calls() -> None:
    """Methods that poise stands in for, and what they are called with."""
    from torchtitan.models.common import moe, token_dispatcher

    pairs = [
        (moe.GroupedExperts.forward, ours.GroupedExperts.forward),
        (moe.RoutedExperts.forward, ours.RoutedExperts.forward),
        *((getattr(token_dispatcher.LocalTokenDispatcher, name), getattr(ours.LocalTokenDispatcher, name))
          for name in ("wire_meshes", "dispatch", "combine")),
    ]  # fmt: skip
    for their, my in pairs:
        a, b = (list(inspect.signature(one).parameters) for one in (their, my))
        assert a == b, (their, a, b)
    for name in ("wire_meshes", "dispatch", "combine"):  # called by position, but for the mesh
        a, b = (
            inspect.signature(getattr(one, name)).parameters
            for one in (token_dispatcher.LocalTokenDispatcher, PassThrough)
        )
        assert len(a) == len(b) and [p.kind for p in a.values()] == [p.kind for p in b.values()], name


def main() -> None:
    dist.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    ) if "RANK" not in os.environ else dist.init_process_group("gloo")
    same_calls()
    print("calls: the same")
    theirs = real()
    mine = stand_in(theirs)
    x = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    wanted, got = theirs(a), mine(b) - b
    wanted.square().sum().backward()
    got.square().sum().backward()
    assert (wanted - got).abs().max() <= 1e-5 * wanted.abs().max(), (wanted - got).abs().max()
    assert torch.equal(theirs.tokens_per_expert_E, mine.tokens_per_expert_E)
    weight, other = (m.routed_experts.inner_experts.w1_EFD.grad for m in (theirs, mine))
    assert (weight - other).norm() <= 1e-3 * weight.norm()
    print("stand-in: outputs, loads and gradients are theirs")
    sharded = torch.nn.Module()
    sharded.moe = real()
    run = fully_shard_experts(sharded, mesh=init_device_mesh("cpu", (1,)), policy="expert-parallelism")
    c = x.clone().requires_grad_()
    out = sharded.moe(c)
    out.square().sum().backward()
    assert (wanted - out).abs().max() <= 1e-5 * wanted.abs().max(), (wanted - out).abs().max()
    mine_grad = run.schedule.layers[0].owned()["w1_EFD"].grad
    assert (torch.Tensor(mine_grad.detach().as_subclass(torch.Tensor)) - weight).norm() <= 1e-3 * weight.norm()
    sharded.moe._init_self_buffers()
    assert set(sharded.moe.state_dict()) == set(theirs.state_dict())
    print("fully_shard_experts: their module gives the same, and its buffers and names are as before")


if __name__ == "__main__":
    main()
