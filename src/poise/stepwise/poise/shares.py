"""Compiled parts of ``poise-near``: where each source sends its tokens by a plan that was made for expected loads.

What a plan says of an expert is a share for every pair (source, holder). Each source deals its own tokens by its own
shares, whatever the others have, so no counts are exchanged.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine
from poise.util.compiled import compiled

GOLDEN = 0.6180339887498949
"""Step of where a source begins to round: what does not divide goes to other holders from the next one."""
CLOSE = 1e-9
"""Tokens below which rounding is not trusted."""


@compiled
def nearest_shares(held_D: NDArray[np.bool_], s: int, machine: Machine, share_D: NDArray[np.float64]) -> None:
    """A source's tokens to itself, to the holders of its node or to all holders, evenly; float64 [D] in place."""
    near, anywhere = 0, 0
    for d in range(held_D.size):
        if held_D[d]:
            anywhere += 1
            near += 1 if machine.node_D[d] == machine.node_D[s] else 0
    share_D[:] = 0.0
    for d in range(held_D.size):
        if held_D[s]:
            share_D[s] = 1.0
        elif held_D[d] and (near == 0 or machine.node_D[d] == machine.node_D[s]):
            share_D[d] = 1.0 / (near if near > 0 else anywhere)


@compiled
def planned_shares(tokens_D: NDArray[np.float64], s: int, machine: Machine, share_D: NDArray[np.float64]) -> None:
    """Where one of equal sources sends an expert's tokens, planned on each device as ``tokens_D`` float64 [D].

    As :func:`poise.stepwise.poise.spread.book_expert` has it: own device, then own node, then anywhere, in proportion
    to what is left there. float64 [D] in place, adds up to 1.
    """
    devices = tokens_D.size
    each = tokens_D.sum() / devices
    home = machine.node_D[s]
    need, room, inside_here, beyond = 0.0, 0.0, 0.0, 0.0
    first = 0
    for n in range(machine.size_N.size):
        last = first + machine.size_N[n]
        lack_here, over_here = 0.0, 0.0
        for d in range(first, last):
            stay = min(tokens_D[d], each)
            lack_here += each - stay
            over_here += tokens_D[d] - stay
        inside = min(lack_here, over_here)
        beyond += over_here - inside
        if n == home:
            need, room, inside_here = lack_here, over_here, inside
        for d in range(first, last):  # what a device has left for other nodes, for now
            over = tokens_D[d] - min(tokens_D[d], each)
            share_D[d] = over * (1.0 - inside / max(over_here, 1e-300))
        first = last
    own = min(tokens_D[s], each)
    near = (each - own) * inside_here / max(need, 1e-300)
    far = max(0.0, each - own - near)  # rounding must not take tokens back
    for d in range(devices):
        if machine.node_D[d] == home:
            share_D[d] = near * (tokens_D[d] - min(tokens_D[d], each)) / max(room, 1e-300)
        else:
            share_D[d] *= far / max(beyond, 1e-300)
    share_D[s] = own
    share_D /= max(share_D.sum(), 1e-300)


@compiled
def deal_rows(
    load_SE: NDArray[np.int64], tokens_ED: NDArray[np.float64], held_ED: NDArray[np.bool_], machine: Machine
) -> NDArray[np.int64]:
    """Whole tokens from each source by the shares of a plan, int64 [D, E, D]; a row asks its source's tokens only.

    Parameters
    ----------
    load_SE : int64 [D, E], tokens of each source.
    tokens_ED : float64 [E, D], as planned; experts without any go to the nearest holders.
    held_ED : bool [E, D].
    """
    devices, experts = load_SE.shape
    out_SED = np.zeros((devices, experts, devices), np.int64)
    share_D = np.zeros(devices)
    for e in range(experts):
        planned = tokens_ED[e].sum() > 0.0
        for s in range(devices):
            load = load_SE[s, e]
            if load == 0:
                continue
            if planned:
                planned_shares(tokens_ED[e], s, machine, share_D)
            else:
                nearest_shares(held_ED[e], s, machine, share_D)
            level = ((s + 1) * GOLDEN + (e + 1) * GOLDEN * GOLDEN) % 1.0
            done = 0
            for d in range(devices):
                level += load * share_D[d]
                until = min(load, np.int64(level + CLOSE))
                if share_D[d] > 0.0:
                    out_SED[s, e, d] = until - done
                    done = until
            out_SED[s, e, np.argmax(share_D)] += load - done
    return out_SED
