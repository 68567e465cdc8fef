"""Attention over packed tokens of many requests, with a key/value cache; what transformers calls by the name "poise".

The tokens of a step come as one row [1, T]: chunks of prompts and single sampled tokens, freely mixed. Each attends to
the cache of its own request, up to its own position. Under ``stay`` (ExFlow, arXiv 2401.08383) tokens live on any rank,
and every rank keeps the cache of every request: a layer first gathers the new keys and values of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from poise.runtime.collectives import gather_rows
from poise.serve.batch import Chunk, KeyValueCache, StepBatch
from poise.util.errors import ModelError

NAME = "poise"
KNOWN = {"sliding_window", "s_aux", "position_ids", "use_cache", "output_router_logits", "is_causal",
         "output_attentions", "output_hidden_states", "return_dict"}  # fmt: skip
"""What families hand over that is honoured, or says nothing about attention."""
STEP = "_poise_step"


@dataclass(slots=True, eq=False)
class AttentionStep:
    """What the attention of all layers must know of the step that runs.

    Parameters
    ----------
    batch, cache : the step's tokens, and those before them.
    tag_n : int64 [n], tags of the tokens that live on this rank now, ascending.
    owner_T : int64 [T], rank where each token lives now; None: caches are local, tokens stay at home.
    group : process group of the tokens.
    bytes_gathered : of keys and values that came from other ranks.
    """

    batch: StepBatch
    cache: KeyValueCache
    tag_n: NDArray[np.int64]
    owner_T: NDArray[np.int64] | None
    group: Any
    bytes_gathered: int = 0


class StepSlot:
    """Where the layers of one model find the step that runs."""

    def __init__(self) -> None:
        self.step: AttentionStep | None = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """One layer's attention: query [1, Hq, T, Dk], key [1, H, T, Dk], value [1, H, T, Dv] -> [1, T, Hq, Dv].

    A rank without tokens hands over one row that is not looked at, and gets zeros.

    Raises
    ------
    ModelError : called outside of a step of :class:`poise.serve.Engine`, or with an option that would be passed over.
    """
    slot = getattr(module, STEP, None)
    if slot is None or slot.step is None:
        raise ModelError(f'attention "{NAME}" runs in steps of poise.serve.Engine only')
    odd = {name for name, given in more.items() if name not in KNOWN and given is not None}
    if odd or attention_mask is not None or dropout:
        raise ModelError(f"attention of {type(module).__name__} asks for {sorted(odd) or 'a mask or dropout'}",
                         hint="this family is not supported in serving")  # fmt: skip
    step: AttentionStep = slot.step
    layer = int(module.layer_idx)
    n = len(step.tag_n)
    keys, values = key[0, :, :n].transpose(0, 1), value[0, :, :n].transpose(0, 1)
    _store(step, layer, keys, values)
    out = query.new_zeros((query.shape[2], query.shape[1], value.shape[3]))
    for chunk, rows, positions in _queries(step):
        out[rows] = _one(step.cache, layer, chunk, positions, query[0, :, rows], scaling, more)
    return out[None], None


def _store(step: AttentionStep, layer: int, keys_nHD: Tensor, values_nHD: Tensor) -> None:
    """The keys and values of a step into the cache: those of this rank, or under ``stay`` of all ranks."""
    first = 0
    if step.owner_T is None:
        chunks = [(i, chunk) for i, chunk in enumerate(step.batch.chunks) if chunk.home == dist.get_rank(step.group)]
        first = int(step.batch.start_C[chunks[0][0]]) if chunks else 0
    else:
        chunks = list(enumerate(step.batch.chunks))
        keys_nHD, values_nHD = _gather(step, keys_nHD, values_nHD)
    for i, chunk in chunks:
        rows = slice(int(step.batch.start_C[i]) - first, int(step.batch.start_C[i + 1]) - first)
        step.cache.write(layer, chunk.request, chunk.first, keys_nHD[rows], values_nHD[rows])


def _gather(step: AttentionStep, keys_nHD: Tensor, values_nHD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens, by tag [T, H, D]: every rank sends its own to every other."""
    assert step.owner_T is not None
    (n, heads, wide), tall = keys_nHD.shape, values_nHD.shape[2]
    mine = torch.cat([keys_nHD, values_nHD], dim=2).reshape(n, heads * (wide + tall))
    count_D = np.bincount(step.owner_T, minlength=step.batch.num_ranks)
    arrived = gather_rows(mine, count_D.tolist(), step.group)
    step.bytes_gathered += arrived.nbytes - mine.nbytes
    place_T = np.empty(step.batch.num_tokens, np.int64)
    place_T[np.argsort(step.owner_T, kind="stable")] = np.arange(step.batch.num_tokens)
    by_tag = arrived[torch.from_numpy(place_T).to(arrived.device)].view(-1, heads, wide + tall)
    return by_tag[:, :, :wide], by_tag[:, :, wide:]


def _queries(step: AttentionStep) -> list[tuple[Chunk, slice, NDArray[np.int64]]]:
    """Chunks with tokens that live here: rows of the queries, and their positions."""
    bounds = np.searchsorted(step.tag_n, step.batch.start_C)
    return [
        (chunk, slice(int(start), int(stop)), step.batch.position_T[step.tag_n[start:stop]])
        for chunk, start, stop in zip(step.batch.chunks, bounds, bounds[1:], strict=False)
        if stop > start
    ]


def _one(
    cache: KeyValueCache, layer: int, chunk: Chunk, position_n: NDArray[np.int64], query_HnD: Tensor,
    scaling: float | None, more: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Queries of one request against its cache, [n, Hq, Dv]; a sliding window is that of transformers."""
    window, sinks = more.get("sliding_window"), more.get("s_aux")
    first, last = int(position_n[0]), int(position_n[-1])
    start = max(0, first - window + 1) if window else 0
    keys, values = cache.read(layer, chunk.request, start, last + 1)
    mask = None
    if len(position_n) > 1:
        at_n = torch.from_numpy(position_n).to(query_HnD.device)[:, None]
        key_at = torch.arange(start, last + 1, device=query_HnD.device)[None]
        mask = key_at <= at_n
        if window:
            mask &= key_at > at_n - window
    if sinks is not None:
        return _with_sinks(query_HnD, keys, values, mask, scaling, sinks)
    out = F.scaled_dot_product_attention(query_HnD[None], keys[None], values[None], mask, scale=scaling,
                                         enable_gqa=len(query_HnD) != len(keys))  # fmt: skip
    return out[0].transpose(0, 1)


def _with_sinks(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None, sinks_H: Tensor
) -> Tensor:
    """Attention with one learned logit a head that takes weight and gives nothing (gpt-oss)."""
    per = len(query) // len(keys)
    scores = query @ keys.repeat_interleave(per, 0).transpose(1, 2) * (scaling or query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    sink = sinks_H.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return (weights @ values.repeat_interleave(per, 0)).transpose(0, 1)


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
