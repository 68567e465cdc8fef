"""Module names of 0.1 and 0.2, for scripts that were written against them: each is the module as it is called now.

:mod:`poise` puts the finder before all others: a room has its submodules under the new names, and a second copy of each
must not come up under the old one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType
from typing import Any

ROOMS = {
    "poise.calibrate": "poise.lab.calibrate",
    "poise.emulate": "poise.lab.emulate",
    "poise.evaluate.report": "poise.report",
    "poise.evaluate": "poise.replay",
    "poise.hfconfig": "poise.machine.hfconfig",
    "poise.observe": "poise.routing",
    "poise.policies": "poise.stepwise",
}
"""Packages, and so whatever in them is not listed below."""
INTO_UTIL = ("compiled", "errors", "extras", "files", "jsonfile", "room", "words", "yamlfile")
METHODS = (
    "expert_parallelism", "faster_moe", "flex_moe", "full_replication", "hecate", "llep", "lplb", "moon_ep",
    "smart_moe", "split", "ultra_ep",
)  # fmt: skip
MODULES = {
    **{f"poise.{name}": f"poise.util.{name}" for name in INTO_UTIL},
    **{f"poise.{name}": f"poise.machine.{name}" for name in ("cluster", "curve", "presets")},
    **{f"poise.policies.{name}": f"poise.stepwise.methods.{name}" for name in METHODS},
    **{
        f"{room}.{old}": f"poise.stepwise.poise.{new}"
        for room in ("poise.policies", "poise.stepwise.poise")
        for old, new in (("joint", "node_split"), ("joint_plan", "gathers"), ("kernels", "work_split"))
    },
    "poise.engines.verdict": "poise.engines.verification",
    "poise.evaluate.flow": "poise.replay.affinity",
    "poise.evaluate.lanes": "poise.simulate.lanes",
    "poise.evaluate.ranks": "poise.simulate.training",
    "poise.evaluate.replay": "poise.replay.static",
    "poise.evaluate.serve_ranks": "poise.simulate.serving",
    "poise.evaluate.stepwise": "poise.replay.serving",
    "poise.evaluate.timeline": "poise.simulate.perfetto",
    "poise.evaluate.traffic": "poise.replay.links",
    "poise.modelspec": "poise.machine.model",
    "poise.policies.loop": "poise.stepwise.driver",
    "poise.policies.plan": "poise.stepwise.protocol",
    "poise.policies.poise_policy": "poise.stepwise.poise.policy",
}


def now_called(name: str) -> str:
    """Today's name of a module, or "" if that name never was another's."""
    if not name.startswith("poise."):
        return ""
    if name in MODULES:
        return MODULES[name]
    for old, new in ROOMS.items():
        if f"{name}.".startswith(f"{old}."):
            return new + name.removeprefix(old)
    return ""


class Moved:
    """Finds old names, and gives the module of today. A finder and loader by what it does: the classes for these load a
    third of what importing poise may cost in a process of an engine.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of an old name; a room is a package."""
        if not now_called(fullname):
            return None
        return spec_from_loader(fullname, self, is_package=fullname in ROOMS)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """An empty one, which :meth:`exec_module` replaces."""

    def get_code(self, fullname: str) -> CodeType | None:
        """Code of the module of today, which ``python -m`` runs."""
        spec = find_spec(now_called(fullname))
        loader: Any = spec.loader if spec else None
        return None if loader is None else loader.get_code(now_called(fullname))

    def exec_module(self, module: ModuleType) -> None:
        """The import system takes what stands in ``sys.modules`` after this."""
        sys.modules[module.__name__] = import_module(now_called(module.__name__))


def install() -> None:
    """Put the finder before all others, if it is not there yet."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, Moved())
