"""Whether a plugin is wanted. Engines load it in every process, asked for or not: this imports nothing."""

from __future__ import annotations

from collections.abc import Mapping

PREFIX, PHASE = "POISE_", "POISE_PHASE"


def planning(environ: Mapping[str, str]) -> bool:
    """POISE_EPLB is set, and not to 0."""
    return on(environ, "POISE_EPLB")


def on(environ: Mapping[str, str], name: str) -> bool:
    """The variable is set, and not to 0."""
    return environ.get(name, "").strip().lower() not in ("", "0", "false", "off")


def static_map(environ: Mapping[str, str]) -> bool:
    """POISE_STATIC_MAP names a file."""
    return bool(environ.get("POISE_STATIC_MAP", "").strip())


def of_phase(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of an instance that says which phase it serves: ``POISE_PHASE=decode`` has
    ``POISE_STATIC_MAP_DECODE`` in the place of ``POISE_STATIC_MAP``, and so on.

    Prefill and decode instances are often started from one set of variables, and differ in maps, tokens a step and
    strategy. The phase is said, not guessed: an engine's own role may be both on either instance.
    """
    out = dict(environ)
    ending = "_" + environ.get(PHASE, "").strip().upper()
    if len(ending) > 1:
        mine = [name for name in environ if name.startswith(PREFIX) and name.endswith(ending)]
        out |= {name.removesuffix(ending): environ[name] for name in mine}
    return out
