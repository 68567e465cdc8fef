"""Whether a plugin is wanted. Engines load it in every process, asked for or not: this imports nothing."""

from __future__ import annotations

from collections.abc import Mapping


def planning(environ: Mapping[str, str]) -> bool:
    """POISE_EPLB is set, and not to 0."""
    return environ.get("POISE_EPLB", "").strip().lower() not in ("", "0", "false", "off")


def static_map(environ: Mapping[str, str]) -> bool:
    """POISE_STATIC_MAP names a file."""
    return bool(environ.get("POISE_STATIC_MAP", "").strip())
