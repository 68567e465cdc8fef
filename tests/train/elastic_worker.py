"""A training run that may lose a rank: one global batch split over however many ranks there are, float64.

    RANK=.. WORLD_SIZE=.. python tests/train/elastic_worker.py FOLDER --steps 8 [--die STEP | --stall STEP | --tear STEP]

Writes FOLDER/weights.pt (all weights, rank 0) at the end, FOLDER/rank-N.error if a collective fails.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.launch import leave
from tests.train import harness as h
from tests.train.matrix import machine

from poise.stepwise.sharding import Heterogeneous
from poise.train import checkpoint, full_state_dict, fully_shard_experts, load_checkpoint, save_checkpoint
from poise.util.errors import CommunicationError

SAVE_EVERY, WORLD_OF_DATA, TOP_K = 3, 4, 2


def part(step: int, rank: int, world: int) -> h.Batch:
    """Every world-th token of the same global batch."""
    whole = h.batch("moving-hot", step, WORLD_OF_DATA, TOP_K, None, torch.float64)
    rows = slice(rank, None, world)
    return h.Batch(whole.x[rows], whole.target[rows], [ids[rows] for ids in whole.ids], whole.total)


def torn(*args: object, write=checkpoint.dcp.save, **kwargs: object) -> None:
    """Half of every file, then the end."""
    write(*args, **kwargs)
    for file in Path(str(kwargs["checkpoint_id"])).glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    os._exit(9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--policy", default="hecate:overlap=2")
    parser.add_argument("--die", type=int, default=-1, help="the last rank is killed between forward and backward")
    parser.add_argument("--stall", type=int, default=-1, help="the last rank sleeps there instead")
    parser.add_argument("--tear", type=int, default=-1, help="all ranks die while this step's checkpoint is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=8))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = h.build()
    owners = np.random.default_rng(world).integers(0, world, (h.LAYERS, h.EXPERTS))
    run = fully_shard_experts(model, mesh=h.MESH(world), policy=options.policy, cluster=machine(world), owners=owners,
                              rematerialise=world % 2 == 0, sharding=Heterogeneous(interval=2, overlap=1))  # fmt: skip
    run.set_gradient_divide_factor(1.0)
    optimizer = h.make_optimizer("adamw", model)
    run.attach(optimizer)
    first = 0
    if checkpoint.latest_checkpoint(options.folder) is not None:
        first = load_checkpoint(options.folder, model, optimizer)
        print(f"rank {rank} of {world} goes on at step {first}", flush=True)
    last = rank == world - 1
    try:
        for step in range(first, options.steps):
            data = part(step, rank, world)
            optimizer.zero_grad()
            loss = h.loss_of(model, data)
            if last and step == options.die:
                os.kill(os.getpid(), signal.SIGKILL)
            if last and step == options.stall:  # until the others have given up
                while not list(options.folder.glob("rank-*.error")):
                    time.sleep(0.1)
            loss.backward()
            h.reduce_dense(model, run)
            optimizer.step()
            if (step + 1) % SAVE_EVERY == 0:
                if step == options.tear:
                    checkpoint.dcp.save = torn
                save_checkpoint(options.folder, model, optimizer, step=step + 1)
    except CommunicationError as error:
        (options.folder / f"rank-{rank}.error").write_text(str(error))
        os._exit(3)
    full = full_state_dict(model)
    if full is not None:
        torch.save(full, options.folder / "weights.pt")
    leave()


if __name__ == "__main__":
    main()
