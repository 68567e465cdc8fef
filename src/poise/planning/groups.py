"""Routing groups kept whole: of blocks of E / G experts a router picks a few before it picks experts (DeepSeek).

A group is *whole* where all slots of all its experts lie in one *place*:

``nodes``  a place is a node. A token then reaches no more nodes than it has groups, whichever experts it takes.
``ids``    a place is a device, or a run of D / G devices. Only so can a placement be new expert ids: the router picks
           among blocks of ids, and engines that know no map put the d-th block on rank d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from poise.util.errors import OptionError

Where = Literal["nodes", "ids"]
Keep = Literal["nodes", "ids", "pays"]
KEEP: tuple[Keep, ...] = ("nodes", "ids", "pays")
"""``pays``: on nodes, in the layers where the modelled time is less so."""


@dataclass(frozen=True, slots=True, eq=False)
class WholeGroups:
    """What lies together, and where.

    Parameters
    ----------
    num_experts, num_groups : E and G, which divides it; group g has the ids g * E/G to (g + 1) * E/G - 1.
    place_D : int64 [D], place of each device, ascending from 0 without gaps.
    where : what a place is.
    must : whether a plan has to; else it may, where that is faster.

    Raises
    ------
    OptionError : there are no groups, or G does not divide E.
    """

    num_experts: int
    num_groups: int
    place_D: NDArray[np.int64]
    where: Where
    must: bool = True

    def __post_init__(self) -> None:
        if self.num_groups < 2:
            raise OptionError(
                f"{self.num_groups} routing group of {self.num_experts} experts: there is nothing to keep whole",
                hint="name a model whose router picks groups first: --model deepseek-v3",
            )
        if self.num_experts % self.num_groups:
            raise OptionError(f"{self.num_experts} experts cannot be {self.num_groups} equal routing groups")

    @classmethod
    def on_nodes(
        cls, num_experts: int, num_groups: int, node_D: NDArray[np.int32], *, must: bool = True
    ) -> WholeGroups:
        """Places are nodes."""
        return cls(num_experts, num_groups, node_D.astype(np.int64), "nodes", must)

    @classmethod
    def in_ids(cls, num_experts: int, num_groups: int, num_devices: int) -> WholeGroups:
        """Places are devices, or runs of devices that share a group.

        Raises
        ------
        OptionError : besides, devices and groups do not line up.
        """
        run = max(1, num_devices // num_groups)
        out = cls(num_experts, num_groups, np.arange(num_devices) // run, "ids")
        if num_groups % num_devices and num_devices % num_groups:
            raise OptionError(
                f"devices of {num_experts // num_devices} experts and routing groups of {out.size} do not line up",
                hint=f"plan for a number of devices that divides {num_groups} or is a multiple of it",
            )
        return out

    @property
    def size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.num_groups

    @property
    def group_E(self) -> NDArray[np.int64]:
        """Group of each expert."""
        return np.arange(self.num_experts) // self.size

    @property
    def num_places(self) -> int:
        """P."""
        return int(self.place_D[-1]) + 1

    def room(self, slots_D: NDArray[np.int64], *, filled: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Least and most groups of each place, int64 [P] each, with slots int [D].

        Parameters
        ----------
        filled : no slot may stay empty and no expert lies twice on a device, so that a place needs as many experts as
            its device with most slots.

        Raises
        ------
        OptionError : the groups cannot lie whole in these slots.
        """
        slots_D = np.minimum(slots_D, self.num_experts)
        places, a = self.num_places, "node" if self.where == "nodes" else "block of ids"
        most_P = np.bincount(self.place_D, weights=slots_D, minlength=places).astype(np.int64) // self.size
        widest_P = np.zeros(places, np.int64)
        np.maximum.at(widest_P, self.place_D, slots_D)
        least_P = -(-widest_P // self.size) * filled
        about = f"{self.num_groups} routing groups of {self.size} experts"
        if most_P.sum() < self.num_groups:
            even = -(-self.num_groups // places) * self.size * places - self.num_experts
            raise OptionError(
                f"{about} cannot lie whole on {places} {a}s with {int(slots_D.sum())} slots: those have room for "
                f"{_listed(most_P)}, {most_P.sum()} in all",
                hint=f"give a number of {a}s that divides {self.num_groups}, or {even} redundant slots",
            )
        if least_P.sum() > self.num_groups or (least_P > most_P).any():
            p = int(np.argmax(least_P - most_P))
            why = (
                f"{a} {p} has a device of {widest_P[p]} slots, which only {least_P[p]} groups fill, and room for "
                f"{most_P[p]}" if least_P[p] > most_P[p]
                else f"each of {places} {a}s needs {_listed(least_P)} to fill its slots, {least_P.sum()} in all"
            )  # fmt: skip
            raise OptionError(
                f"{about} cannot lie whole where every slot is filled: {why}",
                hint="give fewer slots or fewer nodes, or --engine none, which lets slots be empty",
            )
        return least_P, np.minimum(most_P, self.num_groups)

    def fits(self, slots_D: NDArray[np.int64], *, filled: bool) -> bool:
        """Whether :meth:`room` has no error."""
        try:
            self.room(slots_D, filled=filled)
        except OptionError:
            return False
        return True

    def slots_LGP(self, count_LED: NDArray[Any]) -> NDArray[np.int64]:
        """Slots of each group in each place, int64 [L, G, P], of slots int [L, E, D]."""
        slots_LGD = (count_LED > 0).reshape(len(count_LED), self.num_groups, self.size, -1).sum(axis=2)
        starts = np.flatnonzero(np.diff(self.place_D, prepend=-1))
        return np.add.reduceat(slots_LGD, starts, axis=2).astype(np.int64)

    def torn_LG(self, count_LED: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Groups that lie in several places, bool [L, G], of slots int [L, E, D]."""
        out: NDArray[np.bool_] = (self.slots_LGP(count_LED) > 0).sum(axis=2) > 1
        return out

    def place_LE(self, count_LED: NDArray[np.int32]) -> NDArray[np.int64]:
        """Place of each expert, int64 [L, E], of a placement with groups whole."""
        return np.repeat(self.slots_LGP(count_LED).argmax(axis=2), self.size, axis=1)


def groups_of(
    keep: Keep | None, num_experts: int, num_groups: int, node_D: NDArray[np.int32]
) -> WholeGroups | None:  # fmt: skip
    """What a word of :data:`KEEP` asks for, None of none.

    Raises
    ------
    OptionError : an unknown word, or groups that cannot be kept so.
    """
    if keep is None:
        return None
    if keep not in KEEP:
        raise OptionError(f"unknown way {keep!r} to keep groups", hint=f"one of {', '.join(KEEP)}")
    if keep == "ids":
        return WholeGroups.in_ids(num_experts, num_groups, len(node_D))
    return WholeGroups.on_nodes(num_experts, num_groups, node_D, must=keep == "nodes")


def _listed(count_P: NDArray[np.int64]) -> str:
    """``2 each``, or the counts of the first eight."""
    if (count_P == count_P[0]).all():
        return f"{count_P[0]} each"
    return ", ".join(str(count) for count in count_P[:8].tolist()) + (", ..." if len(count_P) > 8 else "")


def gathered(
    count_LED: NDArray[np.int32], whole: WholeGroups, slots_D: NDArray[np.int64], *, filled: bool,
    load_LE: NDArray[np.float64] | None = None,
) -> NDArray[np.int32]:  # fmt: skip
    """The nearest placement with groups whole, int32 [L, E, D] of 0 and 1: as many slots as can stay where they are.

    Which group lies where is an assignment problem, solved exactly. Experts without a slot there take free ones, the
    heaviest first, each on the device with least load; where none is free, replicas give way, those with least load
    first. Layers whose groups are whole stay as they are.

    Parameters
    ----------
    count_LED : int [L, E, D], a placement that fits ``slots_D``.
    filled : as :meth:`WholeGroups.room`, whose errors this has.
    load_LE : float64 [L, E]; without it all count alike.
    """
    least_P, most_P = whole.room(slots_D, filled=filled)
    held_LED = count_LED > 0
    load_LE = np.zeros(held_LED.shape[:2]) if load_LE is None else load_LE
    slots_LGP = whole.slots_LGP(count_LED)
    here_LGP = slots_LGP > 0
    change_L = (here_LGP.sum(axis=2) > 1).any(axis=1) | (here_LGP.sum(axis=1) < least_P).any(axis=1)
    for layer in np.flatnonzero(change_L):
        goal_G = _goals(slots_LGP[layer], least_P, most_P)
        _gather(held_LED[layer], goal_G[whole.group_E], whole.place_D, slots_D, load_LE[layer])
    return held_LED.astype(np.int32)


def _goals(
    slots_GP: NDArray[np.int64], least_P: NDArray[np.int64], most_P: NDArray[np.int64]
) -> NDArray[np.int64]:  # fmt: skip
    """Place of each group, int64 [G], that keeps most slots."""
    place_C = np.repeat(np.arange(len(most_P)), most_P)
    rank_C = np.concatenate([np.arange(most) for most in most_P])
    bonus_C = (rank_C < least_P[place_C]) * (slots_GP.sum() + 1)  # each place has its least first
    _, column_G = linear_sum_assignment(slots_GP[:, place_C] + bonus_C, maximize=True)
    out: NDArray[np.int64] = place_C[column_G]
    return out


def _gather(
    held_ED: NDArray[np.bool_], goal_E: NDArray[np.int64], place_D: NDArray[np.int64], slots_D: NDArray[np.int64],
    load_E: NDArray[np.float64],
) -> None:  # fmt: skip
    """One layer, in place."""
    held_ED &= goal_E[:, None] == place_D[None, :]
    for p in range(int(place_D[-1]) + 1):
        devices = np.flatnonzero(place_D == p)
        experts = np.flatnonzero(goal_E == p)
        stray = experts[~held_ED[experts].any(axis=1)]
        free_D = slots_D[devices] - held_ED[:, devices].sum(axis=0)
        while free_D.sum() < len(stray):
            copies_E = held_ED.sum(axis=1)
            able = experts[copies_E[experts] > 1]
            e = able[np.argmin(load_E[able] / copies_E[able])]
            d = int(np.argmax(held_ED[e, devices]))
            held_ED[e, devices[d]] = False
            free_D[d] += 1
        for e in stray[np.argsort(-load_E[stray], kind="stable")]:
            each_E = load_E / np.maximum(held_ED.sum(axis=1), 1)
            level_D = (held_ED[:, devices] * each_E[:, None]).sum(axis=0)
            d = int(np.argmin(np.where(free_D > 0, level_D, np.inf)))
            held_ED[e, devices[d]] = True
            free_D[d] -= 1
