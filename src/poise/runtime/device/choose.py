"""Which kernels plan a layer's steps: chosen by the device of its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.cost.weights import StepPrice
from poise.runtime.device.needs_triton import PLANNER as DEVICE
from poise.runtime.device.needs_triton import WHY_NONE
from poise.stepwise.host_kernels import HostKernels
from poise.stepwise.kernels import LayerSlots, StepKernels, refusal


class OnHost:
    """The host's kernels for tensors wherever they lie: what is on a GPU is copied, and waited for.

    Parameters
    ----------
    host : numba's.
    why : why the device's kernels do not run.
    refused : whether tensors lie on a GPU all the same: every call waits for the host, which nobody asked for.
    """

    def __init__(self, host: HostKernels, why: str, refused: bool = False) -> None:
        self.host, self.why, self.refused = host, why, refused

    def prepare(self, load_E: Tensor, expert_DS: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`poise.stepwise.kernels.StepKernels.prepare`, int32 [D, S] and [1]."""
        filled_DS, leave = self.host.prepare(_numpy(load_E), _numpy(expert_DS))
        return _back(filled_DS, load_E), _back(leave, load_E)

    def split(self, load_SE: Tensor, expert_DS: Tensor, leave: Tensor) -> Tensor:
        """As :meth:`poise.stepwise.kernels.StepKernels.split`, int32 [E, D]."""
        return _back(self.host.split(_numpy(load_SE), _numpy(expert_DS), _numpy(leave)), load_SE)

    def rows(self, load_SE: Tensor, quota_ED: Tensor, source: int) -> Tensor:
        """As :meth:`poise.stepwise.kernels.StepKernels.rows`, int32 [E, D]."""
        return _back(self.host.rows(_numpy(load_SE), _numpy(quota_ED), source), load_SE)


def kernels_for(
    like: Tensor, table: LayerSlots, price: StepPrice, most_pairs: int, *, margin: float = 0.03
) -> StepKernels:
    """The kernels that plan where a tensor lies: Triton's on a GPU, numba's on the host and for what those do not know.

    ``most_pairs``: (token, expert) pairs that a step of the layer can have on all devices together.
    """
    why = f"tensors lie on {like.device.type}" if not like.is_cuda else refusal(table, price, most_pairs, margin)
    if why is None and DEVICE is None:
        why = WHY_NONE
    if why is None:
        kernels: StepKernels = DEVICE.DeviceKernels(table, price, most_pairs, like.device, margin=margin)
        return kernels
    return OnHost(HostKernels(table, price, margin), why, refused=like.is_cuda)


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _back(array: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)
