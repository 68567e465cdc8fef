"""Configs of models by their ids at Hugging Face, from its cache on this machine; nothing is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from poise.util.errors import ModelError
from poise.util.words import closest

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_model_id(text: str) -> bool:
    """Whether a text has the form ``org/name``."""
    return _ID.fullmatch(text) is not None


def cache_folder() -> Path:
    """Where Hugging Face's own tools keep what they fetch, by the variables that they read."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def cached_config(model: str, presets: Iterable[str]) -> Path:
    """``config.json`` of a model in the cache: of its branch ``main``, else of the snapshot that came last.

    Raises
    ------
    ModelError : there is none; the hint names the command that fetches it, and a preset of that name if there is one.
    """
    place = cache_folder() / f"models--{model.replace('/', '--')}"
    try:
        revision = (place / "refs" / "main").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        revision = ""
    if re.fullmatch(r"\w+", revision) and (config := place / "snapshots" / revision / "config.json").is_file():
        return config
    found = sorted(place.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
    close = closest(model.split("/")[1], presets)
    raise ModelError(
        f"no config of {model!r} lies in Hugging Face's cache, {cache_folder()}",
        hint=f"hf download {model} --include '*.json'; or give its config.json"
        + (f", or the preset {close}" if close else ""),
    )
