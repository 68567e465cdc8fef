"""What plans, comparisons, replays and simulations say of fixed inputs: ``python -m tests.goldens.freeze`` writes it anew.

No clock takes part: machines are datasheets, searches count work. A file changes in a commit of its own that names the fault.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from poise.cli.main import app
from poise.cost.exchange import ExchangeModel
from poise.cost.weights import training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.replay.serving import FastLoop
from poise.replay.training import SourceLoads, replay_training
from poise.routing.batching import make_batch
from poise.routing.predict import SlidingMean
from poise.routing.synthetic import zipf_trace
from poise.simulate.serving import serve_step, served_work
from poise.simulate.training import rank_step
from poise.stepwise.registry import POLICIES, parse_policy
from poise.stepwise.sharding import Heterogeneous

FOLDER = Path(__file__).parent / "answers"
CLOCKS = {"seconds", "planning_seconds"}
FORM = {"schema", "interrupted"}
"""Keys of every answer that say nothing of the input."""
DEMO = "src/poise/data/demo_trace.npz"
PLAN = [
    "plan",
    DEMO,
    "--homes",
    "by-request",
    "-n",
    "1024",
    "--work",
    "1",
    "--json",
    "--no-verdict",
    "-c",
    "2x4:h100+datasheet",
]
COMPARE = ["compare", DEMO, "--homes", "by-request", "-n", "1024", "--work", "0.3", "--json", "-c"]
COMMANDS = {
    "plan": [*PLAN, "-r", "8"],
    "plan-node-of-4": [*PLAN, "-c", "1x4:h100+datasheet", "-r", "4", "--engine", "sglang"],
    "plan-home": [*PLAN, "-r", "8", "--traffic", "home", "--engine", "none"],
    "plan-stay": [*PLAN, "--traffic", "stay"],
    "plan-worst": [*PLAN, "-r", "8", "--risk", "worst", "--split", "exact"],
    "plan-model": [*PLAN, "-m", "tests/goldens/answers/config.json"],
    "plan-pooled": [*PLAN, "--pooled", "--engine", "none", "--method", "moetuner"],
    "plan-eplb": [*PLAN, "-r", "8", "--method", "eplb"],
    "compare": [*COMPARE, "2x4:h100+datasheet", "-r", "8"],
    "compare-fast": [
        *COMPARE, "1x4:h100+datasheet", "-r", "4", "-p", "eplb-global", "--steps", "4", "--warm-up", "2",
        *(word for name in POLICIES for word in ("--fast", name)), "-m", "tests/goldens/answers/config.json",
    ],
    "compare-fast-nodes": [
        *COMPARE, "2x4:h100+datasheet", "-r", "8", "-p", "lpt", "--steps", "4", "--warm-up", "2", "--traffic", "home",
        *(word for name in POLICIES for word in ("--fast", name)),
    ],
}  # fmt: skip


def without_clocks(value: Any) -> Any:
    """The same without what a clock has measured."""
    if isinstance(value, dict):
        timed = {key for key in value if key in CLOCKS and not isinstance(value[key], dict)}
        return {
            key: without_clocks(one)
            for key, one in value.items()
            if key not in timed or ("lower_bound" in value and "gap" not in value)
        }
    return [without_clocks(one) for one in value] if isinstance(value, list) else value


def command(words: list[str]) -> Any:
    """What it prints, and the placement that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.npz"
        done = CliRunner().invoke(app, [*words, *(["-o", str(path)] if words[0] == "plan" else [])])
        assert done.exit_code == 0, done.stderr or done.exception
        said = {key: value for key, value in json.loads(done.stdout).items() if key not in FORM}
        out = {"said": without_clocks(said)}
        if path.exists():
            out["slots"] = Placement.load(path).slot_expert_LS.tolist()
        return out


def training() -> Any:
    """Every policy over five steps, with new owners after three, on two nodes of two."""
    rng, cluster, model = np.random.default_rng(5), Cluster.uniform(2, 2), ModelSpec.generic(8, 2, np.arange(2))
    weight = rng.dirichlet(np.full(8, 0.4), size=(2, 4))
    loads = SourceLoads(rng.multinomial(600, weight, size=(5, 2, 4)).astype(np.int32), 2)
    out = {}
    for name, policy in POLICIES.items():
        for again in (False, True):
            price = training_price(4096, 8, cluster, model, window_s=1e-6, control_s=0.0, rematerialise=again)
            got = replay_training(loads, FastLoop(policy, 2), price, sharding=Heterogeneous(overlap=2), first_reshard=3,
                                  warm_up=1, by_rank=True)  # fmt: skip
            ends = [rank_step(work, cluster.node_D, ExchangeModel.of(cluster), window_s=1e-6, counts_s=2e-6).end_D.tolist()
                    for work in got.work_BL]  # fmt: skip
            out[f"{name}, {'materialised again' if again else 'kept'}"] = {
                "seconds of steps": got.step_seconds_B.tolist(), "tokens": got.tokens_BLD.tolist(), "ends of ranks": ends,
                "replicas": got.replicas_BLD.tolist(), "bytes": got.moved_BL.tolist(), "owners": got.owner_LE.tolist(),
            }  # fmt: skip
    return out


def serving() -> Any:
    """Marks of ranks under three data flows, with and without policies, and an engine's own split."""
    cluster, trace = Cluster.uniform(2, 2), zipf_trace(num_tokens=1200, num_layers=2, num_experts=12, top_k=2, seed=3)
    batch = make_batch(trace, tokens_per_step=240, homes="by-request")
    model, draw = ModelSpec.generic(12, 2, batch.layer_ids_L), np.random.default_rng(3)
    slots = np.stack([np.concatenate([draw.permutation(12), draw.choice(12, 4, replace=False)]) for _ in range(2)])
    placement = Placement(slots.astype(np.int32), np.sort(np.arange(16) % 4).astype(np.int32), 12, 4)
    out = {}
    for traffic in ("home", "home_device_dedup", "stay"):
        for name in ("", "split", "lplb", "poise", "hecate", "ultra-ep") if traffic == "home" else ("",):
            loop = FastLoop(parse_policy(name), 2, SlidingMean(2)) if name else None
            work = served_work(batch, placement, cluster, model, traffic=traffic, loop=loop)
            marks = [serve_step(one, cluster.node_D, ExchangeModel.of(cluster), window_s=1e-5, counts_s=2e-6, planning_s=1e-6)
                     for one in work]  # fmt: skip
            out[f"{traffic}, {name or 'no policy'}"] = {
                "marks": [one[:, :, -1].tolist() for one in marks], "tokens": [[layer.tokens_D.tolist() for layer in one] for one in work],
            }  # fmt: skip
    return out


WORK: dict[str, Callable[[], Any]] = {
    **{name: lambda words=words: command(words) for name, words in COMMANDS.items()},
    "training": training,
    "serving": serving,
}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def main() -> None:
    for name in sys.argv[1:] or WORK:
        path_of(name).write_text(json.dumps(WORK[name](), indent=1) + "\n")


if __name__ == "__main__":
    main()
