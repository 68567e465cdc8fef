"""How a plugin plans, from the environment: without the planner, which a static map does not need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.engines.plugins.static_map import StaticMap
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """How a plugin plans; each field has an environment variable (:meth:`from_environment`).

    Parameters
    ----------
    cluster : POISE_CLUSTER, as ``--cluster``; default: nodes and ranks of the engine, h100.
    model : POISE_MODEL, as ``--model``; default: generic sizes.
    tokens_per_step : POISE_TOKENS_PER_STEP, tokens of one step over all ranks, with ``model`` only: loads are then
        priced as they are (in decode an expert costs its weights, however few its tokens). Default: tokens count.
    time_limit_s : POISE_TIME_LIMIT_S, seconds of one core that the search may take, counted in proposals.
    horizon_steps : POISE_HORIZON_STEPS, steps that a map is expected to serve.
    static_map : POISE_STATIC_MAP, a placement or an SGLang map that is returned whatever the load.
    seed : for the search.

    Raises
    ------
    OptionError : a number is out of range.
    """

    cluster: Cluster | None = None
    model: ModelSpec | None = None
    tokens_per_step: int | None = None
    time_limit_s: float = 0.5
    horizon_steps: float = 1000.0
    static_map: StaticMap | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("time_limit_s", "horizon_steps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.tokens_per_step is not None and (self.tokens_per_step < 1 or self.model is None):
            raise OptionError(
                f"tokens_per_step is {self.tokens_per_step}, model {'named' if self.model else 'not named'}",
                hint="at least 1, together with a model",
            )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> PolicySettings:
        """Settings from ``POISE_*`` variables; an empty one counts as not set.

        Raises
        ------
        InputError : a variable cannot be read; a static map, cluster or model file too.
        """

        def number(name: str, default: float | None) -> Any:
            text = environ.get(name, "").strip()
            try:
                return float(text) if text else default
            except ValueError:
                raise OptionError(f"{name} must be a number, got {text[:40]!r}") from None

        def named(name: str) -> str | None:
            return environ.get(name, "").strip() or None

        cluster, model, static = named("POISE_CLUSTER"), named("POISE_MODEL"), named("POISE_STATIC_MAP")
        tokens = number("POISE_TOKENS_PER_STEP", None)
        if tokens is not None and not tokens.is_integer():
            raise OptionError(f"POISE_TOKENS_PER_STEP must be a whole number, got {tokens}")
        spec = None if model is None else ModelSpec.parse(model)
        return cls(
            None if cluster is None else Cluster.parse(cluster),
            spec,
            None if tokens is None else int(tokens),
            number("POISE_TIME_LIMIT_S", DEFAULT.time_limit_s),
            number("POISE_HORIZON_STEPS", DEFAULT.horizon_steps),
            None if static is None else StaticMap.read(Path(static), spec),
        )

    def machine(self, num_nodes: int, num_ranks: int) -> Cluster:
        """The cluster, which must have the engine's ranks."""
        if self.cluster is None:
            return Cluster.uniform(num_nodes, num_ranks // num_nodes)
        if self.cluster.num_devices != num_ranks:
            raise OptionError(f"POISE_CLUSTER has {self.cluster.num_devices} devices, the engine {num_ranks} ranks")
        return self.cluster


DEFAULT = PolicySettings()
