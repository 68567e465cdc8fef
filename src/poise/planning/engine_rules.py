"""What engines can hold: the constraint under which a map is planned, priced and exported, so that all three are one.

Released engines know no empty slot: what a plan leaves empty they fill, and then run another map than the one that was
priced. So by default every plan fills its slots (:func:`hold`, and with traffic at hand
:func:`poise.planning.solve.complete.complete`), no expert lies twice on a device, and a named engine also asks for as
many slots on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from poise.planning.placement import EMPTY, Placement
from poise.util.errors import OptionError, PlacementError
from poise.util.words import close_to

if TYPE_CHECKING:  # it compiles, and a plugin with a static map does not
    from poise.cost.split import Split


@dataclass(frozen=True, slots=True)
class EngineRules:
    """One engine's constraint.

    Parameters
    ----------
    name : as in ``--engine``.
    empty_slots : slots may stay empty, and an expert may lie twice on a device.
    equal_slots : every rank has as many slots.
    replicas : an expert may have more than one slot.
    splits : how the engine can split an expert's tokens over its replicas, its default first; none: as asked.
    ids : a placement is new expert ids, so that a model's routing groups must stay whole.
    kernels : whose measured expert kernels price its plans (:data:`poise.machine.constants.ENGINES`); None: any's.
    caveats : what of the engine is priced otherwise than it runs, one sentence for a split.
    """

    name: str
    empty_slots: bool = False
    equal_slots: bool = True
    replicas: bool = True
    ids: bool = False
    splits: tuple[Split, ...] = ("even",)
    kernels: str | None = None
    caveats: tuple[tuple[Split, str], ...] = ()

    def check_slots(self, slots_D: NDArray[np.int64], num_experts: int) -> None:
        """Raise OptionError unless the engine can have so many slots a device, int [D], for ``num_experts``."""
        total, devices = int(slots_D.sum()), len(slots_D)
        if self.equal_slots and (slots_D != slots_D[0]).any():
            raise OptionError(
                f"{self.name} needs as many slots on every rank: {total} slots on {devices} ranks were given as "
                f"{slots_D.min()} to {slots_D.max()}",
                hint=f"choose --redundant so that {num_experts} + R is a multiple of {devices}"
                if total % devices
                else f"{total // devices} a rank",
            )
        if self.equal_slots and slots_D[0] > num_experts:
            raise OptionError(f"{slots_D[0]} slots a rank for {num_experts} experts: some would lie there twice")
        if not self.replicas and total != num_experts:
            raise OptionError(
                f"{self.name} holds every expert once, {total} slots were given for {num_experts} experts",
                hint="use --redundant 0",
            )

    def choose_split(self, asked: Split | None) -> Split:
        """The split that is priced: the one asked for if the engine does it, else the engine's.

        Raises
        ------
        OptionError : the engine splits otherwise.
        """
        if asked is not None and self.splits and asked not in self.splits:
            raise OptionError(
                f"{self.name} splits tokens over replicas {' or '.join(self.splits)}, --split asks for {asked}",
                hint="--engine any or none prices a runtime that can",
            )
        return asked or (*self.splits, "even")[0]

    def caveat(self, split: Split) -> str:
        """What of the engine is priced otherwise than it runs under a split, one sentence, or ``""``."""
        return dict(self.caveats).get(split, "")

    def check(self, placement: Placement, slots_D: NDArray[np.int64]) -> None:
        """Raise PlacementError unless the engine can hold the placement in slots of int [D]."""
        if self.empty_slots:
            return
        held, room_D = placement.entries(), np.minimum(slots_D, placement.num_experts)
        used_LD = held.used_LD(different=True)
        wrong_LD = (used_LD != room_D) | (used_LD != held.used_LD())
        if wrong_LD.any():
            layer, device = (int(x) for x in np.argwhere(wrong_LD)[0])
            raise PlacementError(
                f"layer {placement.layer_ids_L[layer]}: device {device} has {room_D[device]} slots and "
                f"{used_LD[layer, device]} different experts",
                hint=f"{self.name} knows no empty slot",
            )


ANY = EngineRules("any", equal_slots=False, splits=())
NONE = EngineRules("none", empty_slots=True, equal_slots=False, splits=())
ENGINES: dict[str, EngineRules] = {
    rules.name: rules
    for rules in (
        ANY,
        EngineRules(
            "sglang",
            splits=("even", "near"),
            kernels="sglang",
            caveats=(
                (
                    "even",
                    "sglang: even is how it splits tokens without an all-to-all backend; with one, dynamic and "
                    "static dispatch prefer replicas of the own rank and node: --split near",
                ),
                (
                    "near",
                    "sglang: of several replicas in a node, where other nodes hold some too, it takes the first "
                    "for all ranks of the node; priced is an even share of each",
                ),
            ),
        ),
        EngineRules("vllm", kernels="vllm"),
        EngineRules("tensorrt-llm", kernels="trtllm"),
        EngineRules("vllm-ascend"),
        EngineRules("megatron", replicas=False, ids=True),
        EngineRules("deepspeed", replicas=False, ids=True),
        EngineRules("checkpoint", replicas=False, ids=True),
        NONE,
    )
}


def parse_engine(name: str) -> EngineRules:
    """The rules of an engine by its name.

    Raises
    ------
    OptionError : unknown name.
    """
    if name not in ENGINES:
        raise OptionError(f"unknown engine {name!r}", hint=close_to(name, ENGINES))
    return ENGINES[name]


def fill_table(
    placement: Placement, price_LE: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Expert of each slot, int32 [L, S], without empty slots, and the layer and slot of those filled, int64 [n, 2].

    Each empty slot gets the expert with the lowest price, then the fewest replicas, that its device lacks; only where
    the device holds every expert, one of those.

    Parameters
    ----------
    placement : any placement.
    price_LE : [L, E], what one more slot of an expert costs; default: the replicas it has.
    """
    out = placement.slot_expert_LS.copy()
    empty = np.argwhere(out == EMPTY)
    replicas = placement.replicas_LE()
    for layer, slot in empty.tolist():
        held = np.zeros(placement.num_experts, bool)
        here = out[layer, placement.slot_device_S == placement.slot_device_S[slot]]
        held[here[here != EMPTY]] = True
        price_E = replicas[layer] if price_LE is None else price_LE[layer]
        expert = int(np.lexsort((replicas[layer], price_E, held))[0])
        out[layer, slot] = expert
        replicas[layer, expert] += 1
    return out, empty


def hold(placement: Placement, rules: EngineRules) -> tuple[Placement, int]:
    """The placement as the engine will run it, and how many empty slots that fills.

    Without traffic: what ``poise export`` does to a file, and so what ``poise compare`` prices of one. An expert that
    a file has twice on a device stays so, as the engine runs it so.
    """
    if rules.empty_slots:
        return placement, 0
    table, empty = fill_table(placement)
    if not len(empty):
        return placement, 0
    return replace(placement, slot_expert_LS=table), len(empty)
