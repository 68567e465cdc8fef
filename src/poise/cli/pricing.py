"""Options of how a step is priced, and of who holds the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from poise.cli.options import HomesRule, Model, SplitRule, StepOrder, TokensPerStep, TrafficModel, flag, one_of
from poise.cost.split import SPLITS
from poise.cost.traffic import DATA_FLOWS
from poise.planning.engine_rules import ENGINES
from poise.planning.groups import KEEP
from poise.routing.batch import HOMES
from poise.routing.batching import ORDERS

EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help=f"Who holds the plan: {', '.join(ENGINES)}. Engines fill every slot, and so does a plan, but with none.",
    ),
]
KeepGroups = Annotated[
    str | None,
    flag(
        "keep_groups",
        "The model's routing groups: whole on nodes; whole in ids, blocks of new expert ids (always so for an "
        "engine that takes those); or pays: on nodes in the layers where the modelled time is less.",
    ),
]


@dataclass(frozen=True, slots=True)
class PricingOptions:
    """How a step is priced."""

    model: Model = None
    traffic: TrafficModel = None
    split: SplitRule = None

    def checked(self) -> dict[str, Any]:
        """The options as :mod:`poise.api` takes them; OptionError for an unknown word."""
        return {
            "model": self.model, "traffic": one_of("traffic model", self.traffic, DATA_FLOWS),
            "split": one_of("split", self.split, SPLITS),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepOptions(PricingOptions):
    """How a step is priced, who holds the plan, and how traffic is batched into steps."""

    engine: EngineName = "any"
    keep_groups: KeepGroups = None
    tokens_per_step: TokensPerStep = None
    order: StepOrder = "interleaved"
    homes: HomesRule = None

    def checked(self) -> dict[str, Any]:
        """See :meth:`PricingOptions.checked`."""
        return PricingOptions.checked(self) | {
            "engine": self.engine, "keep_groups": one_of("way to keep groups", self.keep_groups, KEEP),
            "tokens_per_step": self.tokens_per_step,
            "order": one_of("order", self.order, ORDERS), "homes": one_of("homes", self.homes, HOMES),
        }  # fmt: skip
