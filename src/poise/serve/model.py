"""A causal language model of transformers, taken apart: its experts leave, the rest stays as it is and is replicated.

In place of ``experts`` every MoE block gets a stand-in that is called the same way, ``(tokens [T, d], ids [T, K],
weights [T, K])``. Under the ``home`` flows the model's own forward runs on packed tokens. Under ``stay`` (ExFlow, arXiv
2401.08383) the decoder layers are walked, since tokens move to other ranks between attention and experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from poise.cost.traffic import DataFlow
from poise.planning.placement import Placement
from poise.runtime.capture import find_routers, routed
from poise.runtime.collectives import gather
from poise.runtime.experts import Bank, ExpertKind, recognise_all
from poise.serve.attention import NAME, STEP, AttentionStep, StepSlot
from poise.serve.batch import KeyValueCache, StepBatch, as_ids
from poise.serve.layer import ServedExperts
from poise.util.errors import ModelError, PlacementError

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
"""``model_type`` of the configs whose models were compared with transformers', tests/serve."""
PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class StandIn(nn.Module):
    """Takes the place of ``experts``: hands the call to whoever serves the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.serve: Any = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts, [T, d]."""
        out: Tensor = self.serve(hidden_states, top_k_index, top_k_weights)
        return out


@dataclass(slots=True, eq=False)
class Parts:
    """A model without its experts, and those of this rank.

    Parameters
    ----------
    model : the causal language model, stand-ins in place of its experts.
    kinds : what an expert of each MoE layer computes, by decoder layer.
    banks : weights of this rank's slots, in their order, by decoder layer.
    placement : that the banks follow.
    """

    model: nn.Module
    kinds: dict[int, ExpertKind]
    banks: dict[int, Bank]
    placement: Placement


def check_family(model: nn.Module) -> None:
    """Raise ModelError unless the model is of a family whose forward pass is known."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise ModelError(
            f"{type(model).__name__} is of family {family!r}, which is not known to serving",
            hint=f"known: {', '.join(FAMILIES)}; others may attend in ways that packed tokens break",
        )


def check_placement(placement: Placement, layers: Sequence[int], num_experts: int, ranks: int) -> None:
    """Raise PlacementError unless a placement is for these decoder layers, E experts and D ranks.

    Layer ids 0, 1, ... are taken as "the MoE layers in order" where some decoder layers are dense.
    """
    want = (len(layers), num_experts, ranks)
    have = (placement.num_layers, placement.num_experts, placement.num_devices)
    if want != have:
        raise PlacementError(f"a placement of [layers, experts, devices] {have} for a model on ranks of {want}")
    ids = np.asarray(placement.layer_ids_L).tolist()
    if ids not in (list(layers), list(range(len(layers)))):
        raise PlacementError(f"the placement is for decoder layers {ids}, MoE layers are {list(layers)}")


def take_apart(model: nn.Module, placement: Placement, rank: int) -> Parts:
    """Take the experts out of a model that has them all; the rows of this rank's slots are copied, the rest is freed.

    Raises
    ------
    ModelError : no MoE layer, an unknown family, or experts of no known shape.
    PlacementError : the placement is for another model or number of ranks.
    """
    routers = find_routers(model)
    check_family(model)
    blocks = {layer: block_of(model, layer) for layer in routers}
    kinds = kinds_of(blocks)
    first: Any = next(iter(blocks.values())).experts
    check_placement(placement, list(blocks), len(next(iter(first.parameters()))), placement.num_devices)
    banks: dict[int, Bank] = {}
    for row, (layer, block) in enumerate(blocks.items()):
        rows = torch.tensor(placement.experts_of(row, rank), dtype=torch.int64)
        weights: Any = block.experts
        with torch.no_grad():
            banks[layer] = {name: getattr(weights, name).detach()[rows].clone() for name in kinds[layer].shapes}
        block.experts = StandIn()
    return Parts(model.eval(), kinds, banks, placement)


def kinds_of(blocks: Mapping[int, Any]) -> dict[int, ExpertKind]:
    """What experts of each block compute when they are evaluated.

    Raises
    ------
    ModelError : experts of no known shape, or whose own code computes something else.
    """
    names = {layer: f"the experts of layer {layer}" for layer in blocks}
    kinds = recognise_all({names[layer]: block.experts for layer, block in blocks.items()})
    for kind in kinds.values():
        kind.follow(False)
    return {layer: kinds[name] for layer, name in names.items()}


def block_of(model: nn.Module, layer: int) -> Any:
    """The MoE block of a decoder layer."""
    return decoder_layers(model)[layer].mlp


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers.

    Raises
    ------
    ModelError : the model is not built like the known families.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not all(hasattr(layer, part) for layer in layers for part in PARTS):
        raise ModelError(f"{type(model).__name__} has no layers of {', '.join(PARTS)}")
    return layers


class ServedModel:
    """One rank's model: runs one step's tokens together with the other ranks.

    Parameters
    ----------
    parts : the model without experts.
    layers : the experts of each MoE layer, by decoder layer.
    traffic : how tokens travel.
    group : process group.
    """

    def __init__(self, parts: Parts, layers: Mapping[int, ServedExperts], traffic: DataFlow, group: Any) -> None:
        self.model: Any = parts.model
        self.layers, self.traffic, self.group = layers, traffic, group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.cache = KeyValueCache()
        self.device = next(self.model.parameters()).device
        self.top_k = int(self.model.config.num_experts_per_tok)
        self.slot = StepSlot()
        self.bytes_gathered = 0
        self.decoder = decoder_layers(self.model)
        self.model.set_attn_implementation(NAME)
        self._arrived: Tensor | None = None
        self._hooks: list[Any] = []
        for number, layer in enumerate(self.decoder):
            setattr(layer.self_attn, STEP, self.slot)
            if number in layers:
                layer.mlp.experts.serve = self._return_arrived if traffic == "stay" else self._run(number)
                if traffic != "stay":
                    self._hooks.append(layer.register_forward_pre_hook(self._prefetch(number)))

    def detach(self) -> None:
        """Leave the model to another one of this class."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, batch: StepBatch, want_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        """Run a step; all ranks call it with the same batch.

        Parameters
        ----------
        batch : tokens of all ranks; their requests are open in the cache.
        want_n : int64 [n], tags whose logits are wanted, ascending.

        Returns
        -------
        tags int64 [m] of those that ended on this rank, and their logits [m, vocabulary].
        """
        stay = self.traffic == "stay"
        tags = batch.tags(self.rank)
        step = AttentionStep(batch, self.cache, tags, batch.home_T.copy() if stay else None, self.group)
        self.slot.step = step
        try:
            with torch.no_grad():
                return self._walk(step, want_n) if stay else self._at_home(step, want_n)
        finally:
            self.slot.step = None
            self.bytes_gathered += step.bytes_gathered

    def _ids(self, values_n: NDArray[np.int64]) -> Tensor:
        """[1, n]; on a rank without tokens one that is not looked at, since models cannot reshape nothing."""
        return as_ids(values_n if len(values_n) else np.zeros(1, np.int64), self.device)[None]

    def _at_home(self, step: AttentionStep, want_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        tags = step.tag_n
        wanted = want_n[np.isin(want_n, tags)]
        keep = np.searchsorted(tags, wanted)
        out = self.model(
            input_ids=self._ids(step.batch.token_T[tags]), position_ids=self._ids(step.batch.position_T[tags]),
            use_cache=False, output_router_logits=False, logits_to_keep=self._ids(keep)[0],
        )  # fmt: skip
        return wanted, out.logits[0, : len(wanted)]

    def _run(self, layer: int) -> Any:
        def serve(x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            n = len(self._step.tag_n)
            y_nd = self.layers[layer].run(x_Td[:n], ids_TK[:n], weights_TK[:n])
            return y_nd if n else torch.zeros_like(x_Td)

        return serve

    def _prefetch(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._start(layer)

        return hook

    @property
    def _step(self) -> AttentionStep:
        if self.slot.step is None:
            raise ModelError("a served model runs in steps of its Engine only: other ranks must take part")
        return self.slot.step

    def _start(self, layer: int) -> None:
        batch = self._step.batch
        self.layers[layer].fill_up(batch.fullest)
        self.layers[layer].prefetch(batch.num_tokens * self.top_k)

    def _return_arrived(self, x_Td: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        assert self._arrived is not None
        return self._arrived

    def _walk(self, step: AttentionStep, want_n: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        inner = self.model.model
        h = inner.embed_tokens(self._ids(step.batch.token_T[step.tag_n]))
        for number, layer in enumerate(self.decoder):
            position = self._ids(step.batch.position_T[step.tag_n])
            rotary = inner.rotary_emb(h, position)
            if number in self.layers:
                h = self._moe_layer(number, layer, h, rotary, step)
            else:
                h = layer(h, position_embeddings=rotary, position_ids=position, attention_mask=None)
        wanted = want_n[np.isin(want_n, step.tag_n)]
        keep = self._ids(np.searchsorted(step.tag_n, wanted))[0]
        return wanted, self.model.lm_head(inner.norm(h)[0, keep])[: len(wanted)]

    def _moe_layer(self, number: int, layer: Any, h: Tensor, rotary: Any, step: AttentionStep) -> Tensor:
        """Attention where the token lives, then the experts where it will live: [1, n, d] -> [1, m, d]."""
        served = self.layers[number]
        self._start(number)
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(h), position_embeddings=rotary, attention_mask=None
        )
        h = h + attended
        router = getattr(layer.mlp, "gate", None) or layer.mlp.router
        ids, weights = routed(router(layer.post_attention_layernorm(h)[0]))
        assert ids is not None and weights is not None  # of all FAMILIES
        n = len(step.tag_n)
        moved = served.move(
            h[0, :n], ids[:n], weights[:n], as_ids(step.tag_n, self.device), layer.post_attention_layernorm
        )
        step.tag_n = moved.tag_T.cpu().numpy()
        step.owner_T = self._owners(step)
        if not len(step.tag_n):
            return h[:, :1]
        self._arrived = moved.y_Td
        h = moved.h_Td[None]
        # The block sees the tokens again, so that it adds shared experts in its own way; its router's answer is unused.
        out = layer.mlp(layer.post_attention_layernorm(h))
        return h + (out[0] if isinstance(out, tuple) else out)

    def _owners(self, step: AttentionStep) -> NDArray[np.int64]:
        """Rank where each token lives now, int64 [T]: one all-gather of a byte a token."""
        mine = torch.zeros(step.batch.num_tokens, dtype=torch.uint8)
        mine[torch.from_numpy(step.tag_n)] = 1
        return gather(mine.to(self.device), self.group).argmax(dim=0).cpu().numpy()
