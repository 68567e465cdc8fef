"""The step-wise policies by name, and their settings from text: ``name`` or ``name:key=value,key=value``.

poise's own, and those that other packages offer by entry points (docs/extend.md).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from poise.stepwise.checked import checked_policy
from poise.stepwise.methods.expert_parallelism import ExpertParallelism
from poise.stepwise.methods.faster_moe import FasterMoE
from poise.stepwise.methods.flex_moe import FlexMoE
from poise.stepwise.methods.fore_moe import ForeMoe
from poise.stepwise.methods.full_replication import FullReplication
from poise.stepwise.methods.hecate import Hecate, HecateCalibrated
from poise.stepwise.methods.llep import Llep
from poise.stepwise.methods.lplb import Lplb
from poise.stepwise.methods.moon_ep import MoonEp
from poise.stepwise.methods.smart_moe import SmartMoE
from poise.stepwise.methods.split import ExactSplit
from poise.stepwise.methods.ultra_ep import UltraEp
from poise.stepwise.poise.near import PoiseNear
from poise.stepwise.poise.policy import Poise
from poise.stepwise.poise.recorded import KnownRouting
from poise.stepwise.protocol import StepPolicy
from poise.util.errors import OptionError
from poise.util.registry import Registry
from poise.util.words import close_to

OWN: dict[str, StepPolicy] = {
    policy.name: policy
    for policy in (
        ExpertParallelism(), ExactSplit(), Lplb(), FasterMoE(), SmartMoE(), FlexMoE(), Hecate(), HecateCalibrated(),
        Llep(), UltraEp(), MoonEp(), FullReplication(), Poise(), PoiseNear(),
    )
}  # fmt: skip
FORESIGHT: dict[str, StepPolicy] = {policy.name: policy for policy in (KnownRouting(), ForeMoe())}
"""Policies of training that plan from recorded routing: in serving, and without a record, they have nothing to add."""
POLICIES = Registry("policy", "poise.policies", OWN, checked_policy)


def parse_policy(spec: str, *, model_named: bool = True, foresight: bool = False) -> StepPolicy:
    """The policy that ``spec`` names, with its settings; ``foresight``: one of :data:`FORESIGHT` too.

    ``poise`` minimises seconds where the model is named; generic sizes have no true seconds, so without a model it
    balances tokens, unless ``objective`` says otherwise.

    Raises
    ------
    OptionError : unknown policy or setting, or a value of the wrong type.
    PluginError : another package's policy is not what it should be.
    """
    name, _, rest = spec.partition(":")
    policy: Any = FORESIGHT[name] if foresight and name in FORESIGHT else POLICIES.ask(name)
    known = asdict(policy)
    given: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, text = item.partition("=")
        if key not in known:
            raise OptionError(
                f"policy {name} has no setting {key!r}", hint=close_to(key, known) if known else "it has none"
            )
        given[key] = _value(f"{name}:{key}", text, known[key])
    if isinstance(policy, Poise) and not model_named:
        given.setdefault("objective", "tokens")
    out: StepPolicy = replace(policy, **given)
    return out


def as_policy(given: str | StepPolicy) -> StepPolicy:
    """What a program that trains gave as a policy: a name with settings, or an object of its own.

    Raises
    ------
    OptionError : it is neither, or as :func:`parse_policy`.
    """
    if isinstance(given, str):
        return parse_policy(given, foresight=True)
    if StepPolicy not in type(given).__mro__:
        raise OptionError(
            f"a policy is a name or derives from poise.stepwise.protocol.StepPolicy, got {type(given).__name__}",
            hint="docs/extend.md shows one",
        )
    return given


def _value(what: str, text: str, like: Any) -> Any:
    """Text as a value of the default's type."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, str):
            return text
        return type(like)(text) if like is not None else float(text)
    except (ValueError, KeyError):
        raise OptionError(f"{what} takes a {type(like).__name__}, got {text!r}") from None
