"""poise's planner as a hook of SGLang.

``--eplb-algorithm`` is a closed list, but SGLang applies hooks that plugins register to any function of its own, in
every process it starts (sgl-project/sglang #21388). :func:`install` puts one around the function that every algorithm
goes through. The name given by ``--eplb-algorithm`` still says whether groups stay on nodes; ``elasticity_aware``,
which knows of dead ranks, is left alone. Every rank plans by itself: numbers that poise does not take are the same on
all of them, so that is said once, and SGLang's own algorithm answers; any other error raises.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from poise.engines.plugins.policy import asked, content, logical_maps, say_once, warm_up
from poise.engines.plugins.settings import PolicySettings
from poise.util.errors import InputError, OptionError

LOG = logging.getLogger("sglang.poise")
TARGET = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
LOCATION = "sglang.srt.eplb.expert_location"
REGISTRY = "sglang.srt.plugins.hook_registry"
CONTEXT = "sglang.srt.runtime_context"


def install(environ: Mapping[str, str]) -> None:
    """Register the hook.

    Raises
    ------
    InputError : a ``POISE_*`` variable is wrong, or this SGLang takes no hooks.
    """
    mine = {name: value for name, value in environ.items() if not name.startswith("POISE_STATIC_MAP")}
    settings = PolicySettings.from_environment(mine)
    if settings.canary:
        raise OptionError("POISE_CANARY: nothing looks at weights under SGLang", hint="unset POISE_CANARY")
    try:
        registry = importlib.import_module(REGISTRY)
    except ImportError:
        raise OptionError(f"this SGLang has no {REGISTRY}", hint="export a static map: --to sglang") from None
    registry.HookRegistry.register(TARGET, around(settings), registry.HookType.AROUND)
    warm_up()
    LOG.info("poise plans expert placement: %s", settings)


def around(settings: PolicySettings) -> Callable[..., Any]:
    """The hook: called with SGLang's function and its arguments, gives the three maps that it would give."""

    def rebalance_experts(
        original: Callable[..., Any],
        tokens_per_expert: Any,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> Any:
        name = str(getattr(algorithm, "name", algorithm))
        if not name.startswith("elasticity"):
            groups = num_groups if name.endswith("_hierarchical") else None
            loads = tokens_per_expert.double().sum(dim=0)  # exact for counts, and may be shares far below 1
            try:
                made = asked(
                    loads.cpu().numpy(), num_physical_experts, groups, num_nodes,
                    num_physical_experts // num_local_physical_experts, _map_in_use(), settings=_with_split(settings),
                    single=tokens_per_expert.is_floating_point() and tokens_per_expert.element_size() < 8,
                )  # fmt: skip
            except InputError as error:
                say_once(LOG, f"poise: {error}; SGLang's own algorithm answers")
            else:
                return _three_maps(tokens_per_expert, made.answer(), loads)
        return original(
            tokens_per_expert=tokens_per_expert, num_physical_experts=num_physical_experts,
            num_local_physical_experts=num_local_physical_experts, num_groups=num_groups, num_nodes=num_nodes,
            algorithm=algorithm,
        )  # fmt: skip

    return rebalance_experts


def _three_maps(tokens_per_expert: Any, table_LS: Any, loads: Any) -> Any:
    """What SGLang's function gives: slot -> expert, expert -> slots, replicas, beside the loads."""
    LOG.info("poise: map %s for loads %s; all ranks must say the same", content(table_LS), content(loads.cpu().numpy()))
    slots, replicas = logical_maps(table_LS, int(loads.shape[1]), table_LS.shape[1])
    whole = tokens_per_expert.long()
    return (
        whole.new_tensor(table_LS),
        whole.new_tensor(slots[:, :, : int(replicas.max())]),
        whole.new_tensor(replicas),
    )


def _with_split(settings: PolicySettings) -> PolicySettings:
    """With the split that SGLang makes, the same on all ranks: where an all-to-all backend runs, a rank's own replicas
    come first, then its node's (docs/engines.md).
    """
    if settings.split is not None:
        return settings
    context = getattr(sys.modules.get(CONTEXT), "get_exec", None)
    backend = getattr(getattr(None if context is None else context(), "moe", None), "moe_a2a_backend", None)
    return replace(settings, split="even" if backend in (None, "none") else "near")


def _map_in_use() -> Any:
    """SGLang's current map, int [layers, slots], or None before there is one."""
    current = getattr(sys.modules.get(LOCATION), "get_global_expert_location_metadata", lambda: None)()
    return None if current is None else current.physical_to_logical_map_cpu.numpy()
