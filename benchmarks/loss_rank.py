"""What every rank of an emulated cluster runs for benchmarks/measured_loss.py: it serves, loses some of its peers, and goes on.

    loss_rank.py JOB.json

The last line that a surviving rank prints is what it saw.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from poise.lab.emulate import DeviceClock
from poise.machine.cluster import Cluster
from poise.planning.losses import Losses
from poise.serve import Engine
from poise.serve.load import expert_source, from_folder
from poise.serve.recover import recover
from poise.util.errors import CommunicationError


def main() -> None:
    """Serve all requests; the ranks of the job that are to be lost kill themselves amid a step."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, gone = dist.get_rank(), job["gone"]
    losses = Losses.load(job["losses"])
    clock = DeviceClock(lambda tokens: job["token_s"] * float(np.sum(tokens)))
    engine = Engine(
        from_folder(job["model"], losses.before, rank), losses.before, Cluster.uniform(*job["shape"]), traffic=job["traffic"],
        budget=job["budget"], most_live=job["most_live"], clock=clock,
        group=dist.new_group(timeout=timedelta(seconds=job["timeout_s"])),
    )  # fmt: skip

    def die(*_: Any) -> None:
        if rank in gone and len(engine.steps) == job["lost_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    engine.model.decoder[1].register_forward_pre_hook(die)
    requests = [engine.submit(prompt, new) for prompt, new in zip(job["prompts"], job["new"], strict=True)]
    seen: dict[str, Any] = {}
    dist.barrier()
    began, steps = time.monotonic(), [(0.0, 0)]
    while engine.busy or engine.swapping:
        try:
            engine.step()
        except CommunicationError:
            noticed = time.monotonic() - began
            engine = recover(engine, losses, expert_source(job["model"]), gone=gone if job["told"] else ())
            seen = {
                "last_step": steps[-1][0], "noticed": noticed, "recovered": time.monotonic() - began,
                "again": sum(request.cached == 0 < len(request.sampled) for request in requests),
                "reads": len(losses.of(gone).reads_R3(losses.before)), "copies": losses.of(gone).copies,
            }  # fmt: skip
        steps.append((time.monotonic() - began, sum(len(request.sampled) for request in requests)))
        if seen and "balanced" not in seen and not engine.swapping:
            seen["balanced"] = steps[-1][0]
    print(json.dumps({**seen, "steps": steps, "sampled": [request.sampled for request in requests],
                      "overruns": clock.report()["overruns"]}), flush=True)  # fmt: skip
    dist.barrier(group=engine.group)
    os._exit(0)  # a barrier of all ranks would wait for those that are lost


if __name__ == "__main__":
    main()
