"""What poise watch prints: a line an event, or a JSON object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from poise.cli import options as o
from poise.cli.terminal import print_json
from poise.control.controller import Decision, Look
from poise.control.restart import Restart
from poise.util.words import percent
from poise.watch.effect import Effect
from poise.watch.service import Planned, Seen, ServiceEvent, Told, Trouble
from poise.watch.sources import Polled


class Teller:
    """Prints events; a problem that stays is told once."""

    def __init__(self, output: Path | None, at_start: bool, json: bool, *, generic: bool = False) -> None:
        self._output, self._at_start, self._json = output, at_start, json
        self._told: tuple[str, ...] = ()
        self._troubles: tuple[list[str], list[str]] = [], []  # of the look before and of this one
        self._no_plan = ""
        self._generic = generic

    def say(self, event: ServiceEvent) -> None:
        """Print an event."""
        if isinstance(event, Polled):
            for message in event.problems:
                if message not in self._told:
                    self._say_problem(message)
            self._told = event.problems
            self._troubles = self._troubles[1], []
            for message in event.notes:
                self._say_note(Told(message))
        elif isinstance(event, Trouble):
            known = (self._no_plan,) if event.failed_plan else (*self._troubles[0], *self._troubles[1])
            if event.message not in known:
                self._say_problem(event.message)
            if event.failed_plan:
                self._no_plan = event.message
            else:
                self._troubles[1].append(event.message)
        elif isinstance(event, Told):
            self._say_note(event)
        elif isinstance(event, Effect):
            _say_effect(event, self._json)
        elif isinstance(event, Seen):
            _say_look(event.look, self._at_start, self._json)
        else:
            self._no_plan = ""
            sizes = " of generic sizes" if self._generic else ""
            _say_decision(event, self._output, self._at_start, self._json, sizes)

    def _say_problem(self, message: str) -> None:
        if self._json:
            _line({"event": "problem", "message": message})
        else:
            o.talk.print(message, soft_wrap=True)

    def _say_note(self, told: Told) -> None:
        if self._json:
            _line({"event": "note", "message": told.message, "files": [str(path) for path in told.written]})
        else:
            o.talk.print(told.message, soft_wrap=True)


def say_listening(url: str, json: bool) -> None:
    """Where the page is."""
    if json:
        _line({"event": "listening", "url": url})
    o.talk.print(f"page at {url}, metrics at {url}metrics", soft_wrap=True)


def _say_look(look: Look, at_start: bool, json: bool) -> None:
    verdict = look.verdict
    p_value, layer = (None, None) if verdict is None else (verdict.p_value, verdict.worst_layer)
    alarm = verdict is not None and verdict.drifted
    if json:
        _line({"event": "look", "step": look.step, "imbalance": look.imbalance, "p_value": p_value, "alarm": alarm,
               "worst_layer": layer, "state": look.state, "imbalance_running": look.imbalance,
               "imbalance_after_restart": look.imbalance_after_restart, "restart": _restart(look.restart)})  # fmt: skip
        return
    drift = "learning" if look.learning and verdict is None else "no test" if p_value is None else f"p {p_value:.4f}"
    runs = f"{look.imbalance:.3f}"
    if at_start:
        runs += f" running, {look.imbalance_after_restart:.3f} after a restart"
    line = f"step {look.step:>6}  imbalance {runs}  {drift}{'  ALARM' if alarm else ''}"
    o.out.print(line)


def _say_effect(event: Effect, json: bool) -> None:
    if json:
        _line({"event": "effect", "news": event.news, **event.judgement.to_json()})
    elif event.news:
        o.out.print(f"map that runs  {event.judgement.sentence()}")


def _say_decision(event: Planned, output: Path | None, at_start: bool, json: bool, sizes: str) -> None:
    decision: Decision = event.decision
    moves, restart = decision.moves, decision.restart
    verdict = "not worth it" if not decision.accepted else "moving" if restart is None else "for the next start"
    if json:
        files = [str(path) for path in event.written]
        _line({"event": "plan", "step": decision.step, "reason": decision.reason, "accepted": decision.accepted,
               "predicted_gain": decision.predicted_gain, "gain_seconds": decision.gain_seconds,
               "cost_seconds": decision.cost_seconds, "moves": moves.fetched, "bytes": moves.moved_bytes,
               "rounds": len(moves.rounds), "turns": moves.turns, "left": decision.left, "left_out": decision.left_out,
               "verdict": verdict, "restart": _restart(restart),
               "file": str(output) if output in event.written else None, "files": files})  # fmt: skip
        return
    waits = "" if at_start else f", steps wait {1e3 * decision.cost_seconds:.2f} ms"
    o.out.print(
        f"step {decision.step:>6}  plan ({decision.reason}): gain {percent(decision.predicted_gain)} of a step{sizes}, "
        f"{moves.fetched} moves, {moves.moved_bytes / 2**20:.1f} MiB, {len(moves.rounds)} rounds{waits}: {verdict}"
        + (f", {decision.left} moves left" if decision.accepted and decision.left else "")
        + (f", {decision.left_out} that do not pay left out" if decision.accepted and decision.left_out else ""),
    )  # fmt: skip
    if restart is not None:
        o.out.print(f"{'':13}{restart.sentence()}")


def _restart(restart: Restart | None) -> dict[str, Any] | None:
    """What a restart would bring; None: nothing, or maps serve at once."""
    if restart is None:
        return None
    return {
        "imbalance_running": restart.imbalance_running, "imbalance_after_restart": restart.imbalance_after,
        "gain_seconds": restart.gain_seconds, "predicted_gain": restart.gain,
        "restart_seconds": restart.restart_seconds,
        "steps_to_win_back": restart.steps_to_win_back, "pays": restart.pays, "verdict": restart.sentence(),
    }  # fmt: skip


def _line(value: dict[str, Any]) -> None:
    print_json("watch", value, indent=None)
