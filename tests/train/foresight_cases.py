"""Routing known ahead: replayed, as a forecast, in micro-batches dealt anew; what is refused (test_foresight.py).

torchrun --standalone --nproc-per-node 2 tests/train/foresight_cases.py --out results.jsonl [case ...]
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.helpers import few_or
from tests.ranks import everywhere, registry
from tests.ranks import folder as shared_folder
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.matrix import machine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise.routing.trace import RoutingTrace
from poise.runtime.capture import find_routers
from poise.runtime.moe import GatedExperts, MoE
from poise.stepwise.sharding import Balanced, Heterogeneous
from poise.train import Rollout, fully_shard_experts, regrouped
from poise.util.errors import CommunicationError, ModelError, OptionError, PoiseError

EXPERTS, WIDTH, TOP_K, LAYERS, MICRO, REQUESTS, STEPS = 10, 8, 2, 2, 3, 2, 3
EXACT = 1e-11
MINE, case = registry()


class Routed(MoE):
    """The layer of poise.runtime.moe with a routing that is given, written down a second time: the dense reference."""

    recorded_TK: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        probabilities = self.gate(hidden_states).softmax(-1)
        ids = probabilities.argsort(dim=-1, descending=True, stable=True)[:, : self.top_k]
        if self.recorded_TK is not None:
            ids = torch.where(self.recorded_TK < 0, ids, self.recorded_TK)
        weights = probabilities.gather(1, ids)
        return self.experts(hidden_states, ids, weights / weights.sum(1, keepdim=True))


class Model(nn.Module):
    def __init__(self, layer: type[MoE], again: bool) -> None:
        super().__init__()
        self.again = again
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.moes = nn.ModuleList(layer(GatedExperts(EXPERTS, WIDTH, 12), WIDTH, EXPERTS, TOP_K) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3)

    def block(self, number: int, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.mixes[number](x))
        return x + self.moes[number](x)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(LAYERS):
            block = partial(self.block, number)
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return self.head(x)


def build(layer: type[MoE] = MoE, again: bool = False) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Model(layer, again).double()


@dataclass
class Step:
    """One optimizer step: its rollout, and requests of every micro-batch and rank. Data are by recorded token."""

    rollout: Rollout
    lengths: dict[int, int]
    groups: list[list[list[int]]]
    x: Tensor
    target: Tensor

    def rows(self, micro: int, rank: int, *, known: bool = True) -> np.ndarray:
        """Recorded token of every token [T]; ``known=False``: of the record, the last tokens are not."""
        requests = self.groups[micro][rank]
        rows = self.rollout.rows(requests, [self.lengths[r] for r in requests])
        out = np.concatenate([row[: self.lengths[r]] for row, r in zip(rows, requests, strict=True)])
        if not known:
            out[np.cumsum([self.lengths[r] for r in requests]) - 1] = -1
        return out


def step_of(number: int, world: int) -> Step:
    """Requests of all ranks with skewed routing that no router here would choose, hot experts other in every layer."""
    rng = np.random.default_rng([7, number])
    count = MICRO * world * REQUESTS
    lengths = {request: int(rng.integers(2, 6)) for request in range(count)}
    tokens = sum(lengths.values())
    score = rng.random((tokens, LAYERS, EXPERTS))
    request_T = np.repeat(np.arange(count), list(lengths.values()))
    for layer in range(LAYERS):  # requests of one kind share experts
        score[np.arange(tokens), layer, (3 * (request_T % 3) + layer + number) % EXPERTS] += 1.0
    experts = np.argsort(-score, axis=2)[:, :, :TOP_K].astype(np.int16)
    trace = RoutingTrace(experts, EXPERTS, request=request_T.astype(np.int32))
    order = rng.permutation(count).reshape(MICRO, world, REQUESTS).tolist()
    x, target = rng.standard_normal((tokens, WIDTH)), rng.standard_normal((tokens, 3))
    return Step(Rollout(trace), lengths, order, torch.tensor(x), torch.tensor(target))


def loss_of(model: nn.Module, step: Step, rows: np.ndarray) -> Tensor:
    return (model(step.x[rows]) - step.target[rows]).square().sum() / len(step.x)


def dense(replay: bool, optimizer: str, known: bool) -> h.RunRecord:
    """All micro-batches and ranks at once, by the reference's own layer."""
    world, model = dist.get_world_size(), build(Routed)
    opt, record = h.make_optimizer(optimizer, model), h.RunRecord([], [], [], {})
    for number in range(STEPS):
        step = step_of(number, world)
        rows = np.concatenate([step.rows(m, d) for m in range(MICRO) for d in range(world)])
        told = np.concatenate([step.rows(m, d, known=known) for m in range(MICRO) for d in range(world)])
        ids_TLK = torch.from_numpy(step.rollout.trace.experts[told].astype(np.int64))
        ids_TLK[torch.from_numpy(told < 0)] = -1
        for layer, moe in enumerate(model.moes):
            moe.recorded_TK = ids_TLK[:, layer] if replay else None
        opt.zero_grad()
        loss = loss_of(model, step, rows)
        loss.backward()
        record.losses.append(loss.item())
        record.grads.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        opt.step()
    record.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return record


def shard(model: nn.Module, **options: Any) -> Any:
    world = dist.get_world_size()
    options = {"policy": "recorded", "cluster": machine(world), "mesh": h.MESH(world), **options}
    run = fully_shard_experts(model, **options)
    run.set_gradient_divide_factor(1.0)
    return run


def foreseen(
    replay: bool, *, optimizer: str = "sgd", known: bool = True, again: bool = False, regroup: bool | str = False,
    watch: Callable[[Any, int], None] | None = None, **options: Any,
) -> tuple[float, Any]:  # fmt: skip
    """Train with the routing known; the largest relative error of losses, gradients and weights; and the run."""
    rank, world, model = dist.get_rank(), dist.get_world_size(), build(again=again)
    run = shard(model, **options)
    record, opt, error = dense(replay, optimizer, known), h.make_optimizer(optimizer, model), 0.0
    anew: list[bool] = []
    for number in range(STEPS):
        step = step_of(number, world)
        if regroup:
            ranks = regroup == "ranks"
            new = run.deal(step.rollout, step.groups) if ranks else regrouped(step.rollout, step.groups, run.owners)
            assert everywhere(new) == [new] * world
            anew.append(new != step.groups)
            step = replace(step, groups=new)
        opt.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        told = [step.rows(m, rank, known=known) for m in range(MICRO)]
        for m in run.foresee(step.rollout, told, replay=replay):
            loss = loss_of(model, step, step.rows(m, rank))
            loss.backward()
            total += loss.detach()
            if watch is not None:
                watch(run, m)
        dist.all_reduce(total)
        h.reduce_dense(model, run)
        grads = {name: h.whole(weight.grad) for name, weight in model.named_parameters()}
        error = max(error, abs(total.item() - record.losses[number]) / record.losses[number],
                    h.worst(grads, h.local_rows(model, record.grads[number])))  # fmt: skip
        opt.step()
    # by modelled time a step may be best as it was given: not every one
    assert any(anew) if regroup == "ranks" else all(anew), f"steps dealt anew: {anew}"
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return c.agreed(max(error, h.worst(weights, h.local_rows(model, record.weights)))), run


@case
def replayed() -> dict:
    """The record's experts, the router's own weights for them; every plan was made ahead, and is the one that ran."""
    sides: list[bool] = []

    def watch(run: Any, micro: int) -> None:
        now = run.schedule.planner.micro_batch
        assert now.number == micro and now.sure
        for one in run.metrics:
            told = run.schedule.planner.drivers[one.layer].policy
            assert (one.view.foreseen.load_SE == now.load_LSE[one.layer]).all()
            early = told.before_gate(one.view)
            plan = told.after_gate(one.view, early, one.view.foreseen.load_SE)
            assert plan.passive or not one.replicas
            assert (plan.quota_ED.sum(axis=0) == one.tokens_D).all()
            sides.append(bool(one.replicas))

    error, run = foreseen(True, watch=watch)
    assert error <= EXACT and any(sides) and run.schedule.moved_bytes["gather"] > 0, (error, sides)
    return {"error": error, "with replicas": sum(sides), "of": len(sides)}


@case
def replayed_but_for_unknown_tokens() -> dict:
    """Owners known ahead too; the last tokens of requests, which no engine records, go where the router sends them."""
    owners: list[Any] = []
    error, run = foreseen(
        True, optimizer="adamw", known=False, sharding=Heterogeneous(interval=1, overlap=1), rematerialise=True,
        watch=lambda run, micro: owners.append(run.owners.tolist()),
    )  # fmt: skip
    assert error <= EXACT, error
    kinds = [owners[i * MICRO] for i in range(STEPS)]
    assert all(owners[i * MICRO + m] == kinds[i] for i in range(STEPS) for m in range(MICRO)), "moved amid a step"
    assert len({str(one) for one in kinds}) > 1 and run.schedule.moved_bytes["reshard"] > 0
    return {"error": error}


@case
def a_forecast_that_lies() -> dict:
    """Where the record is of other experts than the router's, results are those of the router."""
    errors, gathered = {}, {}
    for policy in (
        "recorded",
        *few_or(("fore-moe", "poise", "hecate", "moon-ep", "flex-moe:trigger=1.0"), ("fore-moe",)),
    ):
        errors[policy], run = foreseen(False, policy=policy, optimizer="adamw")
        gathered[policy] = run.schedule.moved_bytes["gather"]
        assert not run.metrics[0].view.foreseen.replayed
    assert max(errors.values()) <= EXACT and gathered["recorded"] > 0, (errors, gathered)
    return errors


@case
def dealt_anew() -> dict:
    """Requests that run in other micro-batches of their step, replayed and not, by other policies."""
    error, _ = foreseen(True, regroup=True, policy="fore-moe")
    other, _ = foreseen(False, regroup=True, step_slots=1)
    assert max(error, other) <= EXACT, (error, other)
    return {"error": max(error, other)}


@case
def dealt_to_ranks() -> dict:
    """Requests that run on other ranks, owners planned with them or not: the same step, as many requests in each cell."""
    owners: list[Any] = []
    error, run = foreseen(True, regroup="ranks", sharding=Balanced(interval=1), optimizer="adamw",
                          watch=lambda run, micro: owners.append(run.owners.tolist()))  # fmt: skip
    forecast, still = foreseen(False, regroup="ranks", policy="poise", step_slots=1)
    assert max(error, forecast) <= EXACT, (error, forecast)
    assert still.schedule.moved_bytes["reshard"] == 0 and len({str(one) for one in everywhere(owners)}) == 1
    world, step = dist.get_world_size(), step_of(0, dist.get_world_size())
    dealt = run.deal(step.rollout, step.groups)
    assert [[len(cell) for cell in micro] for micro in dealt] == [[REQUESTS] * world] * MICRO
    assert sorted(r for micro in dealt for cell in micro for r in cell) == sorted(step.lengths)
    said = [c.raised(OptionError, lambda: run.deal(step.rollout, [one[:1] for one in step.groups]))]
    assert f"groups are of 1 ranks, the run of {world}" in said[0], said
    last = dist.get_rank() == world - 1
    record = step_of(1, world).rollout if last else step.rollout
    said.append(c.raised(CommunicationError, lambda: run.deal(record, step.groups)))
    assert "their recorded experts: " in said[1], said
    alike = other(step, experts=np.zeros_like(step.rollout.trace.experts) + np.arange(TOP_K, dtype=np.int16))
    one, two = next(
        pair for pair in itertools.combinations(step.lengths, 2) if len({step.lengths[r] for r in pair}) == 1
    )
    swap = {one: two, two: one} if last else {}
    named = [[[swap.get(r, r) for r in cell] for cell in micro] for micro in step.groups]
    said.append(c.raised(CommunicationError, lambda: run.deal(alike, named)))
    assert "requests by micro-batch and rank: " in said[2], said
    said.append(c.raised(OptionError, lambda: run.deal(step.rollout, None if last else step.groups)))
    assert "given to deal cannot be read: TypeError" in said[3], said
    return {"error": max(error, forecast), "said": said, "moved": run.schedule.moved_bytes["reshard"]}


@case
def computed_again() -> dict:
    """Under activation checkpointing the record is replayed a second time; outside of its turn that is refused."""
    error, _ = foreseen(True, again=True)
    assert error <= EXACT, error
    rank, world, model = dist.get_rank(), dist.get_world_size(), build(again=True)
    run, step = shard(model), step_of(0, world)
    losses = [loss_of(model, step, step.rows(m, rank)) for m in
              run.foresee(step.rollout, [step.rows(m, rank) for m in range(MICRO)])]  # fmt: skip
    said = c.raised(ModelError, losses[0].backward)
    assert "micro-batch 0 is computed again while none" in said, said
    rows = [step.rows(m, rank) for m in range(MICRO)]
    outside = loss_of(model, step, rows[0])
    for _ in run.foresee(step.rollout, rows[:1]):
        late = c.raised(ModelError, outside.backward)
    assert "a pass outside of the loop is computed again while micro-batch 0" in late, late
    for _ in run.foresee(step.rollout, rows[:1], replay=False):
        forecast = loss_of(model, step, rows[0])
    for _ in run.foresee(step.rollout, rows):
        late = c.raised(ModelError, forecast.backward)
        break
    assert "micro-batch 0 is computed again while micro-batch 0" in late, late
    for _ in run.foresee(step.rollout, rows[:1], replay=False):
        outside = loss_of(model, step, rows[0])
    outside.backward()  # no record is replayed, then or now
    return {"error": error, "said": said}


def turns(model: nn.Module, run: Any, step: Step, given: Rollout | None = None, **options: Any) -> None:
    """All micro-batches of a step, forward."""
    rank = dist.get_rank()
    for m in run.foresee(given or step.rollout, [step.rows(m, rank) for m in range(MICRO)], **options):
        loss_of(model, step, step.rows(m, rank))


def other(step: Step, **changes: Any) -> Rollout:
    """The same tokens with another record."""
    trace = step.rollout.trace
    return Rollout(
        RoutingTrace(changes.get("experts", trace.experts), changes.get("num_experts", EXPERTS), trace.request)
    )


@case
def what_does_not_fit() -> dict:
    """A record that disagrees on one rank is one error on all, with both numbers, before anything runs; then all is well."""
    rank, world, model = dist.get_rank(), dist.get_world_size(), build()
    run, step, said = shard(model), step_of(0, world), {}
    experts = step.rollout.trace.experts
    idle = experts.copy()
    idle[:, 1, 1] = -1
    wrong: dict[str, tuple[type[PoiseError], Rollout, Sequence[str], bool]] = {
        "layers": (ModelError, other(step, experts=experts[:, :1]), ("1 MoE layers", "the model 2"), True),
        "experts": (ModelError, other(step, num_experts=11), ("11 experts a layer", "the model 10"), False),
        "picks": (OptionError, other(step, experts=idle), ("recorded picks", "compute nothing"), True),
    }
    last = world - 1
    for name, (kind, record, words, replay) in wrong.items():
        said[name] = c.raised(
            kind, lambda r=record, p=replay: turns(model, run, step, r if rank == last else None, replay=p)
        )
        assert all(word in said[name] for word in words), said
    top_1 = other(step, experts=experts[:, :, :1])
    said["top-k"] = c.raised(ModelError, lambda: turns(model, run, step, top_1 if rank == last else None, replay=False))
    assert "1 experts a token" in said["top-k"] and "names 2" in said["top-k"], said

    def one_more() -> None:
        for _ in run.foresee(step.rollout, [step.rows(m, rank) for m in range(MICRO)]):
            model(torch.zeros(len(step.rows(0, rank)) + (rank == last), WIDTH, dtype=torch.float64))

    said["tokens"] = c.raised(ModelError, one_more)
    count = len(step.rows(0, last))
    assert f"{count} tokens on this rank" in said["tokens"] and f"gets\n{count + 1}" in said["tokens"].replace(
        " ", "\n"
    ), said
    beyond = [np.array([0, len(step.x)])] * MICRO
    said["rows"] = c.raised(
        OptionError, lambda: run.foresee(step.rollout, beyond if rank == last else [beyond[0] * 0] * MICRO)
    )
    assert f"row {len(step.x)} of a rollout of {len(step.x)} tokens" in said["rows"], said
    unread = {"ragged": [[0, [1, 2]]] * MICRO, "a generator": (one for one in beyond), "none": None}
    for name, bad in unread.items():
        given = bad if rank == last else [step.rows(m, rank) for m in range(MICRO)]
        said[name] = c.raised(OptionError, lambda given=given: run.foresee(step.rollout, given))
        assert "cannot be read: " in said[name], said
    said["numbers"] = c.raised(
        CommunicationError, lambda: run.foresee(step.rollout, [np.zeros(1, int)] * (1 + (rank == last)))
    )
    planner = run.schedule.planner
    run.foresee(step.rollout, [step.rows(m, rank) for m in range(MICRO)])
    assert planner.micro_batch is None and not [key for key in planner._ahead._found if isinstance(key, tuple)]
    turns(model, run, step)
    assert planner.micro_batch is None and not [key for key in planner._ahead._found if isinstance(key, tuple)]
    forced = shard(build(), force_balance=True)
    said["forced"] = c.raised(OptionError, lambda: turns(model, forced, step))
    return said


@case
def a_router_that_cannot_be_told() -> dict:
    """A choice that is made without ``torch.topk`` is not replayed, and that is said; as a forecast the record is fine."""
    world, model = dist.get_world_size(), build(Routed)
    run, step = shard(model), step_of(0, world)
    said = c.raised(ModelError, lambda: turns(model, run, step))
    assert "recorded tokens to other experts" in said and "torch.topk" in said, said
    turns(model, run, step, replay=False)
    for _ in run.foresee(step.rollout, [step.rows(m, dist.get_rank()) for m in range(MICRO)], replay=False):
        break  # what follows is not of the record
    model(torch.zeros(3, WIDTH, dtype=torch.float64)).sum().backward()
    assert run.metrics[0].view.foreseen is None
    return {"said": said}


def weights_of(router: nn.Module, hidden: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and weights of given experts, as each family of transformers has them: written down a second time."""
    kind, x = type(router).__name__, hidden.reshape(-1, hidden.shape[-1])
    if kind.startswith("GptOss"):
        logits = x @ router.weight.T + router.bias
        return logits, logits.gather(1, ids_TK).softmax(1)
    if kind.startswith("DeepseekV3"):
        logits = x.float() @ router.weight.float().T
        chosen = logits.sigmoid().gather(1, ids_TK)
        chosen = chosen / (chosen.sum(1, keepdim=True) + 1e-20) if router.norm_topk_prob else chosen
        return logits, chosen * router.routed_scaling_factor
    logits = x @ router.weight.T
    chosen = logits.float().softmax(1).gather(1, ids_TK)
    normed = getattr(router, "norm_topk_prob", True)
    return logits, chosen / chosen.sum(1, keepdim=True) if normed else chosen.to(logits.dtype)


@case
def routers_of_hugging_face() -> dict:
    """Softmax before and after the choice, sigmoid with groups: the recorded experts, with the router's own weights."""
    rank, world, errors = dist.get_rank(), dist.get_world_size(), {}
    for family in few_or(("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"), ("gpt_oss", "deepseek_v3")):
        dense, model = c.hf_model(family), c.hf_model(family)
        batch, mine = c.hf_tokens(0, None, world), c.hf_tokens(0, rank, world)
        score = np.random.default_rng(1).random((batch.numel(), 2, c.HF_EXPERTS))
        picks = np.argsort(score, axis=2)[:, :, :2]
        for layer, router in enumerate(find_routers(dense).values()):
            ids_TK = torch.from_numpy(picks[:, layer].copy())
            router.forward = lambda x, router=router, ids_TK=ids_TK: (*weights_of(router, x, ids_TK), ids_TK)
        c.hf_loss(dense, batch).backward()
        run = shard(model, cluster=machine(world))
        first = rank * mine.numel()
        rollout = Rollout(RoutingTrace(picks.astype(np.int16), c.HF_EXPERTS))
        for _ in run.foresee(rollout, [np.arange(first, first + mine.numel()).reshape(mine.shape)]):
            (c.hf_loss(model, mine) / world).backward()
        h.reduce_dense(model, run)
        wanted = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in dense.named_parameters()}
        errors[family] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, wanted)))
    assert max(errors.values()) <= 1e-6, errors  # their routers compute in float32
    return errors


@case
def as_the_guide_says() -> dict:
    """The example of docs/training.md, as it stands there, is a step of the dense run."""
    rank, world, model = dist.get_rank(), dist.get_world_size(), build()
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    text = next(part for part in guide.split("```python")[1:] if "run.foresee" in part).partition("```")[0]
    step = step_of(0, world)
    record = dense(True, "sgd", True)
    with shared_folder() as folder:
        if rank == 0:
            step.rollout.trace.save(folder / "rollout.npz")
        dist.barrier()
        text = text.replace('"rollout.npz"', repr(str(folder / "rollout.npz"))).replace("optimizer.zero_grad()", "")
        sharded = shard(model)
        optimizer = h.make_optimizer("sgd", model)
        optimizer.register_step_pre_hook(lambda *_: h.reduce_dense(model, sharded))

        def batch_of(requests: list[int]) -> np.ndarray:
            width = max(step.lengths[r] for r in requests)
            return step.rollout.rows(requests, [step.lengths[r] for r in requests], width)

        def loss_of(model: nn.Module, rows: np.ndarray) -> Tensor:
            out = model(step.x[rows.reshape(-1)])[rows.reshape(-1) >= 0]
            return (out - step.target[rows[rows >= 0]]).square().sum() / len(step.x)

        names: dict[str, Any] = {
            "fully_shard_experts": lambda *_, **options: sharded, "model": model, "mesh": None, "groups": step.groups,
            "lengths": step.lengths, "rank": rank, "loss_of": loss_of, "batch_of": batch_of, "optimizer": optimizer,
        }  # fmt: skip
        exec(text, names)
    assert names["groups"] != step.groups and sharded.metrics[0].view.foreseen is not None
    error = c.agreed(
        h.worst({name: w.grad for name, w in model.named_parameters()}, h.local_rows(model, record.grads[0]))
    )
    assert error <= EXACT, error
    return {"error": error}


if __name__ == "__main__":
    run_cases(MINE, read_options())
