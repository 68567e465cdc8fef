"""What benchmarks/peers.py asks of a trainer: where it is installed, and a model in training.

A module of this folder is an adapter: it has ``PEER``, what to install, and ``start`` and ``build`` of :class:`Adapter`.
Of the peer's own packages it imports none before ``start``: the command that reads ``PEER`` has none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A release, and what to know of its row.

    Parameters
    ----------
    name : of its rows, and of its environment.
    requirements : as pip takes them, with versions.
    gigabytes : of its environment on disk.
    module : its adapter in this folder.
    runs : what of it runs on CPU, as the report says it.
    """

    name: str
    requirements: tuple[str, ...]
    gigabytes: float
    module: str
    runs: str


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows.

    Parameters
    ----------
    shape : sizes of the model (:class:`peer.model.Shape`).
    mesh : all ranks, 1-D.
    clock : takes the place of computing, where it is given (:class:`peer.clock.Device`).
    rate : of AdamW.
    """

    shape: Any
    mesh: Any
    clock: Any
    rate: float


class Trainer(Protocol):
    """One model in training on all ranks."""

    def gates(self) -> list[Tensor]:
        """Router weights [E, d], layer by layer: the ones that compute, whose first column is set from outside."""

    def step(self, ids: Tensor) -> float:
        """Forward, backward and optimizer on this rank's tokens; the mean loss of this rank's tokens."""

    def held(self) -> int:
        """Bytes of parameters, gradients and optimizer states on this rank."""


class Adapter(Protocol):
    """A module of this folder."""

    PEER: Peer

    def start(self) -> None:
        """Set up ``torch.distributed`` on gloo, as the peer wants it."""

    def build(self, settings: Settings) -> Trainer:
        """The model of ``settings`` in the peer's hands."""
