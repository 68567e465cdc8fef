"""The pages of docs/recipes, from one table: commands, flags, and what a verdict says on generated loads.

Usage: python benchmarks/recipes.py [NAME ...]

Writes the pages that are named, or all. Figures come from :func:`poise.verdict` on loads made here (no recording of a
served model): two windows of four MoE layers and six steps, experts' shares falling as 1 / rank ** 0.4 (the fullest of
256 has 5.5 times the mean; 5.6 to 8.1 were seen in DeepSeek's), each window with its own drift of 20 %.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import poise
from poise.engines.slots import trivial_placement
from poise.machine.model import ModelSpec
from poise.replay.verdict import Verdict
from poise.routing.trace import LoadProfile

DOCS = Path(__file__).parents[1] / "docs" / "recipes"
LAYERS, STEPS, EXPONENT, DRIFT, WORK = 4, 6, 0.4, 0.2, 1.0
HEADS = ("phase", "cluster", "ranks", "tokens a step", "verdict", "map", "saves a step", "of the step",
         "more GiB of slots a rank", "fewer tokens of cache", "paid back after")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A machine and a phase: N tokens a rank, R redundant slots."""

    phase: str
    cluster: str
    ranks: int
    tokens_a_rank: int
    redundant: int


@dataclass(frozen=True)
class Recipe:
    """A page. ``hub`` : the model's name as engines take it. ``serve`` : flags of the launch beside those of experts."""

    name: str
    title: str
    model: str
    hub: str
    engine: str
    serve: str
    rows: tuple[Row, ...]
    about: str
    memory: str
    wrong: tuple[str, ...]


DEEP = "--enable-dp-attention --moe-a2a-backend deepep"
GROUPS = (
    "DeepSeek's router picks 4 of 8 groups of experts. `poise plan --keep-groups pays` asks whether groups should lie whole "
    "on nodes; a map that scatters them sends a token to more nodes ([planning](../planning.md))."
)
SLOTS = "SGLang wants experts and redundant slots together divisible by the ranks: 256 + 32 = 288 is, by 32, 72, 96 and 144."
LIVE = "A map that is given and does not run: `poise verify` after the start ([engines](../engines.md))."
RECIPES = (
    Recipe(
        "deepseek-prefill", "DeepSeek-R1 and V3, prefill over 32 ranks", "deepseek-r1", "deepseek-ai/DeepSeek-R1", "sglang",
        f"{DEEP} --deepep-mode normal --disaggregation-mode prefill",
        (Row("prefill", "4x8:h200", 32, 1024, 32), Row("prefill", "4x8:h200", 32, 4096, 32)),
        "Prefill is where imbalance costs most: steps are large, and the fullest rank computes longest.",
        "58 MoE layers of 256 experts in fp8: one redundant slot a rank in every layer takes what the table says.",
        (GROUPS, SLOTS, "Prefill and decode instances see other traffic: each has a map of its own.", LIVE),
    ),
    Recipe(
        "deepseek-decode", "DeepSeek-R1 and V3, decode over 64 to 144 ranks", "deepseek-r1", "deepseek-ai/DeepSeek-R1",
        "sglang", f"{DEEP} --deepep-mode low_latency --disaggregation-mode decode",
        (Row("decode", "8x8:h200", 64, 64, 64), Row("decode", "1x72:gb200", 72, 128, 32), Row("decode", "18x8:h200", 144, 64, 32)),
        "With 2 to 4.5 slots a rank a hot expert fills a rank alone: without copies no map helps.",
        "256 experts do not divide by 72 or 144: what runs now is there SGLang's start with 32 redundant slots (slot p holds "
        "expert p mod 256), so that the map takes no more memory and saves what the start wastes. By 64 ranks it is blocks "
        "of 4 experts, and a slot more a rank.",
        (SLOTS, "In decode a step reads weights more than it computes: balance counts less at few tokens a rank "
         "(`poise breakeven`).", GROUPS, "One rank lost takes experts that have no copy with it: "
         "`poise plan --survive 1` ([losses](../losses.md)).", LIVE),
    ),
    Recipe(
        "qwen3-235b", "Qwen3-235B-A22B over 8 and 16 ranks", "qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", "vllm",
        "--enable-expert-parallel --tensor-parallel-size 1",
        (Row("prefill", "1x8:h200", 8, 1024, 16), Row("decode", "1x8:h200", 8, 64, 16), Row("decode", "2x8:h200", 16, 64, 16)),
        "128 experts of 94 layers, no shared expert, no groups.",
        "Weights are taken as 16 bit; with the FP8 checkpoint name its `config.json` as `--model`, slots take half.",
        ("Within one node gains in decode are small: a trial, not a promise.",
         "vLLM takes `num_redundant_experts` only with `--enable-eplb`; redundant slots that only make sizes divide cost "
         "memory for nothing.", LIVE),
    ),
    Recipe(
        "kimi-k2", "Kimi-K2 over 16 and 32 ranks", "kimi-k2", "moonshotai/Kimi-K2-Instruct", "sglang",
        f"{DEEP} --deepep-mode auto",
        (Row("prefill", "2x8:h200", 16, 1024, 16), Row("decode", "4x8:h200", 32, 64, 32)),
        "384 experts of 60 layers, 8 a token, no groups.",
        "A rank of 16 holds 24 experts a layer in fp8 and little beside: see what the cache loses before more slots.",
        ("384 and 16 divide by 16; 384 and 32 by 32: other redundancies may not.", LIVE),
    ),
    Recipe(
        "gpt-oss-120b", "gpt-oss-120b over 8 ranks", "gpt-oss-120b", "openai/gpt-oss-120b", "vllm",
        "--enable-expert-parallel --tensor-parallel-size 8",
        (Row("prefill", "1x8:h100", 8, 1024, 8), Row("decode", "1x8:h100", 8, 64, 8)),
        "128 small experts (MXFP4) of 36 layers, 4 a token: a step has little to balance.",
        "Slots are cheap: 4.25 bits a weight.",
        ("Whether EPLB takes quantized experts is a matter of the engine's version: it says so when it starts.", LIVE),
    ),
    Recipe(
        "qwen3-next", "Qwen3-Next-80B-A3B over 8 ranks", "qwen3-next-80b-a3b", "Qwen/Qwen3-Next-80B-A3B-Instruct", "vllm",
        "--enable-expert-parallel --tensor-parallel-size 1",
        (Row("prefill", "1x8:h200", 8, 1024, 16), Row("decode", "1x8:h200", 8, 64, 16)),
        "512 experts of 48 layers, 10 a token. Three of four layers have linear attention, which counts nothing here: the step "
        "is in truth longer, and every share of it smaller.",
        "Only every fourth layer has a key/value cache: a slot takes four times as many tokens of it as the table says.",
        ("Of all shares here these are the most optimistic: see above.", LIVE),
    ),
    Recipe(
        "glm", "GLM-4.5, 4.6 and 4.7 over 16 ranks", "glm-4.5", "zai-org/GLM-4.6", "sglang", f"{DEEP} --deepep-mode auto",
        (Row("prefill", "2x8:h200", 16, 1024, 16), Row("decode", "2x8:h200", 16, 64, 16)),
        "160 experts of 89 MoE layers, 8 a token, one shared expert.",
        "Weights are taken as 16 bit; with the FP8 checkpoint name its `config.json` as `--model`, slots take half.",
        ("Three layers are dense: a map has 92 rows, and theirs say nothing (`poise export` writes them).", LIVE),
    ),
)  # fmt: skip


def loads(model: ModelSpec, window: int) -> LoadProfile:
    """A window of generated loads; both windows of a model have the same experts on top, before their own drift."""
    ids = np.array(model.moe_layer_ids)[np.linspace(0, model.num_moe_layers - 1, LAYERS).round().astype(int)]
    common, own = np.random.default_rng(0), np.random.default_rng([1, window])
    falling = np.arange(1, model.num_experts + 1.0) ** -EXPONENT
    share_LE = np.stack([common.permutation(falling) for _ in range(LAYERS)])
    share_LE *= np.exp(DRIFT * own.normal(size=share_LE.shape))
    load_BLE = share_LE * np.exp(0.1 * own.normal(size=(STEPS, *share_LE.shape)))
    load_BLE = np.round(load_BLE / load_BLE.sum(axis=2, keepdims=True) * 65_536 * model.top_k)
    return LoadProfile(load_BLE, top_k=model.top_k, layer_ids=ids.astype(np.int32), name=f"generated, window {window}")


def found(recipe: Recipe, row: Row) -> Verdict:
    """What a verdict says of a row."""
    model, first = ModelSpec.parse(recipe.model), loads(ModelSpec.parse(recipe.model), 1)
    current = None
    if model.num_experts % row.ranks:  # no engine holds blocks then: SGLang starts with slot p holding expert p mod E
        current = trivial_placement(model.num_experts, model.num_experts + row.redundant, row.ranks, first.layer_ids)
    return poise.verdict(
        first, loads(model, 2), current=current, cluster=row.cluster, model=model, engine=recipe.engine, phase=row.phase,
        tokens_per_step=row.ranks * row.tokens_a_rank, redundant=row.redundant, work=WORK,
    )  # fmt: skip


def figures(recipe: Recipe) -> list[str]:
    """The rows of the page's table, and its flags, a line each."""
    rows, flags = [], dict[str, None]()
    for row in recipe.rows:
        got = found(recipe, row)
        one = got.phases[0]
        cells = [row.phase, f"`{row.cluster}`", str(row.ranks), f"{row.ranks * row.tokens_a_rank:,}", one.advice,
                 f"{one.chosen.method}, {one.chosen.redundant} redundant", f"{1e3 * one.saved_s:.3g} ms",
                 f"{100 * one.share(one.saved_s):.1f} %", f"{one.price.slot_bytes / 2**30:.2f}",
                 "-" if one.price.cache_tokens is None else f"{one.price.cache_tokens:,}",
                 "never" if one.pay_back_steps is None else f"{one.pay_back_steps:,} steps"]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
        flags |= dict.fromkeys(got.flags)
    return rows + [f"- `{line}`" for line in flags]


def record(recipe: Recipe) -> list[str]:
    """The two commands that leave a recording to convert."""
    if recipe.engine == "sglang":
        return [
            f"$ SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=dumps python -m sglang.launch_server --model-path {recipe.hub} \\",
            f"    --tp {recipe.rows[0].ranks} --ep-size {recipe.rows[0].ranks} {recipe.serve} \\",
            "    --expert-distribution-recorder-mode stat",
            "$ curl -X POST localhost:30000/start_expert_distribution_record && sleep 600 && \\",
            "    curl -X POST localhost:30000/dump_expert_distribution_record",
        ]  # fmt: skip
    ranks = recipe.rows[0].ranks
    parallel = recipe.serve if f"size {ranks}" in recipe.serve else f"{recipe.serve} --data-parallel-size {ranks}"
    return [
        f"$ vllm serve {recipe.hub} {parallel} --enable-return-routed-experts",
        "$ while read -r ask; do curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' -d \"$ask\"; \\",
        "    echo; done < requests.jsonl > answers.jsonl",
    ]  # fmt: skip


def page(recipe: Recipe, made: Sequence[str]) -> str:
    """The page with these figures: lines of the table, then of flags."""
    rows, flags = ([line for line in made if line.startswith(mark)] for mark in ("| ", "- "))
    what = "dumps" if recipe.engine == "sglang" else "answers.jsonl"
    first = recipe.rows[0]
    asked = f"--cluster {first.cluster} --model {recipe.model} --engine {recipe.engine} -r {first.redundant}"
    return "\n".join([
        f"# {recipe.title}", "",
        f"{recipe.about} Made by `python benchmarks/recipes.py {recipe.name}`: edit that, not this page.", "",
        "## Is it worth it?", "",
        f"| {' | '.join(HEADS)} |", f"|{'---|' * 4}{'---|' * (len(HEADS) - 4)}", *rows, "",
        "All times are modelled ([how far they are off](../accuracy.md)), on **generated** loads: shares of experts fall as "
        f"1 / rank ^ {EXPONENT:g}, two windows that differ by a drift of {DRIFT:.0%}, each plan judged on the window that it was "
        "not made on. Your traffic gives other figures: record it.", "",
        "## Record", "", "Two commands, with EPLB off, then the same on another day:", "", "```", *record(recipe), "```", "",
        "## Judge and plan", "", "```",
        f"$ poise convert {what} --model {recipe.model} -o monday.npz",
        f"$ poise verdict monday.npz tuesday.npz {asked} \\",
        f"    --phase {first.phase} -n {first.ranks * first.tokens_a_rank} -o placement.npz", "```", "",
        "A recipe of others (`recipe.yaml` of srt-slurm or InferenceX, or a launch script) is judged by what it sets: "
        "`poise verdict monday.npz tuesday.npz --recipe recipe.yaml` ([how](../verdict.md#a-recipe)).", "",
        "## Flags", "", *flags, "",
        "## Memory", "", recipe.memory, "",
        "## What can go wrong", "", *(f"- {line}" for line in recipe.wrong), "",
    ])  # fmt: skip


def made_lines(text: str) -> list[str]:
    """The figures of a page as it lies there."""
    table = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| phase |")]
    flags = text.split("## Flags", 1)[-1].split("## Memory", 1)[0]
    return table + [line for line in flags.splitlines() if line.startswith("- ")]


def main(names: Sequence[str]) -> int:
    """Write pages."""
    for recipe in RECIPES:
        if not names or recipe.name in names:
            (DOCS / f"{recipe.name}.md").write_text(page(recipe, figures(recipe)), "utf-8")
            print(f"wrote docs/recipes/{recipe.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
