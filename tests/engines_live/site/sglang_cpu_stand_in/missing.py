"""Modules that SGLang 0.5.23 imports wherever it runs, and that its CPU platform cannot have from PyPI.

``sgl_kernel``   CPU kernels: its wheels there are for CUDA. Names are imported by kvcache/cache_move.py:10 and
                 mem_cache/allocation.py:46, and called for pages and speculation, which are not used here.
``torchvision``  does not load beside a CPU build of PyTorch; pictures (configs/deepseek_ocr.py:7) are not used here.
``IPython``      shows streams in notebooks (sglang/utils.py:25).

Only SGLang sees them: what asks whether a module is installed, as transformers does, is told that it is not. A name that
is called all the same raises.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import FrameType, ModuleType
from typing import Any

WHOLE, ALONE = ("torchvision", "IPython"), ("sgl_kernel",)
"""With all that is below them, and without: SGLang tries some submodules, and does without."""


class _Missing(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": _refuse, "__getattr__": _refuse})


def _refuse(one: Any, *arguments: Any, **named: Any) -> None:
    raise NotImplementedError(f"{type(one).__name__} is not there on this CPU, and the stand-in has none")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        known = fullname.partition(".")[0] in WHOLE or fullname in ALONE
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known and _asked_by_sglang() else None

    def create_module(self, spec: Any) -> ModuleType:
        module = _Missing(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None: ...


def _asked_by_sglang() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename == __file__ or "importlib" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith("sglang.")


def stand_in() -> None:
    """Put the finder behind all others, once."""
    if not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.append(_Finder())
