"""One repeat of what the measured serving tables run: the run and its simulation give every rank the same tokens."""

import json
from dataclasses import asdict, replace

import numpy as np
from tests.launch import ranks

from poise.api import deal_slots
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.replay.serving import FastLoop
from poise.routing.batching import make_batch
from poise.routing.synthetic import zipf_trace
from poise.simulate.serving import ServingMark, served_work
from poise.stepwise.registry import parse_policy

SCRIPT = "benchmarks/serve_rank.py"
LAYERS, EXPERTS, TOP_K, WIDTH, STEPS, SLOTS, WINDOW_S = 2, 8, 2, 16, 4, 1, 5e-3
FAST = ("", "poise", "llep")


def test_a_repeat_on_two_ranks(tmp_path):
    trace = zipf_trace(num_tokens=600, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, exponent=1.2, seed=3)
    batch = make_batch(trace, tokens_per_step=128, steps=STEPS, seed=0)
    home_T = (np.arange(len(batch.experts_TLK)) % 2).astype(np.int32)
    batch = replace(batch, home_T=home_T)
    # what policies reckon with: replicas pay
    cluster = replace(Cluster.uniform(1, 2), intra_bytes_per_s=6e4, flops_per_s=5e6, memory_bytes_per_s=1e6)
    model = ModelSpec("tiny", LAYERS, tuple(range(LAYERS)), EXPERTS, TOP_K, WIDTH, 8, 2)
    problem = PlacementProblem(batch, cluster, model, deal_slots(EXPERTS, 2, 2), "home", "even")
    placement, prior = solve(problem, method="eplb").placement, batch.load_LE()

    paths = [tmp_path / name for name in ("job.json", "routing.npz", "out.npz", "cluster.yaml", "curve.csv", "map.npz")]
    paths[3].write_text(cluster.to_yaml())
    paths[4].write_text("tokens,active_experts,seconds\n1,1,0.001\n64,1,0.003\n")
    placement.save(paths[5])
    rows = [{"name": fast, "placement": str(paths[5]), "fast": fast, "step_slots": SLOTS} for fast in FAST]
    job = {"cluster": str(paths[3]), "traffic": "home", "width": WIDTH, "model": asdict(model), "curve": str(paths[4]),
           "expert_bytes": int(model.expert_bytes), "window_s": WINDOW_S, "repeats": 1, "tokens": 128, "kv_bytes": 64,
           "warm_up": 0, "steps": STEPS, "prior": prior.tolist(), "rows": rows}  # fmt: skip
    paths[0].write_text(json.dumps(job))
    np.savez(paths[1], experts=batch.experts_TLK, home=home_T, start=batch.start_B)
    ranks(2, SCRIPT, *map(str, paths[:3]), folder=tmp_path)

    with np.load(paths[2], allow_pickle=False) as z:
        marks, tokens = z["marks"], z["tokens"]
    assert marks.shape == (len(FAST), 1, STEPS, LAYERS, 2, len(ServingMark))
    assert (np.diff(marks, axis=-1) >= 0).all()
    for got, fast in zip(tokens[:, 0], FAST, strict=True):
        loop = FastLoop(parse_policy(fast), SLOTS, window_s=WINDOW_S) if fast else None
        work = served_work(batch, placement, cluster, model, traffic="home", loop=loop, prior_LE=prior)
        want = [[layer.tokens_D for layer in layers] for layers in work]
        assert (got == want).all(), fast
    assert (tokens[1:] != tokens[:1]).any(), "no fast loop did anything"
