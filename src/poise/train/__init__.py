"""Fully Sharded Sparse Data Parallelism (FSSDP): experts of MoE layers fully sharded, materialised where needed."""

from poise.train.api import FssdpExperts, fully_shard_experts
from poise.train.checkpoint import export_safetensors, full_state_dict, load_checkpoint, save_checkpoint
from poise.train.gradients import clip_grad_norm_, parameter_groups, update_correction_bias
from poise.train.metrics import LayerMetrics
from poise.train.muon import Muon
from poise.train.regroup import regrouped
from poise.train.rollout import Rollout
from poise.train.states import full_optimizer_state_dict
from poise.train.totals import local_rows

__all__ = [
    "FssdpExperts",
    "LayerMetrics",
    "Muon",
    "Rollout",
    "clip_grad_norm_",
    "export_safetensors",
    "full_optimizer_state_dict",
    "full_state_dict",
    "fully_shard_experts",
    "load_checkpoint",
    "local_rows",
    "parameter_groups",
    "regrouped",
    "save_checkpoint",
    "update_correction_bias",
]
