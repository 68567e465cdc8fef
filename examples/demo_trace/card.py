"""Write the card of the demo trace, or refuse a trace that is not good enough.

Refused (exit code 1): a layer with more than 5 % dead experts, or a model no better than a bigram model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from poise.routing.files import read
from poise.routing.profile import dead_share_L, load_LE, mutual_information, skew_L
from poise.routing.trace import RoutingTrace

COMMANDS = """python examples/demo_trace/corpus.py
python examples/demo_trace/train.py --minutes {minutes:.0f} --threads {threads}{balance}
python examples/demo_trace/prompts.py
poise record build/demo_model build/demo_prompts.jsonl --max-prompt-tokens 128 --max-new-tokens 64 \\
  --batch-size 20 -o {trace}
python examples/demo_trace/card.py --trace {trace}"""


def card(trace: RoutingTrace, metrics: dict, path: Path) -> tuple[str, list[str]]:
    """The card in markdown, and the reasons to refuse the trace."""
    load = load_LE(trace.experts, trace.num_experts)
    skew, dead = skew_L(load), dead_share_L(load)
    real, null = mutual_information(trace.experts, trace.num_experts)
    model, bigram = metrics["model"], metrics["bigram"]
    refused = []
    if dead.max() > 0.05:
        refused.append(f"layer {int(dead.argmax())} has {dead.max():.1%} dead experts, at most 5 % are allowed")
    if model["all"] >= bigram["all"]:
        refused.append(f"held-out loss {model['all']:.3f} is not below the bigram model's {bigram['all']:.3f}")
    options, corpus = metrics["options"], metrics["corpus"]
    packages = ", ".join(f"{name} {version}" for name, version in corpus["packages"].items())
    lines = [
        "# The demo trace",
        "",
        f"Routing of {trace.num_tokens:,} tokens in {len(trace.requests())} requests through {trace.num_layers} MoE layers, "
        f"top-{trace.top_k} of {trace.num_experts} experts, recorded with `poise record` from a small OLMoE trained for it. "
        "Only expert ids are shipped, no text and no weights.",
        "",
        f"- Model: OLMoE architecture, {metrics['parameters'] / 1e6:.1f} M parameters, hidden {options['hidden']}, "
        f"expert {options['intermediate']}, vocabulary {corpus['vocab']}; balance loss per layer, weight {options['balance']}"
        f"{'' if options['last_balance'] == options['balance'] else ' at first, ' + str(options['last_balance']) + ' at the end, but in the first layer'}.",
        f"- Training: {metrics['tokens'] / 1e6:.1f} M tokens in {metrics['minutes']:.0f} minutes on {options['threads']} CPU "
        f"thread, torch {metrics['torch']}, seed {options['seed']}.",
        f"- Text: Debian packages {packages}; the standard library of Python {corpus['python']}. Split by whole chapters, "
        "blocks and modules; the same chapters are held out in every language.",
        f"- Requests: prompts of up to 128 tokens of held-out text, then 64 sampled tokens; "
        f"{float(trace.is_decode.mean()):.0%} of the rows are decode.",
        "",
        "## Held-out loss, nats a token",
        "",
        f"| domain | model | bigram ({bigram['kind']}) |",
        "|---|---:|---:|",
        *(f"| {name} | {model['domains'][name]:.3f} | {bigram['domains'][name]:.3f} |" for name in model["domains"]),
        f"| mean | {model['all']:.3f} | {bigram['all']:.3f} |",
        "",
        "## Routing, per layer",
        "",
        "Dead: below 1 % of the mean load. Information: between the heaviest experts of this layer and the next; the null "
        "shuffles the tokens.",
        "",
        "| layer | max / mean load | dead | information, nats | shuffled |",
        "|---:|---:|---:|---:|---:|",
    ]
    for layer in range(trace.num_layers):
        info = f"{real[layer]:.3f} | {null[layer]:.3f}" if layer < real.size else " | "
        lines.append(f"| {layer} | {skew[layer]:.2f} | {dead[layer]:.1%} | {info} |")
    lines += [
        "",
        "Per domain, max / mean load of each layer:",
        "",
        "| domain | " + " | ".join(map(str, range(trace.num_layers))) + " |",
    ]
    lines.append("|---|" + "---:|" * trace.num_layers)
    for name in trace.domain_names:
        part = skew_L(load_LE(trace.select(domains=[name]).experts, trace.num_experts))
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in part) + " |")
    falls = options["last_balance"] != options["balance"]
    commands = COMMANDS.format(
        minutes=options["minutes"], threads=options["threads"], trace=path,
        balance=f" --balance {options['balance']} --last-balance {options['last_balance']}" if falls else "",
    )  # fmt: skip
    lines += ["", "## Made with", "", "```", commands, "```", ""]
    return "\n".join(lines), refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, default=Path("src/poise/data/demo_trace.npz"))
    parser.add_argument("--metrics", type=Path, default=Path("build/demo_model/metrics.json"))
    args = parser.parse_args()
    trace = read(args.trace)
    assert isinstance(trace, RoutingTrace)
    text, refused = card(trace, json.loads(args.metrics.read_text("utf-8")), args.trace)
    if refused:
        sys.exit("refused: " + "; ".join(refused))
    args.trace.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
