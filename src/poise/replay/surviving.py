"""A plan changed so that a loss takes few experts, with what follows each loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from poise.planning.losses import lost_together
from poise.planning.problem import MethodResult, PlacementProblem, Solution
from poise.planning.solve.repair import check_room, prepared
from poise.planning.solve.solve import evaluate
from poise.planning.solve.survive import hardened
from poise.replay.losses import loss_rows
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True, eq=False)
class Survival:
    """What plans of a problem are to survive, asked before one is made.

    Parameters
    ----------
    problem : slots are counted by layer.
    unit : ``device`` or ``node``, of which any one may be lost.
    cost : share of the modelled seconds that may be given up for it.
    copies : most experts copied between devices that are left for each one read; None: as many as balance needs.

    Raises
    ------
    OptionError : slots are pooled, groups are kept whole, the unit is unknown, or a number is below 0.
    InfeasibleError : the slots that are left after a loss do not hold all experts.
    """

    problem: PlacementProblem
    unit: str
    cost: float
    copies: float | None = None
    losses: Sequence[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        if self.problem.pooled:
            raise OptionError("what is left after a loss is counted layer by layer", hint="leave --pooled out")
        if self.problem.whole is not None:
            raise OptionError(
                f"{self.problem.whole.num_groups} routing groups lie whole, and a plan that survives the loss of a "
                f"{self.unit} spreads experts over others", hint="leave --keep-groups or --survive out",
            )  # fmt: skip
        if not self.cost >= 0 or (self.copies is not None and not self.copies >= 0):
            raise OptionError(f"cost and copies must be at least 0, got {self.cost} and {self.copies}")
        losses = lost_together(self.unit, self.problem.cluster.node_D)
        for lost in losses:
            check_room(self.problem.slots_D, self.problem.batch.num_experts, lost)
        object.__setattr__(self, "losses", losses)

    def of(self, found: Solution) -> Solution:
        """The plan changed, priced again, with the placements that follow each loss."""
        problem = self.problem
        unit_D = np.zeros(problem.num_devices, np.int64)
        for number, lost in enumerate(self.losses):
            unit_D[list(lost)] = number
        made = hardened(problem, found.placement, unit_D, most_cost=self.cost)
        load_LE, speed_D = problem.batch.load_LE(), problem.cluster.speed_D
        kept = prepared(made.placement, self.unit, problem.cluster.node_D, load_LE, speed_D, copies=self.copies)
        about = {"unit": self.unit, "cost": made.cost, "most_cost": self.cost, "most_copies_a_read": self.copies,
                 "orphans_before": made.alone_before, "orphans": made.alone, "fewest_orphans": made.fewest,
                 "losses": [asdict(row) for row in loss_rows(kept, load_LE, speed_D)]}  # fmt: skip
        result = MethodResult(made.placement, {**found.details, "survive": about})
        again = evaluate(problem, result, method=found.method, seconds=found.seconds)
        return replace(again, losses=kept)
