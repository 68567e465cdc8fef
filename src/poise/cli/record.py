"""poise record: a routing trace of any Hugging Face MoE model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poise.cli import options as o
from poise.util.extras import with_torch


def record(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face MoE model.")],
    texts: Annotated[list[Path], typer.Argument(help='Prompts: .jsonl with {"text", "domain"} lines, or .txt files.')],
    output: Annotated[Path, o.flag("output", "Trace to write (.npz).")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(help="Prompts are cut to this length.")] = 512,
    requests_per_domain: Annotated[int | None, typer.Option(help="Prompts of each domain, evenly spaced.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Run text through a model and record which experts every token chose, prefill and decode.

    Example: poise record ./model prompts.jsonl --max-new-tokens 64 -o trace.npz
    """
    with o.errors():
        capture = with_torch("poise.runtime.capture", "recording", "PyTorch and transformers")
        o.writable(output, ".npz")
        prompts = capture.read_prompts(texts, per_domain=requests_per_domain)
        net, tokenizer = capture.load_model(model)
        with o.progress() as report:
            trace = capture.record(
                net, tokenizer, prompts, max_new_tokens=max_new_tokens, max_prompt_tokens=max_prompt_tokens,
                batch_size=batch_size, temperature=temperature, seed=seed, progress=report,
            )  # fmt: skip
        trace.save(output)
        if json:
            o.print_json("record", {
                "tokens": trace.num_tokens, "requests": len(trace.requests()), "layers": trace.num_layers,
                "experts": trace.num_experts, "top_k": trace.top_k, "file": str(output),
            })  # fmt: skip
        else:
            o.out.print(repr(trace))
        o.talk.print(f"wrote {output}")
