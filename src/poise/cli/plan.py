"""poise plan: one placement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from poise import api
from poise.cli import options as o
from poise.cli.ending import first_interrupt
from poise.cli.pricing import StepOptions
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.budget import Budget
from poise.planning.elastic import RankMap
from poise.planning.placement import Placement
from poise.planning.problem import RISKS, Solution
from poise.planning.solve.survive import COST
from poise.replay.rows import fewer_words, shortened
from poise.util.errors import OptionError
from poise.util.executors import executor_of
from poise.util.words import percent

TIME_LIMIT = (
    "Seconds for all after reading: search, prices and bound, a second plan without redundant slots, verdict. "
    "Compiling is not counted."
)
VERDICT_SHARE = 0.25
SURVIVE = {"1": "device", "device": "device", "node": "node"}
OF_ITS_KIND = "That is of traffic of the same kind; what a map does on another, poise verdict says."
SHOWN = 8
"""Losses of the table on a terminal."""


@o.grouped
def plan(
    *,
    traces: o.Traces,
    cluster: o.ClusterSpec,
    output: Annotated[Path, o.flag("output", "Placement file to write (.npz).")],
    redundant: o.Redundant = 0,
    method: Annotated[str, typer.Option(help="poise, or a method of 'poise compare'.")] = "poise",
    priced: StepOptions,
    pooled: Annotated[bool, typer.Option("--pooled", help="Count slots over all layers together (MoETuner).")] = False,
    current: Annotated[
        Path | None,
        typer.Option("--current", help="The placement that runs now, on as many devices or not; moves are priced."),
    ] = None,
    ranks: Annotated[
        str | None,
        o.flag("rank_map", "OLD:NEW of ranks of --current that stay, as in 0:0,1:1,3:2. Default: same numbers."),
    ] = None,
    migration_steps: Annotated[float, typer.Option(help="Steps over which those moves are written off.")] = 1000.0,
    risk: Annotated[str, typer.Option(help="mean, worst or cvar over steps or recorded workloads.")] = "mean",
    survive: Annotated[
        str | None,
        typer.Option(
            "--survive",
            help="Plan for the loss of any one device (1) or node (node): few experts without a holder, and the maps "
            "of the rest beside the output (.losses.npz).",
        ),
    ] = None,
    survive_cost: Annotated[float, typer.Option(help="Share of the modelled time that --survive may give up.")] = COST,
    survive_copies: Annotated[
        float | None,
        typer.Option(help="Most copies between those left, for each expert read anew. Default: as balance needs."),
    ] = None,
    verdict: Annotated[
        bool, typer.Option(help="Say what is gained over what runs now, on traffic left out of a second fit.")
    ] = True,
    time_limit: Annotated[float, o.flag("time_limit", TIME_LIMIT)] = 20.0,
    work: o.Work = None,
    seed: o.Seed = 0,
    executor: o.Executor = "serial",
    json: o.Json = False,
) -> None:
    """Plan an expert placement from recorded traffic and write it to a file.

    Example: poise plan trace.npz --cluster 2x8:h100 --redundant 16 --model deepseek-v3 -o placement.npz
    """
    with o.errors():
        o.writable(output, ".npz")
        unit = None if survive is None else SURVIVE[o.one_of("survive", survive, tuple(SURVIVE))]
        beside = output.with_suffix(".losses.npz")
        if unit is not None:
            o.writable(beside)
        running = _renumber(current, ranks, cluster)
        now = None if running is None else running[0]
        with executor_of(executor) as workers, o.progress() as report:
            found = api.load(list(traces), workers)
            share = VERDICT_SHARE if verdict and not pooled else 0.0
            whole = Budget(time_limit, work=work, executor=workers)
            shared = {**priced.checked(), "redundant": redundant, "method": method, "seed": seed, "progress": report}
            with first_interrupt(lambda: _stop(whole)):
                solution = api.plan(
                    found, cluster, pooled=pooled, current=now, migration_steps=migration_steps,
                    risk=o.one_of("risk", risk, RISKS), survive=unit, survive_cost=survive_cost,
                    survive_copies=survive_copies, time_limit_s=whole.part(1 - share), **shared,
                )  # fmt: skip
                said = None
                if share and not whole.stopped:
                    said = api.planning_verdict(
                        found, cluster, current=now, time_limit_s=whole.part(share, until=1.0), **shared
                    )
                if whole.stopped:  # a verdict of plans that were cut short would be of no plan that is written
                    said = None
                if solution.losses is not None:
                    solution.losses.save(beside)
                with_command(solution.placement).save(output)
        if late := whole.beyond():
            o.talk.print(late)
        each = None if priced.model is None else ModelSpec.parse(priced.model).expert_bytes
        moves, devices = _moves(running, solution, each), solution.placement.num_devices
        if json:
            o.print_json("plan", {**_json(solution), "moves": moves, "verdict": said, **_losses(solution, each)})
        else:
            _show(solution)
            if not said:
                o.say_notes(solution.details.get("defaults", ()))
            _show_moves(moves, solution.details.get("payback"))
            _show_losses(solution, each)
            if said:
                over = "Over what runs now, fitted" if now is None or now.num_devices == devices else "Fitted"
                o.out.print(f"{over} on one half of the traffic and judged on the other. {said} {OF_ITS_KIND}")
        o.talk.print(f"wrote {output}")
        if solution.losses is not None:
            o.talk.print(f"wrote {beside}: what follows each loss")


def _stop(budget: Budget) -> None:
    """End the search of a plan, and say so."""
    budget.stop()
    o.talk.print("interrupted: writing the best plan so far; control-C again ends at once")


def with_command(placement: Placement) -> Placement:
    """The placement, its file told what made it."""
    assert placement.fitted is not None
    about = {**placement.fitted.about, "command": o.command_line()}
    return replace(placement, fitted=replace(placement.fitted, about=about))


def _renumber(current: Path | None, ranks: str | None, cluster: str) -> tuple[Placement, RankMap] | None:
    """The placement in use, in the numbers of the cluster's ranks, and which rank of it is which."""
    if current is None:
        if ranks is not None:
            raise OptionError("--rank-map says which rank of --current is which", hint="give --current")
        return None
    placement = Placement.load(current)
    change = RankMap.parse(ranks, placement.num_devices, Cluster.parse(cluster).num_devices)
    return placement if ranks is None else change.number(placement), change


def _moves(running: tuple[Placement, RankMap] | None, solution: Solution, each: float | None) -> dict[str, Any] | None:
    """What going from the placement in use to the new one fetches; ``each``: bytes of an expert, if they are known."""
    if running is None:
        return None
    placement, ranks = running
    diff = placement.diff(solution.placement)
    return {
        "ranks_before": len(ranks.new_O), "ranks_after": ranks.num_new, "join": ranks.join, "leave": ranks.leave,
        "fetched": diff.fetched, "moved_bytes": None if each is None else diff.moved_bytes(each),
        "dropped": diff.dropped, "fetched_by": diff.fetched_D.tolist(),
        "held_by_none_that_stays": len(diff.leaving_O2),
    }  # fmt: skip


def _show_moves(moves: dict[str, Any] | None, payback: dict[str, Any] | None) -> None:
    if moves is None:
        return
    size, only = moves["moved_bytes"], moves["held_by_none_that_stays"]
    text = f"From what runs now {moves['fetched']} experts to fetch"
    text += f"{'' if size is None else f', {size / 2**30:.2f} GiB'}; {moves['dropped']} copies go"
    if moves["join"] or moves["leave"]:
        join = sum(moves["fetched_by"][rank] for rank in moves["join"])
        text = f"{moves['ranks_before']} ranks before, {moves['ranks_after']} after. {text}"
        text += f". Onto ranks that stay {moves['fetched'] - join}, onto ranks that join {join}"
        text += f"; {only} experts lie on no rank that stays" if only else ""
    o.out.print(f"{text}. Who fetches what from whom: poise diff.")
    if payback is None or payback["gain_seconds"][-1] <= 0 or not payback["fetched"][-1]:
        return
    text = f"In the order in which they pay back, half of the gain comes with {payback['half']} of them, "
    text += f"90 % with {payback['most']}."
    if payback["pays"] is not None:
        text += f" Over {payback['steps']:,.0f} steps {payback['pays']} pay for what steps wait for them."
    o.out.print(text)


def _losses(solution: Solution, each: float | None) -> dict[str, Any]:
    """``losses``: a row for each; bytes only where those of an expert are known. Nothing where none were asked for."""
    if solution.losses is None:
        return {}
    rows = [
        {**row, "read_bytes": None if each is None else row["orphans"] * each,
         "copied_bytes": None if each is None else row["copies"] * each}
        for row in solution.details["survive"]["losses"]
    ]  # fmt: skip
    return {"losses": rows}


def _show_losses(solution: Solution, each: float | None) -> None:
    """A table of the losses that are worst, and what was given up for them."""
    if solution.losses is None:
        return
    about = solution.details["survive"]
    rows = sorted(about["losses"], key=lambda row: (-row["orphans"], -row["after"]))
    unit = about["unit"]
    heads = (unit, "orphans", "read", "copied", "imbalance", "at once", "after", "bound", "vLLM's rule")
    table = o.table(f"after the loss of a {unit}", heads)

    def size(count: int) -> str:
        return f"{count}" if each is None else f"{count * each / 2**30:.2f} GiB"

    for row in rows[:SHOWN]:
        table.add_row(row["name"], str(row["orphans"]), size(row["orphans"]), size(row["copies"]),
                      *(f"{row[key]:.3f}" for key in ("before", "first", "after", "bound", "rival")))  # fmt: skip
    o.out.print(table)
    o.out.print(
        "orphans: experts that no device left holds, read anew, as few as can be; at once: once they are read; after: "
        "after the copies; bound: the least in the slots that are left; vLLM's rule: of #38862, which reads as many"
    )
    saved, most = about["orphans_before"], max(row["orphans"] for row in about["losses"])
    o.out.print(
        f"All losses together leave {about['orphans']} orphans, the plan alone {saved}, none fewer than "
        f"{about['fewest_orphans']} in these slots; one loss {most} at most. Given up for it: "
        f"{percent(about['cost'])} of the modelled time, of {percent(about['most_cost'])} allowed (--survive-cost)."
    )
    if len(rows) > SHOWN:
        o.out.print(f"{len(rows) - SHOWN} more losses: --json")


def _groups(about: dict[str, Any]) -> str:
    """A sentence on routing groups, whole on nodes or in ids."""
    place = "a node" if about["where"] == "nodes" else "a block of ids"
    text = f"Each of {about['groups']} routing groups lies whole on {place} in {about['whole_layers']} of "
    text += f"{about['layers']} layers"
    if "whole_s" not in about:
        return f"{text}."
    return (
        f"{text}: {1e6 * about['taken_s']:.2f} us, in none {1e6 * about['without_s']:.2f}, in all "
        f"{1e6 * about['whole_s']:.2f}."
    )


def _json(solution: Solution) -> dict[str, object]:
    return {
        "method": solution.method,
        "objective": solution.objective,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "imbalance": solution.imbalance,
        "cut_by_clock": "cut_by_clock" in solution.details and not solution.details.get("interrupted"),
        "interrupted": bool(solution.details.get("interrupted")),
        "terms": {name: {"seconds": t.seconds, "lower_bound": t.lower_bound} for name, t in solution.terms.items()},
        "details": solution.details,
    }


def _show(solution: Solution) -> None:
    heads = ("term", "us", "lower bound us", "gap")
    table = o.table(f"{solution.method}: modelled seconds of one MoE layer and step", heads, left=heads[:1])
    for name, term in solution.terms.items():
        if term.seconds > 0:
            gap = 1 - term.lower_bound / term.seconds
            table.add_row(name, f"{1e6 * term.seconds:.2f}", f"{1e6 * term.lower_bound:.2f}", percent(gap))
    table.add_row("all", f"{1e6 * solution.objective:.2f}", f"{1e6 * solution.lower_bound:.2f}",
                  percent(solution.gap), style="bold")  # fmt: skip
    o.out.print(table)
    o.out.print(
        f"imbalance {solution.imbalance:.3f} (max / mean tokens, in-sample), planned in {solution.seconds:.2f} s"
    )
    o.out.print(f"Constants: {solution.details['ground']}.")
    if solution.joint_bound > sum(term.lower_bound for term in solution.terms.values()):
        o.out.print("The lower bound of all terms is of one placement for all of them, so it is more than their sum.")
    o.say_notes((*solution.details.get("notes", ()), *shortened(solution)))
    if about := solution.details.get("groups"):
        o.out.print(_groups(about))
    fewer = solution.details.get("fewer_redundant")
    if fewer is not None:
        saves, defaults = 1 - fewer["objective"] / solution.objective, solution.details.get("defaults", ())
        o.out.print(fewer_words(fewer["redundant"], saves, defaults))
    o.out.print(repr(solution.placement))
