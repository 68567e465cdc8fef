"""poise: keep every GPU of a Mixture-of-Experts model equally busy. Plan, compare and export expert placements.

Names are imported when they are first asked for: engines import this package in every process of theirs, to find a
plugin that mostly is not wanted.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from poise import moved
from poise.version import VERSION

if TYPE_CHECKING:
    from poise.api import compare, plan, verdict
    from poise.machine.cluster import Cluster
    from poise.machine.model import ModelSpec
    from poise.planning.placement import Placement
    from poise.planning.problem import PlacementProblem, Solution
    from poise.planning.solve.solve import METHODS, solve
    from poise.routing.batching import make_batch
    from poise.routing.files import read
    from poise.routing.trace import LoadProfile, RoutingTrace
    from poise.stepwise.registry import POLICIES
    from poise.util.errors import InfeasibleError, InputError, NoResultError, PoiseError

moved.install()
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
    "verdict",
]

if not TYPE_CHECKING:  # to type checkers a __getattr__ would be every name
    _MODULE = {
        "poise.api": ("compare", "plan", "verdict"),
        "poise.machine.cluster": ("Cluster",),
        "poise.util.errors": ("InfeasibleError", "InputError", "NoResultError", "PoiseError"),
        "poise.machine.model": ("ModelSpec",),
        "poise.routing.batching": ("make_batch",),
        "poise.routing.files": ("read",),
        "poise.routing.trace": ("LoadProfile", "RoutingTrace"),
        "poise.planning.placement": ("Placement",),
        "poise.planning.problem": ("PlacementProblem", "Solution"),
        "poise.planning.solve.solve": ("METHODS", "solve"),
        "poise.stepwise.registry": ("POLICIES",),
    }
    _MODULE_OF = {name: module for module, names in _MODULE.items() for name in names}

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
