"""Which tensors of a Hugging Face checkpoint follow the ids of experts, by their names.

===================  ==========================================================================================
experts, one by one  ``mlp.experts.N.gate_proj.weight``, ``block_sparse_moe.experts.N.w1.weight``, with any suffix
                     (scales, quantised weights): they change their name
experts, fused       ``mlp.experts.gate_up_proj`` and ``down_proj`` with ``_bias``, ``_blocks``, ``_scales``, ...;
                     aria's ``fc1``, ``fc2``; granite's ``block_sparse_moe.input_linear.weight``: [E, ...], blocks
                     change places
router               ``gate.weight``, ``router.weight``, ``router.layer.weight``, their biases,
                     ``e_score_correction_bias``, ``expert_bias``: [E, ...] or [1, E], rows change places
left alone           shared experts and their gate, the layer's attention and what else has a name that is known
===================  ==========================================================================================

The MoE module is what ``experts`` lie in: ``mlp``, or the layer itself (gemma-4). Anything else of an MoE layer that
may depend on ids is refused. In the module: a tensor beside the experts or the router, one with E in its shape, one of
integers (DeepSeek-V4's ``tid2eid`` holds expert ids). Outside of it: one that is named after routers or experts
(kolibri's ``moe.router.expert_bias``), or has E in its shape: where E is also the width of the model, a norm looks like
a bias of the router.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from poise.engines.shards import BITS, StoredTensor
from poise.util.errors import ModelError

NUMBER = r"(?:0|[1-9][0-9]{0,4})"
PREFIX = r"(?:(?:model|language_model|transformer|backbone|text_model|llm)\.)*(?:layers|blocks|h)\."
DECODER = rf"{PREFIX}(?P<layer>{NUMBER})\."
MODULE = rf"(?P<path>{DECODER[:-2]}(?:\.(?!shared|experts\.)\w+)?)\."
EXPERT = re.compile(rf"{MODULE}experts\.(?P<expert>{NUMBER})\.(?P<rest>.+)")
FUSED = re.compile(
    rf"{MODULE}(?:experts\.(?:(?:gate_up|gate|up|down)_proj|w[123]|w13|fc[12])(?![a-z0-9])[\w.]*"
    r"|(?<=\.block_sparse_moe\.)(?:input|output)_linear\.weight)"
)
ROUTER = re.compile(
    r"(?:gate|router)\.(?:(?:layer|classifier|gate|wg|proj)\.)?"
    r"(?:weight|bias|e_score_correction_bias|expert_bias|per_expert_scale)"
    r"|(?:experts\.|moe_statics\.)?e_score_correction_bias|expert_bias"
)
ROUTER_WEIGHT = re.compile(r"(?:gate|router)\.(?:(?:layer|classifier|gate|wg|proj)\.)?weight")
BESIDE = ("experts.", "gate.", "router.")
APART = re.compile(
    r"(?:self_)?att(?:n|ention)\.|linear_att(?:n|ention)\.|mamba\.|(?:short_)?conv\.|hc_\w|per_layer_(?:input_gate|projection)\."
)
"""Attention and other mixers of tokens, hyper-connections, embeddings of a layer: of any size, nothing in them follows
ids unless its name says so."""
NAMED = re.compile(r"(?:^|\.)(?!shared)\w*(?:router|experts?(?![a-z])|e_score_correction|tid2eid)")
GATE = re.compile(r"(?:^|\.)gate\.")
MENTION = re.compile(rf"(?P<path>(?<![\w.])(?:\w+\.)*layers\.(?P<layer>{NUMBER})\.\w+)\.experts\.(?P<expert>{NUMBER})")
IDS = {"I16", "U16", "I32", "U32", "I64", "U64"}
MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Changes:
    """What new ids do to the tensors of a checkpoint.

    Parameters
    ----------
    names : old name -> new name, of tensors of single experts.
    rows : name -> int32 [E], old block of each new one along the first axis.
    paths : MoE module -> order of its layer, int32 [E]; None: its ids stay.
    """

    names: dict[str, str]
    rows: dict[str, NDArray[np.int32]]
    paths: dict[str, NDArray[np.int32] | None]

    def in_text(self, text: str, where: str) -> str:
        """Text of a config with new ids wherever it names an expert, as lists of modules left unquantised do.

        Raises
        ------
        ModelError : it names an expert of a module that the checkpoint does not have.
        """

        def renamed(found: re.Match[str]) -> str:
            if found["path"] not in self.paths:
                raise ModelError(
                    f"{where} names {found[0]!r}, the checkpoint has no experts under {found['path']!r}",
                    hint="its expert numbers cannot be told apart from old ones",
                )
            order = self.paths[found["path"]]
            if order is None:
                return found[0]
            place = np.flatnonzero(order == int(found["expert"]))
            if not place.size:
                raise ModelError(f"{where} names {found[0]!r}, the model has {len(order)} experts")
            return f"{found['path']}.experts.{place[0]}"

        return MENTION.sub(renamed, text)


def find_changes(tensors: Iterable[StoredTensor], orders: Mapping[int, NDArray[np.int32]]) -> Changes:
    """Every tensor that follows the ids of experts in the given decoder layers.

    Parameters
    ----------
    tensors : of the whole checkpoint.
    orders : decoder layer -> int32 [E], old expert of each new id.

    Raises
    ------
    ModelError : a layer has no experts or no router, lacks experts or has more than E, or holds tensors of which it
        is not known whether they follow the ids.
    """
    tensors = tuple(tensors)
    inside = _by_layer(tensors, orders)
    paths, owners = _modules(tensors, orders, inside)
    changes = Changes({}, {}, paths)
    doubtful = [tensor for tensor in tensors if _outside_of_layers(tensor, orders)]
    for layer, order in orders.items():
        doubtful += _of_layer(inside[layer], owners[layer], layer, order, changes)
    if doubtful:
        raise ModelError(
            f"it is not known whether {_listed(doubtful)} follow{'s' if len(doubtful) == 1 else ''} the ids of "
            f"{len(next(iter(orders.values())))} experts, or not",
            hint="this kind of checkpoint cannot be relabelled; export a map for the engine instead",
        )
    return changes


def _by_layer(
    tensors: Iterable[StoredTensor], orders: Mapping[int, NDArray[np.int32]]
) -> dict[int, list[StoredTensor]]:
    """Tensors of each of the layers."""
    inside: dict[int, list[StoredTensor]] = {layer: [] for layer in orders}
    pattern = re.compile(DECODER)
    for tensor in tensors:
        found = pattern.match(tensor.name)
        if found is not None and int(found["layer"]) in orders:
            inside[int(found["layer"])].append(tensor)
    return inside


def _modules(
    tensors: Iterable[StoredTensor], orders: Mapping[int, NDArray[np.int32]], inside: dict[int, list[StoredTensor]]
) -> tuple[dict[str, NDArray[np.int32] | None], dict[int, str]]:
    """MoE modules of the checkpoint as in :class:`Changes`, and that of each layer of the placement."""
    paths: dict[str, NDArray[np.int32] | None] = {}
    layers: dict[int, str] = {}
    for tensor in tensors:
        found = EXPERT.fullmatch(tensor.name) or FUSED.fullmatch(tensor.name)
        if found is None:
            if other := MENTION.match(tensor.name):
                paths.setdefault(other["path"], None)
            continue
        path, layer = found["path"], int(found["layer"])
        if layers.setdefault(layer, path) != path and layer in orders:
            raise ModelError(f"layer {layer} has experts under {layers[layer]!r} and under {path!r}")
        paths[path] = orders.get(layer)
    for layer in sorted(set(orders) - set(layers)):
        size = len(orders[layer])
        like = [t for t in inside[layer] if NAMED.search(t.name) or _may_follow_outside(t, size)]
        if like:
            raise ModelError(
                f"layer {layer} has no experts under a name that is known; what looks like them: {_listed(like)}",
                hint="this kind of checkpoint cannot be relabelled; export a map for the engine instead",
            )
        have = f"{len(layers)} layers from {min(layers)} to {max(layers)} have" if layers else "no layer has any"
        raise ModelError(
            f"layer {layer} is in the placement and has no experts in the checkpoint; {have}",
            hint="is the placement of this model, and are the expert tensors named as in Hugging Face checkpoints?",
        )
    return paths, layers


def _of_layer(
    tensors: Iterable[StoredTensor], path: str, layer: int, order: NDArray[np.int32], changes: Changes
) -> list[StoredTensor]:
    """Enter what changes in a layer; tensors of which it is not known whether they do."""
    place = np.argsort(order)
    doubtful: list[StoredTensor] = []
    seen: set[int] = set()
    router = False
    for tensor in tensors:
        if not tensor.name.startswith(f"{path}."):
            doubtful += [tensor] if _may_follow_outside(tensor, len(order)) else []
            continue
        rest = tensor.name[len(path) + 1 :]
        if single := EXPERT.fullmatch(tensor.name):
            old = int(single["expert"])
            if old >= len(order):
                raise ModelError(f"{tensor.name!r}: the placement has {len(order)} experts")
            seen.add(old)
            changes.names[tensor.name] = f"{path}.experts.{place[old]}.{single['rest']}"
        elif FUSED.fullmatch(tensor.name):
            changes.rows[tensor.name] = _rows(tensor, order)
            seen.update(range(len(order)))
        elif ROUTER.fullmatch(rest):
            changes.rows[tensor.name] = _rows(tensor, order)
            router = router or ROUTER_WEIGHT.fullmatch(rest) is not None
        elif _may_follow(tensor, rest, len(order)):
            doubtful.append(tensor)
    if len(seen) < len(order):
        lacking = min(set(range(len(order))) - seen)
        raise ModelError(f"layer {layer} has {len(seen)} of {len(order)} experts, {lacking} is missing")
    if not router and not doubtful:
        raise ModelError(f"layer {layer} has experts under {path!r} and no router's weight beside them")
    return doubtful


def _rows(tensor: StoredTensor, order: NDArray[np.int32]) -> NDArray[np.int32]:
    shape = tensor.shape
    while len(shape) > 1 and shape[0] == 1 < len(order):  # ernie's [1, E]
        shape = shape[1:]
    if not shape or shape[0] != len(order):
        hint = "is the placement of this model?"
        if shape and len(order) < shape[0] <= 2 * len(order):
            hint = "rows of what is no routed expert (shared ones, or some that compute nothing) are not read"
        raise ModelError(
            f"{tensor.name!r} has the shape {list(tensor.shape)}, it should begin with {len(order)} experts", hint=hint
        )
    if (tensor.end - tensor.begin) % len(order) or (BITS[tensor.dtype] % 8 and tensor.shape[-1] % 8):
        raise ModelError(
            f"{tensor.name!r}: one expert of {tensor.dtype} {list(tensor.shape)} is no whole number of bytes"
        )
    return order


def _may_follow(tensor: StoredTensor, rest: str, num_experts: int) -> bool:
    """Of a tensor in the MoE module."""
    if rest.startswith("shared") or _one_number(tensor):
        return False
    if rest == "router.scale" and num_experts not in tensor.shape:  # gemma-4: of the width of the model
        return False
    if APART.match(rest):
        return NAMED.search(rest) is not None
    return rest.startswith(BESIDE) or num_experts in tensor.shape or tensor.dtype in IDS or "tid2eid" in rest


def _may_follow_outside(tensor: StoredTensor, num_experts: int) -> bool:
    """Of a tensor of the layer that does not lie in its MoE module."""
    rest = re.sub(DECODER, "", tensor.name, count=1)
    if rest.startswith("shared") or _one_number(tensor):
        return False
    if NAMED.search(rest) or APART.match(rest):
        return NAMED.search(rest) is not None
    return num_experts in tensor.shape or GATE.search(rest) is not None


def _one_number(tensor: StoredTensor) -> bool:
    """It holds a single number, so nothing for each expert; packed integers may be more than one."""
    return prod(tensor.shape) == 1 and "F" in tensor.dtype and BITS[tensor.dtype] >= 16


def _outside_of_layers(tensor: StoredTensor, orders: Mapping[int, NDArray[np.int32]]) -> bool:
    """Of all layers at once: named after routers or experts, with E in its shape, and in no layer."""
    if not orders or "layers." in tensor.name or re.match(DECODER, tensor.name):
        return False
    return len(next(iter(orders.values()))) in tensor.shape and NAMED.search(tensor.name) is not None


def _listed(tensors: list[StoredTensor]) -> str:
    names = [f"{t.name!r} ({t.dtype} {list(t.shape)})" for t in tensors[:MAX_NAMED]]
    more = len(tensors) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
