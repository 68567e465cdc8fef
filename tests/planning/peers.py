"""Loads and maps on which vllm-ascend's own FlashLB and SwiftBalance were run, and what they gave.

``python -m tests.planning.peers FOLDER`` runs the originals in a wheel of vllm-ascend unpacked at FOLDER and writes
``peers.json``: of each case the hash of the loads, and of each layer that of the experts each device holds. torch_npu and
vLLM's logger, which they import, are empty stand-ins; 0.26.0rc1 has the same two files as 0.23.0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
from numpy.typing import NDArray

ANSWERS = Path(__file__).with_name("peers.json")
POLICIES = "vllm_ascend/eplb/core/policy"


@dataclass(frozen=True)
class Case:
    """Sizes; loads and table come of the seed. Loads are cut to whole ``grain``, and layer l has 1 + l x ``grow`` times."""

    steps: int
    layers: int
    experts: int
    devices: int
    slots: int
    seed: int
    grain: int = 1
    grow: int = 0

    def load_TLE(self) -> NDArray[np.int64]:
        """Tokens, whole numbers in whole-number arithmetic: heavy tails, the same experts hot in all steps."""
        rng = np.random.RandomState(self.seed)  # its streams are frozen
        base_E = 200_000 // (10 + np.arange(self.experts) * 256 // self.experts)
        rows = [base_E[rng.permutation(self.experts)] for _ in range(self.layers)]
        loads = [[row * rng.randint(30, 171, self.experts) // 100 for row in rows] for _ in range(self.steps)]
        return np.array(loads) // self.grain * (1 + self.grow * np.arange(self.layers))[:, None]

    def table_LDK(self) -> NDArray[np.int64]:
        """Every expert once, then others that the device lacks; slots shuffled."""
        rng = np.random.RandomState(self.seed + 1)
        out = np.empty((self.layers, self.devices, self.slots), np.int64)
        for table in out:
            once = -(-self.experts // self.devices)
            dealt = rng.permutation(self.experts)
            for d, row in enumerate(table):
                own = dealt[d * once : (d + 1) * once]
                more = rng.permutation(np.setdiff1d(np.arange(self.experts), own))[: self.slots - len(own)]
                row[:] = rng.permutation(np.concatenate([own, more]))
        return out


CASES = {
    "small": Case(1, 6, 48, 8, 7, 1),
    "few steps": Case(12, 8, 64, 8, 9, 2),
    "a hundred steps": Case(100, 3, 256, 32, 9, 3),
    "merged steps": Case(200, 4, 48, 6, 10, 4),
    "two spare slots a device": Case(24, 4, 128, 16, 10, 5),
    "layers of other loads": Case(4, 6, 96, 12, 9, 6, grow=3),
    "coarse loads": Case(3, 12, 64, 8, 10, 2, grain=100),
}


def digest(array: NDArray[np.integer]) -> str:
    """Sixteen digits of whole numbers."""
    return hashlib.sha256(np.ascontiguousarray(array, np.int64).tobytes()).hexdigest()[:16]


def contents(table_DK: NDArray[np.integer]) -> str:
    """Hash of the experts of each device, whatever their slots."""
    return digest(np.sort(table_DK, axis=1))


def spread(load_TLE: NDArray[np.int64], table_LDK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each slot [T, L, D, K], as the originals take them: an expert's divided over its slots."""
    steps, layers, experts = load_TLE.shape
    out = np.zeros((steps, layers, table_LDK[0].size), np.int64)
    for layer, row in enumerate(table_LDK.reshape(layers, -1)):
        for expert in range(experts):
            mine = np.flatnonzero(row == expert)
            share, more = np.divmod(load_TLE[:, layer, expert], len(mine))
            out[:, layer, mine] = share[:, None] + (np.arange(len(mine)) < more[:, None])
    return out.reshape(steps, *table_LDK.shape)


def originals(folder: Path) -> tuple[type, type]:
    """FlashLB and SwiftBalance of an unpacked wheel."""
    import torch

    def stand_in(name: str, **members: object) -> ModuleType:
        module = ModuleType(name)
        module.__dict__.update(members, __path__=[str(folder / POLICIES)] if name == "peers_original" else [])
        sys.modules[name] = module
        return module

    def no_group() -> None:
        raise RuntimeError("no group")

    for name in ("vllm", "vllm_ascend", "vllm_ascend.distributed", "torch_npu", "peers_original"):
        stand_in(name)
    stand_in("vllm.logger", logger=logging.getLogger("peers"))
    stand_in("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=no_group)
    torch.npu = SimpleNamespace(device_count=lambda: 16)
    found = []
    for file, name in (("policy_flashlb", "FlashLB"), ("policy_swift_balancer", "SwiftBalanceEplb")):
        spec = importlib.util.spec_from_file_location(f"peers_original.{file}", folder / POLICIES / f"{file}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        found.append(getattr(module, name))
    return found[0], found[1]


def main() -> None:
    """Write what the originals give."""
    import numba
    import scipy
    import torch

    folder = Path(sys.argv[1])
    flash, swift = originals(folder)
    (about,) = folder.glob("vllm_ascend-*.dist-info")
    out: dict[str, object] = {
        "made_of": about.name.removesuffix(".dist-info"),
        "made_with": {"numpy": np.__version__, "numba": numba.__version__, "scipy": scipy.__version__},
    }
    for name, case in CASES.items():
        table, load = case.table_LDK(), spread(case.load_TLE(), case.table_LDK())
        _, changed, by_flash = flash().rebalance_experts(torch.from_numpy(table), torch.from_numpy(load))
        held = table.copy()
        held[changed] = np.asarray(by_flash)[changed]
        _, _, by_swift = swift().rebalance_experts(torch.from_numpy(table), torch.from_numpy(load.sum(axis=0)))
        out[name] = {
            "loads": digest(case.load_TLE()), "table": digest(table),
            "flash_lb": [contents(one) for one in held], "swift_balance": [contents(one) for one in np.array(by_swift)],
        }  # fmt: skip
    ANSWERS.write_text(json.dumps(out, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
