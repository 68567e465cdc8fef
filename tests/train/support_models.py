"""Models, references and comparisons that the cases of ``support_cases.py`` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks import agreed, registry
from tests.train import harness as h
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MINE, case = registry()
LIKE: dict[str, str] = {}
"""Cases of ``make test-all`` alone, and the case that ``make test`` runs for each."""
VOCABULARY, SEQUENCES, LENGTH, HF_EXPERTS = 40, 2, 5, 6
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def case_like(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """A case that ``make test`` leaves to ``make test-all``, because it runs the case ``name``, which goes the same way."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        LIKE[function.__name__] = name
        return case(function)

    return add


# ---- Hugging Face -------------------------------------------------------------------------------------------------


def hf_config(family: str) -> Any:
    """Two MoE layers of six experts, of which four ranks own 2, 2, 1, 1."""
    import transformers as t

    common = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        max_position_embeddings=64, num_experts_per_tok=2, use_cache=False, initializer_range=0.3,
        experts_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if family == "mixtral":
        return t.MixtralConfig(**common, intermediate_size=24, num_local_experts=HF_EXPERTS)
    if family == "qwen3_moe":
        return t.Qwen3MoeConfig(**common, intermediate_size=24, moe_intermediate_size=24, num_experts=HF_EXPERTS,
                                head_dim=8)  # fmt: skip
    if family == "olmoe":
        return t.OlmoeConfig(**common, intermediate_size=24, num_experts=HF_EXPERTS)
    if family == "deepseek_v3":
        return t.DeepseekV3Config(**{**common, "num_hidden_layers": 3, "num_key_value_heads": 4}, intermediate_size=24,
                                  moe_intermediate_size=24, n_routed_experts=HF_EXPERTS, n_shared_experts=1, n_group=2,
                                  topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8,
                                  qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)  # fmt: skip
    return t.GptOssConfig(**common, intermediate_size=24, num_local_experts=HF_EXPERTS, head_dim=8,
                          layer_types=["sliding_attention", "full_attention"])  # fmt: skip


def hf_model(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    import transformers

    config = hf_config(family)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            if "experts" in name:
                nn.init.normal_(weight, std=0.3)
    return model.to(dtype).train()


def hf_tokens(step: int, rank: int | None, world: int) -> Tensor:
    """Token ids of one rank, or of all."""
    ids = torch.randint(3, VOCABULARY, (world * SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))
    return ids if rank is None else ids[rank * SEQUENCES : (rank + 1) * SEQUENCES]


def hf_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over the tokens at hand; ranks have equally many."""
    logits = model(input_ids=ids).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))


@cache
def hf_dense(family: str, steps: int = 3, dtype: torch.dtype = torch.float64,
             after: Callable[[nn.Module, int], None] | None = None) -> h.RunRecord:  # fmt: skip
    """The dense run on all ranks' tokens."""
    world = dist.get_world_size()
    return dense_record(hf_model(family, dtype), lambda m, step: hf_loss(m, hf_tokens(step, None, world)), steps, after)


def dense_record(model: nn.Module, loss_of: Callable[[nn.Module, int], Tensor], steps: int,
                after: Callable[[nn.Module, int], None] | None = None) -> h.RunRecord:  # fmt: skip
    optimizer = h.make_optimizer("adamw", model)
    record = h.RunRecord([], [], [], {})
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        record.losses.append(loss.item())
        record.grads.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        record.norms.append(torch.nn.utils.get_total_norm([w.grad.double() for w in model.parameters()]).item())
        optimizer.step()
        if after is not None:
            after(model, step)
    record.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return record


# ---- comparison ---------------------------------------------------------------------------------------------------


def whole(tensor: Any) -> Tensor:
    """All of a DTensor, the rows here of experts: as a tensor whose norm is its own."""
    out = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return out.detach().as_subclass(Tensor)


def of_all(model: nn.Module, what: str = "grad") -> dict[str, Tensor]:
    """Gradients (absent ones are zeros) or weights by name; DTensors in full, experts the owned ones."""
    out = {}
    for name, weight in model.named_parameters():
        value = weight if what == "weight" else weight.grad
        out[name] = torch.zeros_like(whole(weight)) if value is None else whole(value)
    return out


def average_dense(model: nn.Module, run: Any) -> None:
    """What data parallelism does to the weights that every rank has."""
    h.reduce_dense(model, run)
    owned = {id(weight) for weight in run.parameters()}
    for weight in model.parameters():
        if id(weight) not in owned:
            weight.grad /= dist.get_world_size()


def follow(model: nn.Module, run: Any, record: h.RunRecord, loss_of: Callable[[nn.Module, int], Tensor], *,
           optimizer: torch.optim.Optimizer | None = None, called: nn.Module | None = None, average: bool = False,
           after: Callable[[nn.Module, int], None] | None = None, weights: bool = True) -> float:  # fmt: skip
    """Train along a dense record; the largest relative error of losses, norms, gradients and weights on any rank.

    ``loss_of`` gives a rank's loss, the mean of which over ranks is the record's.
    """
    opt = optimizer or h.make_optimizer("adamw", model)
    error, world = 0.0, dist.get_world_size()
    for step, expected in enumerate(record.losses):
        opt.zero_grad()
        loss = loss_of(called or model, step)
        loss.backward()
        if average:
            average_dense(model, run)
        total = loss.detach().double()
        dist.all_reduce(total)
        norm = run.clip_grad_norm_(1e9).item()
        error = max(
            error,
            abs(total.item() / world - expected) / abs(expected),
            abs(norm - record.norms[step]) / record.norms[step],
            h.worst(of_all(model), h.local_rows(model, record.grads[step])),
        )
        opt.step()
        if after is not None:
            after(model, step)
    if weights:
        error = max(error, h.worst(of_all(model, "weight"), h.local_rows(model, record.weights)))
    return agreed(error)


def plain_loss(workload: str, dtype: torch.dtype = torch.float64, top_k: int = 2) -> Callable[[nn.Module, int], Tensor]:
    """Of the harness's model on this rank's tokens: the mean over ranks is the harness's loss."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return h.loss_of(model, h.batch(workload, step, world, top_k, rank, dtype)) * world

    return loss_of


def raised(kind: type[Exception], action: Callable[[], Any]) -> str:
    """The message of the error that every rank must get."""
    try:
        action()
    except kind as error:
        said = str(error)
    else:
        said = ""
    assert agreed(float(said == "")) == 0, f"no {kind.__name__}"
    return said
