"""Cases about checkpoints and exports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.helpers import few_or
from tests.ranks import everywhere, folder
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_models import case, case_like
from tests.train.support_runs import (
    EXACT,
    STEPS,
    adamw,
    dense_run,
    fsdp,
    hf_loss_of_step,
    moments_error,
    shard,
    some_owners,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from poise.stepwise.sharding import Heterogeneous
from poise.train import export_safetensors, full_state_dict, load_checkpoint, parameter_groups, save_checkpoint
from poise.util.errors import PoiseError


def rest(record: h.RunRecord, done: int) -> h.RunRecord:
    """What is left of a record."""
    return h.RunRecord(record.losses[done:], record.norms[done:], record.grads[done:], record.weights)


def later(loss_of: Callable[[nn.Module, int], torch.Tensor], done: int) -> Callable[[nn.Module, int], torch.Tensor]:
    return lambda model, step: loss_of(model, step + done)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def states_error(model: nn.Module, optimizer: Any, wanted: dict[str, dict[str, torch.Tensor]]) -> float:
    """Of Adam's states against those of a dense optimizer, by name."""
    out = 0.0
    for key in ("exp_avg", "exp_avg_sq", "step"):
        found = {name: c.whole(optimizer.state[weight][key]) for name, weight in model.named_parameters()}
        full = {name: states[key] for name, states in wanted.items()}
        out = max(out, h.worst(found, h.local_rows(model, full) if key != "step" else full))
    return out


def states_of(model: nn.Module, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: value.clone() for key, value in optimizer.state[weight].items()}
        for name, weight in model.named_parameters()
    }


@case
def checkpoint_other_policy() -> dict:
    """Two steps one way, a checkpoint, two steps another way: other owners, policy, wrapping, memory."""
    world, done, errors = dist.get_world_size(), 2, {}
    record = h.dense("moving-hot", 2, "adamw", world, steps=4)
    dense = h.build()
    dense_optimizer = h.make_optimizer("adamw", dense)
    for step in range(done):
        dense_optimizer.zero_grad()
        h.loss_of(dense, h.batch("moving-hot", step, world, 2, None, torch.float64)).backward()
        dense_optimizer.step()
    known = states_of(dense, dense_optimizer)
    ways: tuple[dict[str, Any], ...] = (
        {"policy": "hecate", "owners": some_owners(1), "sharding": Heterogeneous(interval=1, overlap=1)},
        {"policy": "poise", "owners": some_owners(2), "rematerialise": True},
        {"policy": "full-replication", "owners": None, "rematerialise": 4096.0, "offload": True},
        {"policy": "expert-parallelism", "owners": some_owners(3), "step_slots": 0},
    )

    def start(way: dict[str, Any], wrap: bool) -> tuple[nn.Module, Any, Any]:
        model = h.build()
        run = shard(model, **way)
        if wrap:
            fsdp(model, h.MESH(world))
        optimizer = h.make_optimizer("adamw", model)
        run.attach(optimizer)
        return model, run, optimizer

    first = h.RunRecord(record.losses[:done], record.norms[:done], record.grads[:done], {})
    for number, way in list(enumerate(ways))[few_or(0, 2) :]:
        with folder() as place:
            model, run, optimizer = start(way, wrap=True)
            c.follow(model, run, first, c.plain_loss("moving-hot"), optimizer=optimizer, weights=False)
            save_checkpoint(place, model, optimizer, step=done)
            wrap = number % 2 == 0
            model, run, optimizer = start(ways[(number + 1) % len(ways)], wrap)
            for weight in run.parameters():
                weight.detach().fill_(float("nan"))
            assert load_checkpoint(place, model, optimizer) == done
            states = c.agreed(states_error(model, optimizer, known))
            going = c.follow(
                model,
                run,
                rest(record, done),
                later(c.plain_loss("moving-hot"), done),
                optimizer=optimizer,
                average=not wrap,
            )
            errors[f"{way['policy']} -> {ways[(number + 1) % len(ways)]['policy']}"] = max(states, going)
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def checkpoint_troubles() -> dict:
    """What one rank cannot write or read is a typed error on all; the checkpoint before stays, and nothing is left."""
    rank, said = dist.get_rank(), {}
    model, other = h.build(), h.build(layers=h.LAYERS + 1)
    run, _ = shard(model), shard(other)
    optimizer = h.make_optimizer("adamw", model)
    h.loss_of(model, h.batch("two-hot", 0, dist.get_world_size(), 2, rank, torch.float64)).backward()
    h.reduce_dense(model, run)
    optimizer.step()

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    def on(victim: int, place: Any, name: str) -> Any:
        return mock.patch.object(place, name, full) if rank == victim else nullcontext()

    with folder() as parent:
        place = parent / "run"

        def refused(do: Callable[[], Any], *words: str) -> None:
            try:
                do()
            except PoiseError as error:
                mine = str(error)
            else:
                mine = "nothing"
            told = everywhere(mine)
            assert all(word in one for word in words for one in told), (words, told)
            dist.barrier()
            left = sorted(path.name for path in place.iterdir()) if place.exists() else []
            assert left == (["latest", "step-1"] if "step-1" in left else []), left
            said[words[0]] = told[0]

        def save(step: int = 2, keep: int = 2) -> Callable[[], Any]:
            return lambda: save_checkpoint(place, model, optimizer, step=step, keep=keep)

        refused(lambda: load_checkpoint(place, model, optimizer), "no complete checkpoint")
        save(1)()
        kept = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        writer = dcp.FileSystemWriter
        for step in (2, 1):  # a new one, and one that is there
            with on(2, writer, "write_data"):
                refused(save(step), f"cannot write {place}/step-{step}: rank 2", "No space left")
            with on(3, writer, "prepare_local_plan"):
                refused(save(step), "rank 3", "No space left")
            with on(0, Path, "rename"):
                refused(save(step), "No space left on device")
        refused(save(2 + rank // 3), "ranks write step and keep (2, 2) or (3, 2)")
        refused(save(2, keep=rank), "keep must be at least 1")
        refused(lambda: save_checkpoint(parent / str(rank), model, optimizer), "is not whole")
        with on(1, dcp.FileSystemReader, "read_data"):
            refused(lambda: load_checkpoint(place, model, optimizer), f"cannot load {place}/step-1: rank 1")
        refused(lambda: load_checkpoint(place, other), "the checkpoint lacks", f"blocks.{h.LAYERS}.")
        for weight in model.parameters():
            weight.detach().fill_(float("nan"))
        assert load_checkpoint(place, model, optimizer) == 1
    assert c.agreed(float(any(not torch.equal(w, kept[name]) for name, w in model.named_parameters()))) == 0.0
    return said


@case_like("checkpoint_other_policy")
def checkpoint_without_poise() -> dict:
    """torch's own loader puts it, states and all, into the unsharded model, which goes on; so does the full state."""
    world, done = dist.get_world_size(), 2
    record = c.hf_dense("mixtral", steps=4)
    first = h.RunRecord(record.losses[:done], record.norms[:done], record.grads[:done], {})
    model = c.hf_model("mixtral")
    run = shard(model, owners=some_owners(4, 2, c.HF_EXPERTS))
    for layer in model.model.layers:
        fully_shard(layer, mesh=h.MESH(world))
    fully_shard(model, mesh=h.MESH(world))
    optimizer = h.make_optimizer("adamw", model)
    c.follow(model, run, first, hf_loss_of_step, optimizer=optimizer, weights=False)
    plain = c.hf_model("mixtral")
    for weight in plain.parameters():
        weight.detach().fill_(float("nan"))
    plain_optimizer = h.make_optimizer("adamw", plain)
    with folder() as place:
        at = save_checkpoint(place, model, optimizer, step=done)
        weights, states = get_state_dict(plain, plain_optimizer)
        loaded = {"model": weights, "optimizer": states, "step": 0}
        dcp.load(loaded, checkpoint_id=str(at))
    set_state_dict(plain, plain_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert loaded["step"] == done
    full = full_state_dict(model)
    assert (full is None) == (dist.get_rank() > 0)
    error = 0.0
    if full is not None:
        other = c.hf_model("mixtral")
        assert str(other.load_state_dict(full)) == "<All keys matched successfully>"
        error = h.worst(dict(other.named_parameters()), dict(plain.named_parameters()))
    for step in range(done, len(record.losses)):
        plain_optimizer.zero_grad()
        c.hf_loss(plain, c.hf_tokens(step, None, world)).backward()
        plain_optimizer.step()
    going = h.worst({name: weight.detach() for name, weight in plain.named_parameters()}, record.weights)
    out = {"full state": c.agreed(error), "goes on": c.agreed(going)}
    assert out["full state"] == 0 and out["goes on"] <= EXACT, out
    return out


@case
def resumed_while_frozen_or_amid_accumulation() -> dict:
    """Moments are loaded though experts are frozen, and though gradients are there."""
    whole, whole_optimizer = dense_run()
    model = h.build()
    run, optimizer = shard(model), adamw(parameter_groups(model))
    train(model, run, optimizer, range(STEPS))
    errors = {}
    with folder() as place:
        save_checkpoint(place, model, optimizer, step=3)
        for how in ("frozen", "with gradients"):
            fresh = h.build()
            other, new = shard(fresh, policy="poise"), adamw(parameter_groups(fresh))
            if how == "frozen":
                for weight in other.parameters():
                    weight.requires_grad_(False)
            else:
                c.plain_loss("hot-expert-a-rank")(fresh, 0).backward()
            assert load_checkpoint(place, fresh, new) == 3
            assert all(weight.requires_grad == (how != "frozen") for weight in other.parameters())
            assert how == "frozen" or all(weight.grad is not None for weight in other.parameters())
            errors[how] = moments_error(fresh, new, whole, whole_optimizer)
    assert max(errors.values()) <= EXACT, errors
    return errors


# ---- exports -------------------------------------------------------------------------------------------------------


def exported(family: str) -> dict:
    """Trained a step, exported, read by transformers from the folder: the same logits, to the last bits."""
    import transformers

    world, rank = dist.get_world_size(), dist.get_rank()
    model = c.hf_model(family)
    run = shard(model, owners=some_owners(5, 2, c.HF_EXPERTS))
    fully_shard(model, mesh=h.MESH(world))
    optimizer = h.make_optimizer("adamw", model)
    hf_loss_of_step(model, 0).backward()
    optimizer.step()
    model.eval()
    ids = c.hf_tokens(7, rank, world)
    with torch.no_grad():
        here = model(input_ids=ids).logits
    before = c.hf_model(family).eval()
    with folder() as place:
        assert export_safetensors(model, place) == place
        files = sorted(path.name for path in place.iterdir())
        again, said = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float64, local_files_only=True, output_loading_info=True, experts_implementation="eager"
        )  # fmt: skip
        dist.barrier()
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
    with torch.no_grad():
        there, untrained = again.eval()(input_ids=ids).logits, before(input_ids=ids).logits
    error = c.agreed(h.worst({"logits": here}, {"logits": there}))
    changed = h.worst({"logits": here}, {"logits": untrained})
    assert error <= EXACT < 1e-3 < changed, (error, changed)
    assert "config.json" in files and "model.safetensors" in files
    assert run.schedule.moved_bytes["gather"] > 0
    return {"error": error, "a step changed": changed, "files": files}


@case_like("safetensors_mixtral")
def safetensors_qwen3_moe() -> dict:
    return exported("qwen3_moe")


@case
def safetensors_mixtral() -> dict:
    return exported("mixtral")


@case
def safetensors_gpt_oss() -> dict:
    return exported("gpt_oss")


@case
def safetensors_plain() -> dict:
    """Of any module, a list of experts under its own names."""
    from safetensors.torch import load_file

    world, errors = dist.get_world_size(), {}
    for kind in ("gated", "plain", "list"):
        record = h.dense("hot-expert-a-rank", 2, "adamw", world, kind, steps=1)
        model = h.build(kind)
        run = shard(model, owners=some_owners(6))
        fsdp(model, h.MESH(world))
        c.follow(model, run, record, c.plain_loss("hot-expert-a-rank"))
        with folder() as place:
            export_safetensors(model, place / "new")
            read = load_file(place / "new" / "model.safetensors")
            dist.barrier()
        plain = h.build(kind)
        assert str(plain.load_state_dict(read)) == "<All keys matched successfully>"
        errors[kind] = c.agreed(h.worst(dict(plain.named_parameters()), record.weights))
    assert max(errors.values()) <= EXACT, errors
    return errors
