"""When things happen: the one object that all sharded layers of a model share.

Forward   gather of layer l starts when layer l - 1 is done, so it runs under the attention of the same block; the
          first one starts with the model. Counts are exchanged after the gate, the policy plans, tokens are
          dispatched. Replicas that only this plan asks for are gathered beside the dispatch: that gather is exposed.
Backward  reduction of layer l and (re-materialisation) the gather of layer l - 1 start when layer l's experts are
          done and run under its attention's backward; layer l - 1 first waits for both. So the replicas of one
          layer, with their gradients, are all that lives at once.
End       a callback of the autograd engine waits for the last reduction.

Hecate (arXiv 2502.02581) section 3.2. Calls go down from here: to the forward and the backward pass
(:mod:`poise.train.forward`, :mod:`poise.train.backward`), from these to what plans (:mod:`poise.train.plans`), to what
holds weights and gradients (:mod:`poise.train.materialize`, :mod:`poise.train.reduce`) and to the stages of a layer
(:mod:`poise.runtime.layer`), from these to owned experts (:mod:`poise.train.owned`) and collectives.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from poise.machine.model import ModelSpec
from poise.runtime.recompute import checkpoint_region, in_backward
from poise.stepwise.dealing import Deal
from poise.train.backward import DROPPED, BackwardSchedule
from poise.train.foresight import MicroBatch
from poise.train.forward import ForwardSchedule
from poise.train.known import known_ahead
from poise.train.meeting import Facts, tried
from poise.train.metrics import LayerMetrics
from poise.train.moves import OwnerMoves
from poise.train.owned import OwnedExperts
from poise.train.owner_plans import OwnerPlans
from poise.train.regroup import MicroBatches, ReadGroups, read_groups
from poise.train.rollout import Rollout
from poise.train.rows import stepping
from poise.train.run import new_run
from poise.train.settings import Deployment, Settings
from poise.train.wrappers import check_plain_call, wrapped_well
from poise.util.errors import ModelError, OptionError

WINDOW_STEPS = (3, 10)
"""Optimizer steps after which ranks agree on the window that was measured."""


class Schedule:
    """See the module docstring; this class has what happens between passes.

    Parameters
    ----------
    layers : owned experts in the order they run.
    settings, deployment : what to do, and where.
    model : the sizes that the policy reckons with.
    top_k : experts a token, until the first forward pass tells.
    """

    def __init__(
        self, layers: list[OwnedExperts], settings: Settings, deployment: Deployment, model: ModelSpec, top_k: int
    ) -> None:
        self._run = run = new_run(layers, settings, deployment, model, top_k)
        self.layers, self.deployment, self.ledger, self.moved_bytes = layers, deployment, run.ledger, run.moved_bytes
        self.planner, self.budget, self.passes = run.planner, run.budget, run.passes
        self.backward = BackwardSchedule(run)
        self.forward = ForwardSchedule(run, self.backward)
        self.moves = OwnerMoves(layers, deployment)
        self._owners = OwnerPlans(self.planner)
        self._copies: list[Schedule] = []
        self._wrapped_well = False
        self._due: NDArray[np.int64] | None = None  # owners to move to before the next forward pass
        self._known = 0  # micro-batches whose routing was known ahead, so far
        self._planned_at: int | None = None  # optimizer steps when owners were last planned from these

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        """A run of its own for a copy of the model, over the same groups: an average that is evaluated or trained."""
        if self.passes.open():
            raise ModelError("a model cannot be copied between its forward and its backward pass")
        out = memo[id(self)] = object.__new__(Schedule)
        layers = [copy.deepcopy(experts, memo) for experts in self.layers]
        out.__init__(layers, self.settings, self.deployment, self.planner.model, self.planner.top_k)  # type: ignore[misc]
        out.backward.divide_factor, out.planner.window_s = self.backward.divide_factor, self.planner.window_s
        return out

    @property
    def settings(self) -> Settings:
        """What the run is told to do; changed by :meth:`restart`."""
        return self._run.settings

    @property
    def metrics(self) -> list[LayerMetrics]:
        """Of the last forward pass, one a layer."""
        return self.forward.metrics

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._run.meeting.steps

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self) -> None:
        """A forward pass of the model starts; where the model's hook does not run, its first layer says so."""
        if in_backward():
            return
        check_plain_call()
        self.forward.drop_early()
        stepping.clear()  # of a step that failed
        self.backward.forget_failed()
        self._wrapped_well = self._wrapped_well or wrapped_well(self.layers)
        self.passes.begin()
        dropped, wrong = self._gradients_dropped() if self.backward.unstepped else (False, None)
        if dropped:
            self._close_iteration()
        if self._due is not None:
            self._run.meeting.meet("moving owners", problem=wrong, more=(("owners", zlib.crc32(self._due.tobytes())),))
            self._move(self._due)
        self.forward.begin(wrong)

    def run(self, experts: OwnedExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One layer, forward, of whatever leading shapes; [T, d]. Its backward follows when autograd asks for it."""
        region = checkpoint_region()
        # selective checkpointing looks at every operation and expects the same ones when it computes again
        with _disable_current_modes() if region.frames else nullcontext():
            if not in_backward() and self.passes.begins_with(experts.number):
                self.begin()
            return self.forward.layer(experts, x, ids, weights, region)

    def weights_changed(self) -> None:
        """Owned weights have changed: what was gathered before is dropped."""
        self.forward.drop_early()
        self.passes.end()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that holds owned experts made a step: the first one after a backward pass ends the iteration."""
        self.weights_changed()
        self.moves.know(optimizer)
        if not self.backward.unstepped:
            return
        self._close_iteration()
        self._run.meeting.steps += 1
        if self.settings.window_s is None and self.steps in WINDOW_STEPS:
            mine = torch.tensor([round(1e9 * (self.forward.clock.median() or 0.0))], device=self.deployment.device)
            least = self._run.meeting.meet("optimizer step", numbers_X=mine).min()
            if least > 0:
                self.planner.measured(float(least) / 1e9)
        sharding = self.settings.sharding
        if sharding is None or not sharding.interval or self.planner.foresees:
            return
        if self.steps % sharding.interval == 0:
            self._owners.begin(sharding, self.steps)
        planned = self._owners.take(self.steps)
        if planned is not None and (planned != self._owners.current).any():
            self._due = planned

    def _gradients_dropped(self) -> tuple[bool, ModelError | None]:
        """Whether gradients were dropped since the last backward pass (:mod:`poise.train.marks`): without a step, as
        by hand or where a step is left out, that ends an iteration too. Or what is wrong: a weight was replaced.

        The first step of an optimizer comes after the first iteration's last pass: before it, nothing else tells.
        """
        try:
            return all(experts.gradient_dropped(name) for experts in self.layers for name in experts.owned()), None
        except ModelError as error:
            return False, error

    def _close_iteration(self) -> None:
        self.backward.unstepped = False
        self.budget.clear()
        self.planner.end_iteration()

    def reshard(self, given_LE: Any) -> int:
        """Give experts new owners, optimizer states with them; bytes this rank received. Between steps only."""
        flag = torch.tensor([int(bool(self.passes.open()))], device=self.deployment.device)
        found, problem = tried(partial(self._owners_given, given_LE), "reshard", "owners are int [L, E]")
        owner_LE = np.zeros(0, np.int64) if found is None else found
        dropped, wrong = self.backward.dropped()
        told = (("owners", zlib.crc32(owner_LE.tobytes())), (DROPPED, dropped))
        if self._run.meeting.meet("moving owners", numbers_X=flag, problem=problem or wrong, more=told).any():
            raise OptionError("owners cannot move while a backward pass is to come")
        if dropped:
            self.backward.let_go()
        return self._move(owner_LE)

    def _owners_given(self, given_LE: Any) -> NDArray[np.int64]:
        owner_LE, shape = np.asarray(given_LE), (len(self.layers), self.layers[0].num_experts)
        ranks = self.deployment.cluster.num_devices
        if owner_LE.shape != shape:
            raise OptionError(f"owners have shape {owner_LE.shape}, the model {shape}")
        if owner_LE.min() < 0 or owner_LE.max() >= ranks:
            raise OptionError(f"owners {owner_LE.min()} to {owner_LE.max()} among {ranks} ranks")
        return owner_LE.astype(np.int64)

    def _move(self, owner_LE: NDArray[np.int64]) -> int:
        """Move owners now; a pass whose backward is still to come then raises there."""
        if self.backward.replica_gradients.waiting:
            raise OptionError("owners cannot move while replica gradients wait for a synchronised backward pass")
        self._due = None
        self.forward.drop_early()
        received = self.moves.move(owner_LE) + sum(run._move(owner_LE) for run in self._copies)
        self.moved_bytes["reshard"] += received
        self.restart()
        return received

    def foresee(self, rollout: Rollout, micro_batches: Sequence[NDArray[np.int64]], *, replay: bool) -> Iterator[int]:
        """The turns of micro-batches whose routing is known; owners and plans are made first. Collective.

        See :meth:`poise.train.api.FssdpExperts.foresee`.
        """
        found = known_ahead(self._run, rollout, micro_batches, replay, self._known)
        self._known += len(found)
        if found:
            self._own_ahead(found)
        return self._turns(found)

    def _owners_due(self) -> bool:
        """Whether owners are to be planned from loads to come, now. Collective where the interval is over."""
        sharding = self.settings.sharding
        if sharding is None or not sharding.interval:
            return False
        if self._planned_at is not None and self.steps - self._planned_at < sharding.interval:
            return False
        dropped, _ = self.backward.dropped()  # not all of it, or not on all ranks: said where the next pass begins
        busy = bool(self.passes.open()) or not dropped
        flag = torch.tensor([int(busy)], device=self.deployment.device)
        if self._run.meeting.meet("owners known ahead", numbers_X=flag).any():
            return False
        self.backward.let_go()
        return True

    def _own_ahead(self, found: Sequence[MicroBatch]) -> None:
        """Owners by the sharding policy from the loads to come, as often as it plans, unless a backward is to come."""
        sharding = self.settings.sharding
        if sharding is None or not self._owners_due():
            return
        self._own(self._owners.known(sharding, np.stack([one.load_LSE for one in found]), found[0].replays))

    def _own(self, owner_LE: NDArray[np.int64]) -> None:
        """Owners by loads to come, from now on: what loads of the past have found, or will, is not taken any more."""
        self._planned_at, self._due = self.steps, None
        self._owners.forget()
        if (owner_LE != self._owners.current).any():
            self._move(owner_LE)

    def deal(self, rollout: Rollout, groups: MicroBatches) -> list[list[list[int]]]:
        """See :meth:`poise.train.api.FssdpExperts.deal`. Collective."""
        sharding = self.settings.sharding
        moving = sharding if sharding is not None and sharding.by_price and self._owners_due() else None

        def dealt() -> tuple[ReadGroups, Deal]:
            rollout.fits(len(self.layers), self.layers[0].num_experts)
            read = read_groups(rollout, groups)
            if read.shape[1] != (ranks := self.deployment.cluster.num_devices):
                raise OptionError(f"groups are of {read.shape[1]} ranks, the run of {ranks}")
            return read, self._owners.dealt(read, moving)

        found, problem = tried(dealt, "deal", "groups[micro_batch][rank] is a list of the requests of a rollout")
        more: Facts = () if found is None else (*found[0].sums(), ("the deal", found[1].sum()))
        self._run.meeting.meet("dealing requests", problem=problem, more=more)
        assert found is not None, "a problem of any rank is raised on all"
        read, deal = found
        if moving is not None:
            self._own(deal.owner_LE)
        return read.groups(deal.rank_Q, deal.micro_Q)

    def _turns(self, found: list[MicroBatch]) -> Iterator[int]:
        """Plans begin with the first turn, so that none stay where nobody asks for one; what is over is let go."""
        one: MicroBatch | None = None
        try:
            self.planner.foresee(found)
            while found:
                self.planner.micro_batch = one = found.pop(0)
                yield one.number
                self.planner.over(one)
        finally:
            for left in (*found, *([] if one is None else [one])):
                self.planner.over(left)

    def follow(self, what: Schedule | Mapping[Any, Tensor] | list[Tensor]) -> None:
        """The run of a copy, or a mapping or list of rows: its owners, or they, move when owners do."""
        if not isinstance(what, Schedule):
            self.moves.follow(what)
        elif what not in self._copies:
            self._copies.append(what)

    def restart(self, settings: Settings | None = None) -> None:
        """Drop replicas that a policy keeps from step to step and plans made ahead; take other settings, if given."""
        self._run.settings = settings or self._run.settings
        self._owners.forget()
        self.planner.restart(self._run.settings)
        self.forward.drop_early()
