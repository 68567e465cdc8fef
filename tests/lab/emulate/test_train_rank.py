"""One repeat of what the measured training table runs: what it writes, and experts on a clock against a dense run."""

import json
from pathlib import Path

import numpy as np
from tests.launch import ranks

from poise.cost.weights import HIDDEN_SHARE, dense_gradient_seconds, training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.replay.serving import FastLoop
from poise.replay.training import SourceLoads, replay_training
from poise.routing.predict import SlidingMean
from poise.simulate.training import Backward, Forward
from poise.stepwise.registry import parse_policy
from poise.stepwise.sharding import even_sharding

SCRIPT = "benchmarks/train_rank.py"
LAYERS, EXPERTS, WARM_UP, TOKENS, WIDTH, ROWS = 2, 6, 3, 12, 8, 16
FIXED_S, TOKEN_S, WINDOW_S = 2e-3, 1e-4, 5e-3
MODEL = ModelSpec("training", LAYERS, tuple(range(LAYERS)), EXPERTS, 2, WIDTH, ROWS, 1, 4.0, 4.0, 4.0, 2.0 * WIDTH)


def job_of(tmp_path: Path) -> dict:
    curve, cluster = tmp_path / "curve.csv", tmp_path / "cluster.yaml"
    curve.write_text("tokens,active_experts,seconds\n" + "".join(f"{n},1,{FIXED_S + n * TOKEN_S}\n" for n in (1, 64)))
    cluster.write_text(Cluster.uniform(1, 2).to_yaml())
    owners = even_sharding(LAYERS, EXPERTS, 2).tolist()

    def row(name: str, policy: str, **more: object) -> dict:
        return {"name": name, "policy": policy, "step_slots": 2, "owners": owners, **more}

    table = [row("ep", "expert-parallelism"), row("poise", "poise"), row("hecate-RM", "hecate:overlap=3", rematerialise=True),
             row("flex", "flex-moe:trigger=1.05"), row("forced", "expert-parallelism", traffic="forced")]  # fmt: skip
    return {"cluster": str(cluster), "curve": str(curve), "window_s": WINDOW_S, "layers": LAYERS, "experts": EXPERTS, "top_k": 2,
            "width": WIDTH, "rows_per_expert": ROWS, "warm_up": WARM_UP, "steps": 1, "repeats": 1, "stream": True,
            "table": table}  # fmt: skip


def test_a_repeat_on_two_ranks(tmp_path):
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS)
    load = np.stack([[rng.multinomial(2 * TOKENS, p, size=2) for p in share] for _ in range(WARM_UP + 1)]).astype(
        np.int32
    )
    loads = SourceLoads(load, 2)
    job, paths = job_of(tmp_path), [tmp_path / name for name in ("job.json", "counts.npz", "out.npz")]
    paths[0].write_text(json.dumps(job))
    np.savez(paths[1], load=load, forced=loads.force_balanced().load_BLSE)
    ranks(2, SCRIPT, *map(str, paths), folder=tmp_path)
    with np.load(paths[2], allow_pickle=False) as z:
        out = {name: z[name] for name in z.files}
    rows = len(job["table"])
    assert out["marks"].shape == (rows, 1, 1, LAYERS, 2, 2, len(Forward)) and out["ends"].shape == (rows, 1, 1, 2, 2)
    assert out["gaps"].max() < 1e-5
    assert (np.diff(out["marks"][..., 0, :], axis=-1) >= 0).all()
    assert (np.diff(out["marks"][..., 1, : len(Backward)], axis=-1) >= 0).all()
    assert len(json.loads(str(out["spans"]))) == 2

    forward = out["marks"][0, 0, 0, :, :, 0]  # of expert parallelism, [L, D, 11]
    took = forward[..., Forward.COMPUTED] - forward[..., Forward.READY]
    here = load[WARM_UP].sum(axis=1).reshape(LAYERS, 2, EXPERTS // 2)  # [L, D, experts of a rank]
    asked = ((here > 0) * FIXED_S + here * TOKEN_S).sum(axis=2)
    assert (took >= asked - 1e-4).all()  # a busy machine may take longer

    for number, row in enumerate(job["table"]):
        traffic = loads.force_balanced() if row["name"] == "forced" else loads
        loop = FastLoop(parse_policy(row["policy"]), 2, SlidingMean(5))
        cluster = Cluster.uniform(1, 2)
        price = training_price(TOKENS * 2, EXPERTS, cluster, MODEL, window_s=WINDOW_S,
                               rematerialise=row.get("rematerialise", False), hidden_share=HIDDEN_SHARE,
                               dense_s=dense_gradient_seconds(cluster, MODEL, MODEL.weight_bytes))  # fmt: skip
        got = replay_training(traffic, loop, price, warm_up=WARM_UP, by_rank=True)
        assert (got.tokens_BLD == out["tokens"][number]).all(), row["name"]
