"""Cases about what experts compute: by their own code, in the mode of the model, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.matrix import machine
from tests.train.support_models import case
from tests.train.support_runs import EXACT, apart, everyone, mine, shard
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from poise.runtime.moe import ExpertList, GatedExperts
from poise.stepwise.methods.hecate import Hecate
from poise.train import checks
from poise.util.errors import ModelError, OptionError


def untouched(model: nn.Module, action: Callable[[], Any], kind: type[Exception] = ModelError) -> str:
    """An error on every rank, after which the model is as it was on all of them."""
    modules, weights = list(model.modules()), list(model.parameters())
    values = [weight.clone() for weight in weights]
    said = c.raised(kind, action)
    same = (
        all(a is b for a, b in zip(model.modules(), modules, strict=True))
        and all(a is b for a, b in zip(model.parameters(), weights, strict=True))
        and all(torch.equal(a, b) for a, b in zip(weights, values, strict=True))
        and not model._forward_pre_hooks
    )
    assert c.agreed(float(not same)) == 0, "the model was changed"
    return said


class Dropping(nn.Module):
    """An expert that drops by ``F.dropout``, and in training is as large again."""

    def __init__(self, p: float, gain: float = 1.0) -> None:
        super().__init__()
        self.up, self.down, self.p, self.gain = nn.Linear(h.WIDTH, h.INNER), nn.Linear(h.INNER, h.WIDTH), p, gain

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.down(torch.tanh(self.up(x))), self.p, training=self.training)
        return y * self.gain if self.training else y


def dropping(p: float, gain: float = 1.0) -> nn.Module:
    """The harness's model with such experts."""
    model = h.build("list")
    with torch.random.fork_rng():
        torch.manual_seed(11)
        for block in model.blocks:
            block.experts = ExpertList(Dropping(p, gain).double() for _ in range(h.EXPERTS))
    return model


@case
def one_rank_with_another_model() -> dict:
    """Found before anything is changed, by all ranks; then they go on together."""
    rank, said = dist.get_rank(), {}

    def layer_left_out(model: nn.Module) -> None:
        model.blocks[rank % h.LAYERS].ffn = model.blocks[rank % h.LAYERS].experts  # another block on every rank
        del model.blocks[rank % h.LAYERS].experts

    def others(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
        return lambda model: change(model) if rank == 2 else None

    def no_experts(model: nn.Module) -> None:
        for block in model.blocks:
            del block.experts

    def activation(model: nn.Module) -> None:
        for block in model.blocks:
            block.experts.act_fn = F.gelu

    def of_size(experts: int, inner: int) -> Callable[[nn.Module], Any]:
        def change(model: nn.Module) -> None:
            for block in model.blocks:
                block.gate = nn.Linear(h.WIDTH, experts)
                block.experts = GatedExperts(experts, h.WIDTH, inner).double()

        return change

    def one_layer_more(model: nn.Module) -> None:
        model.blocks.append(h.Block("gated").double())

    changes: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
        "layer left out": (layer_left_out, "layers: blocks.1.experts on rank 0, blocks.0.experts on rank 1"),
        "no experts": (others(no_experts), "no child named experts"),
        "another layer": (others(one_layer_more), "blocks.2.experts on rank 2"),
        "experts": (others(of_size(h.EXPERTS + 1, h.INNER)), "number of experts: 10 on rank 0, 11 on rank 2"),
        "shape": (others(of_size(h.EXPERTS, h.INNER + 1)), "weights: "),
        "activation": (others(activation), "what blocks.0.experts makes of the same tokens: "),
        "kind": (others(lambda model: _lists(model)), "kind: gated on rank 0, modules on rank 2|weights: "),
        "type": (others(lambda model: model.float()), "type of weights: torch.float64 on rank 0"),
        "frozen": (others(lambda m: m.blocks[1].experts.down_proj.requires_grad_(False)), "trained weights: "),
        "outputs of a router": (others(lambda m: setattr(m.blocks[1], "gate", nn.Linear(h.WIDTH, 12))), "12 outputs"),
        "rows": (others(lambda m: setattr(m.blocks[0].experts, "down_proj", nn.Parameter(
            m.blocks[0].experts.down_proj[1:].detach()))), "9 experts by down_proj"),
    }  # fmt: skip
    for name, (change, expected) in changes.items():
        model = h.build()
        change(model)
        said[name] = untouched(model, lambda model=model: shard(model)).splitlines()[0]
        assert any(part in said[name] for part in expected.split("|")), (name, said[name])
    model = h.build()
    shard(model)
    h.loss_of(model, mine()).backward()
    return said


def _lists(model: nn.Module) -> None:
    for block, other in zip(model.blocks, h.build("list").blocks, strict=True):
        block.experts = other.experts


@case
def one_rank_with_other_options() -> dict:
    """Every option is compared; what is out of range on one rank is an error on all."""
    rank, world, said = dist.get_rank(), dist.get_world_size(), {}
    model = h.build()
    owners = np.arange(h.LAYERS * h.EXPERTS).reshape(h.LAYERS, -1) % world
    differing: dict[str, Any] = {
        "policy": "poise", "step_slots": 3, "sharding": "balanced", "rematerialise": True, "prefetch": 2, "window": 7,
        "window_s": 0.5, "form": "direct", "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        "gather_dtype": torch.bfloat16, "offload": True, "force_balance": True, "owners": owners, "replica_bytes": 1e6,
    }  # fmt: skip
    for name, value in differing.items():
        given = {name: value} if rank == 2 else {}
        said[name] = untouched(model, lambda given=given: shard(model, **given)).splitlines()[0]
        assert said[name].startswith(f"{name}: ") and "on rank 2" in said[name], said[name]
    slow = machine(world)
    object.__setattr__(slow, "intra_bytes_per_s", slow.intra_bytes_per_s * (1 + (rank == 1)))
    said["cluster"] = untouched(model, lambda: shard(model, cluster=slow)).splitlines()[0]
    assert "intra_bytes_per_s of the cluster" in said["cluster"], said
    wrong: dict[str, Any] = {"step_slots": -1, "policy": "no such", "sharding": "no such", "window": 0,
                             "owners": owners + 1}  # fmt: skip
    for name, value in wrong.items():
        given = {name: value} if rank == 1 else {}
        said[f"wrong {name}"] = untouched(model, lambda given=given: shard(model, **given), OptionError).splitlines()[0]
        assert rank == 1 or said[f"wrong {name}"].startswith("rank 1: "), said
    run = shard(model, policy=Hecate())  # the same as by its name
    h.loss_of(model, mine()).backward()
    return said | {"replicas": sum(one.replicas for one in run.metrics)}


@case
def one_rank_whose_check_fails() -> dict:
    """By an error that is not poise's own: the others do not wait."""
    model, rank = h.build(), dist.get_rank()
    fails = (
        mock.patch.object(checks, "recognise_all", side_effect=MemoryError("no room")) if rank == 3 else mock.DEFAULT
    )
    if rank == 3:
        with fails:
            said = untouched(model, lambda: shard(model))
    else:
        said = untouched(model, lambda: shard(model))
    assert "MemoryError: no room" in said, said
    shard(model)
    h.loss_of(model, mine()).backward()
    return {"said": said.splitlines()[0]}


@case
def experts_that_compute_something_else() -> dict:
    """A list with a constant of one expert, stacked experts with a forward of their own, refused on all ranks."""

    class Doubled(GatedExperts):
        def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            return 2.0 * super().forward(x, ids, w)

    doubled = h.build()
    doubled.blocks[1].experts = Doubled(h.EXPERTS, h.WIDTH, h.INNER).double()
    first = untouched(doubled, lambda: shard(doubled))
    assert first.startswith(("blocks.1.experts: Doubled computes", "rank 0: blocks.1.experts: Doubled")), first
    scaled = dropping(0.0)
    scaled.blocks[0].experts[3].gain = 2.0
    second = untouched(scaled, lambda: shard(scaled))
    assert "expert 3 differs from expert 0 in gain: 2.0 and 1.0" in second, second
    nested = h.build()
    nested.blocks[0].experts.experts = h.build().blocks[0].experts
    third = untouched(nested, lambda: shard(nested))
    assert "lies in other experts" in third, third
    shared = h.build()
    shared.blocks[1].experts.down_proj = nn.Parameter(shared.blocks[0].experts.down_proj.data)
    fourth = untouched(shared, lambda: shard(shared))
    assert "are one parameter" in fourth, fourth
    alias = h.build("list")
    alias.blocks[0].first = alias.blocks[0].experts[0][0]  # the same module by another name
    fifth = untouched(alias, lambda: shard(alias))
    assert "are one parameter" in fifth, fifth
    return {"said": [one.splitlines()[0] for one in (first, second, third, fourth, fifth)]}


class ByName(h.Block):
    """Calls its experts by the names that their forward gives, with a router of one output more: no expert."""

    def __init__(self) -> None:
        super().__init__("gated")
        self.gate = nn.Linear(h.WIDTH, h.EXPERTS + 1, bias=False)
        kind = type("Named", (GatedExperts,), {"forward": lambda s, x, chosen, shares: GatedExperts.forward(
            s, x, chosen, shares)})  # fmt: skip
        self.experts = kind(h.EXPERTS, h.WIDTH, h.INNER)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(x))
        shares = self.gate(x).softmax(-1).gather(1, ids)
        return x + self.experts(x, shares=shares, chosen=ids)


@case
def experts_called_by_name() -> dict:
    """As before sharding; with other names, or too few inputs: a typed error."""
    models = []
    for _ in range(2):
        models.append(h.build())
        with torch.random.fork_rng():
            torch.manual_seed(5)
            models[-1].blocks = nn.ModuleList(ByName().double() for _ in range(h.LAYERS))
    dense, model = models
    run = shard(model)
    run.set_gradient_divide_factor(1.0)
    h.loss_of(dense, everyone()).backward()
    h.loss_of(model, mine()).backward()
    error = apart(model, run, dense)
    assert error <= EXACT, error
    x, ids = mine().x, mine().ids[0]
    said = [c.raised(ModelError, lambda: model.blocks[0].experts(x, ids=ids, shares=None)),
            c.raised(ModelError, lambda: model.blocks[0].experts(x, ids))]  # fmt: skip
    assert "x, chosen, shares" in said[0] and "2 inputs" in said[1], said
    return {"error": error, "said": said}


@case
def dropout_of_experts() -> dict:
    """Refused where it drops; a model that is evaluated may have it, and drops nothing then."""
    dense, model = dropping(0.5), dropping(0.5)
    said = [untouched(model, lambda: shard(model))]
    assert "draws random numbers" in said[0], said
    model.eval(), dense.eval()
    run = shard(model)
    run.set_gradient_divide_factor(1.0)
    assert not any(one.training for one in model.modules())
    model.train()
    said.append(c.raised(ModelError, lambda: h.loss_of(model, mine())))
    assert "may be evaluated only" in said[1], said
    model.eval()
    with torch.no_grad():
        losses = [h.loss_of(dense, everyone()), h.loss_of(model, mine())]
    dist.all_reduce(losses[1])
    error = c.agreed(abs(losses[1] / losses[0] - 1).item())
    h.loss_of(dense, everyone(1)).backward()
    h.loss_of(model, mine(1)).backward()
    error = max(error, apart(model, run, dense))
    assert error <= EXACT, error
    return {"error": error, "said": [one.splitlines()[0] for one in said]}


@case
def the_mode_of_experts() -> dict:
    """``train`` and ``eval`` reach the experts at every pass, and in the recomputation of a checkpoint."""
    dense, model = dropping(0.0, 3.0), dropping(0.0, 3.0)
    run = shard(model, policy="full-replication")
    run.set_gradient_divide_factor(1.0)

    def loss_of(one: nn.Module, data: h.Batch, again: bool) -> Tensor:
        x = data.x
        for block, ids in zip(one.blocks, data.ids, strict=True):
            x = checkpoint(block, x, ids, use_reentrant=False) if again else block(x, ids)
        return (one.head(x) - data.target).square().sum() / data.total

    errors = []
    for step, training in enumerate((True, False, True)):
        for again in (False, True):
            for one in (dense, model):
                one.train(training)
                one.zero_grad()
            loss_of(dense, everyone(step), False).backward()
            loss_of(model, mine(step), again).backward()
            errors.append(apart(model, run, dense))
    assert max(errors) <= EXACT, errors
    return {"errors": errors}


@case
def what_is_set_after_sharding() -> dict:
    """Hooks of the experts run, of all kinds; constants that would have no effect cannot be set."""
    seen: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen[name] = seen.get(name, 0) + 1

        return hook

    model = h.build()
    experts = model.blocks[0].experts
    experts.register_forward_pre_hook(note("before"))
    experts.register_forward_hook(note("after"))
    experts.register_full_backward_hook(note("backward"))
    experts.register_full_backward_pre_hook(note("before backward"))
    shard(model)
    h.loss_of(model, mine()).backward()
    assert seen == {"before": 1, "after": 1, "backward": 1, "before backward": 1}, seen

    def change() -> None:
        model.blocks[1].experts.act_fn = F.gelu

    said = c.raised(ModelError, change)
    assert "act_fn" in said
    model.blocks[1].experts.note = 1  # one's own is no constant of theirs
    return {"said": said.splitlines()[0], **seen}
