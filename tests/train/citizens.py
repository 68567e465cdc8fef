"""Every case of ``citizen_cases.py``: its modules add theirs when they are imported."""

from tests.train import (  # noqa: F401
    citizen_compose,
    citizen_doors,
    citizen_kinds,
    citizen_loops,
    citizen_memory,
    citizen_misuse,
    citizen_routing,
    citizen_steps,
)
from tests.train.citizen_models import MINE

__all__ = ["MINE"]
