"""Thin helpers over HiGHS (highspy): build row by row, run in silence, say how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget
from poise.util.errors import InfeasibleError, NoResultError

INF = highspy.kHighsInf
ROOT_COLUMN, NODE_COLUMN, LEAST_NODES = 2.5e-3, 3e-5, 100
"""Nominal seconds a column takes at the root and at each further node; nodes of a programme that nothing replaces."""


@dataclass(frozen=True, slots=True, eq=False)
class MilpResult:
    """Values of all columns, objective and proven bound (minimisation)."""

    values: NDArray[np.float64]
    objective: float
    bound: float


class _Silent(highspy.Highs):
    """Silent before the constructor's first call that prints (1.16: HiGHS's banner, on a stdout that may be JSON)."""

    def enableCallbacks(self) -> None:
        self.silent()
        super().enableCallbacks()


def silent_model() -> highspy.Highs:
    """An empty model that prints nothing and uses one thread."""
    model = _Silent()
    model.silent()
    model.setOptionValue("threads", 1)
    return model


class Milp:
    """A minimisation problem under construction."""

    def __init__(self) -> None:
        self.model = silent_model()
        self.size = 0

    def columns(self, costs: NDArray[Any], upper: float = 1.0, *, integer: bool = True) -> NDArray[np.int64]:
        """Add columns in [0, upper] with the given costs, any shape; returns their numbers in that shape."""
        flat = np.asarray(costs, dtype=np.float64).ravel()
        count = flat.size
        index = np.arange(self.size, self.size + count)
        none = np.zeros(0, np.int32)
        self.model.addCols(
            count, flat, np.zeros(count), np.full(count, upper), 0, np.zeros(count, np.int32), none, np.zeros(0)
        )
        if integer:
            kinds = np.full(count, int(highspy.HighsVarType.kInteger.value), np.uint8)
            self.model.changeColsIntegrality(count, index.astype(np.int32), kinds)
        self.size += count
        return index.reshape(np.shape(costs))

    def row(self, low: float, columns: Sequence[Any] | NDArray[Any], values: Any, high: float) -> None:
        """Add ``low <= values . columns <= high``."""
        index = np.asarray(columns, dtype=np.int32).ravel()
        value = np.broadcast_to(np.asarray(values, dtype=np.float64), np.shape(columns)).ravel()
        self.model.addRow(low, high, index.size, index, value)

    def solve(
        self, *, budget: Budget, stage: str, abs_gap: float = 1e-6, rel_gap: float = 0.0,
        most_nodes: int | None = None, needed: bool = False, start: NDArray[Any] | None = None,
    ) -> MilpResult:  # fmt: skip
        """Run to a gap, to as many nodes as the budget has seconds for, or until its clock cuts ``stage``. One that is
        ``needed`` runs at least some nodes and a moment.

        Raises
        ------
        InfeasibleError : HiGHS proved that nothing meets the constraints.
        NoResultError : the budget is too small for so many columns, or was used up before any solution was found.
        """
        nodes = max(int((budget.seconds / self.size - ROOT_COLUMN) / NODE_COLUMN), LEAST_NODES if needed else 0)
        if not nodes or (budget.over(stage) and not needed):
            raise NoResultError(f"{self.size} columns are too many for {budget.seconds:.1f} s of HiGHS",
                                hint="raise --time-limit")  # fmt: skip
        self.model.setOptionValue("time_limit", min(max(0.05, budget.left()), highspy.kHighsInf))
        self.model.setOptionValue("mip_max_nodes", nodes if most_nodes is None else min(nodes, most_nodes))
        for name, value in (("mip_abs_gap", abs_gap), ("mip_rel_gap", rel_gap)):
            self.model.setOptionValue(name, float(value))
        if start is not None:
            hint = highspy.HighsSolution()
            hint.col_value = np.asarray(start, dtype=np.float64).tolist()
            self.model.setSolution(hint)
        self.model.run()
        status, info = self.model.getModelStatus(), self.model.getInfo()
        if status == highspy.HighsModelStatus.kTimeLimit:
            budget.cuts.add(stage)
        if status == highspy.HighsModelStatus.kInfeasible:
            raise InfeasibleError(f"HiGHS proved that no solution meets the {self.model.getNumRow()} constraints")
        values = np.array(self.model.getSolution().col_value)
        if (
            values.size != self.size
            or not np.isfinite(info.objective_function_value)
            or info.primal_solution_status == 0
        ):
            raise NoResultError(f"HiGHS found no solution in {budget.seconds:.1f} s", hint="raise --time-limit")
        return MilpResult(values, float(info.objective_function_value), float(info.mip_dual_bound))
