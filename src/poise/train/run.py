"""What the parts of one run share: who owns what, what is planned, what is counted. It knows no order of events."""

from __future__ import annotations

from dataclasses import dataclass

from poise.machine.model import ModelSpec
from poise.train.budget import ReplicaBudget
from poise.train.materialize import Ledger
from poise.train.meeting import RunMeeting
from poise.train.owned import OwnedExperts
from poise.train.passes import Passes
from poise.train.plans import RunPlanner
from poise.train.settings import Deployment, Settings


@dataclass(slots=True, eq=False)
class RunState:
    """One run.

    Parameters
    ----------
    layers : owned experts in the order they run.
    settings, deployment : what to do, and where; the policy in ``settings`` may change.
    planner, meeting, budget, passes, ledger : the parts.
    moved_bytes : that ranks have gathered, reduced and re-sharded since the start.
    """

    layers: list[OwnedExperts]
    settings: Settings
    deployment: Deployment
    planner: RunPlanner
    meeting: RunMeeting
    budget: ReplicaBudget
    passes: Passes
    ledger: Ledger
    moved_bytes: dict[str, int]


def new_run(
    layers: list[OwnedExperts], settings: Settings, deployment: Deployment, model: ModelSpec, top_k: int
) -> RunState:
    """A run from its start; its layers get their numbers. Parameters as of :class:`poise.train.schedule.Schedule`."""
    for number, experts in enumerate(layers):
        experts.number = number
    return RunState(
        layers, settings, deployment,
        RunPlanner(layers, settings, deployment, model, top_k),
        RunMeeting(deployment, layers[0].num_experts),
        ReplicaBudget(settings.rematerialise, len(layers)),
        Passes(), Ledger(), {"gather": 0, "reduce": 0, "reshard": 0},
    )  # fmt: skip
