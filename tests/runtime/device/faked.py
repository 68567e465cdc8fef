"""A training step of the layer without a host on tensors that have no values, as one of four ranks.

    python -m tests.runtime.device.faked [--mutant]

What looks at a value, or has a size that follows one, cannot run here at all. Kernels are launched in name only: they
are proven elsewhere. Prints one line. ``--mutant``: a step that does look must not run.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist
from tests.runtime.device.traced import GraphRules
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from poise.cost.weights import step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.runtime.device import layer as code
from poise.runtime.device import planner
from poise.runtime.device.slot_weights import SlotWeights
from poise.runtime.experts import recognise
from poise.runtime.moe import GatedExperts
from poise.stepwise.kernels import LayerSlots

EXPERTS, WIDTH, INNER, TOKENS, TOP_K, WORLD, RANK = 16, 8, 6, 10, 3, 4, 1


class InName:
    """In place of a kernel."""

    def __getitem__(self, grid):
        return lambda *tensors, **sizes: None


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    for name in ("prepare_kernel", "split_kernel", "rows_kernel"):
        setattr(planner, name, InName())
    code.DeviceLayer._agree = lambda self, devices, where: None  # when it is made, the host may read
    if "--mutant" in sys.argv:
        whole = code.pairs_of
        code.pairs_of = lambda ids_TK, experts: whole(ids_TK[(ids_TK >= 0).any(1)], experts)
    kind = recognise(GatedExperts(EXPERTS, WIDTH, INNER).double())
    slots = LayerSlots.of(np.arange(EXPERTS)[:, None] % WORLD == np.arange(WORLD), 2, np.arange(WORLD) // 2)
    price = step_price(200.0, EXPERTS, Cluster.uniform(2, 2), ModelSpec.generic(EXPERTS, TOP_K, np.arange(1)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.randn(EXPERTS // WORLD, *shape, dtype=torch.float64, requires_grad=True)
                   for name, shape in kind.shapes.items()}  # fmt: skip
        held = SlotWeights(slots, weights, dist.group.WORLD)
        kernels = planner.DeviceKernels(slots, price, 1 << 16, "cpu")
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
        except (DataDependentOutputException, DynamicOutputShapeException, AssertionError) as error:
            print(f"refused: {str(error)[:200]}")
            return
        shapes = {tuple(each.grad.shape) for each in (x, router, *held.owned.values())}
    assert y.shape == x.shape and len(shapes) == 4
    print(f"{len(rules.seen)} operations without a value")


if __name__ == "__main__":
    main()
