"""Hugging Face's Trainer over sharded experts::

    class MyTrainer(ShardedExpertsMixin, transformers.Trainer):
        pass

Training, clipping, evaluation and loading are Trainer's own. Under data parallelism it writes a model and its optimizer
on rank 0 alone, which has a part of the experts: this gathers them first, on all ranks. Under FSDP2 Trainer gathers by
itself.
"""

from __future__ import annotations

from typing import Any

from poise.train.checkpoint import full_state_dict
from poise.train.states import full_optimizer_state_dict


class ShardedExpertsMixin:
    """Stands before ``transformers.Trainer`` among the base classes."""

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Called on all ranks; those that do not write return at once."""
        if state_dict is None:
            state_dict = full_state_dict(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        optimizer, self.optimizer = self.optimizer, _Whole(full_optimizer_state_dict(self.optimizer))
        try:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        finally:
            self.optimizer = optimizer


class _Whole:
    """An optimizer as far as writing it goes."""

    def __init__(self, state: dict[str, Any] | None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any] | None:
        return self.state
