"""Cases about what people do around a step: generation, preference pairs, adapters, auxiliary losses, repeated runs."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case
from tests.train.support_routing import alone, said_by_all
from tests.train.support_runs import EXACT, mine, shard
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from poise.train import full_state_dict
from poise.util.errors import ModelError

MOVING = ("poise", "hecate", "expert-parallelism")


def hf_step(model: nn.Module, run: Any, optimizer: Any, step: int, loss_of: Callable[..., Tensor] = c.hf_loss) -> None:
    """One step on this rank's tokens; dense weights by hand, as data parallelism does."""
    optimizer.zero_grad()
    loss_of(model, c.hf_tokens(step, dist.get_rank(), dist.get_world_size())).backward()
    c.average_dense(model, run)
    optimizer.step()


def distance(model: nn.Module, dense: nn.Module) -> float:
    """Largest relative error of any weight."""
    full: list[Any] = [full_state_dict(model)]
    dist.broadcast_object_list(full)
    return c.agreed(h.worst(full[0], dict(dense.named_parameters())))


# ---- generation ----------------------------------------------------------------------------------------------------


def prompts(model: nn.Module, synced: bool) -> Tensor:
    """Every rank asks for another number of tokens."""
    rank = dist.get_rank()
    more = {"synced_gpus": True} if synced else {}
    with torch.no_grad():
        return model.generate(c.hf_tokens(7, rank, dist.get_world_size()), max_new_tokens=3 + 2 * rank, do_sample=False,
                              eos_token_id=None, pad_token_id=0, **more)  # fmt: skip


@case
def text_generated_between_steps() -> dict:
    """Ranks stop at other lengths: with ``synced_gpus`` as dense, and without it an error on all ranks, no wrong step."""
    dense, world, errors = c.hf_model("olmoe"), dist.get_world_size(), {}
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1)
    text: Any = None
    for step in range(2):
        theirs.zero_grad()
        c.hf_loss(dense, c.hf_tokens(step, None, world)).backward()
        theirs.step()
        if step == 0:
            text = prompts(dense.eval(), synced=False)
            dense.train()

    def steps(model: nn.Module, run: Any, synced: bool) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        hf_step(model, run, optimizer, 0)
        got = prompts(model.eval(), synced)
        model.train()
        hf_step(model, run, optimizer, 1)
        return got

    for policy in few_or(MOVING, MOVING[:1]):
        model = c.hf_model("olmoe")
        got = steps(model, shard(model, policy=policy), True)
        assert c.agreed(float(not torch.equal(got, text))) == 0
        errors[policy] = distance(model, dense)
    assert max(errors.values()) <= EXACT, errors
    model = c.hf_model("olmoe")
    run = alone(model)
    said = said_by_all(lambda: steps(model, run, False))
    return {**errors, "said": said}


# ---- several models, several losses ---------------------------------------------------------------------------------


def preference(model: nn.Module, reference: nn.Module, chosen: h.Batch, rejected: h.Batch) -> Tensor:
    """Direct preference: both answers' graphs are open at once, and the policy's own pass without one comes between."""

    def score(one: nn.Module, data: h.Batch) -> Tensor:
        return -(one(data.x, data.ids) - data.target).square().mean(-1)

    with torch.no_grad():
        before = [score(reference, data) for data in (chosen, rejected)]
    now = [score(model, data) for data in (chosen, rejected)]
    with torch.no_grad():
        score(model, chosen)
    gain = (now[0] - before[0]) - (now[1] - before[1])
    return -F.logsigmoid(0.3 * gain).sum() / chosen.total


@case
def a_model_and_its_frozen_reference() -> dict:
    """Both sharded over the same ranks, by policies of their own; an evaluation in inference mode between steps."""
    errors, world = {}, dist.get_world_size()

    def reference_of() -> nn.Module:
        model = h.build()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.7)
        return model.requires_grad_(False)

    def batches(step: int, rank: int | None) -> tuple[h.Batch, h.Batch]:
        pair = [
            h.batch("hot-expert-a-rank", number, world, 2, rank, torch.float64) for number in (2 * step, 2 * step + 1)
        ]
        return pair[0], pair[1]

    dense, reference = h.build(), reference_of()
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.02)
    for step in range(few_or(4, 3)):
        theirs.zero_grad()
        preference(dense, reference, *batches(step, None)).backward()
        theirs.step()
    for policy, again in (("poise", True), ("hecate", False), ("expert-parallelism", False))[: few_or(3, 2)]:
        model, frozen = h.build(), reference_of()
        run = shard(model, policy=policy, rematerialise=again)
        run.set_gradient_divide_factor(1.0)
        shard(frozen, policy="full-replication")
        ours = torch.optim.AdamW(model.parameters(), lr=0.02)
        for step in range(few_or(4, 3)):
            ours.zero_grad()
            preference(model, frozen, *batches(step, dist.get_rank())).backward()
            h.reduce_dense(model, run)
            ours.step()
            with torch.inference_mode():
                model.eval()(mine(50).x, mine(50).ids)
            model.train()
        errors[policy] = distance(model, dense)
    assert max(errors.values()) <= EXACT, errors
    return errors


@cache
def with_router_loss(accumulate: int) -> nn.Module:
    """Dense: the mean over ranks and micro-batches of each one's own loss, with its own auxiliary term."""
    world, model = dist.get_world_size(), router_loss_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        for number in range(accumulate):
            for rank in range(world):
                ids = c.hf_tokens(accumulate * step + number, rank, world)
                (model(input_ids=ids, labels=ids).loss / (accumulate * world)).backward()
        optimizer.step()
    return model


def router_loss_model() -> nn.Module:
    model = c.hf_model("olmoe")
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    return model


@case
def auxiliary_losses_accumulated() -> dict:
    """Routers' gradients under accumulation and checkpointing, with the balancing loss of each rank's own tokens."""
    errors, world, rank = {}, dist.get_world_size(), dist.get_rank()
    for policy in few_or(MOVING, MOVING[:1]):
        model = router_loss_model()
        model.gradient_checkpointing_enable()
        run = shard(model, policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            for number in range(2):
                run.set_requires_gradient_sync(number == 1)
                ids = c.hf_tokens(2 * step + number, rank, world)
                (model(input_ids=ids, labels=ids).loss / 2).backward()
            c.average_dense(model, run)
            optimizer.step()
        errors[policy] = distance(model, with_router_loss(2))
    assert max(errors.values()) <= EXACT, errors
    without = c.hf_model("olmoe")
    assert distance_of(without, with_router_loss(2)) > 1e-3
    return errors


def distance_of(one: nn.Module, other: nn.Module) -> float:
    return h.worst(dict(one.named_parameters()), dict(other.named_parameters()))


@case
def a_rank_whose_sequences_count_nothing() -> dict:
    """In turn one rank has all that counts; amid one step all run out of memory, and try again."""
    rows, errors = c.hf_tokens(3, None, dist.get_world_size())[:3], {}

    def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, c.VOCABULARY), ids[:, 1:].reshape(-1), reduction="sum") / 15

    dense = c.hf_model("olmoe")
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1)
    for _ in range(3):
        theirs.zero_grad()
        loss_of(dense, rows).backward()
        theirs.step()

    def out_of_memory(*_: Any) -> None:
        raise MemoryError("pretended")

    for policy in few_or(MOVING, MOVING[:1]):
        model = c.hf_model("olmoe")
        run = shard(model, policy=policy)
        run.set_gradient_divide_factor(1.0)
        ours = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            whose = dist.get_rank() == step % dist.get_world_size()
            ids, share = (rows, 1.0) if whose else (rows[:1], 0.0)
            ours.zero_grad()
            if step == 1:
                hook = model.model.layers[1].self_attn.register_forward_pre_hook(out_of_memory)
                c.raised(MemoryError, lambda model=model, ids=ids: loss_of(model, ids))
                hook.remove()
            (share * loss_of(model, ids)).backward()
            h.reduce_dense(model, run)
            ours.step()
        errors[policy] = distance(model, dense)
    assert max(errors.values()) <= EXACT, errors
    return errors


# ---- the same run again; other numbers -------------------------------------------------------------------------------


@case
def the_same_run_again_bit_for_bit() -> dict:
    """What a rank waits, and so every time that is measured, changes no plan and no order of sums."""
    for policy in few_or(MOVING, MOVING[:1]):
        runs: list[list[Tensor]] = []
        for turn in range(2):
            clock = random.Random(dist.get_rank())
            model = h.build(dtype=torch.float32, layers=3)
            run = shard(model, policy=policy)
            optimizer, kept = torch.optim.AdamW(model.parameters(), lr=0.01), []
            for step in range(few_or(12, 6)):
                if turn:
                    time.sleep(0.02 * clock.random())
                optimizer.zero_grad()
                loss = h.loss_of(model, mine(step % 4, layers=3, dtype=torch.float32))
                loss.backward()
                h.reduce_dense(model, run)
                optimizer.step()
                kept.append(loss.detach())
            runs.append([*kept, *(c.whole(weight) for weight in model.parameters())])
        differ = [number for number, pair in enumerate(zip(*runs, strict=True)) if not torch.equal(*pair)]
        assert c.agreed(float(bool(differ))) == 0, (policy, differ)
    return {}


@case
def another_type_of_numbers_and_back() -> dict:
    """``model.to(bfloat16)`` and back, and weights that are changed by hand: what was gathered before is not used."""
    errors = {}
    for policy in ("full-replication", "poise"):
        dense, model = h.build(dtype=torch.float32), h.build(dtype=torch.float32)
        shard(model, policy=policy, rematerialise=False)
        data = mine(dtype=torch.float32)
        low = h.Batch(data.x.bfloat16(), data.target, data.ids, data.total)

        def gap(data: h.Batch, model: nn.Module = model, dense: nn.Module = dense) -> float:
            with torch.no_grad():
                return c.agreed(h.worst({"": model(data.x, data.ids)}, {"": dense(data.x, data.ids)}))

        errors["before"] = gap(data)
        for one in (model, dense):
            one.to(torch.bfloat16)
        rounded = gap(low)
        for one in (model, dense):
            one.to(torch.float32)
        errors["back"] = gap(data)
        for one in (model, dense):
            with torch.no_grad():
                for weight in one.parameters():
                    weight.mul_(0.9)
        errors["by hand"] = gap(data)
        h.loss_of(model, data).backward()
        assert max(errors.values()) <= 1e-5 and rounded <= 0.02, (errors, rounded)
    return errors


# ---- adapters ------------------------------------------------------------------------------------------------------


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return get_peft_model(model, config).double()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if "lora" in name}


@case
def adapters_of_attention_over_frozen_experts() -> dict:
    """PEFT before and after sharding, and handed its inner model."""
    dense, world, errors = adapted(c.hf_model("olmoe")), dist.get_world_size(), {}
    theirs = torch.optim.AdamW([weight for weight in dense.parameters() if weight.requires_grad], lr=0.05)
    start = {name: weight.clone() for name, weight in adapters(dense).items()}
    for step in range(3):
        theirs.zero_grad()
        c.hf_loss(dense, c.hf_tokens(step, None, world)).backward()
        theirs.step()
    assert h.worst(start, adapters(dense)) > 0.1
    for when in ("before", "inner", "after"):
        model = c.hf_model("olmoe")
        if when == "after":
            run = shard(model, policy="poise")
            model = adapted(model)
        else:
            model = adapted(model)
            run = shard(model if when == "before" else model.get_base_model(), policy="poise")
        ours = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)
        for step in range(3):
            ours.zero_grad()
            c.hf_loss(model, c.hf_tokens(step, dist.get_rank(), world)).backward()
            for weight in model.parameters():
                if weight.requires_grad:
                    dist.all_reduce(weight.grad)
                    weight.grad /= world
            ours.step()
        assert not any(weight.requires_grad for weight in run.parameters())
        errors[when] = c.agreed(h.worst(adapters(model), adapters(dense)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def experts_whose_weights_are_taken_away() -> dict:
    """Adapters on experts, parametrisation, pruning, another parameter: an error on every rank, before anything is sent."""
    said = {}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(c.hf_model("olmoe"), target_parameters=targets)
    said["adapters before"] = c.raised(ModelError, lambda: shard(model))
    late = c.hf_model("olmoe")
    shard(late)
    late = adapted(late, target_parameters=targets)
    said["adapters after"] = c.raised(ModelError, lambda: c.hf_loss(late, c.hf_tokens(0, 0, 1)))

    def refused(name: str, change: Callable[[nn.Module], Any]) -> None:
        model = h.build()
        shard(model)
        before = h.loss_of(model, mine()).item()

        def attempt() -> None:
            change(model.blocks[0].experts)
            h.loss_of(model, mine()).backward()

        said[name] = c.raised(ModelError, attempt)
        assert "of sharded experts" in said[name]
        if name == "parametrised":  # refused at once: nothing was changed
            assert math.isclose(h.loss_of(model, mine()).item(), before)

    half = nn.Hardtanh(-0.5, 0.5)
    refused("parametrised", lambda experts: parametrize.register_parametrization(experts, "down_proj", half))
    refused("pruned", lambda experts: prune.identity(experts, "down_proj"))
    refused("replaced", lambda experts: setattr(experts, "down_proj", nn.Parameter(torch.zeros(3, 12, 8).double())))
    return {name: words.splitlines()[0] for name, words in said.items()}
