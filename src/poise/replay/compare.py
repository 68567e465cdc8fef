"""compare: every placement on every part of the traffic, in one table, with the bound beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from poise.cost.bound import bound_terms
from poise.cost.perturb import GainRange, gain_range
from poise.cost.pricing import Pricing
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import ground, settle
from poise.planning.engine_rules import ANY, EngineRules
from poise.planning.placement import Placement
from poise.replay.serving import WARM_UP, FastLoop, replay_steps
from poise.replay.static import Replay, replay
from poise.routing.batch import RoutingBatch
from poise.routing.fingerprint import FITTED, Fingerprint
from poise.stepwise.checked import failed
from poise.util.errors import NoResultError, OptionError, PluginError, PoiseError
from poise.util.notebook import lines_html, table_html
from poise.util.wish import Wish
from poise.util.words import percent

IN_SAMPLE = "in-sample"
ON_FITTED = "fitted on this traffic"
INTERRUPTED = (
    "Interrupted: these are the best plans so far, and what was not judged to its end is left out. No verdict: another "
    "run may end elsewhere."
)
"""Instead of a verdict."""
NOT_WORTH = 0.01
"""A gain below this share of a step is called not worth it."""
OF_BOUND: dict[str, float | None] = {
    "imbalance": 1.0, "imbalance_p99": 1.0, "cross_device_share": None, "cross_node_share": None, "efficiency": 1.0,
    "moved_bytes_per_step": 0.0,
}  # fmt: skip
"""What a row says of its replay, as it is for the bound."""
COLUMNS = ("imbalance", "p99", "off device", "off node", "step ms", "p99 ms", "efficiency", "speedup")
"""Of a table, behind the name of the placement."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A placement in a comparison.

    Parameters
    ----------
    name : its row.
    placement : what is replayed.
    pooled : its memory is counted over all layers together.
    seconds : planning time, or None if it came from a file.
    fast : a fast loop over the placement, or None: the engine's own split.
    prior_LE : float64 [L, E], loads a fast loop knows before the first step, or None.
    fitted : fingerprint of the traffic that the placement was fitted on; None: not known.
    made_for : the placement as it was given, where it is for another number of devices than the cluster has, or None.
    """

    name: str
    placement: Placement
    pooled: bool = False
    seconds: float | None = None
    fast: FastLoop | None = None
    prior_LE: NDArray[np.float64] | None = None
    fitted: Fingerprint | None = None
    made_for: Placement | None = None

    @property
    def looks_at_nothing(self) -> bool:
        """No traffic was looked at for it, so all is alike to it."""
        return self.fitted is not None and self.fitted.is_empty


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Replays of all entries on all parts of the traffic.

    Parameters
    ----------
    entries : what was compared, in order; the first is the baseline.
    batches : the traffic of each part; :data:`IN_SAMPLE` is what the methods were fitted on.
    replays : (entry name, part) -> replay.
    bounds_B : part -> least seconds of each step for any placement with the slots of the problem.
    pricing, slots_D : what prices a step, and the memory that the bound is given.
    notes : what the reader must know, one sentence each.
    warm_up : steps at the start of each part that ran but are not judged.
    fitted_share : (entry name, part) -> share of the part's traffic that the entry was fitted on, where it is known.
    defaults : what was not said and decides the seconds, one sentence each; with any, no gain in time is claimed.
    engine : what every placement is held to (:mod:`poise.planning.engine_rules`).
    interrupted : plans are the best so far, and fast loops that were not judged to their end are left out.
    """

    entries: tuple[Entry, ...]
    batches: Mapping[str, RoutingBatch]
    replays: Mapping[tuple[str, str], Replay]
    bounds_B: Mapping[str, NDArray[np.float64]]
    pricing: Pricing
    slots_D: NDArray[np.int64]
    notes: tuple[str, ...] = ()
    warm_up: int = 0
    fitted_share: Mapping[tuple[str, str], float] = field(default_factory=dict)
    defaults: tuple[str, ...] = ()
    engine: str = ANY.name
    interrupted: bool = False

    @property
    def cluster(self) -> Cluster:
        """The machine."""
        return self.pricing.cluster

    @property
    def model(self) -> ModelSpec:
        """The model's sizes."""
        return self.pricing.model

    @property
    def traffic(self) -> DataFlow:
        """The data flow."""
        return self.pricing.traffic

    @property
    def split(self) -> Split:
        """How tokens of a replicated expert are split."""
        return self.pricing.split

    def label(self, name: str, part: str) -> str:
        """What a row of a part was judged on: the part, or :data:`ON_FITTED` where its plan knew that traffic."""
        share = self.fitted_share.get((name, part), 0.0)
        return ON_FITTED if part != IN_SAMPLE and share >= FITTED else part

    def title(self, part: str) -> str:
        """The part's name; :data:`ON_FITTED` where every row that looks at traffic was fitted on it."""
        known = [e.name for e in self.entries if not e.looks_at_nothing]
        labels = {self.label(name, part) for name in known}
        return ON_FITTED if labels == {ON_FITTED} else part

    @property
    def judged_on(self) -> str:
        """The part that the verdict is about: the first held-out one, else the in-sample one."""
        return next((part for part in self.batches if part != IN_SAMPLE), IN_SAMPLE)

    @property
    def num_layers(self) -> int:
        """L, MoE layers of the judged traffic."""
        return next(iter(self.batches.values())).num_layers

    def rows(self) -> list[dict[str, Any]]:
        """One row an entry and part, plus the bound; JSON values."""
        out = []
        for part in self.batches:
            for entry in self.entries:
                got = self.replays[entry.name, part]
                judged_on = self.title(part) if entry.looks_at_nothing else self.label(entry.name, part)
                figures = {name: getattr(got, name) for name in OF_BOUND}
                share = self.fitted_share.get((entry.name, part))
                out.append(self._row(entry.name, judged_on, part, got.step_seconds_B, figures, share, entry.seconds))
            out.append(self._row("bound", self.title(part), part, self.bounds_B[part], OF_BOUND))
        return out

    def _row(
        self, name: str, judged_on: str, part: str, seconds_B: NDArray[np.float64], figures: Mapping[str, Any],
        fitted_share: float | None = None, planned_s: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        base = float(self.replays[self.entries[0].name, part].step_seconds_B.mean())
        return {
            "name": name,
            "judged_on": judged_on,
            "part": part,
            "fitted_share": fitted_share,
            "imbalance": figures["imbalance"],
            "imbalance_p99": figures["imbalance_p99"],
            "cross_device_share": figures["cross_device_share"],
            "cross_node_share": figures["cross_node_share"],
            "step_seconds": _spread(seconds_B),
            "efficiency": figures["efficiency"],
            "moved_bytes_per_step": figures["moved_bytes_per_step"],
            "speedup": base / float(seconds_B.mean()),
            "planning_seconds": planned_s,
        }

    def gain(self, name: str, over: str, part: str | None = None) -> tuple[float, float, float]:
        """Share of step time that ``name`` saves over ``over``: mean and a 95 % interval (bootstrap over steps)."""
        part = part or self.judged_on
        return saved_share(*(self.replays[which, part].step_seconds_B for which in (name, over)))

    def verdict(self) -> str:
        """One sentence or two: what the best placement gains on the judged traffic, or that it is not worth it.

        Placements fitted on the judged traffic come second to those that were not: what they gain there says nothing of
        other traffic. Without a model, or with loads of no stated step, no gain in time is claimed, and none of plans
        that somebody cut short: another run may end elsewhere.
        """
        if self.interrupted:
            return INTERRUPTED
        part, base = self.judged_on, self.entries[0].name
        if len(self.entries) < 2:
            return f"{base}: nothing to compare with."
        if self.defaults:
            return self._undecided(part, base)
        fresh = [e.name for e in self.entries if self.label(e.name, part) != ON_FITTED or e.name == base]
        seen = [e.name for e in self.entries if e.name not in fresh]
        said = [self._best(part, base, fresh)] if len(fresh) > 1 else []
        if said and self.label(base, part) == ON_FITTED:
            said.append(f"{base} was {ON_FITTED}, which flatters it.")
        if seen:
            text = self._best(part, base, [base, *seen])
            said.append(f"{', '.join(seen)}: {ON_FITTED}, which says nothing of other traffic. {text}")
        return " ".join(said)

    def _best(self, part: str, base: str, names: Sequence[str]) -> str:
        mean = {name: float(self.replays[name, part].step_seconds_B.mean()) for name in names}
        best = min(mean, key=mean.__getitem__)
        steps = len(self.bounds_B[part])
        where = self.where(names[-1] if best == base else best, part)
        if best == base:
            return f"Not worth it: on {where} no method beats {base}."
        share, low, high = self.gain(best, base)
        text = f"{percent(share)} less modelled MoE time than {base} on {where}"
        text += (
            f" (95 % interval over {steps} steps: {percent(low)} to {percent(high)})" if steps > 1 else " (one step)"
        )
        sure, more = self.within_errors(best, base, part), ""
        if sure is not None:
            more = f"{percent(sure.least_share)} at the least while constants are off by their errors; "
        even = {name: self.replays[name, part].imbalance for name in (best, base)}
        more += f"max / mean tokens {even[best]:.3f}, {base} {even[base]:.3f}."
        if share < NOT_WORTH or low <= 0 or (sure is not None and sure.least_share <= 0):
            return f"Not worth it: {best} is best, {text}. {more}"
        return f"{best} is best: {text}. {more}"

    def within_errors(self, name: str, over: str, part: str | None = None) -> GainRange | None:
        """What ``name`` saves over ``over`` while every constant of the machine is off by its error
        (:func:`poise.cost.perturb.gain_range`); None where one of the two plans every step anew.
        """
        by_name = {entry.name: entry for entry in self.entries}
        pair = [by_name[which] for which in (over, name)]
        if any(entry.fast is not None for entry in pair):
            return None
        before, after = (entry.placement.count_LED() for entry in pair)
        return gain_range(self.batches[part or self.judged_on], before, after, self.pricing)

    def where(self, name: str, part: str) -> str:
        """What a row of a part was judged on, in a sentence about it."""
        if self.label(name, part) == ON_FITTED:
            return "the traffic it was fitted on"
        if self.title(part) == ON_FITTED:
            return "this traffic"
        entry = next(entry for entry in self.entries if entry.name == name)
        told = entry.looks_at_nothing or part == IN_SAMPLE or (name, part) in self.fitted_share
        return f"{part} traffic" if told else f"{part} traffic (as far as is known)"

    def _undecided(self, part: str, base: str) -> str:
        imbalance = {entry.name: self.replays[entry.name, part].imbalance for entry in self.entries}
        best = min(imbalance, key=imbalance.__getitem__)
        head = f"No verdict on time: {'; '.join(self.defaults)}. By tokens alone"
        if best == base:
            return (
                f"{head} nothing is more even than {base} on {self.where(base, part)}: max / mean over devices "
                f"{imbalance[base]:.3f}."
            )
        return (
            f"{head} {best} is most even on {self.where(best, part)}: max / mean over devices {imbalance[best]:.3f}, "
            f"{base} {imbalance[base]:.3f}."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything that the table shows."""
        return {
            "rows": self.rows(),
            "verdict": self.verdict(),
            "judged": {
                part: {
                    "order": batch.order,
                    "steps": batch.num_steps,
                    "warmup_steps_left_out": self.warm_up,
                    "drawn_from_steps": batch.drawn_from,
                }
                for part, batch in self.batches.items()
            },
            "cluster": repr(self.cluster),
            "ground": ground(self.cluster),
            "model": self.model.name,
            "traffic": self.traffic,
            "split": self.split,
            "engine": self.engine,
            "defaults": list(self.defaults),
            "slots": self.slots_D.tolist(),
            "notes": list(self.notes),
            "interrupted": self.interrupted,
        }

    def _repr_html_(self) -> str:
        """For notebooks: a table a part, the notes and the verdict."""
        rows = self.rows()
        tables = [
            table_html(
                f"{self.title(part)}: {batch.order}", ("placement", *COLUMNS),
                [_cells(row, self.title(part)) for row in rows if row["part"] == part],
            )
            for part, batch in self.batches.items()
        ]  # fmt: skip
        notes = [f"note: {note}" for note in self.notes]
        return "".join(tables) + lines_html([f"Constants: {ground(self.cluster)}.", *notes, self.verdict()])

    def table(self, console: Console) -> None:
        """Print one table a part, best values bold, and the notes."""
        rows = self.rows()
        for part, batch in self.batches.items():
            mine = [row for row in rows if row["part"] == part]
            left_out = f", {self.warm_up} warm-up steps left out" if self.warm_up else ""
            table = Table(
                title=f"{self.title(part)}: {batch.order}{left_out}", title_justify="left", header_style="bold"
            )
            table.add_column("placement")
            for head in COLUMNS:
                table.add_column(head, justify="right")
            best = min(row["step_seconds"]["mean"] for row in mine[:-1])
            for row in mine:
                style = "dim" if row["name"] == "bound" else "bold" if row["step_seconds"]["mean"] == best else None
                table.add_row(*_cells(row, self.title(part)), style=style)
            console.print(table)
        console.print(
            f"{self.cluster!r}; model {self.model.name}; traffic {self.traffic}; split {self.split}; "
            f"{int(self.slots_D.sum())} slots a layer, held as engine '{self.engine}' holds them. Imbalance is max / "
            f"mean tokens over devices, mean and p99 over steps and layers; off device and off node are shares of "
            f"(token, expert) pairs; step ms is modelled: all {self.num_layers} recorded MoE layers of a forward pass; "
            "efficiency is bound / step, speedup is over the first row."
        )
        console.print(f"Constants: {ground(self.cluster)}.")
        for note in self.notes:
            console.print(f"note: {note}")
        console.print(self.verdict())


def _why_none(loop: FastLoop, error: Exception, wish: Wish | None) -> PoiseError | None:
    """Why a fast loop has no row, if that is a note: somebody ended it, or its policy is another package's."""
    if wish is not None and wish.came and isinstance(error, NoResultError):
        return error
    return failed(loop.policy, error)


def saved_share(new_B: NDArray[np.float64], old_B: NDArray[np.float64]) -> tuple[float, float, float]:
    """Share of step time that is saved: mean and a 95 % interval (bootstrap over steps)."""
    rng = np.random.default_rng(0)
    pick = rng.integers(len(new_B), size=(2000, len(new_B)))
    boot = 1.0 - new_B[pick].mean(axis=1) / old_B[pick].mean(axis=1)
    low, high = np.percentile(boot, [2.5, 97.5])
    return float(1.0 - new_B.mean() / old_B.mean()), float(low), float(high)


def left_out(name: str, error: PoiseError) -> str:
    """The note on a row that is not there."""
    said = f"{name} left out: {error.message}"
    return f"{said} (hint: {error.hint})" if isinstance(error, PluginError) else said


def _spread(seconds_B: NDArray[np.float64]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds_B, [50, 99])
    return {"mean": float(seconds_B.mean()), "p50": float(p50), "p99": float(p99)}


def _cells(row: dict[str, Any], title: str) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    seconds = row["step_seconds"]
    return [
        row["name"] if row["judged_on"] == title else f"{row['name']} ({row['judged_on']})",
        f"{row['imbalance']:.3f}", f"{row['imbalance_p99']:.2f}", share(row["cross_device_share"]),
        share(row["cross_node_share"]), f"{1e3 * seconds['mean']:.3f}", f"{1e3 * seconds['p99']:.3f}",
        f"{row['efficiency']:.3f}", f"{row['speedup']:.3f}",
    ]  # fmt: skip


def compare(
    batches: Mapping[str, RoutingBatch],
    entries: Sequence[Entry],
    *,
    pricing: Pricing,
    slots_D: NDArray[np.int64],
    notes: Sequence[str] = (),
    warm_up: int | None = None,
    prints: Mapping[str, Fingerprint] | None = None,
    defaults: Sequence[str] = (),
    engine: EngineRules = ANY,
    wish: Wish | None = None,
) -> Comparison:
    """Replay every entry on every part of the traffic; one whose policy is another package's and fails is a note.

    Parameters
    ----------
    batches : part -> traffic; the key :data:`IN_SAMPLE` marks what the entries were fitted on.
    entries : at least one; names must differ.
    pricing : what prices a step.
    slots_D : int [D], the memory that the bound row is given.
    warm_up : steps that run but are not judged; default 5 where an entry has a fast loop, else none.
    prints : part -> fingerprint of its traffic, to tell which entries were fitted on it.
    defaults, engine : as in :class:`Comparison`; placements are taken as they are.
    wish : that it be ended: fast loops, which take most of the time, are left out then.

    Raises
    ------
    OptionError : no entry, a name twice, or a placement that does not fit the traffic and cluster.
    NoResultError : no entry is left.
    """
    cluster, model, traffic = pricing.cluster, pricing.model, pricing.traffic
    names = [entry.name for entry in entries]
    if not names or len(set(names)) < len(names) or not batches:
        raise OptionError(f"a comparison needs traffic and placements with different names, got {names}")
    cluster = settle(cluster, model, next(iter(batches.values())).mean_tokens(), engine=engine.kernels)
    loops = [entry.fast for entry in entries if entry.fast is not None]
    skip = (WARM_UP if loops else 0) if warm_up is None else warm_up
    room_D = np.minimum(
        slots_D + max((loop.step_slots for loop in loops), default=0), next(iter(batches.values())).num_experts
    )
    replays, bounds, judged = {}, {}, {}
    broken: dict[str, PoiseError] = {}
    blind = pricing.split != "near" and all(entry.fast is None for entry in entries)
    for part, batch in batches.items():
        if skip >= batch.num_steps:
            raise OptionError(
                f"{part} has {batch.num_steps} steps, {skip} of them warm-up",
                hint="lower --tokens-per-step, or --steps",
            )
        batch = batch.at_home(cluster.num_devices)
        judged[part] = batch.steps_from(skip)
        for entry in (entry for entry in entries if entry.name not in broken):
            try:
                replays[entry.name, part] = _replayed(entry, batch, skip, replace(pricing, cluster=cluster), wish)
            except Exception as error:
                problem = None if entry.fast is None else _why_none(entry.fast, error, wish)
                if problem is None:
                    raise
                broken[entry.name] = problem
        terms = bound_terms(judged[part], cluster, model, traffic=traffic, slots_D=room_D, blind=blind)
        bounds[part] = terms.seconds_BL.sum(axis=1)
    entries = [entry for entry in entries if entry.name not in broken]
    notes = [*notes, *(left_out(name, problem) for name, problem in broken.items())]
    if not entries:
        raise NoResultError("; ".join(notes))
    shares, said = _fitted_on(entries, prints or {})
    return Comparison(
        tuple(entries), judged, replays, bounds, pricing, slots_D, (*notes, *said), skip, shares, tuple(defaults),
        engine.name, wish is not None and wish.came,
    )  # fmt: skip


def _replayed(entry: Entry, batch: RoutingBatch, skip: int, pricing: Pricing, wish: Wish | None) -> Replay:
    """One entry on the steps of one part; the first ``skip`` are not judged."""
    cluster, model, traffic = pricing.cluster, pricing.model, pricing.traffic
    if entry.fast is None:
        return replay(batch.steps_from(skip), entry.placement, cluster, model, traffic=traffic, split=pricing.split,
                      pooled=entry.pooled)  # fmt: skip
    loop = replace(entry.fast, engine_split="near" if pricing.split == "near" else "even")
    return replay_steps(batch, entry.placement, loop, cluster, model, traffic=traffic, warm_up=skip,
                        prior_LE=entry.prior_LE, wish=wish)  # fmt: skip


def _fitted_on(
    entries: Sequence[Entry], prints: Mapping[str, Fingerprint]
) -> tuple[dict[tuple[str, str], float], list[str]]:
    """Share of each part's traffic that each entry was fitted on, and where that cannot be told, in words."""
    shares: dict[tuple[str, str], float] = {}
    said = []
    for part, print_ in prints.items():
        for entry in entries:
            share = None if entry.fitted is None else entry.fitted.share_of(print_)
            if share is not None:
                shares[entry.name, part] = share
            elif entry.fitted is not None and part != IN_SAMPLE:
                said.append(f"{entry.name}: whether {part} traffic is held out for it cannot be told")
    return shares, said
