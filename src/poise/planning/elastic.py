"""Placements for another number of devices: which rank of the old one is which of the new one.

Ranks keep their numbers unless told otherwise (:class:`RankMap`). Those that stay, join and leave are devices of one
:class:`Frame`: the old placement has no slots on those that join, the new one none on those that leave. So going from
one to the other is a change of placement like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.util.errors import OptionError

GONE = -1


@dataclass(frozen=True, slots=True, eq=False)
class RankMap:
    """Which rank of an old placement is which one of a new placement.

    Parameters
    ----------
    new_O : int64 [D_old], number of each old rank in the new placement; -1: it leaves.
    num_new : D_new, ranks of the new placement; those that no old one becomes join.
    """

    new_O: NDArray[np.int64]
    num_new: int

    @classmethod
    def keep(cls, num_old: int, num_new: int) -> RankMap:
        """Every rank keeps its number: growth adds ranks at the end, shrinking drops the last ones."""
        return cls(np.where(np.arange(num_old) < num_new, np.arange(num_old), GONE), num_new)

    @classmethod
    def parse(cls, text: str | None, num_old: int, num_new: int) -> RankMap:
        """``OLD:NEW`` of all ranks that stay, ``"0:0,1:1,3:2"``, or ranges, ``"0-1:0-1,3:2"``; None: :meth:`keep`.

        Raises
        ------
        OptionError : the text is something else, a rank is out of range, or is named twice.
        """
        if text is None:
            return cls.keep(num_old, num_new)
        new_O = np.full(num_old, GONE, np.int64)
        for item in text.split(","):
            olds, news = _pair(item)
            if len(olds) != len(news):
                raise OptionError(f"ranks {item.strip()!r}: {len(olds)} old ranks and {len(news)} new ones")
            if olds.stop > num_old or news.stop > num_new:
                raise OptionError(
                    f"ranks {item.strip()!r}: the old placement has {num_old} ranks, the new one {num_new}",
                    hint="OLD:NEW, both counted from 0",
                )
            for old, new in zip(olds, news, strict=True):
                if new_O[old] != GONE or new in new_O:
                    raise OptionError(f"ranks {text!r} name old rank {old} or new rank {new} twice")
                new_O[old] = new
        return cls(new_O, num_new)

    @property
    def leave(self) -> list[int]:
        """Old ranks that leave."""
        return [int(rank) for rank in np.flatnonzero(self.new_O == GONE)]

    @property
    def join(self) -> list[int]:
        """New ranks that join."""
        return np.setdiff1d(np.arange(self.num_new), self.new_O).tolist()

    @property
    def stay(self) -> list[int]:
        """New ranks that were there before."""
        return np.intersect1d(np.arange(self.num_new), self.new_O).tolist()

    def frame(self, cluster: Cluster | None = None) -> Frame:
        """All ranks as devices of one machine.

        A cluster of D_new devices is taken to be the new ranks; those that leave are then on further nodes. Where no
        rank joins, a cluster of D_old devices is the old ranks. Without a cluster new ranks come first, then those that
        leave.

        Raises
        ------
        OptionError : the cluster has another number of devices.
        """
        old, new, leave = len(self.new_O), self.num_new, len(self.leave)
        if cluster is None or cluster.num_devices == new:
            old_F = np.full(new + leave, GONE, np.int64)
            old_F[self.new_O[self.new_O != GONE]] = np.flatnonzero(self.new_O != GONE)
            old_F[new:] = self.leave
            new_F = np.concatenate([np.arange(new), np.full(leave, GONE)])
            if cluster is None or not leave:
                return Frame(old_F, new_F, cluster)
            return Frame(old_F, new_F, _with_leaving(cluster, leave), assumed=True)
        if cluster.num_devices != old or self.join:
            sizes = f"{new}" if self.join or old == new else f"{new} or, with those that leave, {old}"
            raise OptionError(f"the cluster has {cluster.num_devices} devices, the placements need {sizes}")
        return Frame(np.arange(old), self.new_O, cluster)

    def number(self, old: Placement) -> Placement:
        """The old placement in new numbers; ranks that leave come last, with numbers from D_new on."""
        moved = self.frame().before(old)
        return moved if self.leave else moved.on_devices(int(self.new_O.max()) + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Devices of one machine on which both placements lie.

    Parameters
    ----------
    old_F, new_F : int64 [F], number of each device in the old and in the new placement; -1: it joins, it leaves.
    cluster : the machine of F devices, or None.
    assumed : the cluster that was given lacks the devices that leave; they were put on further nodes.
    """

    old_F: NDArray[np.int64]
    new_F: NDArray[np.int64]
    cluster: Cluster | None
    assumed: bool = False

    def before(self, old: Placement) -> Placement:
        """The old placement on F devices."""
        return _renumbered(old, self.old_F)

    def after(self, new: Placement) -> Placement:
        """The new placement on F devices."""
        return _renumbered(new, self.new_F)


def _pair(item: str) -> tuple[range, range]:
    match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?:(\d{1,6})(?:-(\d{1,6}))?\s*", item)
    if not match:
        raise OptionError(f"ranks {item.strip()!r}: OLD:NEW is wanted", hint="as in 0:0,1:1,3:2 or 0-1:0-1,3:2")
    first, last, to, to_last = match.groups()
    return range(int(first), int(last or first) + 1), range(int(to), int(to_last or to) + 1)


def _with_leaving(cluster: Cluster, leave: int) -> Cluster:
    """A cluster with so many devices more, on further nodes of the size of its last."""
    more = cluster.num_nodes + np.arange(leave) // int(cluster.devices_per_node_N[-1])
    return replace(cluster, node_D=np.concatenate([cluster.node_D, more.astype(np.int32)]),
                   speed_D=np.concatenate([cluster.speed_D, np.ones(leave)]))  # fmt: skip


def _renumbered(placement: Placement, number_F: NDArray[np.int64]) -> Placement:
    """A placement on F devices, device f of which has its number in ``number_F``; -1: it has no slot."""
    place_D = np.zeros(placement.num_devices, np.int64)
    place_D[number_F[number_F != GONE]] = np.flatnonzero(number_F != GONE)
    order = np.argsort(place_D[placement.slot_device_S], kind="stable")
    return replace(placement, slot_expert_LS=placement.slot_expert_LS[:, order], num_devices=len(number_F),
                   slot_device_S=place_D[placement.slot_device_S][order].astype(np.int32))  # fmt: skip
