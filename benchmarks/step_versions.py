"""A training step of this checkout and of another one, side by side: four gloo ranks each, turn by turn.

Usage: python benchmarks/step_versions.py OTHER/src [--rounds 30] [--steps 4] [--ranks 4]

Both versions' ranks stay up; while one makes its steps, the other's wait for a line. A row is the median over rounds of
the ratio this / other (quartiles in brackets), of the wall time and of the processor time of all ranks, which a busy
machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CASES: dict[str, dict[str, Any]] = {
    "small, expert-parallelism": dict(d=64, h=128, layers=4, tokens=64, policy="expert-parallelism"),
    "small, hecate, re-materialised": dict(d=64, h=128, layers=4, tokens=64, policy="hecate", again=True),
    "larger, expert-parallelism": dict(d=256, h=512, layers=4, tokens=512, policy="expert-parallelism"),
    "larger, poise": dict(d=256, h=512, layers=4, tokens=512, policy="poise"),
    "large, poise": dict(d=768, h=1536, layers=4, tokens=512, policy="poise"),
    "larger, poise, checkpointed": dict(d=256, h=512, layers=4, tokens=512, policy="poise", checkpoint=True),
}


def rank_main() -> None:
    """Makes as many steps as it is told, of one case; tells the seconds they took."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.utils.checkpoint import checkpoint

    from poise.runtime.moe import GatedExperts, MoE
    from poise.train import fully_shard_experts

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, experts = dist.get_world_size(), 16
    mesh, made = init_device_mesh("cpu", (world,)), {}

    class Block(nn.Module):
        def __init__(self, d: int, h: int) -> None:
            super().__init__()
            self.mix, self.moe = nn.Linear(d, d), MoE(GatedExperts(experts, d, h), d, experts, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + torch.tanh(self.mix(x))
            return x + self.moe(x)

    def build(
        d: int, h: int, layers: int, tokens: int, policy: str, again: bool = False, checkpoint: bool = False
    ) -> Any:
        torch.manual_seed(0)
        model = nn.ModuleList(Block(d, h) for _ in range(layers))
        fully_shard_experts(model, mesh=mesh, policy=policy, rematerialise=again)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return model, optimizer, torch.randn(tokens, d), checkpoint

    for line in sys.stdin:
        name, steps = json.loads(line)
        if name not in made:
            made[name] = build(**CASES[name])
        model, optimizer, x, again = made[name]
        dist.barrier()
        began, spent = time.perf_counter(), time.process_time()
        for _ in range(steps):
            y = x
            for block in model:
                y = checkpoint(block, y, use_reentrant=False) if again else block(y)
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()
        print(json.dumps([time.perf_counter() - began, time.process_time() - spent]), flush=True)
    os._exit(0)


class Version:
    """The ranks of one version."""

    def __init__(self, source: Path, ranks: int, port: int) -> None:
        self.ranks = []
        for rank in range(ranks):
            env = os.environ | {"PYTHONPATH": str(source), "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port),
                                "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1",
                                "PYTHONWARNINGS": "ignore"}  # fmt: skip
            self.ranks.append(subprocess.Popen([sys.executable, __file__, "--rank"], env=env, text=True,
                                               stdin=subprocess.PIPE, stdout=subprocess.PIPE))  # fmt: skip

    def steps(self, name: str, count: int) -> tuple[float, float]:
        """Wall and processor seconds a step, the longest and the sum over the ranks."""
        for rank in self.ranks:
            rank.stdin.write(json.dumps([name, count]) + "\n")
            rank.stdin.flush()
        told = np.array([json.loads(rank.stdout.readline()) for rank in self.ranks]) / count
        return float(told[:, 0].max()), float(told[:, 1].sum())

    def end(self) -> None:
        """They are done."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()


def quartiles(ratios: list[float]) -> str:
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} [{low:.3f} .. {high:.3f}]"


def main() -> None:
    if sys.argv[1:] == ["--rank"]:
        rank_main()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("other", type=Path, help="the other version's src folder")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        versions = [Version(source, given.ranks, 29610 + n) for n, source in enumerate((ROOT / "src", given.other))]
        for version in versions:
            stack.callback(version.end)
        print("| case | wall, this / other | processor | ms a step, other |\n|---|---|---|---|")
        for name in given.cases:
            for version in versions:
                version.steps(name, 12)  # plans are compiled, windows measured
            wall, cpu, other = [], [], []
            for number in range(given.rounds):
                order = (0, 1) if number % 2 else (1, 0)
                told = {which: versions[which].steps(name, given.steps) for which in order}
                wall.append(told[0][0] / told[1][0])
                cpu.append(told[0][1] / told[1][1])
                other.append(told[1][0])
            print(f"| {name} | {quartiles(wall)} | {quartiles(cpu)} | {1e3 * np.median(other):.1f} |", flush=True)


if __name__ == "__main__":
    main()
