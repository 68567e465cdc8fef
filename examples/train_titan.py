"""torchtitan's model, balancing hook and mesh with poise's experts: a loop as its trainer's, and what changes in it.

    torchrun --nproc-per-node 2 examples/train_titan.py [--policy poise] [--steps 10]     # torchtitan 0.3; CPU or GPUs

Lines marked ``poise`` are the patch; the rest stands where torchtitan's ``trainer.py`` has it: build, initialise,
shard, build the optimizer and its hooks, step. The trainer itself asks for CUDA, and so does the backward pass of its
attention with masks: on a CPU its plain causal attention runs in their place.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.distributed.parallel_dims as parallel_dims
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.qwen3 import Qwen3Model, _build_qwen3_moe_layers, _qwen3_norm

from poise.train import clip_grad_norm_, fully_shard_experts, parameter_groups  # poise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "partial_dtensor"
"""Of torchtitan's ways to place what is not an expert: parameters as FSDP2 shards them."""
INIT = {"weight": lambda weight: torch.nn.init.normal_(weight, std=0.02)}


def model_config(experts: int) -> Any:
    """Its Qwen3-MoE in small, with the balancing bias that its MoE modules have by default."""
    dim, head = 64, 16
    layers = _build_qwen3_moe_layers(
        n_layers=2, dim=dim, n_heads=4, n_kv_heads=2, head_dim=head, moe_hidden_dim=96, num_experts=experts, top_k=2,
        attn_backend="flex", rope=CosSinRoPE.Config(dim=head, max_seq_len=64, theta=1e4), moe_comm_backend="standard",
    )  # fmt: skip
    if DEVICE == "cpu":
        for layer in layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return Qwen3Model.Config(
        vocab_size=128, dim=dim, norm=_qwen3_norm(dim), layers=layers,
        tok_embeddings=Embedding.Config(num_embeddings=128, embedding_dim=dim, param_init=INIT),
        lm_head=Linear.Config(in_features=dim, out_features=128, param_init=INIT),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--policy", default="poise")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    set_spmd_backend(BACKEND)
    parallel_dims.device_type = DEVICE  # it is "cuda" where torchtitan finds no accelerator
    dims = ParallelDims(dp_replicate=1, dp_shard=world, cp=1, tp=1, pp=1, ep=1, world_size=world, spmd_backend=BACKEND)
    dims.build_mesh()

    torch.manual_seed(0)
    model = model_config(options.experts).build().to(DEVICE)
    model.init_states()
    mesh = init_device_mesh(DEVICE, (world,))
    run = fully_shard_experts(model, mesh=mesh, policy=options.policy)  # poise: before parallelize and FSDP
    for layer in model.layers.values():
        fully_shard(layer, mesh=dims.get_mesh("fsdp"))
    fully_shard(model, mesh=dims.get_mesh("fsdp"))
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3)  # poise: a group of experts, a group of the rest
    register_moe_load_balancing_hook(optimizer, [model], dims)  # as ever

    tokens = torch.randint(0, 128, (world * 4, 64), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mine = tokens[rank * 4 : rank * 4 + 4]
    for step in range(options.steps):
        logits = model(mine, positions=None)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), mine[:, 1:].flatten())
        loss.backward()
        norm = clip_grad_norm_(model, 1.0)  # poise: every expert once
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            bias = max(float(layer.moe.expert_bias_E.abs().max()) for layer in model.layers.values())
            overload = max(one.overload for one in run.metrics)
            said = f"loss {mean.item() / world:.4f} norm {float(norm):.3f} max/mean {overload:.2f} bias {bias:.4f}"
            print(f"step {step} {said}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
