"""What replicas and tokens cost in bytes, counted, and what three ways to spend less would save (modelled seconds).

    python benchmarks/replica_memory.py DATA [--tokens 4096] [--layers 4] [--micro 4] [--dry]

DATA holds olmoe/expert_counts/*.npz. *Once*: a token to a device once against a row a (token, expert) pair, on tokens: the
shipped trace, and tokens drawn with OLMoE's recorded loads (8 distinct experts of 64, independent: what experts a token
takes together is not recorded). *Accumulation*: replica gradients reduced after every micro-batch against once an
optimizer step. *Rows*: experts with replicas stored in rows on all devices against whole on their owners.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import table, write
from train_cases import of_domains, shares

from poise.cost.route import locality_rows
from poise.cost.transfers import plan_transfers
from poise.cost.weights import HIDDEN_SHARE, StepPrice, training_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.routing.shipped import shipped
from poise.stepwise.driver import LayerDriver
from poise.stepwise.registry import as_policy
from poise.stepwise.sharding import even_sharding, owned_ED
from poise.stepwise.step_seconds import exchange_seconds

CLUSTERS, SLOTS, WARM_UP, SEED = ("1x8:h100", "2x8:h100", "4x8:h100"), 4, 5, 11
POLICIES = ("hecate", "hecate:overlap=8", "llep", "ultra-ep", "poise")
TOLD_BYTES = 8


def olmoe(layers: int, experts: int = 64, top_k: int = 8) -> ModelSpec:
    """Sizes of OLMoE-1B-7B's layers, 16-bit."""
    return ModelSpec("olmoe", layers, tuple(range(layers)), experts, top_k, 2048, 1024, 3, 2.0, 2.0, 2.0, 2.0 * 2048)


def price_of(cluster: Cluster, model: ModelSpec, tokens: int) -> StepPrice:
    """Of a micro-batch of so many tokens a device."""
    return training_price(float(tokens * cluster.num_devices), model.num_experts, cluster, model,
                          sequence_length=2048, hidden_share=HIDDEN_SHARE)  # fmt: skip


def drawn(data: Path, tokens: int, devices: int) -> np.ndarray:
    """Experts [layer, device, T, K] of tokens, each device's of one domain after the other."""
    rng = np.random.default_rng(SEED)
    share_GlE = shares(data)
    out = np.empty((share_GlE.shape[1], devices, tokens, 8), np.int64)
    for layer in range(len(out)):
        for d in range(devices):
            weight = np.log(np.maximum(share_GlE[rng.integers(len(share_GlE), size=tokens), layer], 1e-9))
            out[layer, d] = np.argpartition(-(weight + rng.gumbel(size=weight.shape)), 8, axis=1)[:, :8]
    return out


def of_the_shipped_trace(tokens: int, devices: int) -> np.ndarray:
    """The same of the shipped trace; requests lie one after the other."""
    trace = shipped("demo_trace")
    experts_TLK = np.asarray(trace.experts, np.int64)
    tokens = min(tokens, len(experts_TLK) // devices)
    some = experts_TLK[: tokens * devices].reshape(devices, tokens, *experts_TLK.shape[1:])
    return some.transpose(2, 0, 1, 3)[::2].copy()


def devices_of(ids_TK: np.ndarray, rows_ED: np.ndarray) -> np.ndarray:
    """Where each pair of one source is computed, [T, K], as dispatch deals them: an expert's first to the first device."""
    out = np.empty(ids_TK.size, np.int64)
    order = np.argsort(ids_TK.reshape(-1), kind="stable")
    out[order] = np.repeat(np.tile(np.arange(rows_ED.shape[1]), len(rows_ED)), rows_ED.reshape(-1))
    return out.reshape(ids_TK.shape)


def by_copies(ids_STK: np.ndarray, rows_SED: np.ndarray) -> np.ndarray:
    """Copies from device to device, int64 [D, D]."""
    devices = len(ids_STK)
    out = np.zeros((devices, devices), np.int64)
    for source, ids_TK in enumerate(ids_STK):
        goes_TD = np.zeros((len(ids_TK), devices), bool)
        np.put_along_axis(goes_TD, devices_of(ids_TK, rows_SED[source]), True, axis=1)
        out[source] = goes_TD.sum(axis=0)
    return out


def once(name: str, ids_LSTK: np.ndarray, experts: int, cluster: Cluster) -> list[list[str]]:
    """A line a policy."""
    layers, devices, tokens, top_k = ids_LSTK.shape
    model = olmoe(layers, experts, top_k)
    price, lines = price_of(cluster, model, tokens), []
    width, told_s = model.dispatch_bytes_per_token, exchange_seconds(np.zeros((devices, devices), np.int64), price)
    owner_LE = even_sharding(layers, experts, devices)
    away = ~np.eye(devices, dtype=bool)
    for policy in ("expert-parallelism", "poise"):
        bytes_of, seconds = {"pairs": 0.0, "copies": 0.0}, {"pairs": 0.0, "copies": 0.0}
        for layer in range(layers):
            load_SE = np.stack([np.bincount(ids.reshape(-1), minlength=experts) for ids in ids_LSTK[layer]])
            driver = LayerDriver(as_policy(policy), owned_ED(owner_LE[layer], devices), step_slots=SLOTS, layer=layer)
            history = load_SE.sum(axis=0, dtype=np.float64)[None]
            view = driver.view(1, history[0], history, price)
            plan = driver.finish(view, driver.choose(view), load_SE).plan
            rows_SED = plan.rows_SED
            if rows_SED is None:
                rows_SED = locality_rows(load_SE, plan.quota_ED, cluster.node_D)
            pairs_DD, copies_DD = rows_SED.sum(axis=1), by_copies(ids_LSTK[layer], rows_SED)
            bytes_of["pairs"] += 4.0 * width * pairs_DD[away].sum()
            bytes_of["copies"] += (4.0 * width + 4.0 * top_k) * copies_DD[away].sum() + TOLD_BYTES * pairs_DD[
                away
            ].sum()
            seconds["pairs"] += exchange_seconds(pairs_DD, price)
            seconds["copies"] += exchange_seconds(copies_DD, price) + told_s / 4.0
        lines.append([name, f"{cluster.num_nodes}x{devices // cluster.num_nodes}", policy,
                      f"{bytes_of['pairs'] / layers / 1e6:.0f}", f"{bytes_of['copies'] / layers / 1e6:.0f}",
                      f"{1 - bytes_of['copies'] / bytes_of['pairs']:.1%}", f"{1e3 * seconds['pairs'] / layers:.2f}",
                      f"{1e3 * seconds['copies'] / layers:.2f}", f"{1 - seconds['copies'] / seconds['pairs']:.1%}"])  # fmt: skip
    return lines


def accumulation(data: Path, cluster: Cluster, tokens: int, layers: int, micro: int) -> tuple[list, list]:
    """Lines a policy: reductions of an optimizer step; and where weights of experts with replicas come from."""
    devices, model = cluster.num_devices, olmoe(layers)
    price = price_of(cluster, model, tokens)
    load_BLSE = of_domains(data, tokens, layers, 64, 8, 2048, WARM_UP + micro, devices, SEED).load_BLSE
    owner_LE, size = even_sharding(layers, 64, devices), price.gathered_bytes * price.gradient_ratio
    lines, stored = [], []
    for policy in POLICIES:
        each = once_ = each_s = once_s = whole_s = rows_s = 0.0
        kept_D = np.zeros(devices, np.int64)
        for layer in range(layers):
            driver = LayerDriver(as_policy(policy), owned_ED(owner_LE[layer], devices), step_slots=SLOTS, layer=layer)
            used = []
            for step in range(WARM_UP + micro):
                known = (
                    step if step <= WARM_UP else WARM_UP + 1
                )  # an iteration's first pass is planned from, and no other
                past_HE = load_BLSE[:known, layer].sum(axis=1).astype(np.float64)
                load_SE = load_BLSE[step, layer].astype(np.int64)
                view = driver.view(step, driver.predict(past_HE, float(load_SE.sum())), past_HE, price)
                early_ED = driver.choose(view)
                plan = driver.finish(view, early_ED, load_SE).plan
                replicas_ED = plan.holders_ED & (plan.quota_ED > 0) & ~driver.static_ED
                if step >= WARM_UP:
                    used.append(replicas_ED)
            union_ED = np.any(used, axis=0)
            plans = [plan_transfers(owner_LE[layer], one, cluster, expert_bytes=size) for one in (*used, union_ED)]
            each, once_ = each + sum(plan.count for plan in plans[:-1]), once_ + plans[-1].count
            each_s += sum(plan.back_seconds(cluster, size) for plan in plans[:-1])
            once_s += plans[-1].back_seconds(cluster, size)
            kept_D += union_ED.sum(axis=0)
            whole_s += plans[0].seconds(cluster, size)
            rows_s += in_rows(used[0], owner_LE[layer], cluster, size)
        lines.append([f"{cluster.num_nodes}x{devices // cluster.num_nodes}", policy, f"{each * size / 1e6:.0f}", f"{once_ * size / 1e6:.0f}",
                      f"{each / max(1.0, once_):.2f}", f"{1e3 * each_s:.2f}", f"{1e3 * once_s:.2f}",
                      f"{kept_D.max() * size / 1e6:.0f}", f"{kept_D.max() * size / 1e6 / (owner_LE.size / devices * size / 1e6):.0%}"])  # fmt: skip
        stored.append(
            [
                f"{cluster.num_nodes}x{devices // cluster.num_nodes}",
                policy,
                f"{1e3 * whole_s:.2f}",
                f"{1e3 * rows_s:.2f}",
            ]
        )
    return lines, stored


def in_rows(used_ED: np.ndarray, owner_E: np.ndarray, cluster: Cluster, size: float) -> float:
    """Seconds of the fullest port where experts with replicas lie in rows on all devices: a holder, the owner too, gets all
    but its part from every other, and every device sends as much.
    """
    hot_E = used_ED.any(axis=1)
    holders_ED = used_ED & hot_E[:, None]
    holders_ED[hot_E, owner_E[hot_E]] = True
    devices, same = cluster.num_devices, cluster.node_D[:, None] == cluster.node_D[None, :]
    into_DD = np.repeat(holders_ED.sum(axis=0)[None], devices, axis=0) * size / devices  # [source, target]
    np.fill_diagonal(into_DD, 0.0)
    near, far = into_DD * same, into_DD * ~same
    ports = [(near, cluster.intra_bytes_per_s), (far, cluster.inter_bytes_per_s)]
    wire = max(max(part.sum(axis=0).max(), part.sum(axis=1).max()) / rate for part, rate in ports)
    return (
        float(wire + cluster.intra_latency_s + (cluster.inter_latency_s if far.any() else 0.0)) if hot_E.any() else 0.0
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("data", type=Path)
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--micro", type=int, default=4)
    options.add_argument("--dry", action="store_true", help="print the report, write nothing")
    asked = options.parse_args()
    machines = [Cluster.parse(word) for word in CLUSTERS]
    copies, reduced, stored = [], [], []
    for cluster in machines:
        copies += once("shipped trace, 4 of 32", of_the_shipped_trace(asked.tokens, cluster.num_devices), 32, cluster)
        copies += once(
            "drawn by OLMoE's loads, 8 of 64", drawn(asked.data, asked.tokens, cluster.num_devices), 64, cluster
        )
        lines, rows = accumulation(asked.data, cluster, asked.tokens, asked.layers, asked.micro)
        reduced, stored = reduced + lines, stored + rows
    text = [
        f"Experts of OLMoE-1B-7B's size in 16 bits, {asked.tokens} tokens a device and micro-batch, {SLOTS} step slots a device "
        "and layer, even owners; bytes are counted, seconds modelled.",
        "## A token to a device once\n\nFour exchanges of a layer, mean over layers. Copies carry their router weights; one "
        "integer a pair goes before them.",
        table(["tokens", "cluster", "policy", "MB by pairs", "MB by copies", "less", "ms by pairs", "ms by copies", "less"], copies),
        f"## Replica gradients of {asked.micro} micro-batches\n\n{asked.layers} layers. *Each*: reduced after every one; *once*: kept, "
        "and reduced with the last.",
        table(["cluster", "policy", "MB each", "MB once", "times", "ms each", "ms once", "MB kept on the fullest device",
               "of its owned weights"], reduced),
        "## Experts with replicas, whole on owners or in rows on all devices\n\nGather of one micro-batch, all layers.",
        table(["cluster", "policy", "ms from owners", "ms from rows"], stored),
    ]  # fmt: skip
    print("\n\n".join(text)) if asked.dry else write("Replica memory", text)


if __name__ == "__main__":
    main()
