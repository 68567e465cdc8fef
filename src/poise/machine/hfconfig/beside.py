"""How weights are quantised, where a checkpoint says it in a file beside ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from poise.machine.hfconfig.fields import Config
from poise.machine.hfconfig.read import text_part
from poise.util.errors import ModelError
from poise.util.jsonfile import read_json

FILES = {
    "hf_quant_config.json": "modelopt",
    "quant_model_description.json": "ascend",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""File, and the ``quant_method`` whose keys it holds."""
MOST_BYTES = 2**27
"""A table of one type a weight has 20 MB for a model of 256 experts and 61 layers."""


def with_quantization(config: Config, folder: Path) -> Config:
    """The config with a ``quantization_config`` from the folder, if it has none or one that only names its method.

    Raises
    ------
    ModelError : such a file cannot be read.
    """
    own: Any = text_part(config).get("quantization_config")
    if own and not (isinstance(own, dict) and set(own) == {"quant_method"}):
        return config
    for name, method in FILES.items():
        path = folder / name
        if path.is_file() and (not own or own["quant_method"] == method):
            data = read_json(path, MOST_BYTES, ModelError, infinite=True)
            if not isinstance(data, dict):
                raise ModelError(f"{path} holds a {type(data).__name__}, not how weights are quantised")
            part = {key: value for key, value in config.items() if key != "quantization_config"}
            return {**part, "quantization_config": {**data, "quant_method": method}}
    return config
