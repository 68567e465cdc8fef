"""Every case of ``support_cases.py``: its modules add theirs when they are imported."""

from tests.train import (  # noqa: F401
    support_accumulation,
    support_beside,
    support_cases,
    support_checkpoints,
    support_exchanges,
    support_frozen,
    support_gradients,
    support_kinds,
    support_lonely,
    support_loops,
    support_memory,
    support_once,
    support_optimizers,
    support_parallel,
    support_passes,
    support_plans,
    support_recompute,
    support_routing,
    support_states,
    support_steps,
    support_titan,
)
from tests.train.support_models import LIKE, MINE

__all__ = ["LIKE", "MINE"]
