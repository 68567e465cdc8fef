"""What vLLM 0.32's CPU platform lacks, a function each; line numbers are of the 0.32.0 wheel."""

from __future__ import annotations

import inspect
import os
import time
from types import SimpleNamespace
from typing import Any

import torch

KNUTH = 2654435769


class Overlay:
    """Another object's attributes, but for some."""

    def __init__(self, under: Any, **mine: Any) -> None:
        self._under = under
        self.__dict__.update(mine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


def switch_is_refused() -> None:
    """config/parallel.py:560: ``--enable-eplb`` is refused outside CUDA, ROCm and XPU."""
    from vllm.config import parallel

    parallel.current_platform = Overlay(parallel.current_platform, is_cuda_alike=lambda: True)


def experts_ignore_where_they_are() -> None:
    """fused_moe/experts/cpu_moe.py: ``apply`` has no use for ``expert_map`` and reads beyond this rank's experts.

    Pairs of other ranks are given weight 0 and this rank's first expert.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = CPUUnquantizedExperts.apply
    signature = inspect.signature(apply)

    def with_map(self: Any, *arguments: Any, **named: Any) -> None:
        given = signature.bind(self, *arguments, **named).arguments
        if given["expert_map"] is not None:
            slot_TK = given["expert_map"][given["topk_ids"].long()]
            here_TK = slot_TK >= 0
            given["topk_weights"] = (given["topk_weights"] * here_TK).contiguous()
            given["topk_ids"] = slot_TK.clamp(min=0).to(torch.int32).contiguous()
        apply(**given)

    CPUUnquantizedExperts.apply = with_map


def ids_stay_logical() -> None:
    """fused_moe/router/base_router.py:118: without Triton experts are not mapped to slots, and nothing is counted.

    The arithmetic is that of the kernel beside it: a replica by Knuth's hash of the token's place, counts by slot.
    """
    from vllm.model_executor.layers.fused_moe.router import base_router

    def map_and_record(
        topk_ids: torch.Tensor, expert_load_view: torch.Tensor, logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor, record_enabled: torch.Tensor,
        num_unpadded_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        expert_TK = topk_ids.long()
        hash_T1 = (torch.arange(len(expert_TK))[:, None] * KNUTH) & 0xFFFFFFFF
        slot_TK = logical_to_physical_map[expert_TK, hash_T1 % logical_replica_count[expert_TK].clamp(min=1)]
        if record_enabled:
            real = slot_TK if num_unpadded_tokens is None else slot_TK[: int(num_unpadded_tokens)]
            expert_load_view += torch.bincount(real.flatten(), minlength=len(expert_load_view)).to(expert_load_view)
        return slot_TK.to(topk_ids.dtype)

    base_router.eplb_map_to_physical_and_record = map_and_record


def models_are_not_registered() -> None:
    """v1/worker/cpu_model_runner.py:72: ``load_model`` tells the load balancer of no model."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model

    def and_register(self: Any, *arguments: Any, **named: Any) -> None:
        load_model(self, *arguments, **named)
        model = get_mixture_of_experts_model(self.model)
        if not self.parallel_config.enable_eplb or model is None:
            return
        self._moe_model = model
        self.eplb_state = EplbState(self.parallel_config, self.device)
        self.eplb_state.add_model(model, self.model_config)
        if self.eplb_state.is_async:
            self.eplb_state.start_async_loop()

    CPUModelRunner.load_model = and_register


def streams_and_events_are_missing() -> None:
    """distributed/eplb: times and the background worker want an accelerator's events, streams and device number.

    On CPU work is done when a call returns, so an event is over when it is recorded.
    """
    from vllm.distributed.eplb import async_worker, eplb_communicator, eplb_state, eplb_utils

    def nothing(*arguments: Any, **named: Any) -> None: ...

    class Event:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.at = 0.0

        def record(self, *arguments: Any) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

        wait = synchronize = nothing

    class Stream:
        device = torch.device("cpu")

        def __init__(self, *arguments: Any, **named: Any) -> None: ...

        synchronize = wait_event = wait_stream = nothing

    accelerator = SimpleNamespace(
        current_stream=Stream, set_stream=nothing, set_device_index=nothing, is_available=lambda: False,
        current_accelerator=lambda: torch.device("cpu"),
    )  # fmt: skip
    for module in (async_worker, eplb_communicator, eplb_state, eplb_utils):
        module.torch = Overlay(torch, Event=Event, Stream=Stream, accelerator=accelerator)
    init = eplb_state.EplbState.__init__

    def with_number(self: Any, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        self.device_index = 0

    eplb_state.EplbState.__init__ = with_number


def shared_memory_has_one_name() -> None:
    """v1/worker/cpu_worker.py:148: with ``external_launcher`` the ranks of every run share memory of the same name.

    What a killed run left there is believed by the next one, and runs side by side meet in it.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name = _CPUSHMDistributed.make_group_name

    def own_name(communicator: Any) -> str:
        os.environ["VLLM_DIST_IDENT"] = f"poise-test-{os.environ.get('MASTER_PORT', os.getpid())}"
        return name(communicator)

    _CPUSHMDistributed.make_group_name = staticmethod(own_name)


ALL = (
    switch_is_refused, experts_ignore_where_they_are, ids_stay_logical, models_are_not_registered,
    streams_and_events_are_missing, shared_memory_has_one_name,
)  # fmt: skip
