"""The split ``near``: tokens are computed on their own device, else in their own node, else anywhere.

Where the tokens of source device s for expert e go:

    s holds e                         all to s
    only others of its node hold e    evenly to the node's slots
    nobody in its node holds e        evenly to all slots

Tokens that have the same slots to go to are a *group*: one of each (expert, holder), of each (expert, node that holds
it), and of each expert. So there are about three groups a slot, however many sources there are, and an array of
sources x experts x devices is never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from poise.cost.entries import LayerEntries
from poise.cost.links import PortLoad
from poise.cost.split import Split, SplitShares, split_shares
from poise.machine.cluster import Cluster
from poise.routing.batch import RoutingBatch
from poise.routing.trace import NO_EXPERT


@dataclass(frozen=True, slots=True, eq=False)
class NearGroups:
    """Groups of one layer. Entries X are the (expert, device) pairs with a slot, sorted, three times: as the only place
    of their own device's tokens, as one of their node's, and as one of all.

    Parameters
    ----------
    group_ED : int64 [E, D], group of what device d has for expert e; groups of holders are their numbers among H.
    expert_G : int64 [G].
    ptr_G : int64 [G + 1], first entry of each group.
    device_X : int64 [3 H].
    share_X : float64 [3 H], part of the group's tokens.
    inside : from this group on tokens leave their device, and stay in their node.
    away : from this group on tokens leave their node.
    """

    group_ED: NDArray[np.int64]
    expert_G: NDArray[np.int64]
    ptr_G: NDArray[np.int64]
    device_X: NDArray[np.int64]
    share_X: NDArray[np.float64]
    inside: int
    away: int

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.expert_G)

    def of_tokens(self, experts_TK: NDArray[Any], home_T: NDArray[Any]) -> NDArray[np.int64]:
        """Group of each pick of tokens, int64 [T, K]; -1 of a pick that computes nothing."""
        return np.where(experts_TK == NO_EXPERT, NO_EXPERT, self.group_ED[experts_TK, home_T[:, None]])

    def loads(self, batch: RoutingBatch, layer: int) -> NDArray[np.float64]:
        """Tokens of each group in each step, float64 [B, G]: an expert's load, divided as its known tokens are.

        Where none of them is known, each device is the home of 1 / D.
        """
        devices, groups = self.group_ED.shape[1], self.num_groups
        size_G = np.bincount(self.group_ED.ravel(), minlength=groups)
        load_BG: NDArray[np.float64] = batch.load_BLE[:, layer, self.expert_G]
        if batch.experts_TLK is None:
            return load_BG * (size_G / devices)
        group_TK = self.of_tokens(batch.experts_TLK[:, layer], batch.home_of_tokens(devices))
        step_T = batch.step_T()
        flat = (step_T[:, None] * groups + group_TK)[group_TK != NO_EXPERT]
        count_BG = np.bincount(flat, minlength=batch.num_steps * groups).reshape(batch.num_steps, groups)
        of_GE = csr_array((np.ones(groups), self.expert_G, np.arange(groups + 1)), shape=(groups, batch.num_experts))
        known_BE: NDArray[np.float64] = np.asarray(count_BG @ of_GE)
        known_BG = known_BE[:, self.expert_G]
        return np.where(known_BG > 0, count_BG * (load_BG / np.maximum(known_BG, 1.0)), load_BG * (size_G / devices))

    def by_entry(self, load_BG: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens of each entry, float64 [B, 3, H]: of its own device, of its node, from anywhere."""
        group_X = np.repeat(np.arange(self.num_groups), np.diff(self.ptr_G))
        tokens_BX: NDArray[np.float64] = load_BG[:, group_X] * self.share_X
        return tokens_BX.reshape(len(load_BG), 3, -1)

    def tokens(
        self, batch: RoutingBatch, layer: int, expert_H: NDArray[Any], device_H: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Tokens of each (expert, device) that is asked for, float64 [B, H]; every one has a slot."""
        tokens_BH = self.by_entry(self.loads(batch, layer)).sum(axis=1)
        return tokens_BH[:, self.group_ED[expert_H, device_H]]

    def ports_of_loads(self, batch: RoutingBatch, layer: int) -> PortLoad:
        """Copies through the ports when only loads are known and each device is the home of 1 / D."""
        devices = self.group_ED.shape[1]
        tokens_B3H = self.by_entry(self.loads(batch, layer))
        each_BE = batch.load_BLE[:, layer] / devices
        away_ED = self.group_ED >= self.away
        inside_ED = (self.group_ED >= self.inside) & ~away_ED
        onto_HD = np.zeros((self.inside, devices))
        onto_HD[np.arange(self.inside), self.device_X[: self.inside]] = 1.0
        return PortLoad(each_BE @ inside_ED, tokens_B3H[:, 1] @ onto_HD, each_BE @ away_ED, tokens_B3H[:, 2] @ onto_HD)

    def pairs_of_loads(self, batch: RoutingBatch, layer: int) -> NDArray[np.float64]:
        """Pairs from each device to each, float64 [B, D, D], likewise."""
        devices = self.group_ED.shape[1]
        each_BE = batch.load_BLE[:, layer] / devices
        share_GD = csr_array((self.share_X, self.device_X, self.ptr_G), shape=(self.num_groups, devices))
        out = np.empty((len(each_BE), devices, devices))
        for source in range(devices):
            out[:, source] = each_BE @ share_GD[self.group_ED[:, source]]
        return out


def near_groups(held: LayerEntries, cluster: Cluster) -> NearGroups:
    """Groups under a placement."""
    experts, devices, order = held.num_experts, held.num_devices, held.by_expert()
    expert_H, device_H = held.expert_H[order], held.device_H[order]
    slots_H, holders = held.count_H[order].astype(np.float64), len(expert_H)
    node_H = expert_H * cluster.num_nodes + cluster.node_D[device_H]
    held_M, part_H = np.unique(node_H, return_inverse=True)  # ascending, as the holders are
    inside, away = holders, holders + len(held_M)
    group_ED = np.tile(away + np.arange(experts)[:, None], (1, devices))
    expert_M, node_M = np.divmod(held_M, cluster.num_nodes)
    place_EN = np.full((experts, cluster.num_nodes), -1)
    place_EN[expert_M, node_M] = inside + np.arange(len(held_M))
    near_ED = place_EN[:, cluster.node_D]
    group_ED = np.where(near_ED >= 0, near_ED, group_ED)
    group_ED[expert_H, device_H] = np.arange(holders)
    firsts = np.searchsorted(node_H, held_M), np.searchsorted(expert_H, np.arange(experts))
    sums_M = np.bincount(part_H, weights=slots_H, minlength=len(held_M))
    sums_E = np.bincount(expert_H, weights=slots_H, minlength=experts)
    return NearGroups(
        group_ED,
        np.concatenate([expert_H, expert_M, np.arange(experts)]),
        np.concatenate([np.arange(holders), holders + firsts[0], 2 * holders + firsts[1], [3 * holders]]),
        np.tile(device_H, 3),
        np.concatenate([np.ones(holders), slots_H / sums_M[part_H], slots_H / sums_E[expert_H]]),
        inside,
        away,
    )


def near_count(count_ED: NDArray[Any], node_D: NDArray[np.integer[Any]], source: int) -> NDArray[Any]:
    """Slots that the tokens of one source device go to, int [E, D]: ``count_ED`` with zeros elsewhere."""
    inside = np.flatnonzero(node_D == node_D[source])
    here_E1 = count_ED[:, inside].any(axis=1, keepdims=True)
    out = np.where(here_E1, 0, count_ED)
    out[:, inside] = count_ED[:, inside]
    own_E = count_ED[:, source] > 0
    out[own_E] = 0
    out[own_E, source] = count_ED[own_E, source]
    return out


def layer_share(
    batch: RoutingBatch, layer: int, held: LayerEntries, cluster: Cluster, split: Split
) -> SplitShares | NearGroups:
    """How a layer's tokens are split: shares of its entries or, where those go by the source, groups."""
    if split == "near":
        return near_groups(held, cluster)
    return split_shares(batch.load_BLE[:, layer], held, cluster.speed_D, split)


def placed_tokens(
    batch: RoutingBatch, layer: int, share: SplitShares | NearGroups, held: LayerEntries
) -> NDArray[np.float64]:
    """Tokens of each entry, float64 [B, H]; ``share`` from :func:`layer_share`."""
    if isinstance(share, NearGroups):
        return share.tokens(batch, layer, held.expert_H, held.device_H)
    out: NDArray[np.float64] = batch.load_BLE[:, layer, held.expert_H] * share.share_BH
    return out
