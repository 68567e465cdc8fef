"""How a plugin plans, from the environment: without the planner, which a static map does not need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from poise.engines.plugins import switch
from poise.engines.plugins.static_map import StaticMap
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.util.errors import OptionError

EngineSplit = Literal["even", "near"]
Strategy = Literal["auto", "hierarchical", "global"]
PHASES = ("", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """How a plugin plans; each field has an environment variable (:meth:`from_environment`).

    Parameters
    ----------
    cluster : POISE_CLUSTER, as ``--cluster``; default: nodes and ranks of the engine, h100. Together with ``model``,
        or for a machine that names them, a step's price rests on measured constants.
    model : POISE_MODEL, as ``--model``; default: generic sizes.
    tokens_per_step : POISE_TOKENS_PER_STEP, tokens of one step over all ranks, with ``model`` only: loads are then
        priced as they are (in decode an expert costs its weights, however few its tokens). Default: tokens count.
    time_limit_s : POISE_TIME_LIMIT_S, seconds of one core that the search may take, counted in proposals.
    horizon_steps : POISE_HORIZON_STEPS, steps that a map is expected to serve.
    static_map : POISE_STATIC_MAP, a placement or an SGLang map that is returned whatever the load.
    split : POISE_SPLIT, how the engine divides an expert's tokens over its replicas: ``even``, or ``near`` (own rank,
        else own node, else any). Default: even, or what the engine's plugin can tell.
    min_gain : POISE_MIN_GAIN, share of the modelled step below which the map in use stays.
    max_moves : POISE_MAX_MOVES, experts that a rank may fetch at one rearrangement; the layers that pay most come
        first, the others later. Default: no limit.
    strategy : POISE_STRATEGY, ``hierarchical`` (expert groups stay whole on nodes, and it is an error where they do not
        divide), ``global`` (they do not), or ``auto``: where the engine's own algorithm would. Default: global in an
        instance of phase decode, else auto.
    phase : POISE_PHASE, ``prefill`` or ``decode``; "": both, or not said.
    canary : POISE_CANARY, whether weights are looked at after each move.
    apart : whether the engine's plugin may plan in a process of its own (POISE_APART, on).
    seed : for the search.

    Raises
    ------
    OptionError : a number is out of range.
    """

    cluster: Cluster | None = None
    model: ModelSpec | None = None
    tokens_per_step: int | None = None
    time_limit_s: float = 0.08
    horizon_steps: float = 1000.0
    static_map: StaticMap | None = None
    split: EngineSplit | None = None
    min_gain: float = 0.01
    max_moves: int | None = None
    strategy: Strategy = "auto"
    phase: str = ""
    canary: bool = False
    apart: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain < 1:
            raise OptionError(f"min_gain must be at least 0 and below 1, got {self.min_gain}")
        if self.max_moves is not None and self.max_moves < 1:
            raise OptionError(f"max_moves must be at least 1, got {self.max_moves}")
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
        environ = switch.of_phase(environ)

        def number(name: str, default: float | None) -> Any:
            text = environ.get(name, "").strip()
            try:
                return float(text) if text else default
            except ValueError:
                raise OptionError(f"{name} must be a number, got {text[:40]!r}") from None

        def whole(name: str) -> int | None:
            value = number(name, None)
            if value is not None and not value.is_integer():
                raise OptionError(f"{name} must be a whole number, got {value}")
            return None if value is None else int(value)

        def named(name: str) -> str | None:
            return environ.get(name, "").strip() or None

        def one_of(name: str, words: tuple[str, ...], default: Any) -> Any:
            word = (named(name) or "").lower()
            if word and word not in words:
                raise OptionError(f"{name} must be one of {', '.join(filter(None, words))}, got {word[:40]!r}")
            return word or default

        cluster, model, static = named("POISE_CLUSTER"), named("POISE_MODEL"), named("POISE_STATIC_MAP")
        spec = None if model is None else ModelSpec.parse(model)
        phase = one_of("POISE_PHASE", PHASES, "")
        return cls(
            None if cluster is None else Cluster.parse(cluster),
            spec,
            whole("POISE_TOKENS_PER_STEP"),
            number("POISE_TIME_LIMIT_S", DEFAULT.time_limit_s),
            number("POISE_HORIZON_STEPS", DEFAULT.horizon_steps),
            None if static is None else StaticMap.read(Path(static), spec),
            split=one_of("POISE_SPLIT", get_args(EngineSplit), None),
            min_gain=number("POISE_MIN_GAIN", DEFAULT.min_gain),
            max_moves=whole("POISE_MAX_MOVES"),
            strategy=one_of("POISE_STRATEGY", get_args(Strategy), "global" if phase == "decode" else "auto"),
            phase=phase,
            canary=switch.on(environ, "POISE_CANARY"),
            apart=switch.on({"POISE_APART": "1", **environ}, "POISE_APART"),
        )

    def machine(self, num_nodes: int, num_ranks: int) -> Cluster:
        """The cluster, which must have the engine's ranks; of a named model, one that measured constants price."""
        if self.cluster is None:
            each = num_ranks // num_nodes
            return Cluster.uniform(num_nodes, each) if self.model is None else Cluster.parse(f"{num_nodes}x{each}:h100")
        if self.cluster.num_devices != num_ranks:
            raise OptionError(f"POISE_CLUSTER has {self.cluster.num_devices} devices, the engine {num_ranks} ranks")
        return self.cluster


DEFAULT = PolicySettings()
