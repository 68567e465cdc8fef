"""Train a small Mixture-of-Experts language model on real text, experts fully sharded and sparsely materialised.

    torchrun --nproc-per-node 4 examples/train_moe.py                                # CPU (gloo) or GPUs (NCCL)
    torchrun --nproc-per-node 4 examples/train_moe.py --policy hecate:overlap=4 --rematerialise
    torchrun --nproc-per-node 4 examples/train_moe.py --compare expert-parallelism,hecate,poise --steps 20
    torchrun --nproc-per-node 2 examples/train_moe.py --checkpoint runs/a            # goes on where runs/a stopped

The text is Python's own standard library, byte by byte, unless ``--text`` names a file. Every rank reads its part of
one global batch, so the loss does not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import OlmoeConfig, OlmoeForCausalLM

from poise.train import (
    FssdpExperts,
    clip_grad_norm_,
    fully_shard_experts,
    load_checkpoint,
    parameter_groups,
    save_checkpoint,
)
from poise.util.errors import PoiseError

SEQUENCE = 128


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="poise", help="a step-wise policy: NAME[:key=value,...]")
    parser.add_argument("--compare", default="", help="several policies, comma-separated; one table at the end")
    parser.add_argument("--step-slots", type=int, default=2, help="replicas a rank may hold beside its own experts")
    parser.add_argument("--rematerialise", action="store_true", help="free replicas between forward and backward")
    parser.add_argument("--sharding", default="balanced", help="even, heterogeneous or balanced")
    parser.add_argument("--force-balance", action="store_true", help="ignore the router: what would even load cost?")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--batch", type=int, default=32, help=f"sequences of {SEQUENCE} bytes a step, all ranks together"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--aux", type=float, default=0.01, help="weight of the per-layer balance loss")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--text", type=Path, help="a file to train on")
    parser.add_argument("--checkpoint", type=Path, help="folder: resume from it if it holds one, save into it")
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object at the end, talk on stderr")
    return parser.parse_args()


def read_text(path: Path | None) -> torch.Tensor:
    """Bytes to train on."""
    if path is not None:
        data = path.read_bytes()
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        data = b"\n".join(file.read_bytes() for file in files)
    if len(data) < 20 * SEQUENCE:
        raise SystemExit(f"the text has {len(data)} bytes, at least {20 * SEQUENCE} are needed")
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def sequences(text: torch.Tensor, count: int, seed: int, *, held_out: bool = False) -> torch.Tensor:
    """Sequences from the first nine tenths, or (held out) from the last; the same on every rank."""
    cut = len(text) * 9 // 10
    low, high = (cut, len(text) - SEQUENCE) if held_out else (0, cut - SEQUENCE)
    start = np.random.default_rng([seed, int(held_out)]).integers(low, high, count)
    return torch.stack([text[i : i + SEQUENCE] for i in start.tolist()]).long()


class Balance:
    """Switch-style balance loss of every layer by itself, from the routers' outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.terms: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._hook)

    def _hook(self, module: Any, args: Any, output: Any) -> None:
        logits, _, ids = output
        share = torch.bincount(ids.flatten(), minlength=logits.shape[-1]).to(logits.dtype) / max(1, ids.numel())
        self.terms.append(logits.shape[-1] * (share * logits.float().softmax(-1).mean(0)).sum())

    def take(self) -> torch.Tensor:
        total = torch.stack(self.terms).mean()
        self.terms.clear()
        return total


class Training:
    """Model, sharding and optimizer of one run."""

    def __init__(self, opts: argparse.Namespace, policy: str, mesh: Any, device: torch.device) -> None:
        self.opts, self.device = opts, device
        torch.manual_seed(opts.seed)
        config = OlmoeConfig(
            vocab_size=256, hidden_size=opts.hidden, intermediate_size=opts.hidden, num_hidden_layers=opts.layers,
            num_attention_heads=4, num_key_value_heads=4, num_experts=opts.experts, num_experts_per_tok=2,
            max_position_embeddings=SEQUENCE, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
        )  # fmt: skip
        self.model = OlmoeForCausalLM(config).to(device).train()
        self.balance = Balance(self.model)
        self.run: FssdpExperts = fully_shard_experts(
            self.model, mesh=mesh, policy=policy, step_slots=opts.step_slots, rematerialise=opts.rematerialise,
            sharding=opts.sharding, force_balance=opts.force_balance,
        )  # fmt: skip
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        # The loss is a sum over the global number of tokens, so gradients are summed over ranks, not averaged.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        self.run.set_gradient_divide_factor(1.0)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=opts.lr, weight_decay=0.01)
        self.run.attach(self.optimizer)

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[dist.get_rank() :: dist.get_world_size()].to(self.device)

    def loss(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss over all rows and the balance loss, this rank's part."""
        x = self.mine(rows)
        logits = self.model(input_ids=x).logits[:, :-1]
        total = F.cross_entropy(logits.reshape(-1, 256).float(), x[:, 1:].reshape(-1), reduction="sum")
        return total / (len(rows) * (SEQUENCE - 1)), self.balance.take() * len(x) / len(rows)

    def step(self, rows: torch.Tensor) -> tuple[float, float]:
        """Loss and gradient norm of one optimizer step."""
        self.optimizer.zero_grad()
        loss, balance = self.loss(rows)
        (loss + self.opts.aux * balance).backward()
        norm = clip_grad_norm_(self.model, 1.0)
        self.optimizer.step()
        return everywhere(loss), float(norm)

    @torch.no_grad()
    def evaluate(self, rows: torch.Tensor) -> float:
        self.model.eval()
        out = everywhere(self.loss(rows)[0])
        self.model.train()
        return out


def everywhere(part: torch.Tensor) -> float:
    total = part.detach().double().clone()
    dist.all_reduce(total)
    return float(total)


def train(opts: argparse.Namespace, policy: str, text: torch.Tensor, mesh: Any, device: torch.device) -> dict[str, Any]:
    """One run; what it did."""
    training = Training(opts, policy, mesh, device)
    held_out = sequences(text, 64, opts.seed, held_out=True)
    first = 0
    if opts.checkpoint and (opts.checkpoint / "latest").exists():
        first = load_checkpoint(opts.checkpoint, training.model, training.optimizer)
        say(f"resumed from step {first}")
    losses, overload, owner_overload, seconds = [], [], [], []
    for step in range(first, opts.steps):
        start = time.perf_counter()
        loss, norm = training.step(sequences(text, opts.batch, opts.seed * 100_003 + step + 1))
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        metrics = training.run.metrics
        overload.append([one.overload for one in metrics])
        owner_overload.append([one.owner_overload for one in metrics])
        if step == first or step % 10 == 9:
            layers = " ".join(f"{a:.2f}<{b:.2f}" for a, b in zip(overload[-1], owner_overload[-1], strict=True))
            replicas = sum(one.replicas for one in metrics)
            say(f"{policy:>20} step {step + 1:4d}  loss {loss:.3f}  norm {norm:6.3f}  replicas {replicas:3d}  "
                f"max/mean by layer, with < without replicas: {layers}")  # fmt: skip
        if opts.checkpoint and (step + 1) % opts.save_every == 0:
            save_checkpoint(opts.checkpoint, training.model, training.optimizer, step=step + 1)
    skip = min(5, max(0, len(losses) - 1))
    memory = training.run.memory(training.optimizer)
    moved, replicas = dict(training.run.schedule.moved_bytes), sum(one.replicas for one in training.run.metrics)
    return {
        "policy": policy,
        "steps": len(losses),
        "first_loss": losses[0] if losses else None,
        "loss": losses[-1] if losses else None,
        "losses": losses,
        "held_out_loss": training.evaluate(held_out),
        "imbalance": float(np.mean(overload[skip:])) if losses else None,
        "owner_imbalance": float(np.mean(owner_overload[skip:])) if losses else None,
        "replicas_per_step": replicas,
        "moved_bytes": moved,
        "memory_bytes": memory,
        "median_step_seconds": float(np.median(seconds)) if seconds else None,
    }


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def report(rows: list[dict[str, Any]]) -> str:
    """One line a run."""
    head = f"{'policy':>20} {'loss':>7} {'held out':>9} {'max/mean':>9} {'no replicas':>12} {'moved MB':>9} "
    lines = [head + f"{'owned MB':>9} {'peak extra MB':>14}"]
    for row in rows:
        memory, moved = row["memory_bytes"], sum(row["moved_bytes"].values())
        owned = memory["parameters"] + memory["gradients"] + memory["states"]
        figures = (
            f"{row['loss']:7.3f} {row['held_out_loss']:9.3f} {row['imbalance']:9.3f} {row['owner_imbalance']:12.3f}"
            if row["steps"] else f"{'':>7} {row['held_out_loss']:9.3f} {'':>9} {'':>12}"
        )  # fmt: skip
        lines.append(f"{row['policy']:>20} {figures} {moved / 1e6:9.1f} {owned / 1e6:9.1f} "
                     f"{memory['materialised peak'] / 1e6:14.1f}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    opts = options()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        text = read_text(opts.text)
        names = [name for name in opts.compare.split(",") if name] or [opts.policy]
        rows = [train(opts, name, text, mesh, device) for name in names]
        if dist.get_rank() == 0:
            print(json.dumps({"ranks": dist.get_world_size(), "rows": rows}) if opts.json else report(rows), flush=True)
    except PoiseError as error:
        say(str(error))
        raise SystemExit(2) from None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
