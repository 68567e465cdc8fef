"""Cases about gradients by PyTorch's own tools: clipping, norms, hooks, ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_runs import EXACT, STEPS, error_of, fsdp, shard, train
from torch import Tensor, nn

from poise.train import full_state_dict
from poise.util.errors import ModelError, OptionError


@case
def stock_clip_grad_norm() -> dict:
    """``torch.nn.utils.clip_grad_norm_`` under FSDP2 and beside replicated weights, in all of its forms."""
    worst, world = 0.0, dist.get_world_size()
    for wrap in (True, False):
        whole, model = h.build(), h.build()
        h.loss_of(whole, h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)).backward()
        run = shard(model)
        if wrap:
            fsdp(model, h.MESH(world))
        c.plain_loss("hot-expert-a-rank")(model, 0).backward()
        if not wrap:
            c.average_dense(model, run)
        kept = [(w.grad, w.grad.clone()) for one in (whole, model) for w in one.parameters() if w.grad is not None]
        for p, foreach in (  # of an empty DTensor, which a small weight leaves some ranks, PyTorch has no infinity norm
            (2.0, None),
            (2.0, False),
            (2.0, True),
            (1.0, None),
            (3.0, True),
            *(() if wrap else ((float("inf"), None),)),
        ):
            for grad, before in kept:
                grad.copy_(before)
            expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01, norm_type=p)
            norm = c.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=p, foreach=foreach))
            clipped = h.local_rows(model, {name: w.grad for name, w in whole.named_parameters()})
            worst = max(worst, abs(norm.item() / expected.item() - 1), h.worst(c.of_all(model), clipped))
    assert c.agreed(worst) <= EXACT, worst
    said = c.raised(OptionError, lambda: [dist.all_reduce(weight.grad) for weight in model.parameters()])
    return {"error": worst, "averaged by hand": said}


@case
def norms_and_sums_are_of_all_experts() -> dict:
    """Reductions, their gradients, and what is refused: an axis of which a rank has a part."""
    whole, model = h.build(), h.build()
    shard(model)
    name = next(name for name, _ in model.named_parameters() if name.endswith("down_proj"))
    all_rows, rows = whole.get_parameter(name), model.get_parameter(name)
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "norm": lambda w: w.norm(), "one": lambda w: torch.norm(w, 1), "inf": lambda w: torch.linalg.vector_norm(w, np.inf),
        "three": lambda w: w.norm(p=3), "sum": lambda w: (w * 2).sum(), "square": lambda w: w.square().mean(), "max": lambda w: w.max(),
        "least": lambda w: w.abs().amin(), "any": lambda w: (w > w.detach().max() * 0.99).any(),
        "all": lambda w: (w < 0.3).all(), "rows": lambda w: w.sum(dim=(1, 2)).sum(),
        "deviation": lambda w: w.std(), "variance": lambda w: torch.var(w, unbiased=False), "of rows": lambda w: w.norm(dim=-1).mean(),
        "deviations": lambda w: w.std(dim=(1, 2)).amax(), "matrices": lambda w: torch.linalg.matrix_norm(w).sum(),
        "singular": lambda w: torch.linalg.svdvals(w).max(), "spread of products": lambda w: (w @ w.mT).var(), "plain norm": torch.linalg.norm, "folded": lambda w: w.reshape(len(w), -1).square().sum(-1).sum(),
        "column": lambda w: w[..., 0].sum(), "turned": lambda w: w.mT.norm(), "medians": lambda w: w.median(dim=-1)[0].sum(),
    }  # fmt: skip
    errors = {}
    for label, reduce in reductions.items():
        ours, theirs = reduce(rows), reduce(all_rows)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, msg=label)
        rows.grad = all_rows.grad = None
        if theirs.is_floating_point():
            ours.backward(), theirs.backward()
            errors[label] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, {
                n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in whole.named_parameters()})))  # fmt: skip
    assert rows.numel() == all_rows.numel()
    assert max(errors.values()) <= EXACT, errors
    for part in (
        lambda: rows.sum(dim=0),
        lambda: rows.mean(axis=0),
        lambda: rows.norm(dim=(0, 1)),
        lambda: rows.amax(-3),
    ):
        said = c.raised(OptionError, part)
        assert "axis of experts" in said
    for part in (
        lambda: rows.flatten(), lambda: rows.view(-1), lambda: torch.nn.utils.parameters_to_vector([rows]), lambda: rows.median(),
        lambda: torch.quantile(rows, 0.9), lambda: rows.argmax(), lambda: rows.cumsum(0), lambda: rows.softmax(dim=0),
        lambda: rows.transpose(0, 1), lambda: rows.permute(2, 1, 0), lambda: torch.einsum("eij,eij->", rows, rows),
        lambda: torch.nn.functional.mse_loss(rows, 2 * rows), lambda: torch.dist(rows, 2 * rows), lambda: rows[rows > 0],
        lambda: nn.utils.vector_to_parameters(torch.zeros(rows.numel(), dtype=rows.dtype), [rows]),
    ):  # fmt: skip
        assert f"weight of {h.EXPERTS} experts" in c.raised(OptionError, part)
    torch.testing.assert_close(
        c.whole(rows.norm(dim=(1, 2))), h.local_rows(model, dict(whole.named_parameters()))[name].norm(dim=(1, 2))
    )
    return errors


@case
def rows_by_keyword_and_on_a_rank_without_experts() -> dict:
    """Arguments may be named; what the other ranks refuse, one that owns one expert or none refuses too, and what they
    do it does."""
    found: dict[str, str] = {}
    world, rank = dist.get_world_size(), dist.get_rank()
    for last in (0, 1):  # experts of the last rank
        owners = np.zeros((h.LAYERS, h.EXPERTS), np.int64)
        owners[:, : last * (world > 1)] = world - 1
        model = h.build()
        shard(model, owners=owners)
        rows = next(weight for name, weight in model.named_parameters() if name.endswith("down_proj")).detach()
        for out in (torch.add(input=rows, other=rows), torch.mul(other=2.0, input=rows), torch.sub(rows, other=-rows)):
            assert type(out) is type(rows) and (torch.Tensor.__getitem__(out, slice(None)) == 2 * rows).all()
        assert type(torch.sqrt(input=rows.abs())) is type(rows) and not torch.is_complex(input=rows)
        several, width = len(rows), rows.shape[2]
        for label, reshape in {
            "view(-1)": lambda w: w.view(-1), "reshape(-1)": lambda w: w.reshape(-1), "flatten": lambda w: w.flatten(),
            "ravel": lambda w: w.ravel(), "view(-1, d)": lambda w, d=width: w.view(-1, d),
            "flatten(0, 1)": lambda w: w.flatten(0, 1), "unflatten": lambda w: w.unflatten(0, (1, -1)),
        }.items():  # fmt: skip
            assert f"weight of {h.EXPERTS} experts" in c.raised(OptionError, partial(reshape, rows)), label
        for label, reshape in {
            "flatten(1)": lambda w: w.flatten(1), "view(n, -1)": lambda w, n=several: w.view(n, -1),
            "reshape(n, -1)": lambda w, n=several: w.reshape((n, -1)), "unsqueeze(1)": lambda w: w.unsqueeze(1),
            "squeeze(1)": lambda w: w.unsqueeze(1).squeeze(1), "squeeze": lambda w: w.squeeze(), "bytes": lambda w: w.view(torch.int64),
            "view(-1, ...)": lambda w: w.view(-1, *w.shape[1:]),
        }.items():  # fmt: skip
            out = reshape(rows)
            assert type(out) is type(rows) and out.shape[0] == several, (label, rank)
            found[label] = str(c.agreed(float(out[:1].numel() != bool(several) * rows[:1].numel())))
    assert set(found.values()) == {"0.0"}, found
    return found


@case
def random_numbers_of_experts() -> dict:
    """Ranks with one seed draw as the unsharded model does; what is scaled by the shape of a weight is refused."""
    fills: dict[str, Callable[[Tensor], object]] = {
        "normal": lambda w: nn.init.normal_(w, std=0.02), "method": lambda w: w.data.uniform_(-1, 2),
        "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02), "he": nn.init.kaiming_uniform_, "he, normal": nn.init.kaiming_normal_,
        "noise": lambda w: w.zero_().add_(torch.randn_like(w), alpha=0.1),
        "even noise": lambda w: w.zero_().sub_(torch.rand_like(w)),
        "whole noise": lambda w: w.copy_(torch.randint_like(w, 3, 90)),
    }  # fmt: skip
    worst = 0.0
    for kind in ("gated", "list"):
        for label, fill in fills.items():
            whole, model = h.build(kind), h.build(kind)
            shard(model)
            for one in (whole, model):
                torch.manual_seed(5)
                with torch.no_grad():
                    for name, weight in one.named_parameters():
                        if ".experts." in name and weight.dim() > 1:
                            fill(weight)
            if kind == "gated":
                rows = h.local_rows(model, dict(whole.named_parameters()))
                worst = max(
                    worst,
                    *(float((w - rows[n]).detach().abs().max()) for n, w in model.named_parameters() if w.dim() > 1),
                )
            numbers = full_state_dict(model) or {}  # of the first rank
            weights = [v for n, v in numbers.items() if ".experts." in n and v.dim() > 1]
            each = [row for weight in weights for row in (weight if kind == "gated" else [weight])]
            seen = {tuple(row.flatten().tolist()) for row in each}
            assert len(seen) == len(each), (kind, label)
    assert c.agreed(worst) == 0.0, worst
    model = h.build()
    shard(model)
    weight = next(weight for name, weight in model.named_parameters() if name.endswith("down_proj"))
    for fill in (nn.init.xavier_uniform_, nn.init.orthogonal_, lambda w: nn.init.kaiming_normal_(w, mode="fan_out"),
                 lambda w: nn.init.kaiming_uniform_(w, mode="fan_out"), lambda w: w.data.bernoulli_(torch.rand_like(w))):  # fmt: skip
        assert "experts" in c.raised(OptionError, lambda fill=fill: fill(weight))
    return {"error": worst}


@case
def gradient_hooks_on_experts() -> dict:
    """A mask of all experts, registered before sharding or after: only the kept ones are trained."""
    keep = [0, 5]

    def arm(model: nn.Module) -> None:
        for name, weight in model.named_parameters():
            if ".experts." in name:
                mask = torch.zeros(10, *[1] * (weight.dim() - 1), dtype=weight.dtype)
                mask[keep] = 1.0
                weight.register_hook(lambda grad, mask=mask: grad * mask)

    whole = h.build()
    arm(whole)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        h.loss_of(whole, h.batch("hot-expert-a-rank", step, dist.get_world_size(), 2, None, torch.float64)).backward()
        optimizer.step()
    errors = {}
    for when in ("before", "after"):
        model = h.build()
        if when == "before":
            arm(model)
        run = shard(model)
        if when == "after":
            arm(model)
        train(model, run, torch.optim.SGD(model.parameters(), 0.1), range(STEPS))
        errors[when] = error_of(model, dict(whole.named_parameters()))
    model.zero_grad()
    c.plain_loss("hot-expert-a-rank")(model, 0).backward()
    said = c.raised(ModelError, lambda: c.plain_loss("hot-expert-a-rank")(model, 0).backward())
    listed = h.build("list")
    next(w for name, w in listed.named_parameters() if ".experts.1." in name).register_hook(lambda grad: grad)
    assert "after fully_shard_experts" in c.raised(ModelError, lambda: shard(listed))
    assert max(errors.values()) <= EXACT, errors
    return {**errors, "said": said}


@case
def grad_of_something_else() -> dict:
    """``torch.autograd.grad`` by the tokens leaves ``.grad`` alone, twice over; by experts' weights it is refused."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for workload, again in (("hot-expert-a-rank", False), ("ragged", True)):
        everything = h.batch(workload, 0, world, 2, None, torch.float64)
        everything.x.requires_grad_()
        dense = h.build()
        h.loss_of(dense, everything).backward()
        model = h.build()
        run = shard(model, rematerialise=again)
        data = h.batch(workload, 0, world, 2, rank, torch.float64)
        data.x.requires_grad_()
        counts = h.tokens_of(workload, 0, world)
        wanted = {"x": everything.x.grad[sum(counts[:rank]) :][: counts[rank]]}
        fired: list[int] = []
        for weight in run.parameters():
            weight.register_post_accumulate_grad_hook(lambda _, fired=fired: fired.append(1))
        loss = h.loss_of(model, data)
        for last in (False, True):
            (slope,) = torch.autograd.grad(loss, data.x, retain_graph=not last)
            errors[f"tokens, {workload}, {last}"] = c.agreed(h.worst({"x": slope}, wanted))
            assert all(weight.grad is None for weight in model.parameters()) and not fired
        assert run.schedule.moved_bytes["reduce"] == 0 == sum(run.schedule.ledger.now.values())
        h.loss_of(model, data).mul(world).backward(inputs=[*model.parameters()])
        assert len(fired) == len(run.parameters()), (len(fired), len(run.parameters()))
        c.average_dense(model, run)
        expected = {name: weight.grad for name, weight in dense.named_parameters()}
        errors[f"weights, {workload}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
        weight = model.blocks[0].experts.down_proj
        said = c.raised(ModelError, partial(torch.autograd.grad, h.loss_of(model, data), weight))
    assert max(errors.values()) <= EXACT, errors
    return {**errors, "said": said}
