"""Controller: steps in; when traffic drifts, a new plan, if it pays, and the moves that lead to it.

Step 1  Learn: the first ``reference`` steps become the reference of the drift test, and a plan is made on them (the
        placement in use may be anybody's).
Step 2  Watch: every ``every`` steps, once ``window`` steps have passed since the reference, the test looks at them.
Step 3  Alarm: a plan is made on the window, at once. Part of it may still be traffic of before, so the controller
        learns again from the next step on (step 1): that plan settles what this one began.

A plan is judged on steps it was not fitted on (every fourth of those at hand; fewer than eight steps are used for
both). Devices of equal speed and slots are interchangeable up to where tokens happen to come from, so the new plan is
also tried with its devices renumbered to fetch least (:func:`aligned`), and either as far as the way there pays
(:mod:`poise.control.payback`). The best one, after migration, is taken if

    horizon_steps * (seconds of a step now - then)  >  seconds that steps wait for its moves

on modelled seconds of the MoE layers. What steps wait is priced against the traffic on every port
(:mod:`poise.control.price`), or told as ``exposed_share`` of the link seconds: 1 lets serving stand still while weights
move. With ``max_moves`` only the best part of the way is gone at a time (:func:`poise.control.payback.bounded`), the
rest at the next looks, each part judged anew on the traffic of its time. Moves are listed in the order in which they
pay back. While it plans or moves, no test is made.

With ``at_start`` nothing moves while tokens flow: all of the plan comes with the engine's next start, so that no step
waits and whatever lowers the seconds of a step is taken. Whether it is worth a restart is another question
(:mod:`poise.control.restart`).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.control.align import aligned
from poise.control.back import part_back
from poise.control.decision import ControllerState, Decision, Look, Reason
from poise.control.drift import DriftTest, permutations_for
from poise.control.moves import MoveList, move_list
from poise.control.payback import Migration, migration
from poise.control.price import PortTraffic
from poise.control.restart import Restart, imbalance_of
from poise.control.steps import join_steps, one_step, steps_of
from poise.cost.step import BatchCost
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.solve import solve
from poise.routing.batch import RoutingBatch
from poise.util.errors import NoResultError, OptionError, PoiseError, told

__all__ = ["ControlSettings", "Controller", "Decision", "Look", "aligned", "join_steps", "steps_of"]

MOST_REFERENCES = 16
"""Most references that pass between a plan that failed and the next try."""


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """How a :class:`Controller` behaves: module docstring.

    Parameters
    ----------
    window, every : steps of a window, steps between looks.
    reference : steps of a reference; None: four windows.
    false_alarm_rate, looks : of :class:`poise.control.drift.DriftTest`.
    max_moves : most experts fetched at a time; None: no limit.
    horizon_steps : steps that a plan is expected to serve.
    exposed_share : share of the link seconds of a migration that serving feels; None: priced against the traffic.
        With ``at_start`` nothing is felt.
    staging : staging buffers a device.
    method, time_limit_s, seed : of :func:`poise.planning.solve.solve.solve`.
    background : plan beside :meth:`Controller.observe`; else that waits for the plan.
    at_start : the engine takes a placement only when it starts: it goes on running what it ran when one is accepted.
    restart_seconds : without serving, that a restart costs; None: not known.
    """

    window: int = 16
    every: int = 8
    reference: int | None = None
    false_alarm_rate: float = 0.01
    looks: int = 1
    max_moves: int | None = None
    horizon_steps: float = 10_000.0
    exposed_share: float | None = None
    staging: int = 1
    method: str = "poise"
    time_limit_s: float = 10.0
    seed: int = 0
    background: bool = True
    at_start: bool = False
    restart_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "every", "reference", "looks", "max_moves", "staging"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}")
        share = 0.0 if self.exposed_share is None else self.exposed_share
        if not (0 < self.horizon_steps < float("inf") and 0 <= share < float("inf")):
            got = f"{self.horizon_steps} and {self.exposed_share}"
            raise OptionError(f"horizon_steps must be above 0 and exposed_share at least 0, got {got}")
        if self.restart_seconds is not None and not 0 <= self.restart_seconds < float("inf"):
            raise OptionError(f"restart_seconds must be at least 0, got {self.restart_seconds}")
        permutations_for(self.reference_steps, self.window, self.false_alarm_rate, self.looks)

    @property
    def reference_steps(self) -> int:
        """Steps of a reference."""
        return self.reference or 4 * self.window


class Controller:
    """Keeps a placement fit for the traffic it sees. Rules: module docstring.

    Parameters
    ----------
    problem : machine, model, slots (of the placement in use, not pooled), traffic model and split; its batch only says
        what steps look like, and ``problem.current`` is the placement in use.
    settings : see :class:`ControlSettings`.

    Attributes
    ----------
    step : steps observed. state : ``planning`` and ``moving`` while that lasts. current : the placement in use; with
    ``at_start`` the newest accepted one, which the next start of the engine takes (:attr:`running`).
    test : the drift test, None while a reference is learned. target : the plan on whose way ``current`` is, or None.
    """

    def __init__(self, problem: PlacementProblem, settings: ControlSettings | None = None) -> None:
        if problem.current is None or problem.pooled:
            raise OptionError("a controller needs the placement in use, and slots counted layer by layer")
        problem.check(problem.current)
        slots_D = problem.current.slots_D
        if (slots_D != problem.slots_D).any():
            d = int(np.argmax(slots_D != problem.slots_D))
            raise OptionError(f"the placement in use has {slots_D[d]} slots on device {d}, not {problem.slots_D[d]}")
        self.settings = settings or ControlSettings()
        self.step, self._since, self._planned = 0, 0, False
        self.state: ControllerState = "idle"
        self.current: Placement = problem.current
        self.target: Placement | None = None
        self.test: DriftTest | None = None
        self._problem = problem
        self._recent: deque[RoutingBatch] = deque(maxlen=self.settings.window)
        self._learned: deque[RoutingBatch] = deque(maxlen=self.settings.reference_steps)
        self._thread: threading.Thread | None = None
        self._outcome: Decision | BaseException | None = None
        self._failures, self._rest_until = 0, 0
        self._decisions: deque[Decision] = deque()
        self._moving: Decision | None = None
        self._running: Placement | None = None
        self._accepted = False
        self._measured: tuple[float, float] | None = None  # seconds of a step of what runs and of the newest
        self._hold = False

    @property
    def running(self) -> Placement:
        """What the engine runs."""
        return self._running or self.current

    def runs(self, placement: Placement) -> None:
        """The engine says that it runs this placement. Plans go on from it, unless a newer one waits for a start."""
        if self.settings.at_start and self._accepted:
            same = placement.holds_like(self.current)
            self._running = None if same else placement
        else:
            self.current, self.target = placement, None

    def observe(self, steps: RoutingBatch | NDArray[Any]) -> list[Look]:
        """Take in one or more steps, in order: a batch, or loads [B, L, E] or [L, E]; returns the looks that fell due.

        Raises
        ------
        OptionError : the steps are not of the problem's shape.
        PoiseError : what planning raised (:exc:`poise.util.errors.NoResultError` where that was no error of
            poise's); the controller is idle again and learns anew, for one reference, then for 2, 4, ... 16 as long as
            plans fail.
        """
        batch = self._batch(steps)
        looks = []
        for b in range(batch.num_steps):
            one = one_step(batch, b)
            self.step += 1
            self._recent.append(one)
            if self.test is None:
                self._learned.append(one)
            else:
                self._since += 1
            self._reap(wait=False)
            if self.test is None and len(self._learned) == self.settings.reference_steps and self.state == "idle":
                if self.step >= self._rest_until:
                    self._learn()
            if self.step % self.settings.every == 0:
                looks.append(self._look())
        return looks

    def collect(self, *, wait: bool = False) -> Decision | None:
        """The oldest decision not collected yet, or None; ``wait`` for a plan that is being made.

        An accepted one holds the state at ``moving`` until :meth:`moved` says how its moves went.
        Raises what planning raised, as :meth:`observe` does.
        """
        self._reap(wait=wait)
        return self._decisions.popleft() if self._decisions else None

    def moved(self, *, done: bool = True) -> None:
        """The moves of the accepted decision were made and serve, or (not ``done``) were given up and undone.

        With ``at_start`` they serve from the engine's next start on.
        """
        if self._moving is None:
            raise OptionError(f"no moves are under way, the state is {self.state}")
        self.target = None
        if done:
            before, self.current = self.running, self._moving.moves.result
            self._accepted = True
            if self.settings.at_start:
                self.runs(before)
            self.target = self._moving.target if self._moving.left else None
            self._measured = None
            if self._moving.reason == "hurt":
                self._measured = self._moving.seconds_before, self._moving.seconds_after
        self._moving, self.state = None, "idle"

    def go_back(self, older: Placement, now_s: float, then_s: float) -> bool:
        """Decide on a placement that ran before, because the engine was measured to be slower since.

        It comes as any other decision does, and is priced so: taken if the steps of the horizon save more, as measured,
        than they wait for its moves. With ``max_moves`` in parts (:mod:`poise.control.back`), each told with the price
        of all that is left of the way, since what was measured is saved at its end.

        Parameters
        ----------
        older : what ran before.
        now_s, then_s : measured seconds of a step, of what runs and of that one.

        Returns whether it was decided on: not while a plan is made or carried out, nor if what runs is not the newest.

        Raises
        ------
        NoResultError : no part of the way fits ``max_moves``.
        """
        if self.state != "idle" or self._decisions or self._running is not None or not self._recent:
            return False
        batch, s = join_steps(list(self._recent)), self.settings
        problem, groups = replace(self._problem, batch=batch, current=self.current), self._problem.whole
        part = part_back(self.current, older, s.max_moves, whole=groups is not None and groups.must)
        road = migration(self.current, part, problem)
        moves = self._moves(self.current, road)
        all_moves = moves if part is older else self._moves(self.current, migration(self.current, older, problem))
        cost = self._waits(all_moves, self._traffic(batch, self.current))
        accepted = s.horizon_steps * (now_s - then_s) > cost
        restart = None
        if accepted and s.at_start:
            restart = self._restart(batch, self._cost(batch, self.current), road.after, (now_s, then_s))
        self._hold = accepted and self.test is None  # the plan that settles this traffic would be the one that hurt
        self._outcome = Decision(self.step, "hurt", accepted, now_s, then_s, cost, moves, road.after, restart)
        self._reap(wait=False)
        return True

    def _batch(self, steps: RoutingBatch | NDArray[Any]) -> RoutingBatch:
        like = self._problem.batch
        if not isinstance(steps, RoutingBatch):
            load = np.array(steps, dtype=np.float64)
            load = load[None] if load.ndim == 2 else load
            ids = like.layer_ids_L if load.shape[1:2] == like.layer_ids_L.shape else np.arange(load.shape[1])
            steps = RoutingBatch(load, np.full(len(load), 1 / max(1, len(load))), like.top_k, ids.astype(np.int32))
        have, want = ((x.num_layers, x.num_experts, x.top_k) for x in (steps, like))
        if have != want:
            raise OptionError(f"steps have [layers, experts, top-k] {have}, the problem {want}")
        if self._problem.traffic != "home" and not steps.has_tokens:
            raise OptionError(f"traffic model {self._problem.traffic!r} needs steps with tokens, got loads only")
        return steps

    def _learn(self) -> None:
        reference = join_steps(list(self._learned))
        self._learned.clear()
        s = self.settings
        self.test = DriftTest.fit(reference, s.window, s.false_alarm_rate, looks=s.looks, seed=s.seed)
        self._since = 0
        if self._hold:
            self._hold = False
        else:
            self._plan(reference, "settled" if self._planned else "first", None)

    def _look(self) -> Look:
        window = join_steps(list(self._recent))
        cost = self._cost(window, self.running)
        restart = None if self._running is None else self._restart(window, cost, self.current, self._measured)
        verdict = None
        if self.test is not None and self._since >= self.settings.window and self.state == "idle":
            verdict = self.test.check(window)
            if verdict.drifted:
                self.test, self.target = None, None
                self._learned.clear()
                self._plan(window, "drift", None)
        if self.state == "idle" and self.target is not None:
            self._plan(window, "continued", self.target)
        return Look(self.step, imbalance_of(cost), verdict, self.state, self.test is None, restart)

    def _plan(self, batch: RoutingBatch, reason: Reason, target: Placement | None) -> None:
        self.state, self._planned = "planning", True
        current, running, step = self.current, self.running, self.step

        def work() -> None:
            try:
                self._outcome = self._decide(batch, current, running, target, reason, step)
            except BaseException as error:  # a thread must not end without saying how; raised where it is waited for
                self._outcome = error

        # always in a thread: who waits for it can be ended by a signal, which compiled code would hold up
        self._thread = threading.Thread(target=work, name="poise-planner", daemon=True)
        self._thread.start()
        if not self.settings.background:
            self._reap(wait=True)

    def _reap(self, *, wait: bool) -> None:
        if self._thread is not None:
            if self._thread.is_alive() and not wait:
                return
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            self.state, self.test, self.target = "idle", None, None
            self._learned.clear()
            rest = self.settings.reference_steps * min(MOST_REFERENCES, 2**self._failures)
            self._failures, self._rest_until = min(self._failures + 1, 30), self.step + rest
            if isinstance(outcome, PoiseError) or not isinstance(outcome, Exception):
                raise outcome
            raise NoResultError(f"planning failed: {told(outcome)}") from outcome
        if outcome is not None:
            self._failures = 0
            self._decisions.append(outcome)
            self.state = "moving" if outcome.accepted else "idle"
            self._moving = outcome if outcome.accepted else None
            self.target = None

    def _decide(
        self, batch: RoutingBatch, current: Placement, running: Placement, target: Placement | None, reason: Reason,
        step: int,
    ) -> Decision:  # fmt: skip
        """Plan, judge, and choose between the plan and its renumbered twin; touches nothing of the controller."""
        s, cluster = self.settings, self._problem.cluster
        fit, judged = batch, batch
        if batch.num_steps >= 8:
            every_fourth = np.arange(batch.num_steps) % 4 == 3
            fit, judged = steps_of(batch, ~every_fourth), steps_of(batch, every_fourth)
        problem = replace(self._problem, batch=fit, current=current)
        plans = [] if target is None else [target]
        if target is None:
            found = solve(problem, method=s.method, time_limit_s=s.time_limit_s, seed=s.seed).placement
            found = problem.placed(found.entries(), found.method)  # in the slots of what runs
            plans = [found, aligned(current, found, cluster, whole=problem.traffic == "stay")]
        before, traffic = self._seconds(judged, current), self._traffic(judged, current)
        best: tuple[float, Decision] | None = None
        for plan in plans:
            for road, aim, left_out in self._roads(current, plan, problem, traffic):
                if not problem.keeps_groups(road.after):  # a part of the way, or renumbered; all of the plan does
                    continue
                moves = self._moves(current, road)
                after = self._seconds(judged, road.after)
                cost = self._waits(moves, traffic)
                net = s.horizon_steps * (before - after) - cost
                if best is None or net > best[0]:
                    best = net, Decision(step, reason, net > 0, before, after, cost, moves, aim, left_out=left_out)
        if best is None:
            raise NoResultError(f"no way of at most {s.max_moves} moves keeps routing groups whole")
        chosen = best[1]
        if not (chosen.accepted and s.at_start):
            return chosen
        return replace(chosen, restart=self._restart(judged, self._cost(judged, running), chosen.moves.result))

    def _roads(
        self, current: Placement, plan: Placement, problem: PlacementProblem, traffic: PortTraffic
    ) -> list[tuple[Migration, Placement, int]]:
        """Ways towards a plan that may be gone: where they aim at, and fetches of the plan that are left out.

        All of it, and as far as it pays on the traffic that the plan was made for, where its moves cost anything.
        """
        s, whole = self.settings, migration(current, plan, problem)
        count = 0 if s.at_start else whole.pays(traffic, problem.model.expert_bytes, s.horizon_steps)
        aims = [(whole, 0)]
        if 0 < count < len(whole.legs):
            aims.append((whole.upto(count), int(whole.fetched_K[-1] - whole.fetched_K[count])))
        return [
            (
                road if s.max_moves is None else migration(current, road.after, problem, max_moves=s.max_moves),
                road.after,
                out,
            )
            for road, out in aims
        ]

    def _moves(self, current: Placement, road: Migration) -> MoveList:
        p = self._problem
        return move_list(current, road.after, expert_bytes=p.model.expert_bytes, staging=self.settings.staging,
                         node_D=p.cluster.node_D, migration=road)  # fmt: skip

    def _waits(self, moves: MoveList, traffic: PortTraffic) -> float:
        """Seconds that steps wait for moves."""
        s = self.settings
        if s.at_start:
            return 0.0
        if s.exposed_share is None:
            return float(moves.delay_R(traffic).sum())
        return s.exposed_share * moves.seconds(self._problem.cluster)

    def _traffic(self, batch: RoutingBatch, placement: Placement) -> PortTraffic:
        """What tokens do to ports, or, where the share is told, what is said to be."""
        cluster, share = self._problem.cluster, self.settings.exposed_share
        if share is not None:
            return PortTraffic(cluster, np.full((4, cluster.num_devices), share))
        return PortTraffic.of(batch, placement, self._problem.pricing)

    def _restart(
        self, batch: RoutingBatch, running: BatchCost, newest: Placement, measured: tuple[float, float] | None = None
    ) -> Restart:
        s = self.settings
        found = Restart.of(running, self._cost(batch, newest), batch, s.horizon_steps, s.restart_seconds)
        if measured is None:
            return found
        return replace(found, seconds_running=measured[0], seconds_after=measured[1], measured=True)

    def _cost(self, batch: RoutingBatch, placement: Placement) -> BatchCost:
        return self._problem.pricing.cost(batch, placement.count_LED())

    def _seconds(self, batch: RoutingBatch, placement: Placement) -> float:
        return float(batch.weight_B @ self._cost(batch, placement).seconds_BL.sum(axis=1))
