"""Decoding of 1,000 tokens on 8 ranks against the single-process model, token by token, with a swap in the middle.

Usage: python benchmarks/serve_parity.py [tokens=1000] [ranks=8] [FOLDER ...]

Every data flow, greedy; of one model also drawn with a seed, since greedy decoding of small models soon repeats itself.
Two models with random weights (OLMoE, DeepSeek-V3), and the checkpoints in the folders given, in two precisions. The
script starts itself as ranks.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import table, write
from tests.launch import leave
from transformers import AutoModelForCausalLM, DeepseekV3Config, OlmoeConfig

from poise.cost.traffic import DATA_FLOWS
from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.serve import Engine, from_config, from_folder
from poise.serve.requests import pick

ROOT = Path(__file__).parents[1]
SEED, SWAP_ROUNDS = 4, 20
COMMON = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_experts_per_tok": 4,
          "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 4096}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "OLMoE, random": OlmoeConfig(**COMMON, intermediate_size=32, num_hidden_layers=4, num_key_value_heads=4,
                                 num_experts=32),
    "DeepSeek-V3, random": DeepseekV3Config(
        **COMMON, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=4, num_key_value_heads=4,
        n_routed_experts=32, n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16,
        qk_rope_head_dim=16, v_head_dim=16, qk_nope_head_dim=16,
    ),
}  # fmt: skip
LENGTHS = (40, 3, 17, 1, 90)
"""Of the prompts; three of eight ranks have no request."""


def plain(name: str, dtype: torch.dtype) -> Any:
    if name in CONFIGS:
        model = from_config(CONFIGS[name], seed=SEED, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    return model


def prompts(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(SEED)
    return [rng.integers(2, vocabulary, length).tolist() for length in LENGTHS]


@torch.no_grad()
def decode(model: Any, request: int, prompt: list[int], count: int, temperature: float) -> list[int]:
    """One process, transformers' own cache and attention."""
    given, cache, out = torch.tensor([prompt]), None, []
    for _ in range(count):
        got = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache = got.past_key_values
        out.append(pick(got.logits[0, -1], temperature, SEED, request, len(prompt) + len(out)))
        given = torch.tensor([out[-1:]])
    return out


def placements(layers: list[int], experts: int, ranks: int) -> tuple[Placement, Placement]:
    """With replicas; and one that differs in most slots, with other numbers of slots and a rank without any."""
    rng = np.random.default_rng(SEED)
    first, second = np.zeros((2, len(layers), experts, ranks), np.int64)
    for layer in range(len(layers)):
        for expert in range(experts):
            first[layer, expert, rng.choice(ranks, int(rng.integers(1, 3)), replace=False)] = 1
            second[layer, expert, rng.choice(ranks - 1, int(rng.integers(1, 3)), replace=False)] = 1
    ids = np.array(layers, np.int32)
    return Placement.from_counts(first, layer_ids_L=ids), Placement.from_counts(second, layer_ids_L=ids)


def rank_main(job: dict[str, Any]) -> None:
    """What one rank runs: every case; rank 0 writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    ranks, rows = dist.get_world_size(), []
    cluster = Cluster.uniform(2, ranks // 2)
    for case in job["cases"]:
        dtype = getattr(torch, case["dtype"])
        before, after = placements(case["layers"], case["experts"], ranks)
        model: Any = (
            plain(case["model"], dtype) if case["model"] in CONFIGS
            else from_folder(case["model"], before, dist.get_rank(), dtype=dtype)
        )  # fmt: skip
        served = Engine(model, before, cluster, traffic=case["traffic"], temperature=case["temperature"], seed=SEED,
                        budget=16)  # fmt: skip
        fetched = int(before.diff(after).fetched_D.max())
        one = sum(weight[0].nbytes for weight in served.experts[case["layers"][0]].bank.values())

        def swap(running: Engine, after: Any = after, each: int = max(one, fetched * one // SWAP_ROUNDS)) -> None:
            if len(running.steps) == job["tokens"] // 2:
                running.swap(after, bytes_per_step=each)

        start = time.perf_counter()
        got = served.generate(prompts(case["vocabulary"]), job["tokens"], before_step=swap)
        seconds = time.perf_counter() - start
        (record,) = served.swaps
        gathered: list[Any] = [None] * ranks
        found = {"equal": got == case["answers"], "wait": record.wait_s, "apply": record.apply_s, "worst": record.worst_s,
                 "bytes": record.bytes_fetched, "staged": record.bytes_staged, "fetched": record.fetched}  # fmt: skip
        dist.all_gather_object(gathered, found)
        same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(got, case["answers"], strict=True)]
        rows.append({
            **{key: case[key] for key in ("model", "dtype", "traffic", "temperature")}, "seconds": seconds,
            "equal": all(one["equal"] for one in gathered), "same": sum(same), "all": job["tokens"] * len(got),
            "distinct": len({token for row in got for token in row[len(row) // 2 :]}), "steps": len(served.steps),
            "step": statistics.median(step.seconds for step in served.steps if not step.swapping),
            "step_swapping": statistics.median(step.seconds for step in served.steps if step.swapping),
            "rounds": record.rounds, "swap_steps": record.steps, "setup": record.setup_s,
            **{key: max(one[key] for one in gathered) for key in ("wait", "apply", "worst", "bytes", "staged", "fetched")},
        })  # fmt: skip
        if dist.get_rank() == 0:
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            Path(job["out"]).write_text(json.dumps(rows))
    leave()


def cases_of(name: str, dtype: str, tokens: int, temperatures: tuple[float, ...] = (0.0,)) -> list[dict[str, Any]]:
    """Every flow, and what one process answers."""
    model = plain(name, getattr(torch, dtype))
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    experts = len(next(model.model.layers[layers[0]].mlp.experts.parameters()))
    vocabulary = model.config.vocab_size
    out = []
    for temperature in temperatures:
        answers = [decode(model, i, prompt, tokens, temperature) for i, prompt in enumerate(prompts(vocabulary))]
        out += [
            {"model": name, "dtype": dtype, "traffic": traffic, "temperature": temperature, "layers": layers,
             "experts": experts, "vocabulary": vocabulary, "answers": answers} for traffic in DATA_FLOWS
        ]  # fmt: skip
    return out


def main() -> None:
    words = [word for word in sys.argv[1:] if "=" in word]
    folders = [word for word in sys.argv[1:] if "=" not in word]
    numbers = {"tokens": 1000, "ranks": 8, **{key: int(value) for key, value in (word.split("=") for word in words)}}
    torch.set_num_threads(1)
    cases = cases_of("OLMoE, random", "float64", numbers["tokens"], (0.0, 1.0))
    cases += cases_of("DeepSeek-V3, random", "float64", numbers["tokens"])
    for folder in folders:
        for dtype in ("float64", "float32"):
            cases += cases_of(folder, dtype, numbers["tokens"])
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.json"
        job.write_text(json.dumps({"cases": cases, "tokens": numbers["tokens"], "out": str(out)}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={numbers['ranks']}", str(Path(__file__)), str(job)]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = json.loads(out.read_text())
    report(rows, numbers, [trained(Path(name)) for name in folders])
    sys.stdout.flush()
    if not all(row["equal"] for row in rows if row["dtype"] == "float64"):
        sys.exit("tokens differ")


def trained(folder: Path) -> str:
    """What a checkpoint is, from what its training wrote."""
    told = folder / "metrics.json"
    if not told.is_file():
        return "CHECKPOINT is a folder that `save_pretrained` wrote."
    metrics = json.loads(told.read_text())
    return (f"CHECKPOINT is what `examples/demo_trace/train.py` wrote after {metrics['minutes']:.0f} minutes: "
            f"{metrics['parameters'] / 1e6:.1f} M parameters, held-out loss {metrics['model']['all']:.2f}.")  # fmt: skip


def report(rows: list[dict[str, Any]], numbers: dict[str, int], checkpoints: list[str]) -> None:
    def name(row: dict[str, Any]) -> str:
        model = row["model"] if row["model"] in CONFIGS else "trained, from disk"
        return f"{model}, {row['dtype']}"

    tokens = [
        [name(row), row["traffic"], "greedy" if row["temperature"] == 0 else f"temperature {row['temperature']:g}",
         f"{row['same']:,} of {row['all']:,}", row["distinct"], row["steps"], f"{row['seconds']:.0f}"]
        for row in rows
    ]  # fmt: skip
    swaps = [
        [name(row), row["traffic"], row["fetched"], f"{row['bytes'] / 2**20:.2f}", f"{row['staged'] / 2**20:.2f}",
         row["rounds"], row["swap_steps"], f"{1e3 * row['wait']:.1f}", f"{1e3 * row['apply']:.1f}",
         f"{1e3 * row['worst']:.1f}", f"{1e3 * row['step']:.0f}", f"{1e3 * row['step_swapping']:.0f}"]
        for row in rows if row["temperature"] == 0
    ]  # fmt: skip
    sys.argv[1:] = ["CHECKPOINT" if Path(word).is_dir() else word for word in sys.argv[1:]]
    write("Serving: tokens equal to the single-process model, across a swap", [
        f"{numbers['ranks']} processes (gloo, one thread each) as 2 nodes; {len(LENGTHS)} requests with prompts of "
        f"{', '.join(map(str, LENGTHS))} tokens, {numbers['tokens']:,} new tokens each, at most 16 tokens a rank and step, so that "
        "prompts run in chunks beside decoding. Placement with replicas; from the middle on another one with replicas, a rank "
        "without experts and other numbers of slots. The single process is transformers' model with its own attention and cache. "
        f"{' '.join([*checkpoints, ''])}\"Distinct\" counts different tokens in the second half of the answers.",
        table(["model", "data flow", "decoding", "tokens equal", "distinct", "steps", "seconds"], tokens),
        "## The swap\n\nMost of any rank; ms. *Staged*: memory beyond the old placement. *Wait*: sum of what steps waited for "
        "transfers; *switch*: putting rows in place; *worst*: most that one step was held up; median step without and with a "
        f"swap on its way. Bytes a step: a part in {SWAP_ROUNDS} of what the fullest rank fetches, or one expert.",
        table(["model", "data flow", "experts", "MiB", "staged MiB", "rounds", "steps", "wait", "switch", "worst", "step",
               "step, swapping"], swaps),
    ])  # fmt: skip


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank_main(json.loads(Path(sys.argv[1]).read_text()))
    else:
        main()
