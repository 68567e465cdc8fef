"""Makers of files as engines write them: the same keys, types and shapes, of random routing that is known."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

LAYERS, MOE, EXPERTS, SLOTS, DEVICES, TOP_K = 5, [1, 2, 4], 8, 12, 4, 2
CONFIG = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "hidden_size": 8,
          "moe_intermediate_size": 4, "moe_layer_freq": [int(i in MOE) for i in range(LAYERS)]}  # fmt: skip


@dataclass
class Known:
    """What went into a dump; None: it does not tell."""

    experts_TLK: np.ndarray | None = None
    request_T: np.ndarray | None = None
    decode_T: np.ndarray | None = None
    load_BLE: np.ndarray | None = None
    map_LS: np.ndarray | None = None
    balance_B: np.ndarray | None = None
    ids: list | None = None


def choices(rng, tokens, layers=3, experts=EXPERTS, top_k=TOP_K):
    """Experts of tokens, [T, L, K], no expert twice."""
    return np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k]


def slot_map(rng, layers=LAYERS):
    """A map with each expert in some slot, [layers, S]."""
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), rng.permutation(EXPERTS)[: SLOTS - EXPERTS]]))
        for _ in range(layers)
    ]
    return np.stack(rows)


def slots_of(rng, experts_TLK, map_LS):
    """A random slot of each expert; ``map_LS`` has the layers of ``experts_TLK``."""
    out = np.empty_like(experts_TLK)
    for (t, layer, k), expert in np.ndenumerate(experts_TLK):
        out[t, layer, k] = rng.choice(np.flatnonzero(map_LS[layer] == expert))
    return out


def count(ids_TLK, width):
    """How often each id was chosen, [L, width]."""
    return np.stack([np.bincount(ids_TLK[:, layer].ravel(), minlength=width) for layer in range(ids_TLK.shape[1])])


def on_all_layers(rows, fill=0):
    """Rows of MoE layers among all decoder layers."""
    out = np.full((LAYERS, *rows.shape[1:]), fill, rows.dtype)
    out[MOE] = rows
    return out


def token_record(pass_id, rank, slot_TLK, positions, lengths, mode, columns=8, inputs=None):
    """One record of SGLang's mode ``per_token``."""
    tokens = len(slot_TLK)
    topk = np.full((LAYERS, tokens, columns), -1, np.int32)
    topk[MOE, :, : slot_TLK.shape[2]] = slot_TLK.transpose(1, 0, 2)
    physical = on_all_layers(count(slot_TLK, SLOTS))
    return {
        "forward_pass_id": pass_id, "rank": rank, "gatherer_key": "primary",
        "input_ids": [1000 * pass_id + 10 * rank + i for i in range(tokens)] if inputs is None else inputs,
        "positions": [int(p) for p in positions], "extend_seq_lens": lengths, "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(topk), "misc_objects": [],
        "global_physical_count": torch.from_numpy(physical.astype(np.int32)),
    }  # fmt: skip


def detail(records, map_LS):
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(map_LS)}


def sglang_stat(folder, rng):
    load = np.stack([on_all_layers(count(choices(rng, 40), EXPERTS)) for _ in range(3)])
    buffer = np.concatenate([load, np.zeros_like(load[:1])])  # a part of it is unused
    data = {
        "rank": 0,
        "logical_count": torch.from_numpy(buffer.astype(np.int32)),
        "average_utilization_rate_over_window": 0.8125,
    }
    torch.save(data, folder / "expert_distribution_recorder_1.5.pt")
    return Known(load_BLE=load[:, MOE], balance_B=np.array([0.8125]), ids=MOE)


def sglang_stat_json(folder, rng):
    load = on_all_layers(count(choices(rng, 40), EXPERTS))
    (folder / "counts").write_text(json.dumps({"logical_count": load.tolist()}))
    return Known(load_BLE=load[None, MOE], ids=MOE)


def sglang_per_pass(folder, rng):
    map_LS = slot_map(rng)
    loads = []
    records = [[], []]
    for pass_id in range(3):
        load = 0
        for rank in range(2):
            chosen = choices(rng, 10 + rank)
            load = load + count(chosen, EXPERTS)
            physical = on_all_layers(count(slots_of(rng, chosen, map_LS[MOE]), SLOTS)).astype(np.int32)
            records[rank].append({"forward_pass_id": pass_id, "rank": rank, "gatherer_key": "primary",
                                  "global_physical_count": torch.from_numpy(physical)})  # fmt: skip
        loads.append(load)
    for rank in range(2):
        torch.save(detail(records[rank], map_LS), folder / f"expert_distribution_recorder_2.5_{rank}.pt")
    return Known(load_BLE=np.stack(loads), map_LS=map_LS[MOE], ids=MOE)


def sglang_per_token(folder, rng):
    """Two data-parallel ranks, each with two requests: one pass extends both, three decode them."""
    map_LS = slot_map(rng)
    pieces, requests, decoded, records = [], [], [], [[], []]
    prompts = [[3, 5], [4, 6]]
    for pass_id in range(4):
        for rank in range(2):
            lengths = prompts[rank]
            n = sum(lengths) if not pass_id else 2
            chosen = choices(rng, n)
            slots = slots_of(rng, chosen, map_LS[MOE])
            if not pass_id:
                positions = [p for length in lengths for p in range(length)]
                request = np.repeat([2 * rank, 2 * rank + 1], lengths)
            else:
                positions = [length + pass_id - 1 for length in lengths]
                request = np.array([2 * rank, 2 * rank + 1])
            records[rank].append(
                token_record(pass_id, rank, slots, positions, None if pass_id else lengths, 2 if pass_id else 1)
            )
            pieces.append(chosen)
            requests.append(request)
            decoded.append(np.full(n, pass_id > 0))
    for rank in range(2):
        torch.save(detail(records[rank], map_LS), folder / f"expert_distribution_recorder_3.5_{rank}.pt")
    return Known(np.concatenate(pieces), np.concatenate(requests), np.concatenate(decoded), map_LS=map_LS[MOE], ids=MOE)


def sglang_map(folder, rng):
    map_LS = slot_map(rng)
    (folder / "map").write_text(json.dumps({"physical_to_logical_map": map_LS.tolist()}))
    return Known(map_LS=map_LS[MOE], ids=MOE)


def sglang_map_pt(folder, rng):
    map_LS = slot_map(rng)
    torch.save({"physical_to_logical_map": torch.from_numpy(map_LS)}, folder / "map.pt")
    return Known(map_LS=map_LS[MOE], ids=MOE)


def raw_base64(experts_TLK, dtype="<i4"):
    return base64.b64encode(
        on_all_layers(experts_TLK.transpose(1, 0, 2)).transpose(1, 0, 2).astype(dtype).tobytes()
    ).decode()


def npy_base64(array):
    out = io.BytesIO()
    np.save(out, array)
    return base64.b64encode(out.getvalue()).decode()


def answers(rng, made):
    """Three requests, and ``made(experts, prompt, completion)`` of each."""
    pieces, requests, decoded, out = [], [], [], []
    for request, (prompt, completion) in enumerate([(5, 4), (3, 1), (6, 2)]):
        chosen = choices(rng, prompt + completion - 1)
        pieces.append(chosen)
        requests.append(np.full(len(chosen), request))
        decoded.append(np.arange(len(chosen)) >= prompt)
        out.append(made(chosen, prompt, completion))
    return out, Known(np.concatenate(pieces), np.concatenate(requests), np.concatenate(decoded), ids=MOE)


def sglang_routed(folder, rng):
    """Answers of /generate, one a line."""
    lines, known = answers(rng, lambda chosen, prompt, completion: {"text": "a [b] {c}", "meta_info": {
        "id": "x", "prompt_tokens": prompt, "completion_tokens": completion, "routed_experts": raw_base64(chosen)}})  # fmt: skip
    (folder / "answers").write_text("\n".join(json.dumps(line) for line in lines))
    return known


def sglang_routed_openai(folder, rng):
    """Answers of /v1/chat/completions, as a list; numbers of one byte."""
    made, known = answers(rng, lambda chosen, prompt, completion: {
        "choices": [{"index": 0, "message": {"content": "a"}}], "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
        "sglext": {"routed_experts": raw_base64(chosen, "u1"), "routed_experts_dtype": "uint8"}})  # fmt: skip
    (folder / "answers.json").write_text(json.dumps(made))
    return known


def vllm_routed(folder, rng):
    """Prompt and answer apart, base64 of .npy."""
    lines, known = answers(rng, lambda chosen, prompt, completion: {
        "choices": [{"index": 0, "routed_experts": npy_base64(chosen[prompt:].astype(np.int16)) if completion > 1 else None}],
        "prompt_routed_experts": npy_base64(chosen[:prompt].astype(np.int16)),
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})  # fmt: skip
    (folder / "answers.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return known


def vllm_routed_lists(folder, rng):
    """Nested lists, both parts in one."""
    made, known = answers(rng, lambda chosen, prompt, completion: {
        "choices": [{"index": 0, "routed_experts": chosen.tolist()}], "prompt_routed_experts": None,
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})  # fmt: skip
    (folder / "answers.json").write_text(json.dumps(made))
    return known


def vllm_routed_choices(folder, rng):
    """As 0.30 to 0.32 write: per choice prompt and answer in one, bytes, all decoder layers; one prompt sampled thrice."""
    prompt, answers_ = 5, (4, 1, 3)
    head = choices(rng, prompt)
    tails = [choices(rng, length - 1) for length in answers_]
    made = [{"index": i, "routed_experts": npy_base64(on_all_layers(np.concatenate([head, tail]).swapaxes(0, 1)).swapaxes(0, 1)
             .astype(np.uint8))} for i, tail in enumerate(tails)]  # fmt: skip
    usage = {"prompt_tokens": prompt, "completion_tokens": sum(answers_)}
    (folder / "answer.json").write_text(json.dumps({"choices": made, "usage": usage}))
    request = np.repeat([0, 0, 1, 2], [prompt, *map(len, tails)])
    return Known(np.concatenate([head, *tails]), request, np.arange(len(request)) >= prompt, ids=MOE)


def load_table(folder, rng):
    load = rng.integers(0, 5000, (2, LAYERS, EXPERTS)) * np.isin(np.arange(LAYERS), MOE)[:, None]
    np.save(folder / "counts.npy", load)
    return Known(load_BLE=load[:, MOE], ids=MOE)


def load_table_pt(folder, rng):
    load = rng.integers(5000, 9000, (len(MOE), EXPERTS))
    torch.save(torch.from_numpy(load), folder / "expert_load_view.pt")
    return Known(load_BLE=load[None], ids=MOE)


def load_nested(folder, rng):
    """Experts without a token are not named."""
    load = rng.integers(0, 4, (len(MOE), EXPERTS)) * 17
    load[:, [0, -1]] = 5, 9
    named = {str(i): {str(e): int(n) for e, n in enumerate(row) if n} for i, row in zip(MOE, load, strict=True)}
    (folder / "counts.json.gz").write_bytes(gzip.compress(json.dumps(named).encode(), mtime=0))
    return Known(load_BLE=load[None], ids=MOE)


def load_csv(folder, rng):
    load = rng.integers(1, 5000, (len(MOE), EXPERTS))
    rows = [(e, n, i) for i, row in zip(MOE, load.tolist(), strict=True) for e, n in enumerate(row)]
    lines = ["expert_id,count,layer_id"] + [",".join(map(str, rows[at])) for at in rng.permutation(len(rows))]
    (folder / "counts.csv").write_text("\r\n".join(lines))
    return Known(load_BLE=load[None], ids=MOE)


def moe_trace(folder, rng):
    """llama.cpp while it decodes: a row a choice, no head."""
    chosen = choices(rng, 12)
    rows = [f"{layer},{e}" for token in chosen for layer, ids in zip(MOE, token, strict=True) for e in ids]
    (folder / "moe_trace.csv").write_text("\n".join(rows) + "\n")
    return Known(chosen, ids=MOE)


def router_lines(folder, rng):
    """Two ranks, of which one has no token in the second step."""
    lines, pieces = [], []
    for step, sizes in enumerate([(3, 4), (2, 0), (1, 5)]):
        for rank, size in enumerate(sizes):
            chosen = choices(rng, size)
            pieces.append(chosen)
            lines += [{"step": step, "layer": layer, "rank": rank, "num_tokens": size, "topk": TOP_K,
                       "indices": chosen[:, i].tolist()} for i, layer in enumerate(MOE)]  # fmt: skip
    (folder / "routing.jsonl").write_text("".join(json.dumps(lines[at]) + "\n" for at in rng.permutation(len(lines))))
    return Known(np.concatenate(pieces), ids=MOE)


def eplb_stats(folder, rng):
    map_LS = slot_map(rng, len(MOE))
    slots = count(slots_of(rng, choices(rng, 40), map_LS), SLOTS)
    load = np.stack([np.bincount(row, held, EXPERTS) for row, held in zip(map_LS, slots, strict=True)])
    layers = [
        {"layer": i, "physical_load": slots[i].tolist(), "logical_load": load[i].tolist()} for i in range(len(MOE))
    ]
    (folder / "stats.json").write_text(
        json.dumps({"step": 5, "physical_to_logical_map": map_LS.tolist(), "per_layer_stats": layers})
    )
    return Known(load_BLE=load[None], map_LS=map_LS, ids=MOE)


def vllm_log(folder, rng):
    balance = np.round(rng.uniform(0.3, 1, 6), 4)
    lines = ["INFO 11-25 [core.py:1] loading"]
    for step, value in enumerate(balance):
        lines.append(
            f"(EngineCore pid=1) INFO 11-25 10:00:00 [eplb_state.py:600] EPLB step: {step} for model org/Model-8B: "
            f"avg_tokens=1234.50, max_tokens=2000, balancedness={value:.4f}, steps until the next rearrangement: {3000 - step}"
        )
    lines.append(lines[-1].replace("Model-8B", "Draft"))
    (folder / "server.log").write_text("\n".join(lines) + "\n")
    return Known(balance_B=balance)


def sglang_log(folder, rng):
    balance = np.round(rng.uniform(0.3, 1, 6), 3)
    lines = [f"[2026-11-25 10:00:00 TP0] [Expert Balancedness] forward_pass_id={i} current_pass_balancedness={v:.03f} "
             f"last_10_average_balancedness=0.900 gpu_physical_count_sum=99" for i, v in enumerate(balance)]  # fmt: skip
    (folder / "server.log").write_text("\n".join(lines) + "\n")
    return Known(balance_B=balance)


def tensorrt_statistics(folder, rng, raw=False):
    """Two ranks with their own tokens, iterations 100 to 102."""
    tokens = {step: [choices(rng, 7 + rank) for rank in range(2)] for step in range(100, 103)}
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K}))
    for rank in range(2):
        keys = {f"{step}_{layer}": tokens[step][rank][:, i] for step in tokens for i, layer in enumerate(MOE)}
        save_file({key: np.bincount(ids.ravel(), minlength=EXPERTS).astype(np.int64) for key, ids in keys.items()},
                  folder / f"rank{rank}.safetensors")  # fmt: skip
        if raw:
            save_file({key: np.ascontiguousarray(ids.astype(np.int32)) for key, ids in keys.items()},
                      folder / f"rank{rank}_raw.safetensors")  # fmt: skip
    load = np.stack([sum(count(chosen, EXPERTS) for chosen in tokens[step]) for step in tokens])
    experts = np.concatenate([chosen for step in tokens for chosen in tokens[step]]) if raw else None
    return Known(experts, load_BLE=load, ids=MOE)


def tensorrt_raw(folder, rng):
    return tensorrt_statistics(folder, rng, raw=True)


def tensorrt_map(folder, rng):
    map_LS = slot_map(rng, len(MOE))
    lines = [f"num_slots: {SLOTS}", "initial_global_assignments:"]
    lines += [f"  {layer}: {row.tolist()}" for layer, row in zip(MOE, map_LS, strict=True)]
    (folder / "moe.yaml").write_text("\n".join([*lines, "layer_updates_per_iter: 0", ""]))
    return Known(map_LS=map_LS, ids=MOE)


def ascend_map(folder, rng):
    map_LS = slot_map(rng, len(MOE))
    layers = [{"layer_id": i, "device_count": DEVICES, "device_list": [
        {"device_id": d, "device_expert": held.tolist()} for d, held in enumerate(row.reshape(DEVICES, -1))]}
        for i, row in enumerate(map_LS)]  # fmt: skip
    (folder / "map.json").write_text(json.dumps({"moe_layer_count": len(MOE), "layer_list": layers}))
    return Known(map_LS=map_LS, ids=MOE)


def vllm_49572(folder, rng):
    map_LS = slot_map(rng, len(MOE))
    (folder / "map.json").write_text(json.dumps(map_LS.tolist()))
    return Known(map_LS=map_LS, ids=MOE)


def vllm_34811(folder, rng):
    ranks = rng.permutation(np.repeat(np.arange(DEVICES), EXPERTS // DEVICES))
    (folder / "ranks.json").write_text(json.dumps({"expert_to_ep_rank": ranks.tolist()}))
    row = [expert for rank in range(DEVICES) for expert in np.flatnonzero(ranks == rank)]
    return Known(map_LS=np.tile(row, (len(MOE), 1)), ids=MOE)


def tokenspeed(folder, rng):
    map_LS = slot_map(rng)
    load = 0
    for rank in range(2):
        chosen = choices(rng, 20 + rank)
        slots = on_all_layers(count(slots_of(rng, chosen, map_LS[MOE]), SLOTS))
        experts = on_all_layers(count(chosen, EXPERTS))
        load = load + experts
        torch.save({"ep_rank": rank, "ep_size": 2, "physical_count": torch.from_numpy(slots), "logical_count": torch.from_numpy(experts),
                    "physical_to_logical_map": torch.from_numpy(map_LS)}, folder / f"load-TP{rank}.expert-load.pt")  # fmt: skip
    return Known(load_BLE=load[None, MOE], map_LS=map_LS[MOE], ids=MOE)


def exflow(folder, rng):
    chosen = choices(rng, 30, top_k=1)
    np.save(folder / "trace.npy", chosen[:, :, 0])
    return Known(chosen, ids=MOE)


def selection_trace(folder, rng):
    """Two requests; dense layers are null."""
    pieces, requests, decoded = [], [], []
    for request, (prompt, answer) in enumerate([(4, 3), (2, 2)]):
        entries = []
        for index in range(1 + answer):
            chosen = choices(rng, prompt if not index else 1)
            layers = {str(layer): None for layer in range(LAYERS)}
            layers.update({str(layer): chosen[:, i].tolist() for i, layer in enumerate(MOE)})
            entries.append(layers)
            pieces.append(chosen)
            requests.append(np.full(len(chosen), request))
            decoded.append(np.full(len(chosen), index > 0))
        (folder / f"{request}.json").write_text(json.dumps(entries))
    return Known(np.concatenate(pieces), np.concatenate(requests), np.concatenate(decoded), ids=MOE)


def load_history(folder, rng):
    load = np.stack([count(choices(rng, 40), EXPERTS) for _ in range(3)])
    history = [{"logical_expert_load": step.tolist(), "timestep": i} for i, step in enumerate(load)]
    (folder / "expert-load.json").write_text(json.dumps({"load_history": history}))
    return Known(load_BLE=load, ids=MOE)


def step_routing(folder, rng):
    chosen = choices(rng, 30, layers=1)
    np.savez(folder / "008_002.npz", data=chosen[:, 0])
    return Known(chosen, ids=[2])


def route_log(folder, rng):
    chosen = choices(rng, 9, layers=1)
    lines = [{"type": "meta", "model_id": "m", "layers_logged": [2], "top_k": TOP_K}]
    lines += [{"type": "route", "req_id": "r1", "token_idx": i, "layer": 2, "topk_ids": row.tolist(), "topk_weights": [0.6, 0.4]}
              for i, row in enumerate(chosen[:, 0])]  # fmt: skip
    (folder / "moe_routes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Known(chosen, np.zeros(9, int), ids=[2])


MAKERS: dict[str, Callable[[Path, np.random.Generator], Known]] = {
    maker.__name__: maker
    for maker in (
        sglang_stat, sglang_stat_json, sglang_per_pass, sglang_per_token, sglang_map, sglang_map_pt, sglang_routed,
        sglang_routed_openai, vllm_routed, vllm_routed_lists, vllm_log, sglang_log, tensorrt_statistics, tensorrt_raw,
        tensorrt_map, ascend_map, vllm_49572, vllm_34811, tokenspeed, exflow, selection_trace, load_history, step_routing,
        route_log, vllm_routed_choices, load_table, load_table_pt, load_nested, load_csv, moe_trace, router_lines, eplb_stats,
    )
}  # fmt: skip
FORMAT = {
    "sglang_stat": "sglang-stat", "sglang_stat_json": "sglang-stat", "sglang_per_pass": "sglang-detail",
    "sglang_per_token": "sglang-detail", "sglang_map": "sglang-map", "sglang_map_pt": "sglang-map",
    "sglang_routed": "routed-experts", "sglang_routed_openai": "routed-experts", "vllm_routed": "routed-experts",
    "vllm_routed_lists": "routed-experts", "vllm_log": "balance-log", "sglang_log": "balance-log",
    "tensorrt_statistics": "tensorrt-statistics", "tensorrt_raw": "tensorrt-statistics", "tensorrt_map": "tensorrt-map",
    "ascend_map": "ascend-map", "vllm_49572": "vllm-49572", "vllm_34811": "vllm-34811", "tokenspeed": "tokenspeed",
    "exflow": "exflow", "selection_trace": "selection-trace", "load_history": "load-history",
    "step_routing": "step-routing", "route_log": "route-log",
    "vllm_routed_choices": "routed-experts", "load_table": "load-table", "load_table_pt": "load-table",
    "load_nested": "load-table", "load_csv": "load-csv", "moe_trace": "load-csv", "router_lines": "router-lines",
    "eplb_stats": "eplb-stats",
}  # fmt: skip
ONE_LAYER = ("step_routing", "route_log")
"""They name a layer, not a model's layers."""
