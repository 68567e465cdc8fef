"""poise diff: what has to move from one placement to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from poise.cli import options as o
from poise.control.change import Change, numbers
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.elastic import RankMap
from poise.planning.placement import Placement
from poise.util.errors import OptionError

SHOWN = 8
"""Layers of the table on a terminal."""


def diff(
    before: Annotated[Path, typer.Argument(help="Placement file that runs now.")],
    after: Annotated[Path, typer.Argument(help="Placement file that is to run.")],
    model: o.Model = None,
    cluster: Annotated[
        str | None,
        o.flag("cluster", "NxD:preset or a .yaml file, of the new ranks or of all: links used, how long."),
    ] = None,
    staging: Annotated[
        int | None,
        typer.Option(help="Plan rounds of moves with so many buffers a device, serving all the while."),
    ] = None,
    ranks: Annotated[
        str | None,
        o.flag("rank_map", "OLD:NEW of all ranks that stay, as in 0:0,1:1,3:2 or 0-1:0-1,3:2. Default: same numbers."),
    ] = None,
    lost: Annotated[
        bool, typer.Option("--lost", help="Ranks that leave are gone: what only they held is read from the checkpoint.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Say what moves between two placements: experts, bytes, links, seconds, and the layers in which most does.

    Bytes need --model, links --cluster, seconds both. The placements may be for different numbers of ranks: those
    beyond the old ones join, those beyond the new ones leave (--rank-map, if others do).

    Example: poise diff now.npz next.npz --model deepseek-v3 --cluster 8x8:h100
    """
    with o.errors():
        old, new = Placement.load(before), Placement.load(after)
        spec = None if model is None else ModelSpec.parse(model)
        machine = None if cluster is None else Cluster.parse(cluster)
        if staging is not None and (spec is None or machine is None):
            raise OptionError("rounds need expert sizes and links", hint="give --model and --cluster")
        change = Change.of(old, new, RankMap.parse(ranks, old.num_devices, new.num_devices), machine, lost=lost)
        if spec is not None:
            spec.matches(num_experts=old.num_experts, layer_ids=change.moves.layer_ids_L)
        facts = _facts(change, spec, staging)
        if json:
            o.print_json("diff", facts)
        else:
            _show(old, new, facts)


def _facts(change: Change, spec: ModelSpec | None, staging: int | None) -> dict[str, Any]:
    """What ``--json`` prints; a figure that needs an option which was not given is null."""
    each, moves, machine = None if spec is None else spec.expert_bytes, change.moves, change.frame.cluster

    def size(count: int) -> float | None:
        return None if each is None else count * each

    def part(count: int) -> dict[str, Any]:
        return {"experts": count, "bytes": size(count)}

    links, rounds = None, None
    if machine is not None:
        near, far = moves.by_link(machine)
        links = {"inside_node": part(near), "between_nodes": part(far)}
    if machine is not None and each is not None and staging is not None:
        planned = change.rounds(each, staging)
        rounds = {"count": len(planned.rounds), "seconds": planned.seconds(machine), "staging": staging,
                  "turns": planned.turns, "fewest_turns": planned.fewest_turns}  # fmt: skip
    arrive_LD, fetches = change.arrive_LD, change.fetches()
    layers = [
        {"layer": int(name), "arrive": int(arrive.sum()), "leave": int(leave.sum()), "bytes": size(int(arrive.sum())),
         "most_on_device": int(arrive.max()), "device": int(arrive.argmax()), "fetches": row}
        for name, arrive, leave, row in zip(moves.layer_ids_L, arrive_LD, moves.leave_LD, fetches, strict=True)
    ]  # fmt: skip
    arrive_D = arrive_LD.sum(axis=0)
    return {
        "fetched": moves.fetched, "dropped": moves.dropped, "moved_bytes": size(moves.fetched),
        "links": links,
        "link_seconds": None if each is None or machine is None else moves.seconds(machine, each),
        "most_on_device": {"experts": int(arrive_D.max()), "device": int(arrive_D.argmax())},
        "rounds": rounds,
        "ranks": {
            "before": len(change.ranks.new_O), "after": change.ranks.num_new, "join": change.ranks.join,
            "leave": change.ranks.leave, "lost": change.lost,
            "onto_those_that_stay": part(int(arrive_D[change.ranks.stay].sum())),
            "onto_those_that_join": part(int(arrive_D[change.ranks.join].sum())),
            "fetched_by": arrive_D.tolist(),
            "held_by_none_that_stays": {"experts": len(change.leaving), "which": change.leaving},
            "fetched_from_those_that_leave": part(change.from_leaving),
            "read_from_checkpoint": part(moves.read),
            "assumed": change.assumed,
        },
        "layers": layers,
        "most": [layers[layer]["layer"] for layer in moves.most(SHOWN)],
    }  # fmt: skip


def _show(old: Placement, new: Placement, facts: dict[str, Any]) -> None:
    for word, placement in (("from", old), ("to  ", new)):
        o.out.print(f"{word} {placement!r}")
    changes = facts["ranks"]["join"] or facts["ranks"]["leave"]
    if changes:
        _show_ranks(facts["ranks"])
    if not facts["fetched"]:
        o.out.print(f"Nothing to fetch; {facts['dropped']} copies go.")
        return
    most, seconds = facts["most_on_device"], facts["link_seconds"]
    text = f"{facts['fetched']} experts to fetch{_size(facts['moved_bytes'])}, {facts['dropped']} copies go; "
    o.out.print(text + f"most on device {most['device']}: {most['experts']}.")
    if changes:
        _show_sources(facts["ranks"])
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
        text = f"In each of {r['turns']} turns a device sends to one peer and receives from one"
        o.out.print(f"{text}; with buffers for all it takes {r['fewest_turns']}.")
    table = o.table("layers in which most arrives", ("layer", "arrive", "leave", "size", "most on one device"))
    rows = {row["layer"]: row for row in facts["layers"]}
    for layer in facts["most"]:
        row = rows[layer]
        table.add_row(str(layer), str(row["arrive"]), str(row["leave"]), _size(row["bytes"]).strip(", "),
                      f"{row['most_on_device']} (device {row['device']})")  # fmt: skip
    o.out.print(table)
    o.out.print("arrive, leave: copies of experts, of one layer on all devices; size: of those that arrive (--model)")
    others = sum(1 for row in facts["layers"] if row["arrive"]) - len(facts["most"])
    if others > 0 or changes:
        more = f"{others} more layers, and " if others > 0 else ""
        o.out.print(f"{more}who fetches which expert from whom: --json")


def _show_ranks(ranks: dict[str, Any]) -> None:
    text = f"{ranks['before']} ranks before, {ranks['after']} after"
    gone = ("is lost", "are lost") if ranks["lost"] else ("leaves", "leave")
    for words, which in ((("joins", "join"), ranks["join"]), (gone, ranks["leave"])):
        text += f"; {numbers(which)} {words[len(which) > 1]}" if which else ""
    o.out.print(f"{text}.")


def _show_sources(ranks: dict[str, Any]) -> None:
    stay, join = ranks["onto_those_that_stay"], ranks["onto_those_that_join"]
    o.out.print(
        f"Onto ranks that stay {stay['experts']}{_size(stay['bytes'])}; "
        f"onto ranks that join {join['experts']}{_size(join['bytes'])}."
    )
    only, which = ranks["held_by_none_that_stays"]["experts"], ranks["held_by_none_that_stays"]["which"]
    if only:
        some = ", ".join(f"layer {layer} expert {expert}" for layer, expert in which[:SHOWN])
        o.out.print(f"No rank that stays holds {only} experts: {some}{', ...' if only > SHOWN else ''}.")
        sent, read = ranks["fetched_from_those_that_leave"], ranks["read_from_checkpoint"]
        if ranks["lost"]:
            o.out.print(
                f"They must be read from the checkpoint: {read['experts']} reads{_size(read['bytes'])}. No time below "
                "counts that."
            )
        else:
            o.out.print(
                f"They must be fetched before those ranks leave ({sent['experts']} fetches in all come from ranks that "
                f"leave{_size(sent['bytes'])}), or read from the checkpoint (--lost)."
            )
    if ranks["assumed"]:
        o.out.print(f"note: {ranks['assumed']}")


def _size(count: float | None) -> str:
    return "" if count is None else f", {count / 2**30:.2f} GiB" if count >= 2**30 else f", {count / 2**20:.1f} MiB"
