"""What is checked of a step-wise policy that another package offers: its class, and its calls on a small layer."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from poise.cost.weights import StepPrice, step_price, training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.stepwise.protocol import Fetch, LayerView, StepPlan, StepPolicy
from poise.util.errors import PluginError, PoiseError, told

EXPERTS, NODES, PER_NODE, STEP_SLOTS = 8, 2, 2, 2
"""The layer that a policy is tried on."""
STEADY = tuple(range(1, EXPERTS + 1))
SKEWED = (90, 0, 1, 0, 5, 0, 0, 0)
"""Tokens of each expert from each device: a level load, and one that calls for replicas."""


class _Wrong(Exception):
    """What a policy has that the protocol has not."""


def checked_policy(name: str, package: str, found: Any) -> StepPolicy:
    """The policy with its default settings, after two steps of a small layer at a price of serving and of training.

    Raises
    ------
    PluginError : ``found`` is no frozen dataclass with the members of :class:`poise.stepwise.protocol.StepPolicy`, or
        its holders or plans break an invariant.
    """
    try:
        policy = _made(found)
        if policy.name != name:
            raise _Wrong(f"calls itself {policy.name!r}; the name of the entry point must be the same")
        cluster, model = Cluster.uniform(NODES, PER_NODE), ModelSpec.generic(EXPERTS, 2, np.arange(1))
        for price in (step_price(4096, EXPERTS, cluster, model), training_price(4096, EXPERTS, cluster, model)):
            for each in (STEADY, SKEWED):
                _try(policy, price, np.tile(np.array(each, np.int64), (cluster.num_devices, 1)))
    except _Wrong as error:
        said = str(error)
    except PoiseError as error:
        said = f"breaks a rule on a small layer: {error.message}"
    except Exception as error:  # whatever a stranger's code does
        said = f"fails on a small layer: {told(error)}"
    else:
        return policy
    hint = f"mend or uninstall {package}; docs/extend.md shows how"
    raise PluginError(f"policy {name!r} of package {package} {said}", hint=hint)


def failed(policy: StepPolicy, error: Exception) -> PluginError | None:
    """What to say of a policy of another package that failed while it ran; None: it is one of poise's own."""
    module = type(policy).__module__
    if module.partition(".")[0] == "poise" or isinstance(error, MemoryError):
        return None
    return PluginError(f"policy {policy.name!r} of {module} failed: {told(error)}", hint=f"mend {module}")


def _made(found: Any) -> StepPolicy:
    """An instance; raises _Wrong unless its class has what the protocol names, of the same types and parameters."""
    if not (isinstance(found, type) and is_dataclass(found) and found.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise _Wrong("is not the class of a frozen dataclass")
    try:
        policy: Any = found()
    except Exception as error:
        raise _Wrong(f"cannot be made without settings, each of which needs a default: {told(error)}") from None
    for member, hint in get_type_hints(StepPolicy).items():
        if get_origin(hint) is not ClassVar:
            continue
        kind = get_args(hint)[0]
        kind = get_origin(kind) or kind
        if not isinstance(getattr(policy, member, None), kind):
            raise _Wrong(f"has no {member} of type {kind.__name__}")
    for member, method in inspect.getmembers(StepPolicy, inspect.isfunction):
        if not member.startswith("_"):
            parameters = list(inspect.signature(method).parameters)[1:]
            try:
                inspect.signature(getattr(policy, member)).bind(*parameters)
            except (AttributeError, TypeError, ValueError):
                raise _Wrong(f"has no {member}({', '.join(parameters)})") from None
    out: StepPolicy = policy
    return out


def _try(policy: StepPolicy, price: StepPrice, load_SE: NDArray[np.int64]) -> None:
    """One step with exact loads of int64 [D, E]; raises _Wrong or PlacementError where what it gives is not allowed."""
    devices = price.cluster.num_devices
    static_ED = np.repeat(np.eye(devices, dtype=bool), EXPERTS // devices, axis=0)
    load_E = load_SE.sum(axis=0)
    view = LayerView(
        static_ED=static_ED, before_ED=static_ED.copy(), predicted_E=load_E.astype(np.float64),
        recent_HE=load_E[None].astype(np.float64), coming_ED=np.zeros_like(static_ED), step_slots=STEP_SLOTS, step=0,
        layer=0, price=price,
    )  # fmt: skip
    early_ED = policy.before_gate(view)
    if not isinstance(early_ED, np.ndarray) or early_ED.dtype != bool or early_ED.shape != static_ED.shape:
        raise _Wrong(f"gives holders before the gate that are no bool array of [experts, devices] {static_ED.shape}")
    given_SE = load_SE.copy()
    plan = policy.after_gate(view, early_ED.copy(), given_SE)
    if not isinstance(plan, StepPlan):
        raise _Wrong(f"gives {type(plan).__name__} after the gate, not a StepPlan")
    plan.check(view, load_SE, unbounded=policy.unbounded)
    fetch = policy.in_background(view, plan.holders_ED) if policy.keeps else None
    if fetch is not None and not isinstance(fetch, Fetch):
        raise _Wrong(f"gives {type(fetch).__name__} in the background, not a Fetch or None")
    kept = np.array_equal(view.before_ED, static_ED) and np.array_equal(view.predicted_E, load_E)
    if not kept or not np.array_equal(given_SE, load_SE):
        raise _Wrong("changes what it is given: its calls must be pure")
