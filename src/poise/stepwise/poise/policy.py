"""``poise``: replicas from predicted loads, tokens split exactly after the gate, weights moved only when they pay.

Three policies under one name:

=============  ========  =====================================
``objective``  price     what runs
=============  ========  =====================================
``seconds``    serving   :mod:`poise.stepwise.poise.serving`
``seconds``    training  :mod:`poise.stepwise.poise.training`
``tokens``     either    :mod:`poise.stepwise.poise.tokens`
=============  ========  =====================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.poise.serving import PoiseServing
from poise.stepwise.poise.tokens import PoiseTokens
from poise.stepwise.poise.training import PoiseTraining
from poise.stepwise.protocol import Fetch, LayerView, StepPlan, StepPolicy

Objective = Literal["seconds", "tokens"]


@dataclass(frozen=True, slots=True)
class Poise(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    objective : ``seconds`` weighs everything; ``tokens`` balances tokens whatever it costs.
    horizon : steps over which an exposed fetch is written off; replicas that stay serve many.
    stall : most that one exposed fetch may take, in layer times.
    urgency : predicted gain, as a share of the layer time, for which a fetch that could wait is made at once.
    patience : most windows that a background fetch may take.
    margin : least predicted gain, as a share of the passive layer time, that wakes the loop (training: that replicas
        must bring beside none, and by which sending tokens to the nearest holders must be faster).
    slack : the second split may exceed the best maximum by this share to keep tokens at home.
    extra : training: most replicas that are fetched after the gate.
    """

    name: ClassVar[str] = "poise"
    summary: ClassVar[str] = "predicted replicas where they pay, exact split after the gate"
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    objective: Objective = "seconds"
    horizon: float = 24.0
    stall: float = 6.0
    urgency: float = 0.2
    patience: float = 8.0
    margin: float = 0.03
    slack: float = 0.05
    extra: int = 4

    @property
    def training(self) -> PoiseTraining:
        """What runs by seconds in training."""
        return PoiseTraining(self.margin, self.extra)

    def before_gate(self, view: LayerView) -> NDArray[np.bool_]:
        """Holders from predicted loads."""
        return self._under(view).before_gate(view)

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """The plan from exact loads."""
        return self._under(view).after_gate(view, holders_ED, load_SE)

    def leaves_alone(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> bool:
        """Serving by seconds: whether the static placement alone is predicted to be as fast."""
        return self._under(view).leaves_alone(view, holders_ED)

    def in_background(self, view: LayerView, holders_ED: NDArray[np.bool_]) -> Fetch | None:
        """Serving by seconds: replicas that pay, but whose fetch would be seen."""
        return self._under(view).in_background(view, holders_ED)

    def training_plan_seconds(self, num_experts: int, num_devices: int) -> float:
        """What planning takes beside the control time that every exact method pays."""
        return self.training.training_plan_seconds(num_experts, num_devices)

    def _under(self, view: LayerView) -> StepPolicy:
        """What runs under a view's price."""
        if self.objective == "tokens":
            return PoiseTokens()
        if view.price.training:
            return self.training
        return PoiseServing(self.horizon, self.stall, self.urgency, self.patience, self.margin, self.slack)
