"""What a watch came to so far, for the page: the loop writes, the server's threads read. Bounded."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from poise.watch.effect import Effect
from poise.watch.service import Planned, Seen, ServiceEvent, Told, Trouble
from poise.watch.sources import Polled

LOOKS, PLANS, PROBLEMS = 2_000, 200, 50
"""Most of each that are kept, the newest."""


class Board:
    """History and state of a watch.

    Parameters
    ----------
    about : facts that do not change, as JSON can say them.
    window : steps of a window: what is measured after a plan is the first look that knows only steps after it.
    clock : seconds since 1970.
    ticks : seconds that no setting of a clock moves.
    """

    def __init__(
        self, about: Mapping[str, Any], *, window: int, clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._lock = threading.Lock()
        self._about, self._window, self._clock, self._ticks = dict(about), window, clock, ticks
        self._started = clock()
        self._number = 0
        self._looks: deque[dict[str, Any]] = deque(maxlen=LOOKS)
        self._plans: deque[dict[str, Any]] = deque(maxlen=PLANS)
        self._problems: deque[dict[str, Any]] = deque(maxlen=PROBLEMS)
        self._heat: dict[str, Any] | None = None
        self._effect: dict[str, Any] | None = None
        self._noted_at = ticks()
        self._up: bool | None = None
        self._count = {"steps": 0, "dumps": 0, "dump_errors": 0, "plans": 0, "moves": 0, "moved_bytes": 0.0}
        self._state, self._learning = "idle", True

    def note(self, event: ServiceEvent) -> None:
        """Take in what happened."""
        with self._lock:
            at, self._noted_at = self._clock(), self._ticks()
            if isinstance(event, Polled):
                self._up = event.up
                self._count["dumps"] += event.dumps
                self._count["dump_errors"] += event.errors
                for message in event.problems:
                    self._note_problem(at, message)
            elif isinstance(event, Trouble):
                self._count["dump_errors"] += event.bad_dump
                self._note_problem(at, event.message)
            elif isinstance(event, Seen):
                self._note_look(at, event)
            elif isinstance(event, Told):
                self._note_told(event)
            elif isinstance(event, Effect):
                found = event.judgement
                self._effect = {"at": at, "sentence": found.sentence(), **found.to_json()}
            else:
                self._note_plan(at, event)

    def state(self, after: int = -1) -> dict[str, Any]:
        """Everything as JSON can say it; of looks only those numbered above ``after``, the heat map only with them."""
        with self._lock:
            looks = [look for look in self._looks if look["n"] > after]
            return {
                "started": self._started, "now": self._clock(), "about": self._about, "up": self._up,
                "state": self._state, "learning": self._learning, **self._count, "newest": self._number - 1,
                "looks": looks, "plans": [dict(plan) for plan in self._plans],
                "effect": self._effect, "problems": list(self._problems), "heat": self._heat if looks else None,
            }  # fmt: skip

    def idle_seconds(self) -> float:
        """Seconds since anything was noted; asking the source is."""
        with self._lock:
            return self._ticks() - self._noted_at

    def _note_problem(self, at: float, message: str) -> None:
        """One line for a problem that stays or comes again, with when it was last met."""
        same = next((line for line in self._problems if line["message"] == message), None)
        if same is not None:
            self._problems.remove(same)
        self._problems.append({"at": at, "message": message, "times": 1 if same is None else same["times"] + 1})

    def _note_look(self, at: float, event: Seen) -> None:
        look, verdict = event.look, event.look.verdict
        self._count["steps"], self._state, self._learning = look.step, look.state, look.learning
        self._looks.append({
            "n": self._number, "at": at, "step": look.step, "imbalance": look.imbalance,
            "after_restart": look.imbalance_after_restart, "restart": look.restart and look.restart.sentence(),
            "first": None if event.first is None else event.first.imbalance,
            "p_value": None if verdict is None else verdict.p_value,
            "alarm": verdict is not None and verdict.drifted,
            "seconds": None if event.now is None else event.now.seconds, "bound": event.bound_seconds,
        })  # fmt: skip
        self._number += 1
        if event.now is not None:
            self._heat = {
                "layers": event.now.layer_ids_L.tolist(),
                "relative": np.round(event.now.relative_LD, 3).tolist(),
                "imbalance": [None if math.isnan(x) else round(x, 4) for x in event.now.imbalance_L.tolist()],
            }
        for plan in self._open():
            if look.step >= plan["step"] + self._window:
                plan["measured"] = look.imbalance_after_restart

    def _open(self) -> list[dict[str, Any]]:
        """Accepted plans that serve and have no window of their own yet."""
        return [p for p in self._plans if p["accepted"] and p["measured"] is None and not p["superseded"]]

    def _supersede(self) -> None:
        """Another placement serves: what is seen from now on says nothing about plans of before."""
        for plan in self._open():
            plan["superseded"] = True

    def _note_told(self, event: Told) -> None:
        if event.replaced:
            self._supersede()
        taken = [plan for plan in self._plans if plan["accepted"]]
        for plan in taken[-1:]:  # what is written late is the newest
            plan["files"] = [*plan["files"], *(str(path) for path in event.written)]

    def _note_plan(self, at: float, event: Planned) -> None:
        decision, moves = event.decision, event.decision.moves
        self._count["plans"] += 1
        if decision.accepted:
            self._supersede()
            self._count["moves"] += moves.fetched
            self._count["moved_bytes"] += moves.moved_bytes
        self._plans.append({
            "at": at, "step": event.step, "reason": decision.reason, "accepted": decision.accepted,
            "gain": decision.predicted_gain, "cost_seconds": decision.cost_seconds, "moves": moves.fetched,
            "bytes": moves.moved_bytes, "rounds": len(moves.rounds), "left": decision.left,
            "before": None if event.before is None else event.before.imbalance,
            "predicted": None if event.after is None else event.after.imbalance, "measured": None,
            "superseded": False, "gap": event.gap, "files": [str(path) for path in event.written],
            "restart": decision.restart and decision.restart.sentence(),
        })  # fmt: skip
