"""Why a policy makes no replicas in training, in few words: what they would cost, save, and be sure to save."""

from __future__ import annotations

from poise.cost.weights import fetch_seconds
from poise.stepwise.methods.hecate import Hecate
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.training import PoiseTraining, Weighed
from poise.stepwise.protocol import LayerView, StepPolicy

EVEN = 1.02
"""Fullest device over the mean of predicted tokens up to which they are even."""


def why_none(policy: StepPolicy, view: LayerView) -> str:
    """The first reason that holds of: no slots, loads not known or even, what the policy weighs; else only its name.

    A pure function of what the policy saw (``view``), so the same on all ranks. Seconds are those of ``view.price``,
    whose cluster is named: rates that nobody measured give seconds that nobody measured.
    """
    if view.step_slots == 0:
        return "no slots"
    if not len(view.recent_HE):
        return "first step: no loads known"
    load_D = view.predicted_E @ view.before_ED / view.price.cluster.speed_D
    if load_D.max() <= EVEN * load_D.mean():
        return "predicted loads are even"
    machine = f"by the rates of {view.price.cluster.name}"
    if isinstance(policy, Hecate) and policy.limits(view)[0] == 0:
        one_s = view.price.gathered_bytes / view.price.cluster.slowest_bytes_per_s
        return f"no gather hides: one takes {one_s:.2g} s, the window has {view.price.window_s:.2g} s, {machine}"
    if isinstance(policy, Poise) and policy.objective == "seconds":
        best = policy.training.weighed(view)
        if (best.holders_ED == view.before_ED).all():
            best = one_replica(policy.training, view)
        if best.pays:
            return f"no plan that was tried saves what it costs, {machine}"
        count = int((best.holders_ED & ~view.before_ED).sum())
        return f"{count} replica{'s' * (count > 1)} would {_weighed(best)}, {machine}"
    return f"{policy.name} makes none"


def _weighed(best: Weighed) -> str:
    """What they cost and save; and, where they save more than they cost, what is wanted beyond that."""
    said = f"cost {best.costs_s:.2g} s and save {best.saves_s:.2g} s"
    if best.saves_s <= best.costs_s:
        return said
    sure = f", {best.sure_s:.2g} s of it sure by the last steps" if best.sure_s < best.saves_s else ""
    return f"{said}{sure}, where at least {best.margin_s:.2g} s must be gained"


def one_replica(policy: PoiseTraining, view: LayerView) -> Weighed:
    """The replica of what loads the fullest device most, on the idlest one, on predicted loads alone."""
    price = view.price
    load_ED = view.predicted_E[:, None] * view.before_ED / price.cluster.speed_D
    most, least = int(load_ED.sum(axis=0).argmax()), int(load_ED.sum(axis=0).argmin())
    held_ED = view.before_ED.copy()
    held_ED[int(load_ED[:, most].argmax()), least] = True
    gather_s = fetch_seconds(view.before_ED, held_ED & ~view.before_ED, price)
    near_s, exact_s = policy.dispatch_seconds(view, held_ED)
    _, alone_s = policy.dispatch_seconds(view, view.before_ED)
    costs_s = price.exposed_seconds(gather_s, 0.0) + min(near_s - exact_s, policy.control_seconds(view))
    return Weighed(held_ED, costs_s, policy.margin * alone_s, alone_s - exact_s, alone_s - exact_s)
