"""The planning hook of vLLM's open proposal #49700 (its wider design: #49702), which no release has.

A policy is given all it may know in one record on CPUs, and told when a layer is in place. The proposal went through
several forms, all of which are taken, told apart by what the policy class has:

- ``plan_rebalance(context)`` or ``plan_rebalance(context, policy_state)``, and an early ``rebalance_experts(context,
  policy_state)``; each gives an ``EplbPlan`` with ``physical_to_logical_map``, on CPUs;
- ``on_layer_committed(policy_state, plan, layer_idx)``, or without the state, after weights and maps are in place;
- ``create_state(num_moe_layers)``, or a policy object for each model.

Its first form, a hook of ``EplbState`` around the policy class of releases, needs nothing: the class is asked as ever.
``active_ranks``, of the proposal #39942 (experts after a loss), is taken from the context or its topology where it is.

What was committed is compared with what was planned: a layer of another plan, or twice, raises, so that vLLM does not
go on with a map that nobody made; a map in use that is none of those committed is said, and planned from.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.plugins.policy import content
from poise.engines.plugins.vllm_call import LOG, Call, Planning
from poise.util.errors import CommunicationError, OptionError

HOOK, OLD_HOOK = "plan_rebalance", "rebalance_experts"
FIELDS = ("load_window_cpu", "physical_to_logical_map_cpu", "topology", "num_replicas")
TOPOLOGY = ("num_groups", "num_nodes", "num_ranks")
FORMS = (("context",), ("context", "policy_state"))
HINT = "unset POISE_EPLB and POISE_STATIC_MAP to start without poise; poise knows #49700 as of September 2026"


def takes_context(base: Any) -> bool:
    """Whether a policy class is of the proposal."""
    return _hook(base) is not None


def _hook(base: Any) -> str | None:
    """The name of its planning hook."""
    if callable(getattr(base, HOOK, None)):
        return HOOK
    names = _parameters(getattr(base, OLD_HOOK, None))
    return OLD_HOOK if names[:1] == ("context",) else None


def _parameters(method: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(method).parameters if name not in ("self", "cls")) if method else ()


def read(context: Any) -> Call:
    """A context as numbers.

    Raises
    ------
    OptionError : fields are missing, or a window has no samples.
    """
    missing = [name for name in FIELDS if not hasattr(context, name)]
    topology = getattr(context, "topology", None)
    missing += [f"topology.{name}" for name in TOPOLOGY if topology is not None and not hasattr(topology, name)]
    if missing:
        raise OptionError(f"this vLLM's context of a rearrangement has no {', '.join(missing)}", hint=HINT)
    window = context.load_window_cpu
    if window.ndim not in (2, 3) or not window.numel():
        raise OptionError(
            f"loads must be [samples, layers, experts] or [layers, experts], got {list(window.shape)}", hint=HINT
        )
    single = window.is_floating_point() and window.element_size() < 8
    loads = window.double()
    active = getattr(context, "active_ranks", getattr(topology, "active_ranks", None))
    assert topology is not None
    return Call(
        (loads.sum(dim=0) if window.ndim == 3 else loads).numpy(), int(context.num_replicas), topology.num_groups,
        topology.num_nodes, topology.num_ranks, context.physical_to_logical_map_cpu.numpy(), single,
        None if active is None else np.asarray(active.cpu() if hasattr(active, "cpu") else active),
        getattr(context, "cpu_group", None),
    )  # fmt: skip


@dataclass(eq=False)
class CommitLedger:
    """What was planned for one model, and what of it is in place.

    Parameters
    ----------
    planned_LS : the last plan; None: vLLM's own algorithm made it, or there is none.
    before_LS : the map in use when it was made.
    """

    planned_LS: NDArray[np.int64] | None = None
    before_LS: NDArray[np.int64] | None = None
    layers: set[int] = field(default_factory=set)

    def plan(self, before_LS: NDArray[np.int64], table_LS: NDArray[np.int64] | None) -> None:
        """A new plan."""
        self.planned_LS, self.before_LS, self.layers = table_LS, before_LS, set()

    def commit(self, map_LS: NDArray[np.int64], layer: int) -> None:
        """A layer of a plan is in place.

        Raises
        ------
        CommunicationError : it is none of the last plan, or was in place before.
        """
        if self.planned_LS is None:
            return
        if not np.array_equal(map_LS, self.planned_LS):
            raise CommunicationError(
                f"layer {layer} was moved to map {content(map_LS)}, poise planned {content(self.planned_LS)}"
            )
        if layer in self.layers or not 0 <= layer < len(self.planned_LS):
            raise CommunicationError(f"layer {layer} of {len(self.planned_LS)} was moved once more than it was planned")
        self.layers.add(layer)

    def found(self, map_LS: NDArray[np.int64]) -> str:
        """What is strange about the map that is in use at the next call, "" if nothing is."""
        if self.planned_LS is None or self.before_LS is None or map_LS.shape != self.planned_LS.shape:
            return ""
        wanted = self.before_LS.copy()
        rows = sorted(self.layers)
        wanted[rows] = self.planned_LS[rows]
        wrong = np.flatnonzero((map_LS != wanted).any(axis=1))
        if not wrong.size:
            return ""
        layer = int(wrong[0])
        said = "was committed with" if layer in self.layers else "was never committed, and had"
        return (
            f"layer {layer} {said} {content(wanted[layer])}, and runs {content(map_LS[layer])} ({wrong.size} of "
            f"{len(wanted)} layers differ)"
        )


class PolicyState:
    """A model's state as vLLM keeps it for a policy: the ledger, and what the policy class makes itself."""

    def __init__(self, theirs: Any = None) -> None:
        self.theirs, self.ledger = theirs, CommitLedger()


def make_policy(base: Any, planning: Planning, policies: ModuleType) -> Any:
    """A subclass of a policy class of the proposal that asks poise.

    Raises
    ------
    OptionError : its hook takes other arguments than any form that is known, or there is no ``EplbPlan``.
    """
    hook = _hook(base)
    assert hook is not None
    names = _parameters(getattr(base, hook))
    if names not in FORMS:
        known = " or ".join(f"({', '.join(form)})" for form in FORMS)
        raise OptionError(f"this vLLM's {hook} takes ({', '.join(names)}), poise knows {known}", hint=HINT)
    plan_class = getattr(policies, "EplbPlan", None)
    if plan_class is None:
        raise OptionError(f"{policies.__name__} has no EplbPlan", hint=HINT)

    def plan(self: Any, context: Any, *state: Any) -> Any:
        mine = state[0] if state else _own(self)
        call, ledger = replace(read(context), state=mine), mine.ledger
        before = np.array(call.old_LS, np.int64)
        if strange := ledger.found(before):
            LOG.error("poise: %s; planning from what runs", strange)
        table = planning.table(call)
        ledger.plan(before, table)
        if table is None:
            theirs = (state[0].theirs,) if state else ()
            return getattr(super(cls, self), hook)(context, *theirs)
        torch_map = context.physical_to_logical_map_cpu
        return plan_class(torch_map.new_tensor(table))

    def on_layer_committed(self: Any, *told: Any) -> None:
        *state, plan_made, layer = told
        ledger = state[0].ledger if state else _own(self).ledger
        ledger.commit(plan_made.physical_to_logical_map.numpy(), int(layer))
        theirs = getattr(super(cls, self), "on_layer_committed", None)
        if theirs is not None and ledger.planned_LS is None:
            theirs(*((state[0].theirs,) if state else ()), plan_made, layer)

    def create_state(self: Any, num_moe_layers: int) -> PolicyState:
        theirs = getattr(super(cls, self), "create_state", None)
        return PolicyState(None if theirs is None else theirs(num_moe_layers))

    def _own(self: Any) -> PolicyState:
        if not hasattr(self, "_poise_state"):
            self._poise_state = PolicyState()
        state: PolicyState = self._poise_state
        return state

    body = {hook: plan, "on_layer_committed": on_layer_committed, "create_state": create_state,
            "poise_settings": planning.settings, "__doc__": __doc__}  # fmt: skip
    cls: Any = type("PoiseEplbPolicy", (base,), body)
    return cls
