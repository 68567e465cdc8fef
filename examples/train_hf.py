"""Hugging Face's Trainer over sharded experts: DDP around the rest, checkpoints that resume on any number of ranks.

    torchrun --nproc-per-node 2 examples/train_hf.py --output runs/hf
    torchrun --nproc-per-node 4 examples/train_hf.py --output runs/hf --steps 40 --resume

Two lines are poise's: ``fully_shard_experts`` before the Trainer is built, and ``ShardedExpertsMixin`` before
``Trainer`` among the base classes. The text is Python's own standard library, byte by byte.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from poise.train import fully_shard_experts
from poise.train.hf import ShardedExpertsMixin

LENGTH = 64


class MyTrainer(ShardedExpertsMixin, Trainer):
    """Trainer, with experts gathered before rank 0 writes."""


class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Pieces of the standard library."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
        every = torch.tensor(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.int64)
        self.pieces = every[: len(every) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def main() -> None:
    """Train, save, and say what the loss was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/hf")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--policy", default="poise:objective=tokens")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = OlmoeForCausalLM(config)
    if cuda:
        model.cuda()
    fully_shard_experts(
        model, mesh=init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),)), policy=given.policy
    )
    arguments = TrainingArguments(
        given.output, max_steps=given.steps, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=5,
        save_steps=10, report_to=[], use_cpu=not cuda, ddp_backend=None if cuda else "gloo", disable_tqdm=True,
    )  # fmt: skip
    trainer = MyTrainer(model=model, args=arguments, train_dataset=Text())
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(given.output) if given.resume else None)
    trainer.save_model(f"{given.output}/model")  # what from_pretrained reads
    if dist.get_rank() == 0:
        print(f"step {result.global_step}, loss {result.training_loss:.3f}, model in {given.output}/model")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
