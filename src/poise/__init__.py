"""poise: keep every GPU of a Mixture-of-Experts model equally busy. Plan, compare and export expert placements."""

from poise.api import VERSION, compare, plan
from poise.cluster import Cluster
from poise.errors import InfeasibleError, InputError, NoResultError, PoiseError
from poise.modelspec import ModelSpec
from poise.observe.batching import make_batch
from poise.observe.files import read
from poise.observe.trace import LoadProfile, RoutingTrace
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem, Solution
from poise.planning.solve.solve import METHODS, solve
from poise.policies.registry import POLICIES

__version__ = VERSION
__all__ = [
    "METHODS",
    "POLICIES",
    "Cluster",
    "InfeasibleError",
    "InputError",
    "LoadProfile",
    "ModelSpec",
    "NoResultError",
    "Placement",
    "PlacementProblem",
    "PoiseError",
    "RoutingTrace",
    "Solution",
    "compare",
    "make_batch",
    "plan",
    "read",
    "solve",
]
