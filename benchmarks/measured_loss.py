"""Ranks are killed amid serving on an emulated cluster: whether a token is wrong, how long none comes, and what comes then.

    python benchmarks/measured_loss.py [--repeats 3] [--keep FOLDER]

Needs root, ip and tc (docs/emulation.md). A tiny OLMoE of random weights serves greedily; what one process samples is
what must come out. Placement by LPT from loads of its own answers, losses prepared beforehand (docs/losses.md).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import REPORTS, table, write
from measured import workplace
from pictures import line_chart, save
from transformers import OlmoeConfig

from poise.cost.split import even_share
from poise.lab.emulate import EmulatedCluster, run
from poise.planning.losses import Losses
from poise.planning.methods.lpt import pack_all
from poise.planning.placement import Placement
from poise.planning.solve.repair import prepared
from poise.serve.load import from_config

NODES, DEVICES, LAYERS, EXPERTS, TOP_K, SLOTS = 2, 4, 4, 16, 2, 5
INTRA, INTER = 20e6, 5e6
"""Ports, bytes a second of this machine's clock."""
TOKEN_S = 0.001
"""Of an expert, each token."""
REQUESTS, PROMPT, NEW, MOST_LIVE, BUDGET = 160, 12, (24, 56), 8, 32
LOST_AT = 40
TIMEOUT_S = 3.0
WINDOW_S = 1.0
"""Of a point of the timeline."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Ranks that are lost, and whether somebody tells the others who is."""

    name: str
    unit: str
    gone: tuple[int, ...]
    told: bool


SCENES = (
    Scene("a device, who is gone is told", "device", (5,), True),
    Scene("a device, nobody tells", "device", (5,), False),
    Scene("a node, who is gone is told", "node", (4, 5, 6, 7), True),
)


def model_in(folder: Path) -> Any:
    """The model, and its checkpoint there."""
    config = OlmoeConfig(
        vocab_size=211, hidden_size=64, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_experts=EXPERTS, num_experts_per_tok=TOP_K, initializer_range=0.3, pad_token_id=0,
        eos_token_id=1, max_position_embeddings=256,
    )  # fmt: skip
    model = from_config(config, seed=0, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the grouped one takes no float64
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def answers(model: Any, prompts: list[list[int]], new: list[int]) -> tuple[list[list[int]], np.ndarray]:
    """What one process samples, and the tokens of every expert, [L, E]."""
    out, load_LE = [], np.zeros((LAYERS, EXPERTS))
    for prompt, length in zip(prompts, new, strict=True):
        ids, past, sampled = torch.tensor([prompt]), None, []
        while len(sampled) < length:
            got = model(ids, past_key_values=past, use_cache=True, output_router_logits=True)
            past, best = got.past_key_values, int(got.logits[0, -1].argmax())
            sampled.append(best)
            ids = torch.tensor([[best]])
            for layer, logits in enumerate(got.router_logits):
                chosen = logits.topk(TOP_K, dim=-1).indices.flatten()
                load_LE[layer] += np.bincount(chosen.numpy(), minlength=EXPERTS)
        out.append(sampled)
    return out, load_LE


def placed(load_LE: np.ndarray) -> Placement:
    """LPT, layer by layer."""
    slots_D, speed_D = np.full(NODES * DEVICES, SLOTS), np.ones(NODES * DEVICES)
    return Placement.from_counts(np.stack([pack_all(load_E, slots_D, speed_D) for load_E in load_LE]), method="lpt")


def throughput(steps: np.ndarray, first: float, last: float) -> float:
    """Tokens a second between two moments."""
    at, tokens = steps.T
    return float(np.diff(np.interp([first, last], at, tokens))[0] / (last - first))


def line(steps: np.ndarray) -> list[tuple[float, float]]:
    """Tokens a second over the window around each quarter of a second."""
    half = WINDOW_S / 2
    return [(at, throughput(steps, at - half, at + half)) for at in np.arange(half, steps[-1, 0] - half, WINDOW_S / 4)]


def fullest(placement: Placement, load_LE: np.ndarray, devices: int) -> float:
    """Mean over layers of the largest load over the mean of the devices that are left."""
    load_LD = np.einsum("le,led->ld", load_LE, even_share(placement.count_LED()))
    return float((load_LD.max(axis=1) * devices / load_LD.sum(axis=1)).mean())


def main() -> None:
    """Serve, lose, report."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--keep", type=Path, help="folder for what is measured")
    given = options.parse_args()
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, 211, (REQUESTS, PROMPT)).tolist()
    new = rng.integers(*NEW, REQUESTS).tolist()
    with workplace(given.keep) as folder:
        want, load_LE = answers(model_in(folder / "model"), prompts, new)
        before, node_D = placed(load_LE), np.arange(NODES * DEVICES, dtype=np.int32) // DEVICES
        rows, drawn = [], {}
        for scene in SCENES:
            losses = prepared(before, scene.unit, node_D, load_LE, np.ones(NODES * DEVICES))
            losses.save(folder / f"{scene.unit}.npz")
            job = {"model": str(folder / "model"), "losses": str(folder / f"{scene.unit}.npz"), "shape": [NODES, DEVICES],
                   "token_s": TOKEN_S, "traffic": "home_node_dedup", "budget": BUDGET, "most_live": MOST_LIVE,
                   "timeout_s": TIMEOUT_S, "lost_at": LOST_AT, "gone": scene.gone, "told": scene.told,
                   "prompts": prompts, "new": new}  # fmt: skip
            (folder / "job.json").write_text(json.dumps(job))
            every = []
            for _ in range(given.repeats):
                done = run(EmulatedCluster(NODES, DEVICES, INTRA, INTER), Path(__file__).parent / "loss_rank.py",
                           [str(folder / "job.json")], timeout=600, may_die=scene.gone, out=StringIO())  # fmt: skip
                if not done.shaped:
                    raise SystemExit("the links were not shaped: nothing was measured (root, ip and tc are needed)")
                every.append(judged(done.ranks, scene, want))
                print(scene.name, every[-1][:-1], flush=True)
            drawn[scene.name] = line(every[0][-1])
            rows.append(row(scene, losses, load_LE, [one[:-1] for one in every], new))
    picture = REPORTS / "measured-loss.svg"
    save(picture, line_chart(drawn, "seconds", "tokens a second", log=False))
    write("Ranks lost amid serving, emulated", report(rows, given.repeats, picture))


def judged(ranks: Any, scene: Scene, want: list[list[int]]) -> tuple[Any, ...]:
    """Of a run: seconds, tokens a second before and after, requests run again, reads, copies, overruns; steps."""
    codes = {one.rank: one.exit_code for one in ranks}
    assert all(codes[rank] == -9 for rank in scene.gone), f"ranks {scene.gone} were to be killed: {codes}"
    said = [json.loads(one.stdout.splitlines()[-1]) for one in ranks if one.rank not in scene.gone]
    wrong = sum(got != right for one in said for got, right in zip(one["sampled"], want, strict=True))
    if wrong:
        raise SystemExit(f"{scene.name}: {wrong} answers are not those of one process")
    one = max(said, key=lambda each: each["recovered"])
    steps = np.array(one["steps"])
    end = np.interp(0.85 * steps[-1, 1], steps[:, 1], steps[:, 0])  # the last requests do not fill a step
    began = steps[LOST_AT // 4, 0]
    return (
        one["noticed"] - one["last_step"], one["recovered"] - one["noticed"], one["balanced"] - one["recovered"],
        throughput(steps, began, one["last_step"]), throughput(steps, one["balanced"], max(end, one["balanced"] + 1)),
        one["again"], one["reads"], one["copies"], sum(each["overruns"] for each in said), steps,
    )  # fmt: skip


def row(
    scene: Scene, losses: Losses, load_LE: np.ndarray, every: list[tuple[Any, ...]], new: list[int]
) -> list[object]:
    """Medians over repeats."""
    noticed, back, balanced, before, after, again, reads, copies, overruns = np.median(np.array(every), axis=0)
    left, loss = NODES * DEVICES - len(scene.gone), losses.of(scene.gone)
    return [scene.name, f"{len(new) * len(every)} of {len(new) * len(every)}", f"{noticed:.2f}", f"{back:.2f}", f"{balanced:.2f}",
            f"{before:.0f}", f"{after:.0f} ({after / before:.0%})", f"{left / NODES / DEVICES:.0%}", f"{again:.0f}", f"{reads:.0f}", f"{copies:.0f}",
            f"{fullest(losses.before, load_LE, NODES * DEVICES):.2f}, {fullest(loss.first, load_LE, left):.2f}, {fullest(loss.after, load_LE, left):.2f}",
            f"{overruns:.0f}"]  # fmt: skip


def report(rows: list[list[object]], repeats: int, picture: Path) -> list[str]:
    """The table and the timeline."""
    head = ["lost", "answers as one process", "noticed s", "serving again s", "balanced s", "tokens/s before", "after", "devices left",
            "requests run again", "experts read", "copied", "max/mean before, at once, after", "overruns"]  # fmt: skip
    return [
        f"{NODES} nodes of {DEVICES} ranks, ports {INTRA / 1e6:g} and {INTER / 1e6:g} MB/s, an OLMoE of {LAYERS} layers of {EXPERTS} experts, "
        f"top-{TOP_K}, float64, {SLOTS} slots a rank, tokens once a node. {REQUESTS} requests of {PROMPT} tokens, {NEW[0]} to {NEW[1] - 1} new ones, "
        f"at most {MOST_LIVE} a rank at a time. A token takes an expert {1e3 * TOKEN_S:g} ms, slept. Ranks are killed in layer 2 of step {LOST_AT + 1}. "
        f"The process group's time-out is {TIMEOUT_S:g} s. Median of {repeats} launches.",
        "Noticed: from the end of the last step to the error, on the rank that went on last. Serving again: from there until the "
        "new process group serves, orphans read (experts are tiny here: this says nothing of reading real ones). Balanced: "
        "until the copies have come, while steps go on. Tokens a second: before, from a quarter of those steps on; after, from then until 85 % of all tokens.",
        table(head, rows),
        f"![Tokens a second over time]({picture.name})",
        f"Tokens a second in windows of {WINDOW_S:g} s, the first launch of each.",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
