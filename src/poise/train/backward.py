"""The backward pass of sharded experts, layer by layer, in one written order on all ranks.

A layer waits for the reductions of the layers after it and for its own replicas, which were gathered again meanwhile;
gradients go where the tokens went; then its own reduction and the gather for the layer before it begin, and run under
its attention's backward. A callback of the autograd engine ends the pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from poise.runtime.spans import BACKWARD, span
from poise.train.hooks import GradientHooks
from poise.train.materialize import LayerGradients, Materialised
from poise.train.passes import Pass
from poise.train.reduce import ReplicaGradients
from poise.train.run import RunState
from poise.util.errors import ModelError

DROPPED = "whether waiting gradients were dropped (or none wait)"
"""What ranks tell one another where they meet."""


class BackwardSchedule:
    """When weights are gathered again, and gradients computed and reduced.

    ``sync``: whether gradients are reduced in this backward pass, or wait for a later one; ``divide_factor``: what they
    are divided by; ``unstepped``: whether complete gradients wait for an optimizer step.
    """

    def __init__(self, run: RunState) -> None:
        self._run = run
        self.replica_gradients = ReplicaGradients(run.layers, run.deployment, run.ledger)
        self.sync, self.divide_factor = True, float(run.deployment.cluster.num_devices)
        self.unstepped = False
        self._hooks = GradientHooks()
        self._callback = False  # the engine will call _finish when the backward pass is over
        self._lost = False  # this rank forgot what waited when its backward pass failed
        self._accumulated = False  # weights got gradients in this backward pass
        self._started: list[Materialised] = []  # gathered again, and no backward has begun that uses them

    def incomplete(self) -> int:
        """Layers whose gradients wait for a synchronised backward pass; the same on all ranks."""
        return 0 if self._callback else self.replica_gradients.layers_waiting

    def dropped(self) -> tuple[bool, ModelError | None]:
        """Whether this rank has dropped all gradients that wait for a synchronised backward pass (``zero_grad``), or
        none wait here; or what is wrong: some were dropped, a weight was replaced. Ranks tell one another where they
        meet next, and all do alike (:meth:`let_go`) or all raise.
        """
        try:
            gone, of = (0, 0) if self._callback else self.replica_gradients.dropped()
        except ModelError as error:
            return False, error
        if 0 < gone < of:
            return False, ModelError(
                f"gradients of {gone} of {of} weights were dropped while those of their replicas wait for a "
                "synchronised backward pass",
                hint="zero_grad() of all sharded experts between micro-batches, or of none",
            )
        return gone == of, None

    def let_go(self) -> None:
        """On all ranks all that waits was dropped: replicas' gradients go as well, and with them their iteration."""
        if self._callback or not (self._lost or self.replica_gradients.layers_waiting):
            return
        self._lost = False
        self.replica_gradients.forget()
        self._run.planner.end_iteration()

    def layer(self, one: Pass, dy_Nd: Tensor, accumulates: Callable[[], bool]) -> Tensor:
        """Gradients of this rank's tokens, [T, d]; those of the weights, if asked for, are added to their owners'.

        Parameters
        ----------
        one : the pass that goes backward.
        dy_Nd : gradients of its outputs, [T * K, d].
        accumulates : whether this backward pass asks for gradients of the weights; raises ModelError.
        """
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        step, weights = one.step, one.weights
        accumulate = self._together(one, accumulates, dy_Nd)
        leaves = weights.leaves() if accumulate else []
        with span(f"{BACKWARD}weights"):
            self._begin_layer(weights)
            weights.ready()
        dy_in = step.dispatch_gradients()
        dx_in, grads, failed = step.compute_gradients(dy_in, leaves, keep=keep)
        with span(f"{BACKWARD}reduce"):
            gradients = weights.gradients(grads) if accumulate else None
            weights.free()
            if gradients is not None:
                try:
                    self._add(one, gradients)
                except ModelError as error:  # on all ranks; what they have asked one another for is sent first
                    failed = failed or error
            one.done = True
            self._start_before(one)
        dx_Td = step.combine_gradients(dx_in)
        if failed is not None:
            raise failed
        return dx_Td

    def _together(self, one: Pass, accumulates: Callable[[], bool], dy_Nd: Tensor) -> bool:
        """All ranks go backward through this layer of this pass, and through as many after it, or all raise.

        Long gradients are on their way meanwhile: one wait less. Short ones leave when ranks have met, by one
        collective: a message a rank costs the host more than the wait.
        """
        accumulate = False
        dropped, problem = self.dropped()
        try:
            one.weights.check_owners()
            accumulate = accumulates()
        except ModelError as error:
            problem = problem or error
        experts = one.weights.experts
        problem = problem or experts.unfit() or self._hooks.unfit(experts.parameters(), self.sync)
        coming = sum(other.comes for other in self._run.passes.open() if other is not one)
        step, ahead = one.step, one.step.way.sends_ahead(dy_Nd)
        announced = self._run.meeting.announce("backward", one.layer, one.number, problem=problem, more=(
            ("layers still to come", coming), ("whether weights get gradients", accumulate),
            ("whether gradients are synchronised", self.sync), ("divide factor", self.divide_factor),
            (DROPPED, dropped),
        ), sends=one.exchange if ahead else None)  # fmt: skip
        if ahead:
            announced.hold(beside=step.send_gradients(dy_Nd).wait)
        else:
            announced.hold()
            step.send_gradients(dy_Nd)
        if dropped:
            self.let_go()
        return accumulate

    def _begin_layer(self, weights: Materialised) -> None:
        """A layer's backward begins: earlier reductions end first, so that one layer's gradients live at once."""
        self._started = [started for started in self._started if started is not weights]
        if not self._callback:
            self._callback = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._hooks.take_off(weights.experts.parameters())
        self.replica_gradients.wait()

    def _add(self, one: Pass, gradients: LayerGradients) -> None:
        """A layer's experts have their gradients: add those of owned experts, send the others to their owners."""
        experts, scale, self._accumulated = one.weights.experts, 1.0 / self.divide_factor, True
        self._run.budget.give_back(one.kept_bytes)
        one.kept_bytes, own = 0.0, gradients.own
        beside = sum(grad.nbytes for name, grad in own.items() if grad is not None and not experts.takes(name, grad))
        self._run.ledger.add("gradients of owned experts", beside)
        for name, grad in own.items():
            experts.add_gradient(name, grad, scale)
        self._run.ledger.add("gradients of owned experts", -beside)
        self.replica_gradients.add(one.weights, gradients, scale)
        if self.sync or self.replica_gradients.beyond(self._run.settings.accumulate_bytes):
            self._reduce(one.layer)

    def _reduce(self, layer: int) -> None:
        sent = self.replica_gradients.reduce(layer)
        self._run.moved_bytes["reduce"] += int(sent * self._run.deployment.gradient_bytes)

    def _start_before(self, one: Pass) -> None:
        """Gather for the backward of the layers before, under this layer's attention."""
        before = one.before
        for _ in range(self._run.settings.prefetch):
            if before is None:
                break
            if not before.done:
                before.weights.start()
                self._started.append(before.weights)
            before = before.before
        one.before = None

    def _end_started(self) -> None:
        """Gathers for layers that the backward pass did not reach."""
        for weights in self._started:
            weights.free()
        self._started.clear()

    def forget_failed(self) -> None:
        """A forward pass begins. If a backward pass failed on the way, what it left must not enter the next step."""
        if not self._callback:
            return
        self._callback, self._accumulated = False, False
        self._run.budget.clear()
        self._hooks.put_back()
        self._end_started()
        self._lost = self._lost or self.replica_gradients.layers_waiting > 0
        self.replica_gradients.forget()

    def _finish(self) -> None:
        """The backward pass is over."""
        self._callback = False
        self._run.passes.end()
        self._hooks.put_back()
        self._end_started()
        accumulated, self._accumulated = self._accumulated, False
        if not accumulated:  # torch.autograd.grad by something else than weights
            return
        if not self.sync:  # what was beyond the bytes that may wait is not held through the next forward pass
            self.replica_gradients.wait()
            self.replica_gradients.remember()
            return
        for layer in range(len(self._run.layers)):  # earlier micro-batches may have reached more of them
            self._reduce(layer)
        self.replica_gradients.wait()
        self.unstepped = True
        for experts in self._run.layers:  # what drops them ends the iteration
            for name in experts.owned():
                experts.watch_gradient(name)
        self._hooks.call(weight for experts in self._run.layers for weight in experts.parameters())
