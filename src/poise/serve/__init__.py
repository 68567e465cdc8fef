"""Expert-parallel inference of Hugging Face MoE models with any placement, which may change while it serves."""

from poise.serve.engine import Engine, StepRecord
from poise.serve.hostless import HostlessPolicy
from poise.serve.load import from_config, from_folder
from poise.serve.split import ServingPolicy
from poise.serve.swap import SwapRecord

__all__ = ["Engine", "HostlessPolicy", "ServingPolicy", "StepRecord", "SwapRecord", "from_config", "from_folder"]
