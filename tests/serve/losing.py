"""One rank of a serving cluster of which others are killed amid the run; what it says is read by test_losses.py."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist
from tests.serve import models as m
from tests.serve.harness import answers, plain

from poise.planning.losses import lost_together
from poise.planning.placement import Placement
from poise.planning.solve.repair import prepared
from poise.serve import Engine
from poise.serve.load import expert_source
from poise.serve.recover import recover
from poise.util.errors import CommunicationError

FAMILY, NEW, TIMEOUT_S = "olmoe", 8, 8


def placement(slots: int) -> Placement:
    """Every rank has a block of its own experts, and replicas of few others: a lost rank leaves orphans."""
    layers = m.moe_layers(plain(FAMILY))
    count = np.zeros((len(layers), m.EXPERTS, 4), np.int64)
    for rank in range(4):
        count[:, 2 * rank : 2 * rank + 2, rank] = 1
        others = [e for e in (0, 1, 3, 4) if e // 2 != rank]
        count[:, others[: slots - 2], rank] = 1
    return Placement.from_counts(count, layer_ids_L=np.array(layers, np.int32))


def read(layer: int, expert: int, kind) -> dict:
    experts = m.block_of(plain(FAMILY), layer).experts
    return {name: getattr(experts, name)[expert].detach().clone() for name in kind.shapes}


def stored():
    """The same from a checkpoint on disk."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    if dist.get_rank() == 0:
        plain(FAMILY).save_pretrained(folder[0], max_shard_size="60KB")
    dist.barrier()
    return expert_source(folder[0])


def main(traffic: str, victims: str, when: str, unit: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    gone = [int(rank) for rank in victims.split(",")]
    old = placement(4)
    load = np.arange(1.0, 1 + m.EXPERTS)[None].repeat(old.num_layers, axis=0)
    losses = prepared(old, unit, m.machine().node_D, load, np.ones(4))
    assert list(map(list, lost_together(unit, m.machine().node_D))).count(gone) == 1
    dist.barrier()
    split = "near" if traffic == "home" else "even"
    served = Engine(copy.deepcopy(plain(FAMILY)), old, m.machine(), traffic=traffic, split=split, budget=6,
                    group=dist.new_group(timeout=timedelta(seconds=TIMEOUT_S)))  # fmt: skip
    dies = dist.get_rank() in gone

    def die(*_) -> None:
        if dies and len(served.steps) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    if when == "amid a step":
        served.model.decoder[1].register_forward_pre_hook(die)
        if traffic == "stay":
            served.experts[1].move = lambda *a, kept=served.experts[1].move: (die(), kept(*a))[1]
    if when == "ranks a step apart":  # one has the tokens of the step, the others do not
        agree = served._agree

        def late(*a):
            tokens = agree(*a)
            die()
            if served.rank == 0 and len(served.steps) == 4:
                raise CommunicationError("as if the answer had not come")
            return tokens

        served._agree = late
    source = stored() if when == "between steps" else read
    prompts, seen = m.prompts(), None
    requests = [served.submit(prompt, NEW) for prompt in prompts]
    timeline = []
    while served.busy:
        if when in ("between steps", "a wrong read"):
            die()
        start = time.time()
        try:
            served.step()
        except CommunicationError as error:
            print(f"after {time.time() - start:.2f} s: {error}", flush=True)
            held = {r.number: r.cached for r in requests}
            if when == "a wrong read":
                refused(served, losses, gone)
            served = recover(served, losses, source, gone=gone if when != "between steps" else ())
            assert served.split == split
            moved = [r.number for r in requests if r.cached == 0 < held[r.number]]
            seen = {"ranks": served.ranks, "again": moved, "cached": [r.cached for r in requests],
                    "reads": len(losses.of(gone).reads_R3(old)), "copies": losses.of(gone).copies}  # fmt: skip
        timeline.append([round(time.time() - start, 4), sum(len(r.sampled) for r in requests)])
    while served.swapping:
        served.step()
    final = losses.of(gone).after_on_rest
    assert (served.placement.count_LED() == final.count_LED()).all(), "the balanced placement serves in the end"
    right = [r.sampled for r in requests] == answers(FAMILY, new=NEW)
    more = served.generate(prompts, NEW) == answers(FAMILY, new=NEW)
    print(json.dumps({"right": right, "more": more, "timeline": timeline, **(seen or {})}))
    leave_group(served)


def refused(served: Engine, losses, gone: list[int]) -> None:
    """What one rank reads is wrong, or it cannot read: every rank that is left says so, and none waits for another."""
    told = {}
    for kind, source in SOURCES.items():
        try:
            recover(served, losses, source, gone=gone)
        except (CommunicationError, OSError, RuntimeError, KeyError) as error:
            told[kind] = f"{type(error).__name__}: {error}"
    print(json.dumps({"refused": told}), flush=True)
    os._exit(0)


def broken(error: Exception):
    def source(*_):
        raise error

    return source


SOURCES = {
    "wrong": lambda *a: {name: weight + 1 for name, weight in read(*a).items()},
    "half": lambda *a: {name: weight[: len(weight) // 2] for name, weight in read(*a).items()},
    "lacks a weight": lambda *a: dict(list(read(*a).items())[:1]),
    "OSError": broken(OSError("the disk is gone")),
    "RuntimeError": broken(RuntimeError("no memory")),
}


def leave_group(served: Engine) -> None:
    """As :func:`tests.launch.leave`, whose barrier is of all ranks."""
    dist.barrier(group=served.group)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
