"""poise diff: what has to move from one placement to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from poise.cli import options as o
from poise.cluster import Cluster
from poise.control.moves import MoveList, move_list
from poise.errors import OptionError
from poise.evaluate.moving import Moving, moving
from poise.modelspec import ModelSpec
from poise.planning.placement import Placement

SHOWN = 8
"""Layers of the table on a terminal."""


def diff(
    before: Annotated[Path, typer.Argument(help="Placement file that runs now.")],
    after: Annotated[Path, typer.Argument(help="Placement file that is to run.")],
    model: o.Model = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", "-c", help="NxD:preset or a .yaml file: which links are used, and how long."),
    ] = None,
    staging: Annotated[
        int | None,
        typer.Option(help="Plan rounds of moves with so many buffers a device, serving all the while."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Say what moves between two placements: experts, bytes, links, seconds, and the layers in which most does.

    Bytes need --model, links --cluster, seconds both.

    Example: poise diff now.npz next.npz --model deepseek-v3 --cluster 8x8:h100
    """
    with o.errors():
        old, new = Placement.load(before), Placement.load(after)
        spec = None if model is None else ModelSpec.parse(model)
        machine = None if cluster is None else Cluster.parse(cluster)
        if machine is not None and machine.num_devices != old.num_devices:
            raise OptionError(f"the cluster has {machine.num_devices} devices, {before} has {old.num_devices}")
        if staging is not None and (spec is None or machine is None):
            raise OptionError("rounds need expert sizes and links", hint="give --model and --cluster")
        moves = moving(old, new, None if machine is None else machine.node_D)
        if spec is not None:
            spec.matches(num_experts=old.num_experts, layer_ids=moves.layer_ids_L)
        rounds = None
        if staging is not None and spec is not None and machine is not None:
            rounds = move_list(old, new, expert_bytes=spec.expert_bytes, staging=staging, node_D=machine.node_D)
        facts = _facts(moves, spec, machine, rounds)
        if json:
            o.print_json(facts)
        else:
            _show(old, new, facts)


def _facts(
    moves: Moving, spec: ModelSpec | None, machine: Cluster | None, rounds: MoveList | None
) -> dict[str, Any]:  # fmt: skip
    """What ``--json`` prints; a figure that needs an option which was not given is null."""
    each = None if spec is None else spec.expert_bytes

    def size(count: int) -> float | None:
        return None if each is None else count * each

    links = None
    if machine is not None:
        near, far = moves.by_link(machine)
        links = {"inside_node": {"experts": near, "bytes": size(near)},
                 "between_nodes": {"experts": far, "bytes": size(far)}}  # fmt: skip
    layers = [
        {"layer": int(name), "arrive": int(arrive.sum()), "leave": int(leave.sum()), "bytes": size(int(arrive.sum())),
         "most_on_device": int(arrive.max()), "device": int(arrive.argmax())}
        for name, arrive, leave in zip(moves.layer_ids_L, moves.arrive_LD, moves.leave_LD, strict=True)
    ]  # fmt: skip
    return {
        "fetched": moves.fetched, "dropped": moves.dropped, "moved_bytes": size(moves.fetched),
        "links": links,
        "link_seconds": None if each is None or machine is None else moves.seconds(machine, each),
        "most_on_device": {"experts": int(moves.arrive_LD.sum(axis=0).max()),
                           "device": int(moves.arrive_LD.sum(axis=0).argmax())},
        "rounds": None if rounds is None or machine is None else {
            "count": len(rounds.rounds), "seconds": rounds.seconds(machine), "staging": rounds.staging,
        },
        "layers": layers,
        "most": [layers[layer]["layer"] for layer in moves.most(SHOWN)],
    }  # fmt: skip


def _show(old: Placement, new: Placement, facts: dict[str, Any]) -> None:
    for word, placement in (("from", old), ("to  ", new)):
        o.out.print(f"{word} {placement!r}", markup=False)
    if not facts["fetched"]:
        o.out.print(f"Nothing to fetch; {facts['dropped']} copies go.")
        return
    most, seconds = facts["most_on_device"], facts["link_seconds"]
    text = f"{facts['fetched']} experts to fetch{_size(facts['moved_bytes'])}, {facts['dropped']} copies go; "
    o.out.print(text + f"most on device {most['device']}: {most['experts']}.")
    if facts["links"] is not None:
        near, far = facts["links"]["inside_node"], facts["links"]["between_nodes"]
        o.out.print(
            f"Inside a node {near['experts']}{_size(near['bytes'])}; "
            f"between nodes {far['experts']}{_size(far['bytes'])}."
        )
    if seconds is not None:
        o.out.print(f"The links need {seconds:.3g} s if they do nothing else.")
    if facts["rounds"] is not None:
        r = facts["rounds"]
        o.out.print(f"{r['count']} rounds with {r['staging']} buffers a device take {r['seconds']:.3g} s of the links.")
    table = Table(title="layers in which most arrives", title_justify="left", header_style="bold")
    for head in ("layer", "arrive", "leave", "size", "most on one device"):
        table.add_column(head, justify="right")
    rows = {row["layer"]: row for row in facts["layers"]}
    for layer in facts["most"]:
        row = rows[layer]
        table.add_row(str(layer), str(row["arrive"]), str(row["leave"]), _size(row["bytes"]).strip(", "),
                      f"{row['most_on_device']} (device {row['device']})")  # fmt: skip
    o.out.print(table)
    others = sum(1 for row in facts["layers"] if row["arrive"]) - len(facts["most"])
    if others > 0:
        o.out.print(f"{others} more layers: --json shows all")


def _size(count: float | None) -> str:
    return "" if count is None else f", {count / 2**30:.2f} GiB" if count >= 2**30 else f", {count / 2**20:.1f} MiB"
