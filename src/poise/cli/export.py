"""poise export: the file that an engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poise.cli import options as o
from poise.engines import sglang
from poise.errors import OptionError
from poise.modelspec import ModelSpec
from poise.planning.placement import Placement

ENGINES = ("sglang", "npz")


def export(
    placement: Annotated[Path, typer.Argument(help="Placement file of 'poise plan'.")],
    to: Annotated[str, typer.Option("--to", help="sglang (JSON for --init-expert-location) or npz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    model: o.Model = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option(help="Decoder layers of the model, dense ones included; --model knows it too.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Write a placement in an engine's format.

    Example: poise export placement.npz --to sglang --model deepseek-v3 -o experts.json
    """
    with o.errors():
        o.one_of("engine", to, ENGINES)
        o.writable(output)
        plan = Placement.load(placement)
        filled = 0
        if to == "npz":
            plan.save(output)
        else:
            if num_hidden_layers is None and model is None:
                raise OptionError("SGLang's map needs every decoder layer", hint="give --model or --num-hidden-layers")
            layers = num_hidden_layers or ModelSpec.parse(model or "").num_hidden_layers
            filled = sglang.write(plan, output, num_hidden_layers=layers)
        if json:
            o.print_json({"engine": to, "file": str(output), "filled_slots": filled, "slots": plan.num_slots,
                          "redundant": plan.num_slots - plan.num_experts, "devices": plan.num_devices})  # fmt: skip
        else:
            o.out.print(repr(plan), markup=False)
        if filled:
            o.talk.print(f"{filled} empty slots were filled with replicas: the engine knows no empty ones")
        if to == "sglang":
            o.talk.print(
                f"start the engine with --ep-size {plan.num_devices} --ep-num-redundant-experts "
                f"{plan.num_slots - plan.num_experts} --init-expert-location {output}"
            )
        o.talk.print(f"wrote {output}")
