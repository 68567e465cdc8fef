"""SwiftBalance: vllm-ascend's default policy (2), a bounded number of moves away from the placement in use.

Source: github.com/vllm-project/vllm-ascend, vllm_ascend/eplb/core/policy/policy_swift_balancer.py (formerly
policy_dynamic_ep_v2.py), as in the wheel of release 0.23.0. There is no paper; the steps are those of the code, layer
by layer:

Step 1  Start from the table in use. The load of an expert is the sum over its replicas.
Step 2  Leave a layer alone whose max/mean over ranks, with even split, is below the threshold (1.01).
Step 3  Slot by slot over all ranks, the first copy of an expert is its owner and stays; all later copies are taken out.
Step 4  Redundancy anew: one replica at a time to the expert with the largest share, fewer than D for each expert. After
        a replicas the code counts a share of 2 load / (a + 2); an even split would give load / (a + 1), which is what
        pull request 16000 (open in September 2026) makes of it: ``share="even"``.
Step 5  Replicas in descending share to the least loaded rank with a free slot, without the expert, and which has not
        yet received from the owner's rank. Slots left over take the expert with the largest exact share that the rank
        lacks, whoever sends it.
Step 6  Swaps, at most 100: the hottest rank tries the others from the coldest up, takes the first whose best pair
        lowers the larger of the two loads by 1 % of the first layer's mean, and stops if none does. A pair of ranks
        exchanges at most one expert in each direction, and what a rank has just received stays there.
Step 7  Keep the new layer only if its largest load, in the shares of step 4 and over the first layer's mean, is below
        the old max/mean.
Step 8  Experts that stay on their rank keep their slot.

Shares and loads of ranks are float32, added up slot by slot, as in the code. The shares of step 4 never lie below the
true ones, so, where the layers' loads are alike, a kept layer is never less balanced than it was on the fitted traffic;
they do hide gains, which is why there is ``share="even"`` too.

Chosen where the source is silent or cannot be followed (docs/planning.md says it for users):

- Without a current placement the layout is the one the engine starts with: physical expert p holds p mod E.
- Loads are not cut to integers. A first layer without tokens does not set the mean: each layer has its own then.
- Pairs of equal gain in step 6: lower experts, where the code takes them as a Python set yields them. Newcomers take a
  rank's slots in ascending order, the code's in that of the set.
- Free slots count as redundant ones, slots may differ, and loads are divided by the speed of their device.
- A second copy on the same device is dropped before anything else, also in a layer that is left alone; that alone may
  change a layer's balance.
- The code's flag "change" (sum of layer maxima down by 5 %) is reported in ``details["change"]``, not acted on.
- Redundancy inside each node, an option of the code that is off, is left out.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.planning.budget import Budget, Limit
from poise.planning.methods import carry, contiguous
from poise.planning.placement import EMPTY, Placement
from poise.planning.problem import MethodResult, PlacementProblem, Progress
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiftBalanceSetting:
    """Constants of the code.

    Parameters
    ----------
    imbalance_threshold : max/mean below which a layer is left alone.
    max_swaps : swaps a layer.
    max_transfers : experts one rank may send to another, a layer.
    min_gain : least gain of a swap, as a share of the mean load.
    share : what a replica of an expert with a redundant ones is thought to carry: 2 / (a + 2) or 1 / (a + 1) of it.
    one_mean : gains and the new largest load of every layer are compared with the mean load of the first, as in the
        code; False: with the layer's own. They are the same where every layer sees the same tokens.
    """

    imbalance_threshold: float = 1.01
    max_swaps: int = 100
    max_transfers: int = 1
    min_gain: float = 0.01
    share: Literal["published", "even"] = "published"
    one_mean: bool = True

    def __post_init__(self) -> None:
        if not self.imbalance_threshold >= 1:
            raise OptionError(f"the imbalance threshold must be at least 1, got {self.imbalance_threshold}")
        if not (self.max_swaps >= 0 and self.max_transfers >= 0 and self.min_gain >= 0):
            raise OptionError(
                f"{self.max_swaps} swaps, {self.max_transfers} transfers, gain {self.min_gain}: all must be at least 0"
            )
        if self.share not in ("published", "even"):
            raise OptionError(f"unknown share {self.share!r}", hint="one of published, even")


PUBLISHED = SwiftBalanceSetting()


@dataclass(frozen=True, slots=True, eq=False)
class SlotTable:
    """A placement as a table that policies with bounded moves start from.

    Parameters
    ----------
    expert_LDK : int64 [L, D, K], expert of the k-th slot of each device; -1 where empty or beyond its slots. Never an
        expert twice on a device.
    room_D : int64 [D], slots of each device.
    capacity_LD : int64 [L, D], most experts a device may hold in a layer.
    notes : what had to be changed in the placement in use.
    """

    expert_LDK: NDArray[np.int64]
    room_D: NDArray[np.int64]
    capacity_LD: NDArray[np.int64]
    notes: tuple[str, ...]

    def holds_LDE(self, num_experts: int) -> NDArray[np.bool_]:
        """Device d holds expert e, bool [L, D, E]."""
        out = np.zeros((*self.expert_LDK.shape[:2], num_experts + 1), np.bool_)
        np.put_along_axis(out, np.where(self.expert_LDK == EMPTY, num_experts, self.expert_LDK), True, axis=2)
        return out[:, :, :num_experts]


def start_table(problem: PlacementProblem) -> SlotTable:
    """The placement in use, or the engine's start-up layout, fitted to the problem's slots.

    One for other devices, or with more experts on a device than there are slots, is carried over
    (:mod:`poise.planning.methods.carry`).
    """
    placement = problem.current
    if placement is None:
        placement = contiguous.plan(problem, time_limit_s=1.0).placement
    elif not carry.fits(placement, problem):
        placement = carry.carried(placement, problem)
    experts, devices = problem.batch.num_experts, problem.num_devices
    used_LD = placement.entries().used_LD(different=True)
    theirs_D = placement.slots_D
    room_D = theirs_D if problem.pooled else problem.slots_D
    capacity_LD = used_LD if problem.pooled else np.broadcast_to(np.minimum(room_D, experts), used_LD.shape)
    held_LS, layers = _once(placement), problem.batch.num_layers
    table = np.full((layers, devices, int(room_D.max())), EMPTY, np.int64)
    device_S = placement.slot_device_S
    turn_S = np.arange(placement.num_slots) - np.concatenate([[0], np.cumsum(theirs_D)])[device_S]
    fits_S = turn_S < room_D[device_S]
    table[:, device_S[fits_S], turn_S[fits_S]] = held_LS[:, fits_S]
    for layer, slot in np.argwhere((held_LS != EMPTY) & ~fits_S).tolist():
        row = table[layer, device_S[slot], : room_D[device_S[slot]]]
        row[np.flatnonzero(row == EMPTY)[0]] = held_LS[layer, slot]
    notes = []
    if problem.current is not None and problem.current is not placement:
        have_D = problem.current.slots_D
        notes.append(f"the current placement has slots {have_D.tolist()}: {placement.method}")
    if placement.has_duplicates:
        notes.append("second copies of an expert on one device of the current placement were dropped")
    if not problem.pooled and (theirs_D != room_D).any():
        notes.append(f"the current placement has slots {theirs_D.tolist()}, the problem {room_D.tolist()}")
    return SlotTable(table, np.asarray(room_D, np.int64), np.asarray(capacity_LD, np.int64), tuple(notes))


def _once(placement: Placement) -> NDArray[np.int64]:
    """Experts of slots, int64 [L, S], without second copies on a device."""
    held_LS = placement.slot_expert_LS.astype(np.int64)
    layer_L1 = np.arange(len(held_LS))[:, None]
    key_LS = (layer_L1 * placement.num_devices + placement.slot_device_S) * (placement.num_experts + 1) + held_LS
    first_LS = np.zeros(held_LS.shape, np.bool_)
    first_LS.flat[np.unique(key_LS, return_index=True)[1]] = True
    return np.where(first_LS, held_LS, EMPTY)


def keep_slots(old_DK: NDArray[np.int64], holds_DE: NDArray[np.bool_], room_D: NDArray[np.int64]) -> NDArray[np.int64]:
    """Experts that stay on their device keep their slot, newcomers fill the others in order; int64 [D, K]."""
    stays_DK = (old_DK != EMPTY) & np.take_along_axis(holds_DE, np.maximum(old_DK, 0), axis=1)
    table, new_DE = np.where(stays_DK, old_DK, EMPTY), holds_DE.copy()
    device, slot = np.nonzero(stays_DK)
    new_DE[device, old_DK[device, slot]] = False
    device, expert = np.nonzero(new_DE)
    of_free, free = np.nonzero((table == EMPTY) & (np.arange(table.shape[1]) < room_D[:, None]))
    turn = np.arange(len(device)) - np.searchsorted(device, device)
    table[device, free[np.searchsorted(of_free, device) + turn]] = expert
    return table


def to_placement(
    problem: PlacementProblem, table_LDK: NDArray[np.int64], room_D: NDArray[np.int64], method: str
) -> Placement:
    """The placement of a slot table."""
    exists_DK = np.arange(table_LDK.shape[2]) < room_D[:, None]
    return Placement(
        table_LDK[:, exists_DK].astype(np.int32), np.repeat(np.arange(len(room_D), dtype=np.int32), room_D),
        problem.batch.num_experts, problem.num_devices, problem.batch.layer_ids_L, method,
    )  # fmt: skip


def carried(holds_DE: NDArray[np.bool_], weight_E: NDArray[np.float64]) -> NDArray[np.float64]:
    """Load of each device, float64 [D]: added up in one order, where ``@`` takes one by processor and threads."""
    return np.where(holds_DE, weight_E, 0.0).sum(axis=1)


def peak(load_E: NDArray[np.float64], holds_DE: NDArray[np.bool_], speed_D: NDArray[np.float64]) -> float:
    """Largest load / speed over devices under even split."""
    return float((carried(holds_DE, load_E / holds_DE.sum(axis=0)) / speed_D).max())


def _redundancy(
    load_E: NDArray[np.float64], slots: int, devices: int, share: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Step 4: redundant replicas of each expert, int [E], and the share each of its replicas is thought to carry."""
    extra, weight = np.zeros(len(load_E), np.int64), load_E.astype(np.float64)
    offset = 1 if share == "published" else 0
    heap = [(-float(load), -expert) for expert, load in enumerate(weight)] if devices > 1 else []
    heapq.heapify(heap)  # the last of equal ones comes first
    for _ in range(slots):
        if not heap:
            break
        expert = -heapq.heappop(heap)[1]
        extra[expert] += 1
        parts = int(extra[expert]) + offset
        weight[expert] = weight[expert] * parts / (parts + 1)
        if extra[expert] + 1 < devices:
            heapq.heappush(heap, (-float(weight[expert]), -expert))
    return extra, weight.astype(np.float32)


def slot_sums(expert_DK: NDArray[np.int64], weight_E: NDArray[np.float32]) -> NDArray[np.float32]:
    """Load of each device, float32 [D], added up slot by slot as the code does."""
    load_D = np.zeros(len(expert_DK), np.float32)
    for expert_D in expert_DK.T:
        load_D += np.where(expert_D == EMPTY, np.float32(0.0), weight_E[expert_D])
    return load_D


@dataclass(slots=True, eq=False)
class _LaidOut:
    """A layer on its way.

    What devices hold bool [D, E], shares float32 [E], loads float32 [D], transfers from rank to rank int [D, D], what
    each rank has received bool [D, E].
    """

    holds: NDArray[np.bool_]
    weight: NDArray[np.float32]
    load_D: NDArray[np.float32]
    sent: NDArray[np.int64]
    received: NDArray[np.bool_]


def _redeploy(
    load_E: NDArray[np.float64], table: SlotTable, layer: int, speed_D: NDArray[np.float64], s: SwiftBalanceSetting
) -> _LaidOut:
    """Steps 3 to 5."""
    old_DK, devices = table.expert_LDK[layer], len(speed_D)
    owner_E = np.full(len(load_E), -1)
    held_DK = np.full_like(old_DK, EMPTY)
    for k, column in enumerate(old_DK.T):
        for d, expert in enumerate(column):
            if expert != EMPTY and owner_E[expert] < 0:
                owner_E[expert], held_DK[d, k] = d, expert
    holds = np.zeros((devices, len(load_E) + 1), np.bool_)
    np.put_along_axis(holds, np.where(held_DK == EMPTY, len(load_E), held_DK), True, axis=1)
    holds = holds[:, :-1].copy()
    free_DK = (held_DK == EMPTY) & (np.arange(held_DK.shape[1]) < table.room_D[:, None])
    free_DK &= free_DK.cumsum(axis=1) <= (table.capacity_LD[layer] - holds.sum(axis=1))[:, None]
    free_DX: list[list[int]] = [[] for _ in range(devices)]
    for d, k in np.argwhere(free_DK).tolist():
        free_DX[d].append(k)
    extra, weight = _redundancy(load_E, sum(map(len, free_DX)), devices, s.share)
    load_D = slot_sums(held_DK, weight)
    sent, received = np.zeros((devices, devices), np.int64), np.zeros_like(holds)

    open_X = np.flatnonzero(free_DK.any(axis=1))

    def receive(d: int, slot: int, expert: int) -> None:
        held_DK[d, slot] = expert
        holds[d, expert] = received[d, expert] = True
        sent[owner_E[expert], d] += 1

    order = np.argsort(-weight, kind="stable")
    for expert in np.repeat(order, extra[order]).tolist():
        fits = open_X[~holds[open_X, expert] & (sent[owner_E[expert], open_X] < s.max_transfers)]
        if fits.size:
            d = int(fits[np.argmin(load_D[fits] / speed_D[fits])])
            receive(d, free_DX[d].pop(), expert)
            if not free_DX[d]:
                open_X = open_X[open_X != d]
            load_D[d] += weight[expert]
    if any(free_DX):
        count = holds.sum(axis=0)
        weight = (load_E / count).astype(np.float32)
        for d, slot in ((d, slot) for d, free in enumerate(free_DX) for slot in free):
            lacks = ~holds[d]
            if lacks.any():
                expert = int(np.flatnonzero(lacks & (weight == weight[lacks].max()))[-1])
                receive(d, slot, expert)
                weight[expert] = float(weight[expert]) * (count[expert] / (count[expert] + 1))
                count[expert] += 1
        load_D = slot_sums(held_DK, weight)
    return _LaidOut(holds, weight, load_D, sent, received)


def _best_pair(hot: int, cold: int, now: _LaidOut, speed_D: NDArray[np.float64]) -> tuple[float, int, int]:
    """The swap after which the larger of two ranks' loads is least: that load, the expert to give, the one to take."""
    give = np.flatnonzero(now.holds[hot] & ~now.holds[cold] & ~now.received[hot])
    take = np.flatnonzero(now.holds[cold] & ~now.holds[hot] & ~now.received[cold])
    if not (give.size and take.size):
        return np.inf, -1, -1
    given, taken = now.weight[give][:, None], now.weight[take][None, :]
    # The code adds up the hot rank in double, the cold one in single precision, and compares in single.
    hotter = (float(now.load_D[hot]) - given.astype(np.float64)) + taken
    colder = (now.load_D[cold] - taken) + given
    after = np.maximum(hotter / speed_D[hot], colder / speed_D[cold]).astype(np.float32)
    i, j = np.unravel_index(int(after.argmin()), after.shape)
    return float(after[i, j]), int(give[i]), int(take[j])


def _swap(now: _LaidOut, speed_D: NDArray[np.float64], s: SwiftBalanceSetting, mean: float) -> tuple[int, float]:
    """Step 6, in place: number of swaps, largest load / speed after them."""
    holds, weight, load_D, sent, received = now.holds, now.weight, now.load_D, now.sent, now.received
    swaps = 0
    while swaps < s.max_swaps:
        order = np.argsort(load_D / speed_D, kind="stable")
        hot = int(order[-1])
        most = float(load_D[hot] / speed_D[hot])
        if not (holds[hot] & ~received[hot]).any():
            break
        takes_D = (holds & ~received & ~holds[hot]).any(axis=1)
        for cold in order[:-1][takes_D[order[:-1]]].tolist():
            if max(sent[hot, cold], sent[cold, hot]) >= s.max_transfers:
                continue
            after, give, take = _best_pair(hot, cold, now, speed_D)
            if after >= most or most - after < s.min_gain * mean:
                continue
            holds[hot, give] = holds[cold, take] = False
            holds[hot, take] = holds[cold, give] = True
            received[hot, take] = received[cold, give] = True
            sent[hot, cold] += 1
            sent[cold, hot] += 1
            load_D[hot] += weight[take] - weight[give]
            load_D[cold] += weight[give] - weight[take]
            swaps += 1
            break
        else:
            break
    return swaps, float((load_D / speed_D).max())


def plan(
    problem: PlacementProblem,
    *,
    time_limit_s: Limit,
    seed: int = 0,
    progress: Progress | None = None,
    setting: SwiftBalanceSetting = PUBLISHED,
) -> MethodResult:
    """SwiftBalance on the expected load; layers that the clock cuts off stay as they are. The seed plays no part.

    ``details``: swaps and changed layers in all, ``change`` (module docstring), the setting's
    share, and ``adapted`` where slots, speeds or the current placement are not what the code knows.
    """
    load_LE, speed_D, budget = problem.batch.load_LE(), problem.cluster.speed_D, Budget.of(time_limit_s)
    table = start_table(problem)
    holds_LDE = table.holds_LDE(problem.batch.num_experts)
    out = table.expert_LDK.copy()
    swaps = changed = 0
    before = after = 0.0
    first = float(load_LE[0].sum() / speed_D.sum())
    for layer, load_E in enumerate(load_LE):
        was = peak(load_E, holds_LDE[layer], speed_D)
        mean = float(load_E.sum() / speed_D.sum())
        unit, now = first if setting.one_mean and first > 0 else mean, was
        if mean > 0 and was / mean >= setting.imbalance_threshold and not budget.over("swift-balance"):
            new = _redeploy(load_E, table, layer, speed_D, setting)
            done, most = _swap(new, speed_D, setting, unit)
            if most / unit < was / mean:
                now = most
                out[layer] = keep_slots(table.expert_LDK[layer], new.holds, table.room_D)
                swaps, changed = swaps + done, changed + 1
        before, after = before + was, after + now
        if progress is not None:
            progress("swift-balance", (layer + 1) / len(load_LE))
    details: dict[str, Any] = {
        "swaps": swaps, "changed_layers": changed, "change": bool(after < 0.95 * before), "share": setting.share,
    }  # fmt: skip
    notes = [*table.notes, *uneven(problem, table)]
    if notes:
        details["adapted"] = "; ".join(notes)
    return MethodResult(to_placement(problem, out, table.room_D, "swift-balance"), details)


def uneven(problem: PlacementProblem, table: SlotTable) -> list[str]:
    """What of the machine the published code does not know: slots or speeds that differ."""
    speed, slots = problem.cluster.speed_D, table.capacity_LD
    notes = []
    if (slots != slots[0, 0]).any():
        notes.append(f"the published code needs equal slots, got {slots[0].tolist()}")
    if (speed != speed[0]).any():
        notes.append(f"loads are divided by speeds {speed.tolist()}")
    return notes
