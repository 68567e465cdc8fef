"""Engines that run one map or another, as their logs show it: tokens choose experts, replicas share them by chance."""

import numpy as np

from poise.engines.dump import BalanceLog, EngineDump
from poise.routing.trace import LoadProfile, RoutingTrace


def popularity(rng, layers, experts, exponent):
    """How often experts are chosen, [L, E]: a Zipf law in another order in each layer."""
    weight = np.arange(1, experts + 1) ** -float(exponent)
    return np.stack([rng.permutation(weight / weight.sum()) for _ in range(layers)])


def tokens(rng, share_LE, top_k, size):
    """Experts of tokens, [T, L, K], K different ones by popularity."""
    score = np.log(share_LE) + rng.gumbel(size=(size, *share_LE.shape))
    return np.argpartition(-score, top_k - 1, axis=2)[:, :, :top_k].astype(np.int16)


def passes(rng, share_LE, top_k, sizes, table_LS, devices, measure="ranks"):
    """Mean and most of each pass, as vLLM logs them, and the experts that all tokens chose [T, L, K]."""
    layers, slots = table_LS.shape
    experts = share_LE.shape[1]
    home = [[np.flatnonzero(row == e) // (slots // devices) for e in range(experts)] for row in table_LS]
    replicas = np.array([[len(h) for h in row] for row in home])
    device_LEX = np.zeros((layers, experts, replicas.max()), np.int64)
    for layer, row in enumerate(home):
        for e, held in enumerate(row):
            device_LEX[layer, e, : len(held)] = held
    mean, most, chosen = [], [], []
    at = np.arange(layers)[None, :, None]
    for size in sizes:
        ids = tokens(rng, share_LE, top_k, size)
        pick = (rng.random(ids.shape) * replicas[at, ids]).astype(np.int64)
        device = device_LEX[at, ids, pick] + devices * at
        load_LD = np.bincount(device.ravel(), minlength=layers * devices).reshape(layers, devices)
        axis = 1 if measure == "ranks" else 0
        mean.append(load_LD.mean(axis=axis).sum())
        most.append(load_LD.max(axis=axis).sum())
        chosen.append(ids)
    return np.array(mean), np.array(most, float), np.concatenate(chosen)


def vllm_dump(mean_B, most_B, traffic, *, own_balancer=False):
    """What the reader makes of a log and its traffic: the map came before the first line."""
    log = BalanceLog(np.round(mean_B, 2), most_B, np.ones(len(mean_B), np.int64), own_balancer)
    what = {"trace": traffic} if isinstance(traffic, RoutingTrace) else {"profile": traffic}
    return EngineDump("vllm", "balance-log", balance_B=np.round(mean_B / most_B, 4), log=log, **what)


def loads(chosen, experts, *, known_k=True):
    """The experts of tokens as loads without tokens."""
    layers, top_k = chosen.shape[1:]
    flat = chosen.astype(np.int64) + np.arange(layers)[:, None] * experts
    load_LE = np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)
    return LoadProfile(load_LE, top_k=top_k if known_k else 1)
