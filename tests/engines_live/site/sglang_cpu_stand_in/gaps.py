"""What SGLang 0.5.23's CPU platform lacks, a function each; line numbers are of the 0.5.23 wheel."""

from __future__ import annotations

from typing import Any


def experts_of_other_ranks_are_refused() -> None:
    """layers/moe/fused_moe_native.py:81: ``scatter_`` fails on -1, which the dispatcher gives pairs of other ranks.

    (layers/moe/token_dispatcher/standard.py:84.) They are given weight 0 and this rank's first expert, and, as line 81
    counts a token once for an expert, every pair of a token and an expert becomes a row.
    """
    from sglang.srt.layers.moe import fused_moe_native

    forward = fused_moe_native.moe_forward_native

    def of_this_rank(layer: Any, x_TH: Any, topk_output: Any, config: Any) -> Any:
        slot_TK, weight_TK = topk_output.topk_ids, topk_output.topk_weights
        pairs = topk_output._replace(
            topk_ids=slot_TK.clamp(min=0).reshape(-1, 1), topk_weights=(weight_TK * (slot_TK >= 0)).reshape(-1, 1)
        )
        out = forward(layer, x_TH.repeat_interleave(slot_TK.shape[1], dim=0), pairs, config)
        return out.reshape(*slot_TK.shape, -1).sum(dim=1)

    fused_moe_native.moe_forward_native = of_this_rank


def memory_is_not_cached() -> None:
    """eplb/expert_distribution.py:992: a dump empties the cache of the device's memory, which ``torch.cpu`` has none of."""
    import torch

    torch.cpu.empty_cache = lambda: None


def nothing_is_captured() -> None:
    """eplb/expert_distribution.py:325: a recorder that does not record asks whether the device's stream is captured."""
    import torch

    torch.cpu.is_current_stream_capturing = lambda: False


ALL = (experts_of_other_ranks_are_refused, memory_is_not_cached, nothing_is_captured)
