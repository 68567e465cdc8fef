"""Settings of step-wise policies that comparisons try, the published one first: rivals stand at the best of theirs."""

from __future__ import annotations

from typing import Any

from poise.stepwise.protocol import StepPolicy

GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "split": ({}, {"slack": 0.05}, {"slack": 0.1}),
    "lplb": (
        {},
        {"rounding": "total"},
        {"rounding": "total", "topology": "cube"},
        {"rounding": "total", "topology": "hypercube"},
        {"rounding": "total", "topology": "torus"},
        {"rounding": "total", "topology": "ring"},
        {"rounding": "total", "history_steps": 0},
    ),
    "faster-moe": ({}, {"training": True}),
    "smart-moe": ({}, {"interval": 5}, {"interval": 25}, {"threshold": 0.2}),
    "flex-moe": ({}, {"trigger": 1.05}, {"horizon": 100.0}, {"most": 32}),
    "hecate": ({}, {"overlap": 4}, {"overlap": 8}, {"overlap": 16}),
    "hecate-calibrated": ({}, {"overlap": 4}, {"overlap": 8}, {"overlap": 16}),
    "llep": (
        {},
        {"min_tokens": 64},
        {"min_tokens": 8},
        {"min_tokens": 1},
        {"min_tokens": 8, "alpha": 1.0},
        {"min_tokens": 8, "alpha": 1.25},
        {"min_tokens": 8, "alpha": 1.5, "threshold": 1.5},
        {"min_tokens": 8, "threshold": 2.0},
        {"min_tokens": 8, "threshold": 0.0},
        {"threshold": 0.0},
    ),
    "ultra-ep": (
        {},
        {"probe": False},
        {"probe": False, "min_tokens": 64},
        {"probe": False, "min_tokens": 8},
        {"min_tokens": 8},
        {"min_tokens": 8, "target": 1.1},
        {"min_tokens": 8, "target": 1.5},
        {"min_tokens": 8, "empty_owner": True},
        {"min_tokens": 8, "cross_node": True},
        {"min_tokens": 8, "cross_node": True, "target": 1.1},
        {"min_tokens": 8, "cross_node": True, "target": 1.5},
    ),
    "moon-ep": ({}, {"bounded": False}),
    "fore-moe": ({}, {"tolerance": 1.1}, {"tolerance": 1.3}),
}


def grid_of(policy: StepPolicy) -> tuple[dict[str, Any], ...]:
    return GRIDS.get(policy.name, ({},))
