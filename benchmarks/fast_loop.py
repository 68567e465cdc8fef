"""Time of the fast loop's kernels on one core, E = 256, and of a look of poise-near.

    python benchmarks/fast_loop.py [looks]

Loads: log-normal, redrawn 300 times; placements: LPT with greedy replicas for other loads of the same law.
"""

from __future__ import annotations

import sys
import time
from itertools import product

import numpy as np
from common import table, write

from poise.cost.quota import QuotaProblem, balance, make_holders, make_scratch
from poise.cost.route import rows_into
from poise.cost.weights import compiled_price, control_seconds, step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.methods.lpt import pack_all
from poise.planning.problem import deal_slots
from poise.stepwise.driver import LayerDriver
from poise.stepwise.poise.host import host_looks, look_seconds
from poise.stepwise.poise.outlook import Site, best_sending
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.ways import first_batch
from poise.stepwise.poise.work_split import best_split
from poise.stepwise.poise.workspace import Desk, make_workspace

EXPERTS, DRAWS, LOOKS = 256, 300, 5


def timed(call) -> str:
    call()
    seconds = []
    for _ in range(DRAWS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    median, p99 = 1e6 * np.percentile(seconds, [50, 99])
    return f"{median:.0f} / {p99:.0f}"


def looks() -> list[str]:
    """Processor seconds of all that a look at one layer plans, for the holders before and after its batch."""
    rows = []
    for name, spec in product(("llama-4-maverick", "deepseek-v3"), ("1x8:h200", "2x8:h200", "4x8:h200", "8x8:h200")):
        model, cluster = ModelSpec.parse(name), Cluster.parse(spec)
        experts, devices = model.num_experts, cluster.num_devices
        for tokens in (1024, 16384):
            price, took = step_price(tokens, experts, cluster, model), []
            for seed in range(LOOKS + 1):  # the first one compiles
                rng = np.random.default_rng(seed)
                law = rng.dirichlet(np.exp(1.5 * rng.standard_normal(experts)))
                loads = rng.multinomial(tokens * model.top_k, law, 24).astype(float).tobytes()
                held = pack_all(rng.permutation(law), deal_slots(experts, devices, devices), np.ones(devices)) > 0
                site = Site(held.tobytes(), 2, price)
                began = time.process_time()
                batch = first_batch(site, held.tobytes(), loads, 200.0, 0.02)
                after = held if batch is None else (held & ~batch.dropped_ED) | batch.coming_ED
                for holders in (held, after):
                    best_sending(site, holders.tobytes(), loads, 0.05)
                took.append(1e3 * (time.process_time() - began))
            charged = 1e3 * look_seconds(experts, devices)
            low, mid, high = np.percentile(took[1:], [0, 50, 100])
            rows.append([name, spec, tokens, f"{mid:.1f}", f"{low:.1f} to {high:.1f}", f"{charged:.1f}",
                         *host_looks(price, experts, float(tokens * model.top_k), 8)])  # fmt: skip
            print(rows[-1], flush=True)
    return ["## A look of poise-near at one layer",
            f"Ways to better holders, shares and how tokens are sent, one core; median and range of {LOOKS} random laws, CPU ms. "
            "Charged: what the policy reckons with; then steps between two looks at a layer, the same while few steps are known, and "
            "steps until what was found is in force.",
            table(["model", "machine", "tokens a step", "ms", "range", "charged", "every", "soonest", "late"], rows)]  # fmt: skip


def main() -> None:
    if sys.argv[1:] == ["looks"]:
        write("Fast loop: looks", looks(), "-looks")
        return
    rng, rows = np.random.default_rng(0), []
    model = ModelSpec.parse("deepseek-v3")
    for devices, slots in ((8, 264), (64, 320), (64, 448), (1024, 2048)):
        cluster = Cluster.parse(f"{max(1, devices // 8)}x8:h100+datasheet")
        for skew in (0.5, 1.0):
            law = np.exp(skew * rng.standard_normal(EXPERTS))
            shape = np.full(devices, slots // devices)
            held = pack_all(law * np.exp(0.3 * rng.standard_normal(EXPERTS)), shape, np.ones(devices)) > 0
            holders, scratch = make_holders(held), make_scratch(EXPERTS, devices)
            quota, none, speed = np.zeros(holders.device_H.size, np.int64), np.zeros(0, np.int64), np.ones(devices)
            draws = [rng.poisson(law * np.exp(0.3 * rng.standard_normal(EXPERTS)) * 500).astype(np.int64)
                     for _ in range(DRAWS + 1)]  # fmt: skip
            turn = iter(draws)
            split = timed(lambda turn=turn, none=none, h=holders, q=quota, c=scratch, s=speed:
                          balance(QuotaProblem(next(turn), s, none, none, 0.0), h, q, c))  # fmt: skip
            load = draws[0]
            sources = np.stack([rng.multinomial(n, np.full(devices, 1 / devices)) for n in load]).T.astype(np.int64)
            quota_ED = np.zeros((EXPERTS, devices), np.int64)
            balance(QuotaProblem(load, speed, none, none, 0.0), holders, quota, scratch)
            quota_ED[holders.expert_H, holders.device_H] = quota
            row, work = np.zeros((1, EXPERTS, devices), np.int64), np.zeros((2, devices), np.int64)
            node = cluster.node_D.astype(np.int64)
            own = timed(lambda a=(sources, quota_ED, node, 3, work[0], work[1], row): rows_into(*a))
            after = before = ""
            if devices <= 64:
                price = step_price(4096, EXPERTS, cluster, model)
                rates = compiled_price(price).machine
                ready = Desk(rates, make_workspace(EXPERTS, devices, slots + 2 * devices)).put(held)
                after = timed(lambda a=(sources, 0.05, ready): best_split(*a))
                driver = LayerDriver(Poise(objective="tokens"), held, step_slots=2, layer=0)
                view = driver.view(0, load.astype(float), np.zeros((0, EXPERTS)), price)
                began = time.perf_counter()
                for _ in range(5):
                    driver.choose(view)
                before = f"{1e3 * (time.perf_counter() - began) / 5:.1f} ms"
            rows.append(
                [devices, slots, skew, split, own, after, before, f"{1e6 * control_seconds(EXPERTS, cluster):.0f}"]
            )
            print(rows[-1], flush=True)
    write("Fast loop: planning time", [
        f"Median / 99th percentile of {DRAWS} calls, us, one core, compiled, nothing allocated. `split`: exact quotas. "
        "Own row: one rank's tokens to every replica. After the gate: poise's three splits, priced for these sources. "
        "Before the gate: all step replicas from nothing, 2 slots a GPU (hidden under attention; with replicas kept, a "
        "step adds few). Control: what the cost model charges a layer, exchange of counts and synchronisation included.",
        table(["GPUs", "slots", "skew", "split us", "own row us", "after the gate us", "before the gate", "charged us"],
              rows),
        *looks(),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
