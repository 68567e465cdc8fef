"""What is checked of a static method that another package offers: itself once, and everything that it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from poise.planning.budget import Limit
from poise.planning.placement import Placement
from poise.planning.problem import Method, MethodResult, PlacementProblem, Progress
from poise.util.errors import NoResultError, PlacementError, PluginError, told

CALL = "plan(problem, *, time_limit_s, seed=0, progress=None)"


def checked_method(name: str, package: str, found: Any) -> Method:
    """The method, its plans checked before anybody uses them.

    Raises
    ------
    PluginError : ``found`` is no :class:`poise.planning.problem.Method`, or its ``plan`` is not called as ours are.
    """
    who, hint = f"method {name!r} of package {package}", f"mend or uninstall {package}; docs/extend.md shows how"
    if not isinstance(found, Method):
        raise PluginError(f"{who} is of type {type(found).__name__}, not poise.planning.problem.Method", hint=hint)
    if not (isinstance(found.summary, str) and isinstance(found.pooled, bool) and isinstance(found.fitted, bool)):
        raise PluginError(f"{who}: summary must be a text, pooled and fitted true or false", hint=hint)
    try:
        inspect.signature(found.plan).bind(None, time_limit_s=1.0, seed=0, progress=None)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{who} cannot be called as {CALL}: {told(error)}", hint=hint) from None
    return replace(found, plan=_checking(found.plan, who, hint))


def _checking(plan: Callable[..., Any], who: str, hint: str) -> Callable[..., MethodResult]:
    """The plan function; raises PluginError where it fails or its placement does not fit the problem."""

    def checking(
        problem: PlacementProblem, *, time_limit_s: Limit, seed: int = 0, progress: Progress | None = None
    ) -> MethodResult:
        try:
            result = plan(problem, time_limit_s=time_limit_s, seed=seed, progress=progress)
        except (NoResultError, MemoryError):
            raise
        except Exception as error:  # whatever a stranger's code does
            raise PluginError(f"{who} failed: {told(error)}", hint=hint) from error
        if not isinstance(result, MethodResult) or not isinstance(result.placement, Placement):
            raise PluginError(f"{who} returned {type(result).__name__}, not a MethodResult of a Placement", hint=hint)
        try:
            problem.check(result.placement)
        except PlacementError as error:
            raise PluginError(f"{who}: {error.message}", hint=hint) from None
        return result

    return checking
