"""``DistributedDataParallel`` around a parent of the model is refused: it would make all ranks' experts equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from poise.train.owned import OwnedExperts
from poise.util.errors import ModelError


def wrapped_well(layers: Sequence[OwnedExperts]) -> bool:
    """Whether ``DistributedDataParallel`` runs this forward pass and leaves the experts alone; False: it does not run.

    Raises
    ------
    ModelError : it manages sharded experts.
    """
    active = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if active is None:
        return False
    managed = {id(weight) for weight in active._module_parameters}
    if any(id(weight) in managed for experts in layers for weight in experts.parameters()):
        raise ModelError(
            "DistributedDataParallel manages sharded experts, and has overwritten them",
            hint="wrap the very model that was given to fully_shard_experts, or use fully_shard",
        )
    return True
