"""poise demo: the main job on the routing trace that ships with the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poise import api
from poise.cli import options as o
from poise.cli.compare import show, unless_stopped
from poise.cli.ending import best_so_far
from poise.cli.plan import with_command
from poise.engines.flags import EplbSetting, eplb_flags
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.engine_rules import parse_engine
from poise.planning.placement import Placement
from poise.planning.provenance import Provenance
from poise.replay.breakeven import contiguous_blocks
from poise.replay.compare import IN_SAMPLE, INTERRUPTED, Comparison
from poise.replay.summary import BOUND, Summary, SummaryRow, summarise
from poise.replay.trial import TrialSetting
from poise.replay.verdict import MS
from poise.replay.what_if import what_if
from poise.report import write_report
from poise.routing.batch import RoutingBatch
from poise.routing.batching import make_batch
from poise.routing.fingerprint import NO_TRAFFIC
from poise.routing.shipped import Shipped, balance, shipped
from poise.routing.trace import RoutingTrace
from poise.util.compilation import COMPILATION
from poise.util.errors import NoResultError, OptionError
from poise.util.wish import Wish
from poise.util.words import close_to, percent

if TYPE_CHECKING:
    from rich.table import Table

DOMAIN, TURNED = "python", "dictionary"
"""The traffic that maps are made for, and what it turns to later."""
ALL = "all"
TRACE: Shipped = "demo_skewed"
EVEN: Shipped = "demo_trace"
CLUSTER, MODEL, ENGINE, REDUNDANT = "2x4:h100", "gpt-oss-20b", "vllm", 8
"""The recorded model itself is too small to serve: its routing stands for that of a preset with as many experts."""
FAST, STEP_SLOTS = "poise-near", 2
WORK = 60.0
"""No clock unless one is asked for: the figures are the same on every machine."""
TOKENS, STEPS, WARM_UP = 4096, 8, 3
SIZES, SIZE_STEPS = (64, 256, 1024, 4096, 16384), 4
"""Batches, and steps of each; of larger ones than the first screen's fewer."""
WHAT_IF_SIZES, WHAT_IF_PRESETS, WHAT_IF_WORK = (256, 16384), ("b200",), 10.0
"""Of the report's panel; maps for other slots are planned with less work than those of the first screen."""
METHODS = ("eplb", "poise")
LABELS = {
    "contiguous": "EPLB off: contiguous blocks",
    "eplb": "EPLB, the engine's own",
    "poise": "poise, as {engine} will load it",
    f"poise + {FAST}": "the same with poise's fast loop",
    BOUND: "bound: nothing can be faster",
}


def demo(
    html: Annotated[Path, o.flag("html", "Where the report goes.")] = Path("report.html"),
    output: Annotated[Path | None, o.flag("output", "Write the map of poise there.")] = None,
    domain: Annotated[
        str | None,
        typer.Option(help=f"Text that the map is made for, or '{ALL}'. Default: {DOMAIN}; with --even all."),
    ] = None,
    even: Annotated[
        bool,
        typer.Option(
            "--even", help="Routing of a model that was trained to be even, all kinds of text mixed: little to gain."
        ),
    ] = False,
    all_tables: Annotated[bool, typer.Option("--all", help="Every method and every column.")] = False,
    cluster: o.ClusterSpec = CLUSTER,
    redundant: o.Redundant = REDUNDANT,
    tokens_per_step: o.TokensPerStep = TOKENS,
    time_limit: Annotated[float | None, o.flag("time_limit", "Seconds a method may take, instead of --work.")] = None,
    work: o.Work = None,
    json: o.Json = False,
) -> None:
    """What a map gains on the trace that ships with poise: a small MoE language model that writes Python.

    Maps are made from half of the requests and judged on the other half, and on the text that traffic turns to then.
    """
    with o.errors():
        o.writable(html)
        if output is not None:
            o.writable(output, ".npz")
        source, text = (EVEN, domain or ALL) if even else (TRACE, domain or DOMAIN)
        with best_so_far(o.talk.print) as wish:
            with o.progress() as report, _fast_loop_compiled_beside():
                found, held_out = compared(
                    text, source, cluster=cluster, redundant=redundant,
                    tokens_per_step=tokens_per_step, all_methods=all_tables,
                    work=WORK if work is None and time_limit is None else work,
                    time_limit_s=10.0 if time_limit is None else time_limit, progress=report, wish=wish,
                )  # fmt: skip
            plan = _map_of_poise(found)
            if output is not None:
                with_command(plan).save(output)
            if all_tables:
                show(found, html, json)
            else:
                _written(found, held_out, html, cluster, text, source, json, wish)
        if output is not None:
            o.talk.print(f"wrote {output}")


def _map_of_poise(found: Comparison) -> Placement:
    """What the demo is about.

    Raises
    ------
    NoResultError : poise has no map here, as a note of the comparison says.
    """
    for entry in found.entries:
        if entry.name == "poise":
            return entry.placement
    why = [note for note in found.notes if note.startswith("poise left out")]
    raise NoResultError("; ".join(why) or "there is no map of poise to show")


def _written(
    found: Comparison, held_out: RoutingTrace, html: Path, cluster: str, domain: str, source: Shipped, json: bool,
    wish: Wish,
) -> None:  # fmt: skip
    """The report, and the first screen."""
    setting, batch_of = _asked(found, held_out, cluster)
    with o.progress() as report:
        what = unless_stopped(
            lambda: what_if(found, setting, batch_of, sizes=WHAT_IF_SIZES, presets=WHAT_IF_PRESETS, work=WHAT_IF_WORK,
                            progress=report, wish=wish), wish,
        )  # fmt: skip
    write_report(found, html, command=o.command_line(), what=what)
    _first_screen(found, summarise(found, "poise", setting, batch_of, SIZES), domain, source, json)
    o.talk.print(f"wrote {html}")


def compared(
    domain: str = DOMAIN, source: Shipped = TRACE, *, cluster: str = CLUSTER, redundant: int = REDUNDANT,
    tokens_per_step: int | None = TOKENS, all_methods: bool = False, work: float | None = WORK, **more: Any,
) -> tuple[Comparison, RoutingTrace]:  # fmt: skip
    """The demo's comparison, and the requests of the domain that it judges on.

    Raises
    ------
    OptionError : the trace has no such domain.
    """
    trace = shipped(source)
    names = trace.domain_names
    if domain not in (*names, ALL):
        raise OptionError(f"unknown domain {domain!r}", hint=close_to(domain, (*names, ALL)))
    other = TURNED if domain != TURNED else DOMAIN
    own = [name for name in names if name != other] if domain == ALL else [domain]
    fit, held_out = trace.select(domains=own).split_requests()
    methods = api.DEFAULT_ROWS[1:] if all_methods else METHODS
    found = api.compare(
        held_out, cluster, fit=fit, others={f"{other} text": trace.select(domains=[other])},
        placements=(_blocks(fit, cluster), *methods), redundant=redundant, model=MODEL, engine=ENGINE,
        tokens_per_step=tokens_per_step, steps=STEPS, warm_up=WARM_UP, fast=(FAST,), step_slots=STEP_SLOTS, work=work,
        **more,
    )  # fmt: skip
    return found, held_out


def compile_fast_loop() -> None:
    """One step of the fast loop over blocks: all that the demo's fast loop compiles, and no planner."""
    trace = shipped(TRACE).select(domains=[DOMAIN])
    api.compare(
        trace, CLUSTER, fit=trace, placements=(_blocks(trace, CLUSTER),), redundant=REDUNDANT, model=MODEL,
        engine=ENGINE, tokens_per_step=TOKENS, steps=1, warm_up=WARM_UP, fast=(FAST,), step_slots=STEP_SLOTS, work=1.0,
    )  # fmt: skip


@contextmanager
def _fast_loop_compiled_beside() -> Iterator[None]:
    """Where this process has to compile, a second one compiles the fast loop while this one compiles the planners."""
    said = COMPILATION.on_first
    beside: list[subprocess.Popen[bytes]] = []

    def first() -> None:
        if said is not None:
            said()
        command = [sys.executable, "-P", "-W", "ignore", "-c", f"from {__name__} import compile_fast_loop as f; f()"]
        with suppress(OSError):  # this process compiles it all then
            beside.append(subprocess.Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL))

    COMPILATION.on_first = first
    try:
        yield
    finally:
        COMPILATION.on_first = said
        for one in beside:
            one.kill()
            one.wait()


def _blocks(fit: RoutingTrace, cluster: str) -> Placement:
    """What runs with EPLB off: no redundant slot."""
    placed = contiguous_blocks(make_batch(fit, steps=1), Cluster.parse(cluster))
    return replace(placed, fitted=Provenance(NO_TRAFFIC, {}))


def _asked(
    found: Comparison, held_out: RoutingTrace, cluster: str
) -> tuple[TrialSetting, Callable[[int], RoutingBatch]]:  # fmt: skip
    """The demo's machine and model, and the judged requests in steps of any size."""
    setting = TrialSetting(Cluster.parse(cluster), ModelSpec.parse(MODEL), parse_engine(ENGINE), split=found.split)

    def batch_of(tokens: int) -> RoutingBatch:
        steps = SIZE_STEPS if tokens <= TOKENS else max(1, SIZE_STEPS * TOKENS // tokens)
        return make_batch(held_out, tokens_per_step=tokens, steps=steps).at_home(found.cluster.num_devices)

    return setting, batch_of


def _first_screen(found: Comparison, summary: Summary, domain: str, source: Shipped, json: bool) -> None:
    if json:
        o.print_json("compare", {**found.to_json(), "summary": summary.to_json()})
        return
    model, cluster = found.model, found.cluster
    text = "four kinds of text" if domain == ALL else f"{domain} text"
    tokens = found.batches[found.judged_on].mean_tokens()
    weight = balance(source)
    o.out.print(
        f"{model.num_moe_layers} MoE layers of {model.name} ({model.num_experts} experts, top-{model.top_k}) on "
        f"{cluster.num_devices} GPUs in {cluster.num_nodes} nodes, vLLM, {tokens:,.0f} tokens a step. Routing: {text} "
        f"through a small model{f', trained with a balance loss of {weight},' if weight else ''} whose trace ships "
        "with poise; the maps know half of the requests."
    )
    for part, rows in summary.parts.items():
        if part != IN_SAMPLE:
            judged = part == found.judged_on
            title = "The other half of the requests" if judged else f"The same maps when traffic turns to {part}"
            o.out.print(_table(title, rows, summary.steps))
    slots = int(found.slots_D.sum()) - model.num_experts
    launch = eplb_flags(ENGINE, EplbSetting(False, slots, cluster.num_devices, model.num_experts, MODEL))
    if found.interrupted:
        o.out.print(INTERRUPTED, style="bold")
    if said := summary.not_worth_words():
        o.out.print(said, style="bold")
    o.out.print(f"Price of poise's map: {summary.price_words()}.")
    o.out.print(f"Trust: {summary.trust_words()}.")
    if any(entry.fast is not None for entry in found.entries):
        o.out.print(
            f"The fast loop needs {STEP_SLOTS} more slots a GPU, and has begun {WARM_UP} steps before these. What it "
            "fetches is priced, and so is its planning, which comes late. It runs in poise.serve, not in vLLM."
        )
    o.out.print(f"By batch: {summary.batches_words()}.")
    o.out.print(f"Load it: {o.command_line()} -o placement.npz, then " + "; ".join(launch))
    o.out.print(
        "More: every method and column: poise demo --all; a model that was trained to be even: poise demo --even; "
        "your own traffic: poise compare, poise verdict."
    )


def _table(title: str, rows: Sequence[SummaryRow], steps: int) -> Table:
    """The maps on one part of the traffic, each beside what runs now."""
    heads = ("map", "fullest GPU", "MoE ms a step", "saved", f"95 % over {steps} steps")
    table = o.table(title, heads, left=("map",))
    for row in rows:
        mean = 1.0 - row.seconds / rows[0].seconds
        between = "" if row.saved is None else f"{percent(row.saved[1])} to {percent(row.saved[2])}"
        name = LABELS.get(row.name, row.name).format(engine="vLLM")
        table.add_row(name, f"{row.imbalance:.2f} x mean", f"{MS * row.seconds:.2f}",
                      "" if row is rows[0] else percent(mean), between,
                      style="dim" if row.name == BOUND else "bold" if row.name == "poise" else None)  # fmt: skip
    return table
