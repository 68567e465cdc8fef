"""Megatron-LM and DeepSpeed-MoE: placements as an order of experts, and state dicts and files put in that order.

Both give rank r of an expert-parallel group the r-th block of E/D experts. A placement is then an order of experts,
with the router's rows in the same order. Names as Megatron core and DeepSpeed write them:

==========  ===========================================================  =====================================
framework   one expert                                                   router
==========  ===========================================================  =====================================
megatron    ``mlp.experts.local_experts.N.linear_fc1|2.*`` (one by one)  ``mlp.router.weight``, ``bias``,
            ``mlp.experts.linear_fc1|2.weightN``, ``biasN`` (grouped)    ``expert_bias``
deepspeed   ``deepspeed_moe.experts.deepspeed_experts.N.*``              ``deepspeed_moe.gate.wg.weight``
==========  ===========================================================  =====================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from poise.engines.checkpoints.permutation import permutation
from poise.planning.placement import Placement
from poise.util.errors import ModelError, OptionError, PlacementError
from poise.util.files import write_whole

Framework = Literal["megatron", "deepspeed"]
FRAMEWORKS: tuple[Framework, ...] = ("megatron", "deepspeed")
FORMAT, VERSION = "poise-expert-order", 1
T = TypeVar("T")

NUMBER = r"(?P<expert>0|[1-9][0-9]{0,4})"
EXPERTS = (
    re.compile(rf"(?P<head>(?P<owner>.*\bmlp\.)experts\.local_experts\.){NUMBER}(?P<tail>\..+)"),
    re.compile(rf"(?P<head>(?P<owner>.*\bmlp\.)experts\.linear_fc[12]\.(?:weight|bias)){NUMBER}(?P<tail>)"),
    re.compile(rf"(?P<head>(?P<owner>.*\bdeepspeed_moe\.)experts\.deepspeed_experts\.){NUMBER}(?P<tail>\..+)"),
)
ROUTERS = re.compile(
    r"(?P<owner>.*\bmlp\.)router\.(?:weight|bias|expert_bias)|(?P<deep>.*\bdeepspeed_moe\.)gate\.wg\.(?:weight|bias)"
)
UNKNOWN = re.compile(r".*\b(?:mlp\.(?:experts|router)|deepspeed_moe\.(?:experts|gate))\..*")
EXPERT_FILE = re.compile(
    r"(?P<head>layer_(?P<layer>[0-9]{1,5})_expert_)(?P<expert>[0-9]{1,5})(?P<tail>_mp_rank_[0-9]+_model_states\.pt)"
)


def write_order(
    placement: Placement, path: str | Path, *, framework: Framework = "megatron", num_groups: int = 1
) -> None:
    """Write the order of experts of every layer, as JSON.

    ``{"format": "poise-expert-order", "version": 1, "framework", "num_experts", "ep_size", "experts_per_rank",
    "layers": {decoder layer: [old expert of each new id]}}``.

    Parameters
    ----------
    placement : as many experts on every device, no replicas.
    path : file to write.
    framework : ``megatron`` or ``deepspeed``; the order is the same.
    num_groups : groups that the router picks from first (Megatron's ``--moe-router-num-groups``), 1 if none.

    Raises
    ------
    PlacementError : as :func:`poise.engines.checkpoints.permutation.permutation`. OptionError : another framework.
    """
    if framework not in FRAMEWORKS:
        raise OptionError(f"unknown framework {framework!r}", hint=f"one of {', '.join(FRAMEWORKS)}")
    order_LE = permutation(placement, num_groups=num_groups)
    layers = {str(layer): order.tolist() for layer, order in zip(placement.layer_ids_L, order_LE, strict=True)}
    data = {
        "format": FORMAT, "version": VERSION, "framework": framework, "num_experts": placement.num_experts,
        "ep_size": placement.num_devices, "experts_per_rank": placement.num_experts // placement.num_devices,
        "layers": layers,
    }  # fmt: skip
    write_whole(path, json.dumps(data), PlacementError)


def _order(order_E: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    order = np.asarray(order_E)
    if order.ndim != 1 or order.dtype.kind not in "iu" or not np.array_equal(np.sort(order), np.arange(order.size)):
        raise PlacementError(f"an order lists each of its {order.size} experts once, got {order.tolist()!r:.80}")
    return order.astype(np.int64)


def apply_order_to_state(
    state: Mapping[str, T], order_E: Sequence[int] | NDArray[Any], *, whole: bool = True
) -> dict[str, T]:
    """One MoE layer's state dict with its experts in a new order: experts get other names, the router other rows.

    Parameters
    ----------
    state : name -> tensor (NumPy or PyTorch), under *global* expert ids; what is neither expert nor router stays.
        Experts' arrays are not copied.
    order_E : [E], old expert of each new id: a row of what :func:`write_order` wrote.
    whole : the router and all experts are there; False: some may be missing, as in a file of one DeepSpeed expert.

    Raises
    ------
    ModelError : experts of two modules; an expert beyond E; experts or router missing (a rank's own state dict has
        local ids: merge the ranks first); or a tensor of which it is not known whether it follows the experts' ids.
    PlacementError : the order is no permutation.
    """
    order = _order(order_E)
    place = np.argsort(order)
    out: dict[str, T] = {}
    owners: set[str] = set()
    seen: set[int] = set()
    router = False
    for name, value in state.items():
        if found := next((match for pattern in EXPERTS if (match := pattern.fullmatch(name))), None):
            expert = int(found["expert"])
            if expert >= order.size:
                raise ModelError(f"{name!r}: the order has {order.size} experts")
            seen.add(expert)
            owners.add(found["owner"])
            out[f"{found['head']}{place[expert]}{found['tail']}"] = value
        elif found := ROUTERS.fullmatch(name):
            out[name] = _rows(name, value, order)
            owners.add(found["owner"] or found["deep"])
            router = router or name.endswith("weight")
        elif UNKNOWN.fullmatch(name):
            raise ModelError(
                f"it is not known whether {name!r} follows the ids of experts",
                hint="leave FP8 state (_extra_state) out, it is built anew; unpack fused experts into one a name",
            )
        else:
            out[name] = value
    if len(owners) > 1:
        raise ModelError(f"experts of {len(owners)} modules: {sorted(owners)[0]!r} and {sorted(owners)[1]!r}",
                         hint="give the tensors of one layer at a time")  # fmt: skip
    if whole and (len(seen) < order.size or not router):
        raise ModelError(
            f"{len(seen)} of {order.size} experts and {'a' if router else 'no'} router are in the state dict",
            hint="a rank's own has local ids: merge the ranks' under global ids; whole=False for a file of one expert",
        )
    return out


def _rows(name: str, value: Any, order: NDArray[np.int64]) -> Any:
    if not getattr(value, "shape", ()) or value.shape[0] != order.size:
        raise ModelError(f"{name!r} has the shape {tuple(getattr(value, 'shape', ()))} for {order.size} experts")
    return value[order.tolist()]


def rename_deepspeed_files(names: Iterable[str], orders: Sequence[Sequence[int] | NDArray[Any]]) -> dict[str, str]:
    """New name of each expert file of a DeepSpeed checkpoint, ``layer_X_expert_Y_mp_rank_ZZ_model_states.pt``.

    Names form circles: write the new files into another folder. The keys inside carry the expert's id too: put each
    file's state dict through :func:`apply_order_to_state` with ``whole=False``, and so, a layer at a time, that of
    ``mp_rank_ZZ_model_states.pt``, which holds the routers.

    Parameters
    ----------
    names : files of the checkpoint; others than those of experts are left out.
    orders : order of each MoE layer; DeepSpeed counts MoE layers from 0, whatever decoder layer they are.

    Raises
    ------
    ModelError : layers or experts beyond the orders, or a layer lacks files of experts.
    PlacementError : an order is no permutation.
    """
    checked = [_order(order) for order in orders]
    out: dict[str, str] = {}
    seen: dict[tuple[int, str], set[int]] = {}
    for name in names:
        found = EXPERT_FILE.fullmatch(name)
        if found is None:
            continue
        layer, expert = int(found["layer"]), int(found["expert"])
        if layer >= len(checked) or expert >= checked[layer].size:
            raise ModelError(
                f"{name}: there are orders for {len(checked)} layers of {checked[0].size if checked else 0}"
            )
        seen.setdefault((layer, found["tail"]), set()).add(expert)
        place = int(np.flatnonzero(checked[layer] == expert)[0])
        out[name] = f"{found['head']}{place}{found['tail']}"
    for (layer, tail), experts in seen.items():
        if len(experts) < checked[layer].size:
            raise ModelError(f"layer {layer} has files of {len(experts)} of {checked[layer].size} experts (*{tail})")
    return out
