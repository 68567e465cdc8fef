"""poise export: the file that an engine loads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from poise.cli import options as o
from poise.engines.checkpoints.permutation import keep_groups
from poise.engines.exports import TARGETS, ExportOptions
from poise.machine.model import ModelSpec
from poise.planning.losses import Loss, Losses
from poise.planning.placement import Placement
from poise.util.errors import OptionError
from poise.util.files import check_new_folder

NO_FILE = {
    "vllm": "poise's plugin for it reads the placement itself: POISE_STATIC_MAP={file} vllm serve MODEL "
    "--enable-expert-parallel --enable-eplb (docs/engines.md); vllm-34811, vllm-49572 and vllm-53022 are files of open "
    "proposals",
}
"""Engines that need no export, and what to do."""


def export(
    placement: Annotated[Path, typer.Argument(help="Placement file of 'poise plan'.")],
    to: Annotated[str, typer.Option("--to", help="; ".join(f"{name}: {t.summary}" for name, t in TARGETS.items()))],
    output: Annotated[Path, o.flag("output", "File to write; for a checkpoint a folder.")],
    model: o.Model = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option(help="Decoder layers of the model, dense ones included; --model knows it too.")
    ] = None,
    num_mtp_layers: Annotated[
        int,
        typer.Option(help="Layers of multi-token prediction that run (tensorrt-llm, vllm-ascend: they need a row)."),
    ] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint folder to relabel (--to checkpoint).")] = None,
    model_class: Annotated[
        str | None,
        typer.Option(help="Class that the engine runs the model as, of architectures in its config (vllm-hygon)."),
    ] = None,
    groups: Annotated[
        bool,
        o.flag(
            "keep_groups",
            "Of a placement that tears the model's routing groups, the nearest one that does not. A plan for "
            "--engine checkpoint, megatron or deepspeed never does.",
        ),
    ] = False,
    losses: Annotated[
        Path | None,
        typer.Option("--losses", help="File of 'poise plan --survive': also the maps after each loss, a file each."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Write a placement in an engine's format.

    Example: poise export placement.npz --to sglang --model deepseek-v3 -o experts.json
    """
    with o.errors():
        if to in NO_FILE:
            raise OptionError(f"{to} loads no file of a map", hint=NO_FILE[to].format(file=shlex.quote(str(placement))))
        target = TARGETS[o.one_of("target", to, tuple(TARGETS))]
        if target.folder:
            check_new_folder(output, OptionError)
        else:
            o.writable(output)
        plan = Placement.load(placement)
        after = [] if losses is None else _after(Losses.load(losses), plan, output, folder=target.folder)
        sizes = None if model is None else ModelSpec.parse(model)
        if sizes is not None and sizes.num_experts != plan.num_experts:
            raise OptionError(
                f"the placement has {plan.num_experts} experts, {sizes.name} has {sizes.num_experts}",
                hint="check --model",
            )
        if groups:
            plan = _grouped(plan, sizes)
        if groups and after:
            raise OptionError("the maps after a loss do not keep groups whole", hint="leave --keep-groups out")
        with o.progress() as report:
            options = ExportOptions(sizes, num_hidden_layers, num_mtp_layers, checkpoint, report, model_class)
            made = target.write(plan, output, options)
            later = [{"lost": list(loss.lost), "file": str(path), "devices": plan.num_devices - len(loss.lost),
                      "command": target.write(loss.after_on_rest, path, options).command}
                     for loss, path in after]  # fmt: skip
        if json:
            o.print_json("export", {
                "engine": to, "file": str(output), "filled_slots": made.filled, "slots": plan.num_slots,
                "redundant": plan.redundant, "devices": plan.num_devices,
                "unplanned_layers": made.unplanned, "command": made.command, "notes": list(made.notes),
                **({"losses": later} if losses is not None else {}), **made.facts,
            })  # fmt: skip
        else:
            o.out.print(repr(plan))
        if made.filled:
            o.talk.print(f"{made.filled} empty slots were filled with replicas: the engine knows no empty ones")
        if made.unplanned:
            o.talk.print(f"{made.unplanned} layers were not planned: {target.unplanned}")
        if made.command:
            first, *more = made.command.split("\n")
            for line in ("start the engine with", first, *more) if more else (f"start the engine with {first}",):
                o.talk.print(line, soft_wrap=True)
        for note in made.notes:
            o.talk.print(note)
        o.talk.print(f"wrote {output}")
        if after:
            o.talk.print(
                f"wrote {len(after)} maps of the rest, {after[0][1]} and so on: a map's ranks are those that are left, "
                "numbered anew in their order"
            )


def _after(losses: Losses, plan: Placement, output: Path, *, folder: bool) -> list[tuple[Loss, Path]]:
    """Each loss and the file of its map: ``NAME.lost-3.json``, for a node ``NAME.lost-4-7.json``."""
    if folder:
        raise OptionError("the maps after a loss are files, this target is a folder", hint="choose another --to")
    mine, theirs = plan.slot_expert_LS, losses.before.slot_expert_LS
    if mine.shape != theirs.shape or (mine != theirs).any():
        raise OptionError(
            f"the losses are of another placement: slots {list(theirs.shape)}, the placement has {list(mine.shape)}"
            + (", and they hold other experts" if mine.shape == theirs.shape else ""),
            hint="give the file that 'poise plan --survive' wrote beside it",
        )
    named = [(loss, output.with_name(f"{output.stem}.lost-{loss.name}{output.suffix}")) for loss in losses.losses]
    for _, path in named:
        o.writable(path)
    return named


def _grouped(plan: Placement, sizes: ModelSpec | None) -> Placement:
    """The placement with routing groups whole; says what that moved."""
    if sizes is None:
        raise OptionError("--keep-groups needs the number of routing groups", hint="give --model")
    kept = keep_groups(plan, sizes.num_expert_groups)
    o.talk.print(
        f"{plan.diff(kept).fetched} experts go to another device so that {sizes.num_expert_groups} routing groups stay "
        "whole; 'poise compare' says what that costs"
    )
    return kept
