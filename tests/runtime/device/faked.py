"""A training step of the layer without a host on tensors that have no values, as one of four ranks.

    python -m tests.runtime.device.faked cpu|meta[:counts|copy] ...

What looks at a value, or has a size that follows one, cannot run here at all: on fake tensors with a fake process
group, and on the meta device, where what would copy to the host cannot either and collectives give a shape. Kernels are launched in name only: they are proven elsewhere. With
another word: a step that looks at counts, or copies them, must not run. Prints a line for each that is asked for, which runs in a
process of its own.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.runtime.device.traced import GraphRules
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from poise.cost.weights import step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.runtime.device import layer as code
from poise.runtime.device import padded, planner, slot_weights
from poise.runtime.device.slot_weights import SlotWeights
from poise.runtime.experts import recognise
from poise.runtime.moe import GatedExperts
from poise.stepwise.kernels import LayerSlots

EXPERTS, WIDTH, INNER, TOKENS, TOP_K, WORLD, RANK = 16, 8, 16, 10, 3, 4, 1


class InName:
    """In place of a kernel."""

    def __getitem__(self, grid):
        return lambda *tensors, **sizes: None


def main(where: str, *mutant: str) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    for name in ("prepare_kernel", "split_kernel", "rows_kernel"):
        setattr(planner, name, InName())
    code.DeviceLayer._agree = lambda self, devices, where: None  # when it is made, the host may read
    if where == "meta":
        padded.exchange_equal = slot_weights.exchange_equal = lambda x, group: torch.empty_like(x)
        code.gather = lambda mine_X, group: mine_X.new_empty(WORLD, len(mine_X))
    if mutant:
        whole = code.pairs_of
        looks = {"counts": lambda ids: ids[(ids >= 0).any(1)], "copy": lambda ids: ids.cpu().to(where)}[mutant[0]]
        code.pairs_of = lambda ids_TK, experts: whole(looks(ids_TK), experts)
    kind = recognise(GatedExperts(EXPERTS, WIDTH, INNER).double())
    slots = LayerSlots.of(np.arange(EXPERTS)[:, None] % WORLD == np.arange(WORLD), 2, np.arange(WORLD) // 2)
    price = step_price(200.0, EXPERTS, Cluster.uniform(2, 2), ModelSpec.generic(EXPERTS, TOP_K, np.arange(1)))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if where == "cpu" else nullcontext()
    with mode, torch.device(where):
        weights = {name: torch.randn(EXPERTS // WORLD, *shape, dtype=torch.float64, requires_grad=True)
                   for name, shape in kind.shapes.items()}  # fmt: skip
        held = SlotWeights(slots, weights, dist.group.WORLD)
        kernels = planner.DeviceKernels(slots, price, 1 << 16, where)
        layer = code.DeviceLayer(kind, kernels, slots, held, tokens=TOKENS, top_k=TOP_K, group=dist.group.WORLD)
        x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
        ids = torch.randint(0, EXPERTS, (TOKENS, TOP_K))
        router = torch.rand(TOKENS, TOP_K, dtype=torch.float64, requires_grad=True)
        rules = GraphRules()
        try:
            with rules:
                layer.prepare()
                y = layer(x, ids, router)
                y.sum().backward()
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            NotImplementedError,
            AssertionError,
        ) as error:
            print(f"refused: {' '.join(str(error).split())[:200]}")
            return
        shapes = {tuple(each.grad.shape) for each in (x, router, *held.owned.values())}
    assert y.shape == x.shape and len(shapes) == 4
    print(f"{len(rules.seen)} operations without a value")


if __name__ == "__main__":
    for one in sys.argv[1:]:
        child = os.fork()
        if not child:
            print(f"{one} ", end="")
            main(*one.split(":"))
            sys.exit()
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{one} did not end well")
