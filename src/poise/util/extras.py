"""Modules that need PyTorch, loaded where they are used: it takes seconds, and may be missing or broken."""

from __future__ import annotations

import importlib
from typing import Any

from poise.util.errors import NoResultError


def with_torch(module: str, doing: str, needs: str = "PyTorch") -> Any:
    """The module of that name.

    Raises
    ------
    NoResultError : it cannot be loaded; ``doing`` says what for.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise NoResultError(
            f"{doing} needs {needs}: {str(error)[:200]}", hint="pip install 'poise-moe[torch]'"
        ) from None
