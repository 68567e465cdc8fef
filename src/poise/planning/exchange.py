"""Exchanges between slots of one layer that lower the load of its fullest device, on mean loads alone.

A step of :func:`descend` looks at all exchanges that touch the fullest device: a replica there becomes one of another
expert; a replica elsewhere, or an empty slot, becomes one of an expert that lies on it; two experts of two devices
change places; one moves to an empty slot. It takes the one that lowers the sum of squared levels most per copy, among
those after which no touched device is as full as the fullest was, so sorted levels fall and it ends. An expert keeps a
holder. With ``guard``, experts that all lie in one unit (what is lost together) do not become more.

Level of a device: its load over its speed, an expert's load split evenly over its replicas.
"""

from __future__ import annotations

# ruff: noqa: NPY002 - inside compiled code numpy's global generator is numba's own, seeded in the same call
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.util.compiled import compiled

FREE = -1
"""In place of an expert: the slot is empty."""
STRICT = 1.0 - 1e-12


class SlotLayer(NamedTuple):
    """One layer on its way; kernels change all but the first four.

    Parameters
    ----------
    load_E, speed_D : float64, loads and relative speeds.
    unit_D : int64 [D], what is lost together, 0 to U - 1.
    base_ED : bool [E, D], where weights lie already: to hold an expert elsewhere takes a copy.
    held_ED : bool [E, D].
    copies_E, room_D : int64, replicas of experts, and empty slots of devices.
    level_D, delta_D : float64 [D], levels, and scratch of zeros.
    cover_EU : int64 [E, U], replicas of each expert in each unit.
    """

    load_E: NDArray[np.float64]
    speed_D: NDArray[np.float64]
    unit_D: NDArray[np.int64]
    base_ED: NDArray[np.bool_]
    held_ED: NDArray[np.bool_]
    copies_E: NDArray[np.int64]
    room_D: NDArray[np.int64]
    level_D: NDArray[np.float64]
    delta_D: NDArray[np.float64]
    cover_EU: NDArray[np.int64]


def make_layer(
    held_ED: NDArray[np.bool_], slots_D: NDArray[np.int64], load_E: NDArray[np.float64], speed_D: NDArray[np.float64],
    unit_D: NDArray[np.int64] | None = None,
) -> SlotLayer:  # fmt: skip
    """A layer as it is held; its weights lie where it is held. ``unit_D`` None: every device is one."""
    experts, devices = held_ED.shape
    units = np.arange(devices) if unit_D is None else np.asarray(unit_D, np.int64)
    cover_EU = np.zeros((experts, int(units.max()) + 1), np.int64)
    for unit in range(cover_EU.shape[1]):
        cover_EU[:, unit] = held_ED[:, units == unit].sum(axis=1)
    copies_E = held_ED.sum(axis=1).astype(np.int64)
    load, speed = np.asarray(load_E, np.float64).copy(), np.asarray(speed_D, np.float64).copy()
    level_D = (load / np.maximum(copies_E, 1)) @ held_ED / speed
    room_D = np.asarray(slots_D, np.int64) - held_ED.sum(axis=0)
    return SlotLayer(load, speed, units, held_ED.copy(), held_ED.copy(), copies_E, room_D, level_D, np.zeros(devices),
                 cover_EU)  # fmt: skip


@compiled(nogil=True)
def put(s: SlotLayer, e: int, d: int) -> None:
    """Expert e also lies on device d."""
    k = s.copies_E[e]
    for h in range(s.speed_D.size):
        if s.held_ED[e, h]:
            s.level_D[h] -= s.load_E[e] / k / (k + 1) / s.speed_D[h]
    s.held_ED[e, d] = True
    s.level_D[d] += s.load_E[e] / (k + 1) / s.speed_D[d]
    s.copies_E[e] += 1
    s.room_D[d] -= 1
    s.cover_EU[e, s.unit_D[d]] += 1


@compiled(nogil=True)
def take(s: SlotLayer, e: int, d: int) -> None:
    """Expert e lies on device d no longer."""
    k = s.copies_E[e]
    s.held_ED[e, d] = False
    s.level_D[d] -= s.load_E[e] / k / s.speed_D[d]
    if k > 1:
        for h in range(s.speed_D.size):
            if s.held_ED[e, h]:
                s.level_D[h] += s.load_E[e] / k / (k - 1) / s.speed_D[h]
    s.copies_E[e] -= 1
    s.room_D[d] += 1
    s.cover_EU[e, s.unit_D[d]] -= 1


@compiled(nogil=True)
def _in_one_unit(s, e, left, came):  # type: ignore[no-untyped-def]
    """Whether expert e lies in one unit only once a copy has left and one has come (units; -1: none)."""
    covered = 0
    for u in range(s.cover_EU.shape[1]):
        if s.cover_EU[e, u] - (u == left) + (u == came) > 0:
            covered += 1
    return covered < 2


@compiled(nogil=True)
def endangered(s: SlotLayer, e: int, e_left: int, e_came: int, f: int, f_left: int, f_came: int) -> int:
    """How many more experts lie in one unit only after an exchange of copies of e and f (FREE: of one alone)."""
    more = 0
    if e >= 0:
        more += int(_in_one_unit(s, e, e_left, e_came)) - int(_in_one_unit(s, e, -1, -1))
    if f >= 0:
        more += int(_in_one_unit(s, f, f_left, f_came)) - int(_in_one_unit(s, f, -1, -1))
    return more


@compiled(nogil=True)
def _settled(s, most):  # type: ignore[no-untyped-def]
    """Fall of the sum of squared levels by ``delta_D``, which is zeroed; -1 where a touched device reaches ``most``."""
    gain, fits = 0.0, True
    for h in range(s.speed_D.size):
        if s.delta_D[h] != 0.0:
            level = s.level_D[h] + s.delta_D[h] / s.speed_D[h]
            fits = fits and level < most
            gain += s.level_D[h] * s.level_D[h] - level * level
            s.delta_D[h] = 0.0
    return gain if fits else -1.0


@compiled(nogil=True)
def replaced(s: SlotLayer, e: int, f: int, d: int, most: float) -> float:
    """:func:`_settled` of expert f in the slot of e (or in an empty one) on device d."""
    if e >= 0:
        k = s.copies_E[e]
        for h in range(s.speed_D.size):
            if s.held_ED[e, h]:
                s.delta_D[h] += s.load_E[e] / k / (k - 1) if h != d else -s.load_E[e] / k
    k = s.copies_E[f]
    for h in range(s.speed_D.size):
        if s.held_ED[f, h]:
            s.delta_D[h] -= s.load_E[f] / k / (k + 1)
    s.delta_D[d] += s.load_E[f] / (k + 1)
    return _settled(s, most)


@compiled(nogil=True)
def swapped(s: SlotLayer, e: int, a: int, f: int, c: int, most: float) -> float:
    """:func:`_settled` of expert e going from device a to c and, unless FREE, f from c to a."""
    out = s.load_E[e] / s.copies_E[e]
    if f >= 0:
        out -= s.load_E[f] / s.copies_E[f]
    s.delta_D[a] -= out
    s.delta_D[c] += out
    return _settled(s, most)


@compiled(nogil=True)
def _fetch(s, came, left, d):  # type: ignore[no-untyped-def]
    """Copies more that the change of one slot takes."""
    more = 0
    if came >= 0 and not s.base_ED[came, d]:
        more += 1
    if left >= 0 and not s.base_ED[left, d]:
        more -= 1
    return more


@compiled(nogil=True)
def _apply(s, e, a, f, c):  # type: ignore[no-untyped-def]
    """Expert e goes from a to c, f from c to a; a = -1: f takes the slot of e on c; FREE: nobody."""
    if a < 0:
        if e >= 0:
            take(s, e, c)
        put(s, f, c)
        return
    take(s, e, a)
    if f >= 0:
        take(s, f, c)
        put(s, f, a)
    put(s, e, c)


@compiled(nogil=True)
def _step(s, guard, left):  # type: ignore[no-untyped-def]
    """The best exchange that takes at most ``left`` copies is made; how many it takes; 2**62: there is none."""
    experts, devices = s.held_ED.shape
    m = int(np.argmax(s.level_D))
    most = s.level_D[m] * STRICT
    best, be, ba, bf, bc, cost = 0.0, -1, -1, -1, -1, 1 << 62
    for c in range(devices):
        for e in range(-1, experts):
            if e < 0 and s.room_D[c] < 1:
                continue
            if e >= 0 and not s.held_ED[e, c]:
                continue
            removable = e < 0 or s.copies_E[e] > 1
            for f in range(experts):
                if s.held_ED[f, c]:
                    continue
                # f takes the slot of e: on the fullest device any f, elsewhere one that lies on the fullest
                if removable and (c == m or s.held_ED[f, m]):
                    more = _fetch(s, f, e, c)
                    if more <= left:
                        gain = replaced(s, e, f, c, most) / max(more, 0.5)
                        if gain > best and not (guard and endangered(s, e, s.unit_D[c], -1, f, -1, s.unit_D[c]) > 0):
                            best, be, ba, bf, bc, cost = gain, e, -1, f, c, more
                # f goes from the fullest device to c, and e, if there is one, to the fullest
                if c != m and s.held_ED[f, m] and (e < 0 or not s.held_ED[e, m]):
                    more = _fetch(s, f, e, c) + _fetch(s, e, f, m)
                    if more <= left:
                        gain = swapped(s, f, m, e, c, most) / max(more, 0.5)
                        if gain > best and not (
                            guard and endangered(s, f, s.unit_D[m], s.unit_D[c], e, s.unit_D[c], s.unit_D[m]) > 0
                        ):
                            best, be, ba, bf, bc, cost = gain, f, m, e, c, more
    if best > 0.0:
        _apply(s, be, ba, bf, bc)
    return cost


@compiled(nogil=True)
def descend(s: SlotLayer, guard: bool, budget: int, enough: float) -> int:
    """Steps until no device is above ``enough``, none helps, or ``budget`` copies are used; copies used."""
    used = 0
    while s.level_D.max() > enough:
        cost = _step(s, guard, budget - used)
        if cost > budget - used:
            return used
        used += cost
    return used


@compiled(nogil=True)
def search(s: SlotLayer, guard: bool, enough: float, kicks: int, seed: int) -> None:
    """Descent, then again and again from a few random exchanges away, kept where it ends lower; no limit to copies."""
    np.random.seed(seed)
    experts, devices = s.held_ED.shape
    descend(s, guard, 1 << 61, enough)
    kept, best = s.held_ED.copy(), s.level_D.max()
    for _ in range(kicks):
        if best <= enough:
            break
        for _ in range(2 + 2 * np.random.randint(6)):
            e, a, f, c = (np.random.randint(experts), np.random.randint(devices),
                          np.random.randint(experts), np.random.randint(devices))  # fmt: skip
            if a == c or not s.held_ED[e, a] or s.held_ED[e, c] or s.held_ED[f, a]:
                continue
            if s.held_ED[f, c]:
                if not (guard and endangered(s, e, s.unit_D[a], s.unit_D[c], f, s.unit_D[c], s.unit_D[a]) > 0):
                    _apply(s, e, a, f, c)
            elif s.copies_E[e] > 1:
                if not (guard and endangered(s, e, s.unit_D[a], -1, f, -1, s.unit_D[a]) > 0):
                    _apply(s, e, -1, f, a)
        descend(s, guard, 1 << 61, enough)
        if s.level_D.max() < best * (1.0 - 1e-9):
            kept, best = s.held_ED.copy(), s.level_D.max()
        else:
            for e in range(experts):
                for d in range(devices):
                    if kept[e, d] and not s.held_ED[e, d]:
                        put(s, e, d)
            for e in range(experts):
                for d in range(devices):
                    if s.held_ED[e, d] and not kept[e, d]:
                        take(s, e, d)
