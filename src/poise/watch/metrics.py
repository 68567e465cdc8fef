"""Prometheus metrics of a watch, in a registry of their own. Needs ``prometheus-client`` (the extra ``watch``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from poise.util.errors import NoResultError
from poise.watch.effect import Effect
from poise.watch.measure import Judged
from poise.watch.service import Planned, Seen, ServiceEvent, Trouble
from poise.watch.sources import Polled

try:
    import prometheus_client
    import prometheus_client.core
except ImportError:
    prometheus_client = None  # type: ignore[assignment]

NAN = float("nan")
EFFECTS = {"helped": 1, "did not help": 0, "hurt": -1}
"""Values of ``poise_map_effect``; NaN: it cannot be told yet."""


class Metrics:
    """Gauges and counters (docs/watch.md has the table). A gauge is NaN before its first value.

    Raises
    ------
    NoResultError : ``prometheus-client`` is not installed.
    """

    def __init__(self) -> None:
        if prometheus_client is None:
            raise NoResultError("metrics need prometheus-client", hint="pip install 'poise-moe[watch]'")
        self._registry = registry = prometheus_client.CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> prometheus_client.Gauge:
            made = prometheus_client.Gauge(f"poise_{name}", text, labels, registry=registry)
            if not labels:
                made.set(NAN)
            return made

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"poise_{name}", text, labels, registry=registry)

        self._up = gauge("up", "1 if the source of traffic answered at the last look")
        self._up.set(0)
        self._running = self._after = NAN
        registry.register(self)
        self._first = gauge(
            "imbalance_first_placement", "The same under the placement that the engine was started with"
        )
        self._predicted = gauge("imbalance_predicted", "The same as the last accepted plan predicted it")
        self._pays = gauge("restart_pays", "1 if a restart with the newest map pays within the horizon, 0 if not")
        self._saves = gauge("restart_gain_ratio", "Share of a step's MoE layers that a restart with it saves")
        self._layer = gauge("layer_imbalance", "Max / mean tokens over devices in the window", ("layer",))
        self._p_value = gauge("drift_p_value", "p value of the last drift test")
        self._alarm = gauge("drift_alarm", "1 if the last drift test alarmed")
        self._seconds = gauge("step_seconds_modelled", "Modelled seconds of a step's MoE layers", ("of",))
        self._effect = gauge("map_effect", "By the engine's own metrics: 1 the map helped, 0 it did not, -1 it hurt")
        self._pairs = gauge("map_effect_pairs", "Pairs of windows of like load that this rests on")
        self._ratio = gauge("map_tpot_ratio", "TPOT under the map over TPOT under the one before it, at like load")
        self._gap = gauge("last_plan_gap", "Modelled seconds of the last plan over the lower bound, minus 1")
        self._gain = gauge("last_plan_gain_ratio", "Share of a step that the last plan was to save on held-back steps")
        self._steps = counter("steps", "Steps watched")
        self._plans = counter("plans", "Plans made", ("accepted",))
        self._moves = counter("moves", "Experts that accepted plans fetch")
        self._bytes = counter("moved_bytes", "Bytes of their weights")
        self._dumps = counter("dumps", "Files of traffic read")
        self._errors = counter("dump_errors", "Files of traffic that could not be used")
        self._failed = counter("plan_failures", "Plans that were begun and that nothing came of")
        for accepted in ("true", "false"):
            self._plans.labels(accepted)
        self._step = 0
        self._now: Judged | None = None
        self.content_type = prometheus_client.CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        """The imbalance of the map that runs, under the name of old and with a label, and of the newest map."""
        made = prometheus_client.core.GaugeMetricFamily(
            "poise_imbalance",
            "Max / mean tokens over devices in the window: the map that runs, or that a restart brings",
        )
        for labels, value in (
            ({}, self._running), ({"map": "running"}, self._running), ({"map": "after_restart"}, self._after),
        ):  # fmt: skip
            made.add_sample("poise_imbalance", labels, value)
        yield made

    def text(self) -> bytes:
        """What a scrape gets."""
        return bytes(prometheus_client.generate_latest(self._registry))

    def details(self) -> bytes:
        """What only who asks for it gets: a series for every layer and device, of the last window."""
        registry, now = prometheus_client.CollectorRegistry(), self._now
        load = prometheus_client.Gauge(
            "poise_device_load_ratio", "Tokens of a device over the layer's mean, in the window", ("layer", "device"),
            registry=registry,
        )  # fmt: skip
        for layer, row in [] if now is None else zip(now.layer_ids_L.tolist(), now.relative_LD.tolist(), strict=True):
            for device, value in enumerate(row):
                load.labels(layer, device).set(value)
        return bytes(prometheus_client.generate_latest(registry))

    def note(self, event: ServiceEvent) -> None:
        """Take in what happened."""
        if isinstance(event, Polled):
            self._up.set(event.up)
            self._dumps.inc(event.dumps)
            self._errors.inc(event.errors)
        elif isinstance(event, Trouble):
            self._errors.inc(event.bad_dump)
            self._failed.inc(event.failed_plan)
        elif isinstance(event, Seen):
            self._note_look(event)
        elif isinstance(event, Planned):
            self._note_plan(event)
        elif isinstance(event, Effect):
            found = event.judgement
            self._effect.set(EFFECTS.get(found.answer, NAN))
            self._pairs.set(found.pairs)
            self._ratio.set(NAN if found.ratio is None else found.ratio)

    def _note_look(self, event: Seen) -> None:
        look = event.look
        self._steps.inc(look.step - self._step)
        self._step = look.step
        self._running, self._after = look.imbalance, look.imbalance_after_restart
        if look.restart is None:  # what runs is the newest
            self._saves.set(0.0)
            self._pays.set(0)
        else:
            self._saves.set(look.restart.gain)
            self._pays.set(NAN if look.restart.pays is None else look.restart.pays)
            self._seconds.labels("after_restart").set(look.restart.seconds_after)
        if look.verdict is not None:
            self._p_value.set(look.verdict.p_value)
            self._alarm.set(look.verdict.drifted)
        if event.first is not None:
            self._first.set(event.first.imbalance)
        if event.now is not None:
            self._now = event.now
            self._seconds.labels("current").set(event.now.seconds)
            for layer, value in zip(event.now.layer_ids_L.tolist(), event.now.imbalance_L.tolist(), strict=True):
                self._layer.labels(layer).set(value)
        if event.bound_seconds is not None:
            self._seconds.labels("bound").set(event.bound_seconds)

    def _note_plan(self, event: Planned) -> None:
        decision = event.decision
        self._plans.labels("true" if decision.accepted else "false").inc()
        self._gain.set(decision.predicted_gain)
        if decision.accepted:
            self._moves.inc(decision.moves.fetched)
            self._bytes.inc(decision.moves.moved_bytes)
        if event.after is not None:
            if decision.accepted:
                self._predicted.set(event.after.imbalance)
            self._seconds.labels("after_plan").set(event.after.seconds)
        if event.gap is not None:
            self._gap.set(event.gap)
