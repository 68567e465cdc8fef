"""vLLM's policy class with poise inside.

vLLM's table of policies has one name, ``default``, and no way to add to it, so :func:`install` puts a subclass of the
engine's default policy in its place, in every process that vLLM starts. What goes wrong at the start (a file that is
not there, an interface that is not known) ends the start. Later numbers that poise does not take are the same on all
ranks, so that is said once, and the engine's own algorithm answers, or, with a static map, the map in use stays. Where
ranks can talk to each other, one plan is made in a process of its own, and what fails there leaves the map in use on
all of them; where they cannot, every rank plans by itself, and any other error raises, as the other ranks may not have
it. Nothing is compiled, nor numba imported, before the first call, which vLLM makes when it profiles: vLLM's CPU build,
while it starts, looks into every module and breaks on one of numba's.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from poise.engines.plugins import vllm_canary, vllm_hooks
from poise.engines.plugins.policy import logical_maps
from poise.engines.plugins.settings import PolicySettings
from poise.engines.plugins.vllm_call import LOG, Call, Planning
from poise.util.errors import OptionError

POLICIES = "vllm.distributed.eplb.policy"
PARAMETERS = ("weight", "num_replicas", "num_groups", "num_nodes")
SINCE = "0.13"
"""First release with a table of policies (before it: one function)."""


def install(environ: Mapping[str, str]) -> None:
    """Replace the default policy; a second call changes nothing.

    Raises
    ------
    InputError : a ``POISE_*`` variable is wrong, or this vLLM's load balancer has another interface.
    """
    try:
        policies = importlib.import_module(POLICIES).EPLB_POLICIES
        base = policies["default"]
    except (ImportError, AttributeError, KeyError) as error:
        raise OptionError(
            f"this vLLM has no policy 'default' in {POLICIES}.EPLB_POLICIES ({type(error).__name__})",
            hint=f"poise needs vLLM {SINCE} or newer; unset POISE_EPLB and POISE_STATIC_MAP to start without poise",
        ) from None
    if hasattr(base, "poise_settings"):
        return
    settings = PolicySettings.from_environment(environ)
    policies["default"] = make_policy(base, settings)
    if settings.canary:
        vllm_canary.install()
    LOG.info("poise plans expert placement: %s", settings)


def make_policy(base: Any, settings: PolicySettings) -> Any:
    """A subclass of an engine's policy class that asks poise.

    Releases differ in what a policy is given and gives: up to 0.13 no map in use; until #36267 three maps (slot ->
    expert, expert -> slots, replicas) instead of one. Builds of the proposal #49700 give it a context.

    Raises
    ------
    OptionError : the class's ``rebalance_experts`` takes other arguments than any release that is known.
    """
    if vllm_hooks.takes_context(base):
        return vllm_hooks.make_policy(base, Planning(settings), importlib.import_module(POLICIES))
    names = tuple(inspect.signature(base.rebalance_experts).parameters)
    if names[:4] != PARAMETERS or len(names) not in (5, 6):
        raise OptionError(
            f"this vLLM's policy takes ({', '.join(names)}), poise knows ({', '.join(PARAMETERS)}, num_ranks) with or "
            "without the map in use"
        )
    takes_old = len(names) == 6
    torch = importlib.import_module("torch")
    three_maps = isinstance(base.rebalance_experts(torch.ones((1, 2)), 2, 1, 1, 1), tuple)
    planning = Planning(settings)

    def rebalance_experts(
        cls: Any, weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:  # fmt: skip
        old = None if old_global_expert_indices is None else old_global_expert_indices.cpu().numpy()
        call = Call(
            weight.double().cpu().numpy(), num_replicas, num_groups, num_nodes, num_ranks, old,
            weight.is_floating_point() and weight.element_size() < 8,
        )  # fmt: skip
        table = planning.table(call)
        if table is None:
            more = (old_global_expert_indices,) if takes_old else ()
            return base.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks, *more)
        whole = weight.long()
        if not three_maps:
            return whole.new_tensor(table)
        experts = call.load_LE.shape[1]
        slots, replicas = logical_maps(table, experts, num_replicas - experts + 1)
        return whole.new_tensor(table), whole.new_tensor(slots), whole.new_tensor(replicas)

    body = {"rebalance_experts": classmethod(rebalance_experts), "poise_settings": settings, "__doc__": __doc__}
    return type("PoiseEplbPolicy", (base,), body)
