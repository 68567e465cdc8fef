"""What the code of an engine's wheel imports from parts of the engine that are not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from logging import getLogger
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal


class Settings(SimpleNamespace):
    """Engine settings; those that a test does not name are off."""

    def __getattr__(self, name: str) -> None:
        return None


def put(modules: dict[str, dict[str, Any]], *, paths: dict[str, Path] | None = None) -> None:
    """Modules with the given contents into ``sys.modules``; packages with a path find real code there."""
    for name, values in modules.items():
        module = ModuleType(name)
        module.__path__ = [str(paths[name])] if paths and name in paths else []  # type: ignore[attr-defined]
        module.__dict__.update(values)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)


def forget(engine: str) -> dict[str, ModuleType]:
    """Take an engine's modules out of ``sys.modules``."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if f"{name}.".startswith(f"{engine}.")}


@contextmanager
def borrowed(engine: str) -> Iterator[None]:
    """What is put in for an engine inside goes afterwards."""
    before = forget(engine)
    try:
        yield
    finally:
        forget(engine)
        sys.modules.update(before)


def sglang(root: Path, *, ranks: int, redundant: int, location: str = "trivial", resources: Any = None) -> None:
    """SGLang's ``eplb`` and ``plugins`` packages, with stand-ins for the settings and the elastic part."""
    moe = Settings(init_expert_location=location, ep_num_redundant_experts=redundant, ep_join_mode="none",
                   ep_dispatch_algorithm=None, moe_a2a_backend="none", eplb_algorithm="auto")  # fmt: skip
    parallel = Settings(nnodes=1, ep_size=ranks, elastic_ep_initial_size=None, tp_size=ranks)
    kept = Settings() if resources is None else resources
    srt = root / "sglang" / "srt"
    forget("sglang")
    put(
        {
            "sglang": {}, "sglang.srt": {}, "sglang.srt.eplb": {}, "sglang.srt.plugins": {},
            "sglang.srt.runtime_context": {
                "get_device": lambda: SimpleNamespace(device="cpu"), "get_exec": lambda: SimpleNamespace(moe=moe),
                "get_parallel": lambda: parallel, "get_resources": lambda: kept,
            },
            "sglang.srt.model_loader": {"get_model_architecture": lambda config: (config, None)},
            "sglang.srt.elastic_ep": {},
            "sglang.srt.elastic_ep.elastic_ep": {
                "elastic_expanded_world_enabled": lambda: False,
                "ElasticEPStateManager": SimpleNamespace(instance=lambda: None),
            },
            "sglang.srt.environ": {
                "envs": SimpleNamespace(SGLANG_EPLB_P2P_BATCH_CHUNK_SIZE=SimpleNamespace(get=lambda: 1024))
            },
            "sglang.srt.utils": {"get_bool_env_var": lambda name: False},
        },
        paths={"sglang.srt.eplb": srt / "eplb", "sglang.srt.plugins": srt / "plugins"},
    )  # fmt: skip


def vllm(root: Path) -> None:
    """vLLM's ``distributed.eplb`` package: policies, and the mover of weights without its communicators."""
    forget("vllm")
    put(
        {
            "vllm": {}, "vllm.config": {}, "vllm.config.parallel": {"EPLBPolicyOption": Literal["default"]},
            "vllm.distributed": {}, "vllm.distributed.eplb": {}, "vllm.utils": {},
            "vllm.distributed.eplb.eplb_communicator": {"EplbCommunicator": object},
            "vllm.distributed.eplb.eplb_utils": {"CpuGpuEvent": object, "device_stream": nullcontext},
            "vllm.logger": {"init_logger": getLogger}, "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": nullcontext},
        },
        paths={"vllm.distributed.eplb": root / "vllm" / "distributed" / "eplb"},
    )  # fmt: skip
