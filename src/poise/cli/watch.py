"""poise watch: a placement that follows the traffic of a growing trace."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from poise import api
from poise.cli import options as o
from poise.cluster import Cluster
from poise.control.controller import Controller, ControlSettings, Decision, Look, steps_of
from poise.cost.split import SPLITS, Split
from poise.cost.traffic import TRAFFIC_MODELS, Traffic
from poise.errors import OptionError, TraceError
from poise.modelspec import ModelSpec
from poise.observe.batch import RoutingBatch
from poise.observe.batching import default_tokens_per_step, make_batch
from poise.observe.trace import LoadProfile, RoutingTrace
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import METHODS, solve

UNREADABLE_POLLS = 3
"""A file that is not readable and no longer changes is broken, not half written, after so many looks at it."""


class Tail:
    """The steps that a growing trace has gained: :meth:`steps` returns the new ones, or None where there are none.

    Steps are ``tokens_per_step`` consecutive rows, or the recorded ones; only whole ones are given out: the last rows
    wait for the rest of theirs, and the last recorded step for the one after it, unless the trace is said to be over.
    """

    def __init__(self, source: str, tokens_per_step: int | None) -> None:
        self.source = source
        self.tokens_per_step = tokens_per_step
        self.given = 0
        self.tokens = 0
        self._seen: tuple[int, int] | None = None
        self._failed = 0

    def steps(self, *, over: bool) -> RoutingBatch | None:
        """New whole steps; a file that cannot be read is tried again, unless it is ``over`` or stays as it is.

        Raises
        ------
        InputError : the file cannot be read, or holds less than before.
        """
        stamp = self._stamp()
        if stamp is not None and stamp == self._seen and not self._failed:
            return None
        try:
            found = api.load(self.source)
        except TraceError:
            self._failed = self._failed + 1 if stamp == self._seen else 1
            self._seen = stamp
            if over or self._failed >= UNREADABLE_POLLS:
                raise
            return None
        self._seen, self._failed = stamp, 0
        return self._new(found, over)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = Path(self.source.partition("#")[0]).stat()
        except (OSError, ValueError):
            return None
        return stat.st_size, stat.st_mtime_ns

    def _new(self, found: RoutingTrace | LoadProfile, over: bool) -> RoutingBatch | None:
        size = found.num_tokens if isinstance(found, RoutingTrace) else found.num_steps
        if size < self.tokens:
            raise TraceError(
                f"{self.source} holds {size} rows, {self.tokens} were read before", hint="watch a file that only grows"
            )
        self.tokens = size
        recorded = isinstance(found, LoadProfile) or (found.step is not None and self.tokens_per_step is None)
        if self.tokens_per_step is None and isinstance(found, RoutingTrace) and found.step is None:
            self.tokens_per_step = default_tokens_per_step(found.num_tokens)
        batch = make_batch(found, tokens_per_step=self.tokens_per_step, order="file")
        if recorded:
            whole = batch.num_steps - (not over and isinstance(found, RoutingTrace))
        else:
            whole = size // (self.tokens_per_step or 1)
        if whole <= self.given:
            return None
        new = steps_of(batch, slice(self.given, whole))
        self.given = whole
        return new


def watch(
    trace: Annotated[str, typer.Argument(help="Routing trace or load profile that may grow.", show_default=False)],
    cluster: o.ClusterSpec,
    placement: Annotated[
        Path | None, typer.Option("--placement", "-p", help="Placement in use. Default: contiguous.")
    ] = None,
    redundant: Annotated[
        int | None, typer.Option("--redundant", "-r", help="Redundant slots a layer, without --placement. Default: 0.")
    ] = None,
    model: o.Model = None,
    traffic: o.TrafficModel = None,
    split: o.SplitRule = "even",
    tokens_per_step: o.TokensPerStep = None,
    window: Annotated[int, typer.Option(help="Steps of a window; four windows make a reference.")] = 16,
    every: Annotated[int, typer.Option(help="Steps between looks.")] = 8,
    max_moves: Annotated[int | None, typer.Option(help="Most experts fetched at a time. Default: no limit.")] = None,
    false_alarm_rate: Annotated[float, typer.Option(help="Odds that a look at unchanged traffic alarms.")] = 0.01,
    horizon: Annotated[float, typer.Option(help="Steps that a new placement is expected to serve.")] = 10_000,
    method: Annotated[str, typer.Option(help="Method that plans, as in 'poise plan'.")] = "poise",
    follow: Annotated[bool, typer.Option("--follow/--once", help="Wait for more, or end at the file's end.")] = True,
    interval: Annotated[float, typer.Option(help="Seconds between looks at the file.")] = 1.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Placement file to keep up to date.")] = None,
    time_limit: o.TimeLimit = 10.0,
    seed: o.Seed = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Watch traffic, and plan anew when it drifts and the gain is worth the moves.

    Moves are taken to be made at once. Ends with --once at the file's end, else when interrupted.

    Example: poise watch trace.npz --cluster 2x8:h100 --redundant 16 --model deepseek-v3 --max-moves 64 -o now.npz
    """
    with o.errors():
        if output is not None:
            o.writable(output)
        if not (np.isfinite(interval) and interval > 0):
            raise OptionError(f"the interval must be above 0 s, got {interval}")
        if tokens_per_step is not None and tokens_per_step < 1:
            raise OptionError(f"tokens_per_step must be at least 1, got {tokens_per_step}")
        if placement is not None and redundant is not None:
            raise OptionError("--redundant is for a watch without --placement: that has slots of its own")
        if METHODS[o.one_of("method", method, tuple(METHODS))].pooled:
            raise OptionError(f"{method} counts slots over all layers together; moves need them layer by layer")
        settings = ControlSettings(
            window=window, every=every, false_alarm_rate=false_alarm_rate, max_moves=max_moves, horizon_steps=horizon,
            method=method, time_limit_s=time_limit, seed=seed, background=follow,
        )  # fmt: skip
        machine = Cluster.parse(cluster)
        flow = o.one_of("traffic model", traffic, TRAFFIC_MODELS)
        rule = o.one_of("split", split, SPLITS)
        use = None if placement is None else Placement.load(placement)
        if not Path(trace.partition("#")[0]).exists():
            raise TraceError(f"no such file: {trace.partition('#')[0]}")
        tail, controller = Tail(trace, tokens_per_step), None
        try:
            while True:
                new = tail.steps(over=not follow)
                if new is not None and controller is None:
                    controller = _start(new, machine, model, flow, rule, use, redundant or 0, settings)
                for b in range(0 if new is None else new.num_steps):
                    assert controller is not None and new is not None
                    for look in controller.observe(steps_of(new, slice(b, b + 1))):
                        _say_look(look, json)
                    _carry_out(controller, output, json)
                if controller is not None:
                    _carry_out(controller, output, json)
                if not follow:
                    break
                time.sleep(interval)
        except KeyboardInterrupt:
            pass
        if controller is None:
            raise TraceError(f"{trace} holds {tail.tokens} rows, less than a step of {tail.tokens_per_step}")
        o.talk.print(f"{controller.step} steps watched")


def _start(
    batch: RoutingBatch, cluster: Cluster, model: str | None, traffic: Traffic | None, split: Split,
    placement: Placement | None, redundant: int, settings: ControlSettings,
) -> Controller:  # fmt: skip
    sizes = ModelSpec.generic(batch.num_experts, batch.top_k, batch.layer_ids_L) if model is None else None
    sizes = sizes or ModelSpec.parse(model or "")
    flow: Traffic = traffic or ("home_node_dedup" if batch.has_tokens else "home")
    if placement is None:
        slots_D = api.deal_slots(batch.num_experts, redundant, cluster.num_devices)
        problem = PlacementProblem(batch, cluster, sizes, slots_D, flow, split)
        placement = solve(problem, method="contiguous").placement
    if placement.num_devices != cluster.num_devices:
        raise OptionError(
            f"the placement is for {placement.num_devices} devices, the cluster has {cluster.num_devices}"
        )
    slots_D = np.bincount(placement.slot_device_S, minlength=cluster.num_devices)
    return Controller(PlacementProblem(batch, cluster, sizes, slots_D, flow, split, current=placement), settings)


def _carry_out(controller: Controller, output: Path | None, json: bool) -> None:
    """Report what was decided, and let accepted placements serve."""
    while (decision := controller.collect()) is not None:
        if decision.accepted:
            controller.moved()
            if output is not None:
                controller.current.save(output)
        _say_decision(decision, output if decision.accepted else None, json)


def _say_look(look: Look, json: bool) -> None:
    verdict = look.verdict
    p_value, layer = (None, None) if verdict is None else (verdict.p_value, verdict.worst_layer)
    alarm = verdict is not None and verdict.drifted
    if json:
        _line({"event": "look", "step": look.step, "imbalance": look.imbalance, "p_value": p_value, "alarm": alarm,
               "worst_layer": layer, "state": look.state})  # fmt: skip
        return
    drift = "learning" if look.learning and verdict is None else "no test" if p_value is None else f"p {p_value:.4f}"
    line = f"step {look.step:>6}  imbalance {look.imbalance:.3f}  {drift}{'  ALARM' if alarm else ''}"
    o.out.print(line, markup=False)


def _say_decision(decision: Decision, written: Path | None, json: bool) -> None:
    moves = decision.moves
    if json:
        _line({"event": "plan", "step": decision.step, "reason": decision.reason, "accepted": decision.accepted,
               "predicted_gain": decision.predicted_gain, "gain_seconds": decision.gain_seconds,
               "cost_seconds": decision.cost_seconds, "moves": moves.fetched, "bytes": moves.moved_bytes,
               "rounds": len(moves.rounds), "left": decision.left,
               "file": None if written is None else str(written)})  # fmt: skip
        return
    verdict = "moving" if decision.accepted else "not worth it"
    o.out.print(
        f"step {decision.step:>6}  plan ({decision.reason}): gain {decision.predicted_gain:.1%} of a step, "
        f"{moves.fetched} moves, {moves.moved_bytes / 2**20:.1f} MiB, {len(moves.rounds)} rounds, "
        f"{1e3 * decision.cost_seconds:.2f} ms of links: {verdict}"
        + (f", {decision.left} moves left" if decision.accepted and decision.left else ""),
        markup=False,
    )  # fmt: skip


def _line(value: dict[str, Any]) -> None:
    sys.stdout.write(jsonlib.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()
