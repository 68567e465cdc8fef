"""Compile the kernels once, before there are workers and ranks of a launch that would each do it on their own.

    python -m tests.kernels training | rest

The two parts take about as long; what is compiled already is loaded in about a second.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("training", "rest")


def compile_all() -> None:
    """Both parts, side by side."""
    running = [subprocess.Popen([sys.executable, "-m", "tests.kernels", part], cwd=ROOT) for part in PARTS]
    assert not any([one.wait() for one in running]), "the kernels do not compile"


def loops() -> None:
    """What fast loops of ranks plan with: in sharded training and in serving."""
    training()
    serving()


def training() -> None:
    """Replicas that pay, with the routing known or not, and owners by price.

    What ranks of a launch need and no function here calls would be compiled by each of them.
    """
    import numpy as np

    from poise.cost.weights import compiled_price, training_price
    from poise.machine.cluster import Cluster
    from poise.machine.model import ModelSpec
    from poise.replay.serving import FastLoop
    from poise.replay.training import Foresight, SourceLoads, replay_training
    from poise.stepwise.poise.early import improved
    from poise.stepwise.poise.gathers import OwnedLayer
    from poise.stepwise.poise.node_split import source_tokens
    from poise.stepwise.poise.shares import deal_rows
    from poise.stepwise.registry import FORESIGHT, POLICIES
    from poise.stepwise.sharding import Heterogeneous

    model = ModelSpec.generic(8, 2, np.arange(2))
    price = training_price(4096, 8, Cluster.uniform(2, 2), model)
    weight = np.random.default_rng(0).dirichlet(np.full(8, 0.4), size=(2, 4))
    loads = np.random.default_rng(1).multinomial(60_000, weight, size=(4, 2, 4)).astype(np.int32)
    traffic = SourceLoads(loads, 2)
    replay_training(traffic, FastLoop(POLICIES["poise"], 2), price, warm_up=2)
    owners = Heterogeneous(interval=1, overlap=1, by_price=True)
    for policy, replayed in itertools.product(FORESIGHT.values(), (True, False)):
        replay_training(traffic, FastLoop(policy, 2), price, sharding=owners, first_reshard=1, warm_up=1,
                        foresight=Foresight(traffic, replayed=replayed))  # fmt: skip
    owned_ED, load_SE = np.arange(8)[:, None] // 2 == np.arange(4), loads[0, 0].astype(np.int64)
    machine = compiled_price(price).machine
    improved(OwnedLayer(source_tokens(load_SE, machine), owned_ED, np.full(4, 2), compiled_price(price)), owned_ED, 1)
    deal_rows(load_SE, np.ones((8, 4)), owned_ED, machine)


def serving() -> None:
    """Replicas that pay, in the background and at once."""
    import numpy as np

    from poise.machine.cluster import Cluster
    from poise.machine.model import ModelSpec
    from poise.planning.placement import Placement
    from poise.replay.serving import FastLoop, replay_steps
    from poise.routing.batching import make_batch
    from poise.routing.synthetic import zipf_trace
    from poise.stepwise.poise.near import PoiseNear
    from poise.stepwise.registry import POLICIES

    model = ModelSpec.generic(8, 2, np.arange(2))
    trace = zipf_trace(num_tokens=96, num_layers=2, num_experts=8, top_k=2, tokens_per_request=8, seed=0)
    placed = Placement.from_devices(np.stack([np.arange(8) // 2] * 2), 4)
    slow = Cluster(np.array([0, 0, 1, 1], np.int32), np.ones(4), 1e6, 1e6, 1e9, 1e12, 1e12, intra_latency_s=1e-9,
                   inter_latency_s=1e-9)  # fmt: skip
    for policy, window_s in itertools.product((POLICIES["poise"], PoiseNear(margin=0.0, refresh=2)), (1e-9, 1.0)):
        loop = FastLoop(policy, 2, window_s=window_s, control_s=0.0, engine_split="near")
        replay_steps(make_batch(trace, tokens_per_step=24), placed, loop, slow, model, traffic="home", warm_up=1)


def rest() -> None:
    """Serving, planning methods, what engines' plugins plan with, and other policies."""
    import numpy as np

    from poise.engines.plugins.policy import warm_up
    from poise.machine.cluster import Cluster
    from poise.machine.model import ModelSpec
    from poise.planning.problem import PlacementProblem
    from poise.planning.solve.repair import prepared
    from poise.planning.solve.solve import METHODS, solve
    from poise.planning.solve.survive import hardened
    from poise.replay.serving import FastLoop, replay_steps
    from poise.routing.batching import make_batch
    from poise.routing.synthetic import zipf_trace
    from poise.stepwise.registry import POLICIES
    from poise.util.errors import NoResultError

    serving()
    trace = zipf_trace(num_tokens=96, num_layers=2, num_experts=8, top_k=2, tokens_per_request=8, seed=0)
    batch = make_batch(trace, tokens_per_step=24)
    cluster, model = Cluster.uniform(2, 2), ModelSpec.generic(8, 2, batch.layer_ids_L)
    for traffic in ("home", "home_node_dedup", "stay"):
        problem = PlacementProblem(batch, cluster, model, np.full(4, 3), traffic)
        for method in METHODS:
            try:
                solution = solve(problem, method=method, work=1.5)
            except NoResultError:
                continue
    for unit_D in (np.arange(4), np.arange(4) // 2):
        hardened(problem, solution.placement, unit_D)
    warm_up()
    prepared(solution.placement, "device", cluster.node_D, batch.load_LE(), np.ones(4))
    for policy in POLICIES.values():
        replay_steps(batch, solution.placement, FastLoop(policy, 2), cluster, model, traffic="home", warm_up=1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"training": training, "rest": rest}[sys.argv[1]]()
