"""Hugging Face's Trainer over sharded experts::

    class MyTrainer(ShardedExpertsMixin, transformers.Trainer):
        pass

Training, clipping and evaluation are Trainer's own. Under data parallelism it writes a model and its optimizer on rank
0 alone, which has a part of the experts: this gathers them first, on all ranks. And it resumes, and goes back to the
best model at the end, by ``load_state_dict`` from files in a family's published layout, of which experts and routers
are then missing, with no more than a warning (seen in transformers 5.23, sharded or not): this loads them by
``from_pretrained``. Under FSDP2 Trainer gathers by itself.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from poise.train.checkpoint import full_state_dict
from poise.train.states import full_optimizer_state_dict
from poise.train.steps import attach


class ShardedExpertsMixin:
    """Stands before ``transformers.Trainer`` among the base classes."""

    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Called on all ranks; those that do not write return at once."""
        if state_dict is None or any(isinstance(value, DTensor) for value in state_dict.values()):
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

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        one = self.accelerator.unwrap_model(model or self.model)
        if self.is_fsdp_enabled or not hasattr(type(one), "from_pretrained") or hasattr(one, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        saved = type(one).from_pretrained(resume_from_checkpoint, dtype=one.dtype)
        one.load_state_dict(saved.state_dict())

    def _load_best_model(self: Any) -> None:
        if self.is_fsdp_enabled or hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            super()._load_best_model()  # type: ignore[misc]
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        attach(getattr(self.optimizer, "optimizer", self.optimizer))
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


class _Whole:
    """Stands for an optimizer while Trainer writes its state dict, which was gathered before."""

    def __init__(self, state: dict[str, Any] | None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any] | None:
        return self.state
