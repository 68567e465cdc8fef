"""Cases about where weights lie: meta device, offload, checkpoints, exports, moves; and what is counted of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.helpers import few_or
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.support_cases import EXACT, fsdp, record_of_dense, shard
from tests.train.support_models import case, case_like
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from poise.runtime.experts import ExpertKind
from poise.stepwise.sharding import Heterogeneous
from poise.train import export_safetensors, full_state_dict, load_checkpoint, save_checkpoint
from poise.util.errors import OptionError, PoiseError

FULL = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


@contextmanager
def folder() -> Iterator[Path]:
    """One for all ranks."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    try:
        yield Path(name[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(name[0], ignore_errors=True)


def some_owners(seed: int, layers: int = h.LAYERS, experts: int = h.EXPERTS) -> np.ndarray:
    """Random: ranks with none or most experts of a layer are likely."""
    return np.random.default_rng(seed).integers(0, dist.get_world_size(), (layers, experts))


def hf_loss(model: nn.Module, step: int) -> torch.Tensor:
    return c.hf_loss(model, c.hf_tokens(step, dist.get_rank(), dist.get_world_size()))


def rest(record: h.RunRecord, done: int) -> h.RunRecord:
    """What is left of a record."""
    return h.RunRecord(record.losses[done:], record.norms[done:], record.grads[done:], record.weights)


def later(loss_of: Callable[[nn.Module, int], torch.Tensor], done: int) -> Callable[[nn.Module, int], torch.Tensor]:
    return lambda model, step: loss_of(model, step + done)


# ---- meta device ---------------------------------------------------------------------------------------------------


def given_memory(model: nn.Module, run: Any) -> None:
    """``to_empty``; what nobody loads stays NaN."""
    assert all(weight.is_meta for weight in model.parameters())
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
    assert all(weight.device.type == "cpu" for weight in run.parameters())


@case
def meta_device() -> dict:
    """Built without memory, sharded, given memory, loaded from a full state on all ranks or on the first alone."""
    world, errors = dist.get_world_size(), {}
    for kind, options, from_first in (
        ("gated", {}, False), ("list", {}, False), ("gated", {"offload": True, "rematerialise": True}, True),
    ):  # fmt: skip
        with torch.device("meta"):
            model = h.build(kind)
        run = shard(model, **options)
        fsdp(model, h.MESH(world))
        given_memory(model, run)
        full = h.build(kind).state_dict() if not from_first or dist.get_rank() == 0 else {}
        set_model_state_dict(model, full, options=FROM_FIRST if from_first else FULL)
        record = (
            record_of_dense() if kind == "gated" else h.dense("hot-expert-a-rank", 2, "adamw", world, kind, steps=3)
        )
        errors[f"{kind}, from the first {from_first}"] = c.follow(model, run, record, c.plain_loss("hot-expert-a-rank"))
    with torch.device("meta"):
        model = h.build()
    run = shard(model)  # without FSDP2 load_state_dict does
    given_memory(model, run)
    model.load_state_dict(h.build().state_dict())
    errors["alone"] = c.follow(model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), average=True)
    assert max(errors.values()) <= EXACT, errors
    return errors


@case_like("meta_device")
def meta_device_hugging_face() -> dict:
    """Buffers that are not in the state (of rotary embeddings) come back by Hugging Face's own initialisation."""
    world = dist.get_world_size()
    with torch.device("meta"):
        model = c.hf_model("qwen3_moe")
    run = shard(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=h.MESH(world))
    fully_shard(model, mesh=h.MESH(world))
    given_memory(model, run)
    rotary = model.model.rotary_emb
    model._init_weights(rotary)
    set_model_state_dict(model, c.hf_model("qwen3_moe").state_dict(), options=FULL)
    assert rotary.inv_freq.isfinite().all()
    error = c.follow(model, run, c.hf_dense("qwen3_moe"), hf_loss)
    assert error <= EXACT, error
    return {"error": error}


# ---- offload -------------------------------------------------------------------------------------------------------


@case
def offload() -> dict:
    """Owned weights computed with elsewhere, or in another type: copies come and go and are counted.

    "cpu:0" is another device than "cpu" by name alone, so that the copies are made where there is but one device.
    """
    world, errors, peaks = dist.get_world_size(), {}, {}
    for where, again in (("cpu", False), ("cpu:0", False), ("cpu:0", True)):
        model = h.build()
        run = shard(model, offload=True, rematerialise=again)
        object.__setattr__(run.schedule.deployment, "device", torch.device(where))  # only another device makes copies
        fsdp(model, h.MESH(world))
        optimizer = h.make_optimizer("adamw", model)
        run.attach(optimizer)
        errors[f"{where}, rematerialise {again}"] = c.follow(
            model, run, record_of_dense(), c.plain_loss("hot-expert-a-rank"), optimizer=optimizer
        )
        for weight in run.parameters():
            tensors = [weight, weight.grad, *(v for v in optimizer.state[weight].values() if v.dim())]
            assert len(tensors) == 4 and all(t.device.type == "cpu" and t.shape == weight.shape for t in tensors)
        owned = sum(weight.nbytes for weight in run.parameters())
        found = run.memory(optimizer)
        assert found["parameters"] == found["gradients"] == owned and found["states"] >= 2 * owned
        peaks[where, again] = found.get("peak: copies of owned experts", 0), owned
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    plain, copies, freed = (peaks[key] for key in (("cpu", False), ("cpu:0", False), ("cpu:0", True)))
    assert c.agreed(float(plain[0] != 0)) == c.agreed(float(copies[0] != copies[1])) == 0, peaks
    assert c.agreed(float(freed[0] > freed[1])) == 0, peaks
    return {**errors, "copies": copies, "re-materialised": freed}


@case_like("offload")
def offload_mixed_precision() -> dict:
    """float32 on the CPU, bfloat16 copies, float32 on the wire: at most 4 times the error of a dense bfloat16 run."""
    world, rank = dist.get_world_size(), dist.get_rank()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    everything = h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)
    exact, coarse = h.build(), h.build(dtype=torch.bfloat16)
    h.loss_of(exact, everything).backward()
    truth = {name: weight.grad for name, weight in exact.named_parameters()}
    low = everything.x.to(torch.bfloat16)
    ((coarse(low, everything.ids).double() - everything.target).square().sum() / everything.total).backward()
    bound = h.worst({name: weight.grad for name, weight in coarse.named_parameters()}, truth)
    layers, peaks = 4, {}
    for again in (False, True):
        model = h.build(dtype=torch.float32)
        run = shard(model, offload=True, mp_policy=policy, rematerialise=again)
        fsdp(model, h.MESH(world), mp_policy=policy)
        mine = h.batch("hot-expert-a-rank", 0, world, 2, rank, torch.float32)
        ((model(mine.x, mine.ids).double() - mine.target).square().sum() / mine.total * world).backward()
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in model.parameters())
        error = c.agreed(h.worst(c.of_all(model), h.local_rows(model, truth)))
        assert 1e-6 < error <= 4 * bound, (error, bound)
        deep = h.build(dtype=torch.float32, layers=layers)
        run = shard(
            deep, offload=True, mp_policy=policy, rematerialise=again, policy="expert-parallelism", step_slots=0
        )
        data = h.batch("hot-expert-a-rank", 0, world, 2, rank, torch.float32, layers=layers)
        h.loss_of(deep, data).backward()
        owned = [sum(weight.nbytes for weight in one.parameters()) // 2 for one in run.schedule.layers]
        most = sum(owned) if not again else max(a + b for a, b in pairwise(owned))
        peaks[again] = run.schedule.ledger.peak_parts.get("copies of owned experts", 0), most
        assert sum(run.schedule.ledger.now.values()) == 0
    assert c.agreed(float(peaks[False][0] != peaks[False][1])) == 0, peaks
    assert c.agreed(float(not 0 < peaks[True][0] <= peaks[True][1] < peaks[False][0])) == 0, peaks
    return {"error": error, "bound": bound, "copies": peaks[False], "re-materialised": peaks[True]}


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
    c.follow(model, run, first, hf_loss, optimizer=optimizer, weights=False)
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


# ---- exports -------------------------------------------------------------------------------------------------------


def exported(family: str) -> dict:
    """Trained a step, exported, read by transformers from the folder: the same logits, to the last bits."""
    import transformers

    world, rank = dist.get_world_size(), dist.get_rank()
    model = c.hf_model(family)
    run = shard(model, owners=some_owners(5, 2, c.HF_EXPERTS))
    fully_shard(model, mesh=h.MESH(world))
    optimizer = h.make_optimizer("adamw", model)
    hf_loss(model, 0).backward()
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


# ---- balance -------------------------------------------------------------------------------------------------------


@contextmanager
def computed() -> Iterator[list[int]]:
    """Pairs that the experts of this rank really compute, one number a layer."""
    counts: list[int] = []
    run = ExpertKind.run

    def counted(self: ExpertKind, banks: Any, x: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return run(self, banks, x)

    with mock.patch.object(ExpertKind, "run", counted):
        yield counts


def everywhere(value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


@case
def force_balance() -> dict:
    """Every rank computes as many pairs, to within one expert's; results are those of the forced ids."""
    world, rank, spread, errors = dist.get_world_size(), dist.get_rank(), {}, {}
    parts = [h.batch("hot-rank", 0, world, 5, one, torch.float64) for one in range(world)]
    forced = [
        (torch.arange(part.ids[0].numel()) + one * part.ids[0].numel()).remainder(h.EXPERTS).view(part.ids[0].shape)
        for one, part in enumerate(parts)
    ]
    whole = h.batch("hot-rank", 0, world, 5, None, torch.float64)
    dense = h.build()
    for block in dense.blocks:  # the router's weights stay, its choice does not
        block.experts.forward = lambda x, ids, w, call=block.experts.forward: call(x, torch.cat(forced), w)
    h.loss_of(dense, whole).backward()
    expected = {name: weight.grad for name, weight in dense.named_parameters()}
    for policy in ("expert-parallelism", "hecate", "poise"):
        for force in (True, False):
            model = h.build()
            run = shard(model, policy=policy, force_balance=force)
            with computed() as mine:
                loss = h.loss_of(model, parts[rank])
            (loss * world).backward()
            tokens = np.array(everywhere(mine[: h.LAYERS])).T  # [L, D]
            assert all((one.tokens_D == tokens[one.layer]).all() for one in run.metrics)
            gap = int((tokens.max(axis=1) - tokens.min(axis=1)).max())
            spread[f"{policy}, forced {force}"] = gap
            if force:
                c.average_dense(model, run)
                errors[policy] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, expected)))
                one_expert = len(whole.x) * 5 // h.EXPERTS
                owned = [np.diff(np.sort(one.owner_tokens_D)[[0, -1]])[0] for one in run.metrics]
                assert max(owned) <= one_expert, owned
                assert policy == "hecate" or gap <= one_expert, spread  # hecate may spread what is even already
    assert spread["expert-parallelism, forced False"] > 2 * spread["expert-parallelism, forced True"], spread
    assert max(errors.values()) <= EXACT, errors
    return {**errors, "max - min pairs": spread}


@case
def metrics() -> dict:
    """``LayerMetrics`` are the same on all ranks and equal counts by hand, from the routing and in the experts."""
    world, rank, said = dist.get_world_size(), dist.get_rank(), {}
    for policy in ("expert-parallelism", "hecate", "full-replication"):
        for workload in few_or(("two-hot", "ragged"), ("two-hot" if policy == "expert-parallelism" else "ragged",)):
            model = h.build()
            owners = some_owners(8)
            run = shard(model, policy=policy, owners=owners)
            for step in range(2):
                data = h.batch(workload, step, world, 2, rank, torch.float64)
                with computed() as mine, torch.no_grad():
                    model(data.x, data.ids)
                tokens = np.array(everywhere(mine)).T
                lines = [
                    (one.layer, one.tokens_D.tolist(), one.owner_tokens_D.tolist(), one.replicas, one.gathered_bytes,
                     one.overload, one.owner_overload, one.why)
                    for one in run.metrics
                ]  # fmt: skip
                assert all(other == lines for other in everywhere(lines)), "ranks disagree"
                assert [line[0] for line in lines] == list(range(h.LAYERS))
                for one in run.metrics:
                    ids = h.routing(workload, step, one.layer, world, 2)
                    load = np.bincount(ids.reshape(-1), minlength=h.EXPERTS)
                    by_owner = np.array([load[owners[one.layer] == device].sum() for device in range(world)])
                    assert (one.owner_tokens_D == by_owner).all() and one.tokens_D.sum() == load.sum()
                    assert (one.tokens_D == tokens[one.layer]).all()
                    assert one.owner_overload == by_owner.max() / by_owner.mean()
                    assert one.overload == tokens[one.layer].max() / tokens[one.layer].mean()
                    assert one.gathered_bytes == one.replicas * run.schedule.deployment.expert_bytes
                    if policy == "expert-parallelism":
                        assert one.replicas == 0 and (one.tokens_D == by_owner).all()
                    if policy == "full-replication":
                        assert one.replicas == h.EXPERTS * (world - 1)
                        assert (one.tokens_D == 2 * np.array(h.tokens_of(workload, step, world))).all()
            said[f"{policy}, {workload}"] = [round(one.overload, 3) for one in run.metrics]
    return said


# ---- frozen experts, no gradients ----------------------------------------------------------------------------------


@case
def frozen_experts() -> dict:
    """Frozen before or after sharding: no gradient for them, none travels, the rest gets its own."""
    world, errors = dist.get_world_size(), {}
    dense = h.build()
    for block in dense.blocks:
        block.experts.requires_grad_(False)
    h.loss_of(dense, h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)).backward()
    expected = {name: weight.grad for name, weight in dense.named_parameters() if weight.requires_grad}
    for before in (True, False):
        for again in (False, True):
            model = h.build()
            if before:
                for block in model.blocks:
                    block.experts.requires_grad_(False)
            run = shard(model, rematerialise=again)
            if not before:
                for weight in run.parameters():
                    weight.requires_grad_(False)
            fsdp(model, h.MESH(world))
            optimizer = h.make_optimizer("adamw", model)
            kept = {weight: weight.detach().clone() for weight in run.parameters()}
            c.plain_loss("hot-expert-a-rank")(model, 0).backward()
            assert all(weight.grad is None for weight in run.parameters()), "a frozen weight has a gradient"
            assert run.schedule.moved_bytes["gather"] > 0 == run.schedule.moved_bytes["reduce"]
            found = {name: c.whole(w.grad) for name, w in model.named_parameters() if w.requires_grad}
            assert found.keys() == expected.keys()
            errors[f"before {before}, rematerialise {again}"] = c.agreed(h.worst(found, expected))
            run.clip_grad_norm_(1.0)
            optimizer.step()
            assert all(torch.equal(weight, value) for weight, value in kept.items())
            assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def frozen_in_part() -> dict:
    """Only one of the experts' matrices trained; thawed later, both are."""
    world, errors = dist.get_world_size(), {}
    for part in ("gate_up_proj", "down_proj"):
        for thaw in (False, True):
            dense, model = h.build(), h.build()
            for block in (*dense.blocks, *model.blocks):
                getattr(block.experts, part).requires_grad_(False)
            run = shard(model)
            if thaw:
                for weight in (*dense.parameters(), *model.parameters()):
                    weight.requires_grad_(True)
            h.loss_of(dense, h.batch("hot-expert-a-rank", 0, world, 2, None, torch.float64)).backward()
            expected = {name: w.grad for name, w in dense.named_parameters() if w.grad is not None}
            c.plain_loss("hot-expert-a-rank")(model, 0).backward()
            names = {name for name, weight in model.named_parameters() if weight.grad is not None}
            assert names == expected.keys(), names ^ expected.keys()
            c.average_dense(model, run)
            full = {name: expected.get(name, torch.zeros_like(w)) for name, w in dense.named_parameters()}
            errors[f"{part}, thawed {thaw}"] = c.agreed(h.worst(c.of_all(model), h.local_rows(model, full)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def evaluation() -> dict:
    """``no_grad`` and ``inference_mode`` equal dense, free all, and leave a training step between them alone."""
    world, rank, errors = dist.get_world_size(), dist.get_rank(), {}
    for again in (False, True):
        model, dense = h.build(), h.build()
        run = shard(model, rematerialise=again)
        fsdp(model, h.MESH(world))
        for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
            for workload in ("hot-expert-a-rank", "ragged"):
                data = h.batch(workload, 1, world, 2, rank, torch.float64)
                before = run.schedule.moved_bytes["gather"]
                with mode():
                    out, wanted = model(data.x, data.ids), dense(data.x, data.ids)
                assert c.agreed(float(run.schedule.moved_bytes["gather"] - before)) > 0
                errors[f"{name}, {workload}, {again}"] = c.agreed(h.worst({"": out}, {"": wanted}))
                assert sum(run.schedule.ledger.now.values()) == 0, run.schedule.ledger.now
        loss = c.plain_loss("hot-expert-a-rank")(model, 0)
        with torch.no_grad():  # between a forward pass and its backward
            model(data.x, data.ids)
        loss.backward()
        found = c.of_all(model)
        errors[f"backward after it, {again}"] = c.agreed(
            h.worst(found, h.local_rows(model, record_of_dense().grads[0]))
        )
        assert sum(run.schedule.ledger.now.values()) == 0
    assert max(errors.values()) <= EXACT, errors
    return errors


# ---- optimizer states that move ------------------------------------------------------------------------------------


@case
def optimizers_move() -> dict:
    """States of every optimizer of PyTorch that works element by element go with their experts."""
    world, errors = dist.get_world_size(), {}
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
        "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
        "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
        "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001, centered=True, momentum=0.5),
        "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
        "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    }
    for name in few_or(list(makers), ["SGD with momentum", "Adam, amsgrad", "NAdam", "Adagrad", "ASGD"]):
        make = makers[name]
        dense, model = h.build(), h.build()
        run = shard(model, owners=some_owners(9), policy="expert-parallelism")
        opts = [make(dense.parameters()), make(model.parameters())]
        run.attach(opts[1])
        for step in range(2):
            for opt in opts:
                opt.zero_grad()
            h.loss_of(dense, h.batch("hot-expert-a-rank", step, world, 2, None, torch.float64)).backward()
            c.plain_loss("hot-expert-a-rank")(model, step).backward()
            c.average_dense(model, run)
            for weight in dense.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            for opt in opts:
                opt.step()
            if step == 0:
                assert c.agreed(float(run.reshard(some_owners(10)))) > 0
        wanted = {key: weight.detach() for key, weight in dense.named_parameters()}
        errors[name] = c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, wanted)))
    assert max(errors.values()) <= EXACT, errors
    return errors


@case
def optimizers_that_cannot_move() -> dict:
    """States without a row an expert: an error on all ranks, of those where they look as if they had one too."""
    world, said = dist.get_world_size(), {}
    owners = np.arange(h.EXPERTS) % (world - 1)
    owners[0] = world - 1  # one expert alone: [1, ...] looks like a row
    before = np.stack([owners] * h.LAYERS)
    model = h.build("list")
    run = shard(model, owners=before)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    run.attach(optimizer)
    c.plain_loss("hot-expert-a-rank")(model, 0).backward()
    c.average_dense(model, run)
    said["Adafactor"] = c.raised(OptionError, optimizer.step)  # it scales by norms, and all experts have one here
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    run.attach(optimizer)
    optimizer.step()
    weight = next(iter(run.parameters()))
    optimizer.state[weight]["odd"] = torch.zeros(len(weight) + 1, *weight.shape[1:])
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    said["odd state"] = c.raised(OptionError, lambda: run.reshard(some_owners(10)))
    assert (run.owners == before).all()
    assert c.agreed(h.worst(c.of_all(model, "weight"), weights)) == 0 == c.agreed(h.worst(c.of_all(model), grads))
    optimizer.zero_grad()  # and the run goes on
    c.plain_loss("hot-expert-a-rank")(model, 1).backward()
    optimizer.step()
    run.schedule.moves.optimizers.clear()
    assert c.agreed(float(run.reshard(some_owners(10)))) > 0
    said["LBFGS"] = c.raised(OptionError, lambda: run.attach(torch.optim.LBFGS(model.parameters())))
    return {name: text.splitlines()[0] for name, text in said.items()}
