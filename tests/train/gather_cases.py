"""Gathers of fewer bits (``gather_dtype``) on ranks: bytes, checkpoints, plans that do not matter (test_packing.py).

torchrun --standalone --nproc-per-node 4 tests/train/gather_cases.py --out results.jsonl [case ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.helpers import few_or
from tests.ranks import folder as shared_folder
from tests.ranks import registry
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_runs import mine, shard, some_owners
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from poise.train import full_state_dict, load_checkpoint, save_checkpoint
from poise.util.errors import OptionError

EXACT = 1e-11
MINE, case = registry()
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
PACKED = {
    None: 3 * h.WIDTH * h.INNER * 8,
    BF16: 3 * h.WIDTH * h.INNER * 2,
    E4M3: 3 * h.WIDTH * h.INNER + 2 * h.INNER + h.WIDTH,  # an exponent for each row of gate, up and down
}


def trained(steps: int = 2, **options: Any) -> tuple[nn.Module, Any, list[float], torch.optim.Optimizer]:
    """Two steps on skewed tokens; losses over all ranks."""
    model = h.build()
    run = shard(model, **options)
    run.set_gradient_divide_factor(1.0)
    optimizer, losses = h.make_optimizer("adamw", model), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = h.loss_of(model, mine(step))
        loss.backward()
        h.reduce_dense(model, run)
        optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
    return model, run, losses, optimizer


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole model's, on rank 0; elsewhere none."""
    full = full_state_dict(model)
    return {name: weight.detach().clone() for name, weight in full.items()} if dist.get_rank() == 0 else {}


@case
def plans_do_not_matter() -> dict:
    """Nothing moved, everything everywhere, replicas freed and gathered again, other owners, other ways of travel."""
    out: dict[str, float] = {}
    for number, gather in enumerate((BF16, E4M3)):
        _, _, plain, _ = trained(policy="expert-parallelism")
        alone, run, first, _ = trained(policy="expert-parallelism", gather_dtype=gather)
        assert run.schedule.moved_bytes["gather"] == 0 and abs(first[0] - plain[0]) > 1e-9, "owners did not round"
        wanted = weights_of(alone)
        for form, again, owners, policy in few_or(
            [(f, a, o, p) for f in ("direct", "node", "tree") for a in (False, True) for o in (0, 3)
             for p in ("full-replication", "hecate", "poise", "moon-ep")],
            [("tree", False, 3, "full-replication"), ("node", True, 0, "full-replication"), ("direct", True, 3, "poise")][number:][:2],
        ):  # fmt: skip
            placed = some_owners(owners) if owners else None
            model, run, losses, _ = trained(
                policy=policy, gather_dtype=gather, form=form, rematerialise=again, owners=placed,
                prefetch=1 + int(again),
            )  # fmt: skip
            assert run.schedule.moved_bytes["gather"] > 0 and not any(run.schedule.ledger.now.values())
            got = weights_of(model)
            error = max([abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True)]
                        + [h.worst(got, wanted) if wanted else 0.0])  # fmt: skip
            out[f"{gather} {form} {again} {policy}"] = c.agreed(error)
    assert max(out.values()) <= EXACT, out
    return {"worst": max(out.values())}


@case
def bytes_on_the_wire() -> dict:
    """What is counted is what travels: of a type's size, with a byte a row of fp8; buffers come and go."""
    moved, peaks = {}, {}
    for gather in (None, BF16, E4M3):
        _, run, _, _ = trained(policy="full-replication", gather_dtype=gather, form="direct")
        there, replicas = run.schedule.deployment, h.LAYERS * h.EXPERTS * (dist.get_world_size() - 1)
        assert there.expert_bytes == PACKED[gather] and there.held_bytes == PACKED[None]
        moved[gather] = run.schedule.moved_bytes["gather"]
        assert moved[gather] == 2 * replicas * PACKED[gather], (moved, PACKED)
        assert run.metrics[0].gathered_bytes == replicas // h.LAYERS * PACKED[gather]
        price = run.schedule.planner.price(1000.0)
        assert price.gather_ratio == PACKED[gather] / PACKED[None]
        assert abs(price.gradient_ratio - PACKED[None] / PACKED[gather]) < 1e-12
        peaks[gather] = run.memory()
    owned = max(int((one == dist.get_rank()).sum()) for one in run.owners)
    for gather in (BF16, E4M3):
        found = peaks[gather]["peak: copies of owned experts"]
        assert found >= owned * PACKED[None], peaks
    wire: dict[Any, int] = {}
    counted = type(run.schedule.ledger).add

    def add(ledger: Any, kind: str, nbytes: int) -> None:
        counted(ledger, kind, nbytes)
        if kind == "weights on the wire":
            wire[gather] = max(wire.get(gather, 0), ledger.now[kind])

    type(run.schedule.ledger).add = add
    for gather in (BF16, E4M3):
        trained(policy="full-replication", gather_dtype=gather, form="direct", steps=1)
    type(run.schedule.ledger).add = counted
    layer = run.owners[0]
    here = int((layer == dist.get_rank()).sum())
    for gather in (BF16, E4M3):  # of a layer: what comes, and what is sent; at most of two layers at a time
        assert h.EXPERTS * PACKED[gather] <= wire[gather] <= 2 * (h.EXPERTS + here) * PACKED[gather], (wire, gather)
    return {str(gather): value for gather, value in moved.items()}


@case
def checkpoints_hold_masters() -> dict:
    """What is saved is what owners keep, to the last bit; it goes on under another type, and without any."""
    model, _, _, optimizer = trained(policy="poise", gather_dtype=E4M3)
    masters, losses = weights_of(model), {}
    with shared_folder() as place:
        save_checkpoint(place, model, optimizer, step=2)
        for gather in (E4M3, None):
            other = h.build()
            run = shard(other, policy="full-replication", gather_dtype=gather, owners=some_owners(5))
            run.set_gradient_divide_factor(1.0)
            assert load_checkpoint(place, other, h.make_optimizer("adamw", other)) == 2
            got = weights_of(other)
            assert all(torch.equal(got[name], weight) for name, weight in masters.items())
            losses[gather] = c.agreed(h.loss_of(other, mine(2)).item())
    coarse = [
        name for name, w in masters.items() if ".experts." in name and torch.equal(w, h.as_gathered(w, "float8_e4m3fn"))
    ]
    assert not coarse, "masters were rounded"
    assert losses[E4M3] != losses[None]
    return {"losses": list(losses.values())}


@case
def mixed_precision_and_refusals() -> dict:
    """float32 masters, bfloat16 copies, fp8 on the wire: as far from float64 as fp8 weights are; and what cannot be."""
    mixed = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    losses = {}
    for policy in ("expert-parallelism", "full-replication"):
        model = h.build(dtype=torch.float32)
        shard(model, policy=policy, mp_policy=mixed, gather_dtype=E4M3)
        data = mine(0)
        out = model.blocks[0].experts(data.x.to(BF16), data.ids[0], torch.ones(data.ids[0].shape, dtype=BF16))
        losses[policy] = out.double().square().sum().item()
    assert c.agreed(abs(losses["expert-parallelism"] - losses["full-replication"])) == 0, losses
    same = shard(h.build(dtype=torch.float32), mp_policy=mixed, gather_dtype=BF16)
    assert same.schedule.deployment.packing is None
    said = []
    for gather, mp in ((torch.float16, None), ("fp8", None), (BF16, MixedPrecisionPolicy(param_dtype=torch.float16))):
        wrong = h.build()
        said.append(c.raised(OptionError, lambda g=gather, m=mp, w=wrong: shard(w, gather_dtype=g, mp_policy=m)))
        assert not hasattr(wrong.blocks[0].experts, "schedule")
    assert "unknown gather_dtype torch.float16" in said[0] and "unknown gather_dtype 'fp8'" in said[1], said
    assert "torch.float16 (2 bytes) and would be gathered in torch.bfloat16 (2 bytes)" in said[2], said
    return {"said": said}


if __name__ == "__main__":
    run_cases(MINE, read_options())
