"""SGLang plugin (entry point ``sglang.srt.plugins``): poise's planner behind ``--enable-eplb``.

``--eplb-algorithm`` is a closed list, but SGLang applies hooks that plugins register to any function of its own, in
every process it starts (sgl-project/sglang #21388). :func:`register` puts one around the function that every algorithm
goes through, only if ``POISE_EPLB`` is set: installing poise changes nothing. The name given by ``--eplb-algorithm``
still says whether groups stay on nodes; ``elasticity_aware``, which knows of dead ranks, is left alone. A static map
needs no plugin: ``poise export --to sglang``.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from poise.engines.plugins.policy import PolicySettings, logical_maps, rebalance, switched_on, warm_up, warn_once
from poise.errors import OptionError

LOG = logging.getLogger("sglang.poise")
TARGET = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
LOCATION = "sglang.srt.eplb.expert_location"
REGISTRY = "sglang.srt.plugins.hook_registry"


def register() -> None:
    """Entry point.

    Raises
    ------
    InputError : a ``POISE_*`` variable is wrong, or this SGLang takes no hooks. SGLang logs it and starts without.
    """
    if not switched_on(os.environ):
        return
    settings = PolicySettings.from_environment({**os.environ, "POISE_STATIC_MAP": ""})
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
            try:
                groups = (num_groups or 1) if name.endswith("_hierarchical") else 1
                loads = tokens_per_expert.double().sum(dim=0)  # exact for counts, and may be shares far below 1
                made = rebalance(
                    loads.cpu().numpy(), num_physical_experts, groups, num_nodes,
                    num_physical_experts // num_local_physical_experts, _map_in_use(), settings=settings,
                    single=tokens_per_expert.is_floating_point() and tokens_per_expert.element_size() < 8,
                )  # fmt: skip
                slots, replicas = logical_maps(made, int(loads.shape[1]), num_physical_experts)
                width = int(replicas.max())
                whole = tokens_per_expert.long()
                return whole.new_tensor(made), whole.new_tensor(slots[:, :, :width]), whole.new_tensor(replicas)
            except Exception as error:
                warn_once(LOG, f"poise: {error}; SGLang's own algorithm answers")
        return original(
            tokens_per_expert=tokens_per_expert, num_physical_experts=num_physical_experts,
            num_local_physical_experts=num_local_physical_experts, num_groups=num_groups, num_nodes=num_nodes,
            algorithm=algorithm,
        )  # fmt: skip

    return rebalance_experts


def _map_in_use() -> Any:
    """SGLang's current map, int [layers, slots], or None before there is one."""
    current = getattr(sys.modules.get(LOCATION), "get_global_expert_location_metadata", lambda: None)()
    return None if current is None else current.physical_to_logical_map_cpu.numpy()
