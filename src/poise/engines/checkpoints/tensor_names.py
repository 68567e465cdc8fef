"""Which tensors of a Hugging Face checkpoint follow the ids of experts, by their names.

===================  ==========================================================================================
experts, one by one  ``mlp.experts.N.gate_proj.weight``, ``block_sparse_moe.experts.N.w1.weight``, with any suffix
                     (scales, quantised weights): they change their name
experts, fused       ``mlp.experts.gate_up_proj`` and ``down_proj`` with ``_bias``, ``_blocks``, ``_scales``, ...;
                     granite's ``block_sparse_moe.input_linear.weight``: [E, ...], blocks change places
router               ``gate.weight``, ``router.weight``, ``router.layer.weight``, their biases,
                     ``e_score_correction_bias``, ``expert_bias``: [E, ...], rows change places
left alone           shared experts and their gate, and all that is outside of the layer's MoE module
===================  ==========================================================================================

Anything else in an MoE module that may depend on ids is refused: a tensor beside the experts or the router, one with
E in its shape, one of integers (DeepSeek-V4's ``tid2eid`` holds expert ids).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poise.engines.shards import BITS, StoredTensor
from poise.errors import ModelError

NUMBER = r"(?:0|[1-9][0-9]{0,4})"
DECODER = rf"(?:(?:model|language_model|transformer|backbone|text_model)\.)*layers\.(?P<layer>{NUMBER})\."
MODULE = rf"(?P<path>{DECODER}(?!shared)\w+)\."
EXPERT = re.compile(rf"{MODULE}experts\.(?P<expert>{NUMBER})\.(?P<rest>.+)")
FUSED = re.compile(
    rf"{MODULE}(?:experts\.(?:(?:gate_up|gate|up|down)_proj|w[123]|w13)(?![a-z0-9])[\w.]*"
    r"|(?<=\.block_sparse_moe\.)(?:input|output)_linear\.weight)"
)
ROUTER = re.compile(
    r"(?:gate|router)\.(?:(?:layer|classifier|gate|wg)\.)?(?:weight|bias|e_score_correction_bias|expert_bias)"
    r"|(?:experts\.)?e_score_correction_bias|expert_bias"
)
ROUTER_WEIGHT = re.compile(r"(?:gate|router)\.(?:(?:layer|classifier|gate|wg)\.)?weight")
MENTION = re.compile(rf"(?P<path>(?<![\w.])(?:\w+\.)*layers\.(?P<layer>{NUMBER})\.\w+)\.experts\.(?P<expert>{NUMBER})")
IDS = {"I16", "U16", "I32", "U32", "I64", "U64"}


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
    ModelError : a layer has no experts or no router, lacks experts or has more than E, or holds a tensor of which it
        is not known whether it follows the ids.
    """
    tensors = tuple(tensors)
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
    missing = sorted(set(orders) - set(layers))
    if missing:
        have = f"{len(layers)} layers from {min(layers)} to {max(layers)} have" if layers else "no layer has any"
        raise ModelError(
            f"layer {missing[0]} is in the placement and has no experts in the checkpoint; {have}",
            hint="is the placement of this model, and are the expert tensors named as in Hugging Face checkpoints?",
        )
    changes = Changes({}, {}, paths)
    owners = {f"{layers[layer]}.": layer for layer in orders}
    places = {layer: np.argsort(order) for layer, order in orders.items()}
    seen: dict[int, set[int]] = {layer: set() for layer in orders}
    routers = set()
    owner = re.compile(rf"{DECODER}\w+\.")
    for tensor in tensors:
        found = owner.match(tensor.name)
        if found is None or found[0] not in owners:
            continue
        layer, rest = owners[found[0]], tensor.name[found.end() :]
        order = orders[layer]
        if single := EXPERT.fullmatch(tensor.name):
            old = int(single["expert"])
            if old >= len(order):
                raise ModelError(f"{tensor.name!r}: the placement has {len(order)} experts")
            seen[layer].add(old)
            changes.names[tensor.name] = f"{found[0]}experts.{places[layer][old]}.{single['rest']}"
            continue
        fused, router = FUSED.fullmatch(tensor.name), ROUTER.fullmatch(rest)
        if fused or router:
            changes.rows[tensor.name] = _rows(tensor, order)
            if fused:
                seen[layer].update(range(len(order)))
            elif ROUTER_WEIGHT.fullmatch(rest):
                routers.add(layer)
        elif _may_follow(tensor, rest, len(order)):
            raise ModelError(
                f"it is not known whether {tensor.name!r} ({tensor.dtype} {list(tensor.shape)}) follows the ids of "
                f"{len(order)} experts",
                hint="this kind of checkpoint cannot be relabelled; export a map for the engine instead",
            )
    for layer, order in orders.items():
        if len(seen[layer]) < len(order):
            lacking = min(set(range(len(order))) - seen[layer])
            raise ModelError(f"layer {layer} has {len(seen[layer])} of {len(order)} experts, {lacking} is missing")
        if layer not in routers:
            raise ModelError(f"layer {layer} has experts under {layers[layer]!r} and no router's weight beside them")
    return changes


def _rows(tensor: StoredTensor, order: NDArray[np.int32]) -> NDArray[np.int32]:
    if not tensor.shape or tensor.shape[0] != len(order):
        raise ModelError(
            f"{tensor.name!r} has the shape {list(tensor.shape)}, it should begin with {len(order)} experts",
            hint="is the placement of this model?",
        )
    if (tensor.end - tensor.begin) % len(order) or (BITS[tensor.dtype] % 8 and tensor.shape[-1] % 8):
        raise ModelError(
            f"{tensor.name!r}: one expert of {tensor.dtype} {list(tensor.shape)} is no whole number of bytes"
        )
    return order


def _may_follow(tensor: StoredTensor, rest: str, num_experts: int) -> bool:
    if rest.startswith("shared"):
        return False
    beside = rest.startswith(("experts.", "gate.", "router."))
    return beside or num_experts in tensor.shape or tensor.dtype in IDS or "tid2eid" in rest
