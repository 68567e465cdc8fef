"""What is said of a placement that should run: states of layers, the verdict, and its words. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from poise.engines.explain import Explanation

MapState = Literal[
    "live", "matches", "reordered", "trivial map", "other map", "counts agree", "counts disagree", "counts fit others",
    "unseen",
]  # fmt: skip
Evidence = Literal["map", "counts", "balance"]
Liveness = Literal["live", "not-live", "undecided", "file-matches", "file-differs"]
RUNS: tuple[MapState, ...] = ("live", "matches", "reordered", "counts agree")
"""States in which every device holds what was planned for it."""
UNKNOWN: tuple[MapState, ...] = ("unseen", "counts fit others")
"""States that tell nothing: ``counts fit others``: another map that could run adds up as well."""


@dataclass(frozen=True, slots=True)
class LayerFinding:
    """One layer of the placement.

    Parameters
    ----------
    layer_id : decoder layer.
    state : what is known of its map.
    wrong : slots that hold another expert than planned (map), or experts whose slots do not add up (counts).
    measured, predicted : imbalance, fullest over mean device, mean over records; None: the dump does not tell.
    """

    layer_id: int
    state: MapState
    wrong: int = 0
    measured: float | None = None
    predicted: float | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """What a dump proves about a placement.

    Parameters
    ----------
    evidence : the strongest there is.
    layers : one finding a layer of the placement.
    live : whether the plan runs in every layer; None: the evidence does not tell, or is a file that does not run.
    measured, predicted, trivial : balance, mean over fullest device, mean over layers and records: as it was, as the
        plan should give on this traffic, and as the map without a plan would; None: the dump does not tell.
    tolerance : relative, of balances that count as equal.
    recorded : the evidence comes from a run, not from a file that was made for one.
    maps_agree : ranks report one map.
    explanations : of a balance: what each map that could run would give, the plan first.
    error_rate : odds that such a map is said not to explain what it gave.
    """

    evidence: Evidence
    layers: tuple[LayerFinding, ...]
    live: bool | None
    measured: float | None = None
    predicted: float | None = None
    trivial: float | None = None
    tolerance: float = 0.05
    recorded: bool = True
    maps_agree: bool = True
    notes: tuple[str, ...] = field(default=())
    explanations: tuple[Explanation, ...] = field(default=())
    error_rate: float = 0.01

    @property
    def verdict(self) -> Liveness:
        """One word: only ``live`` says that the plan runs."""
        if self.recorded:
            return "undecided" if self.live is None else "live" if self.live else "not-live"
        states = [layer.state for layer in self.layers if layer.state != "unseen"]
        if not all(state in RUNS for state in states):
            return "file-differs"
        return "file-matches" if len(states) == len(self.layers) else "undecided"

    @property
    def as_predicted(self) -> bool | None:
        """Whether the measured balance is the predicted one or better; None: one of them is unknown."""
        if self.measured is None or self.predicted is None:
            return None
        return self.measured >= self.predicted * (1.0 - self.tolerance)

    def sentence(self) -> str:
        """The verdict in words."""
        head = self._by_balance() if self.evidence == "balance" else self._by_slots()
        if self.measured is not None and self.predicted is not None:
            how = "as predicted" if self.as_predicted else "worse than predicted"
            head += f"; balance {self.measured:.3f} of 1, {self.predicted:.3f} predicted: {how}"
        return head

    def _by_balance(self) -> str:
        plan, others = self.explanations[0], [e for e in self.explanations[1:] if e.explains]
        odds = f"p {plan.p_value:.2g}, error rate {self.error_rate:g}"
        named = ", ".join(f"the {e.name} ({e.balance:.3f})" for e in others)
        if self.live:
            return f"the plan runs: it explains the reported balance and no other map that could run does ({odds})"
        if self.live is False:
            return f"the plan does not run: it does not explain the reported balance ({odds}), {named} would"
        if not plan.explains:
            return f"undecided: no map explains the reported balance ({odds}); is the traffic what ran?"
        if not others:
            return "undecided: passes differ more than under any one map; is it one run, and the traffic what ran?"
        return f"undecided: the plan explains the reported balance, but so would {named}"

    def _by_slots(self) -> str:
        seen = [layer for layer in self.layers if layer.state != "unseen"]
        bad = [layer for layer in seen if layer.state not in RUNS and layer.state not in UNKNOWN]
        if not self.maps_agree:
            return "ranks report different maps: no plan runs on all of them"
        if bad:
            trivial = sum(layer.state == "trivial map" for layer in bad)
            what = "does not run" if self.recorded else "is not what the file holds"
            head = f"the plan {what} in {len(bad)} of {len(seen)} layers"
            return head + (f", {trivial} of them the trivial map" if trivial else "")
        known = [layer for layer in seen if layer.state in RUNS]
        where = f"all {len(known)} layers"
        if len(known) < len(self.layers):
            where = f"{len(known)} of {len(self.layers)} layers"
        if not self.recorded:
            return f"the file matches the plan in {where}; whether the engine runs it, this file cannot say"
        if len(known) < len(seen):
            count = len(seen) - len(known)
            return (
                f"undecided: in {count} of {len(seen)} layers the counts of slots fit another map as well as the plan"
            )
        return f"the plan runs in {where}" + ("; the others were not seen" if len(seen) < len(self.layers) else "")
