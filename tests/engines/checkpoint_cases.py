"""Small checkpoints of every layout, made of bytes that say which expert they belong to."""

import json
from itertools import count
from pathlib import Path

import numpy as np
import safetensors

from poise.engines.checkpoints.permutation import keep_groups
from poise.engines.shards import BITS
from poise.planning.placement import Placement

HIDDEN, EXPERTS = 3, 8
BASE = {"num_hidden_layers": 3, "num_experts_per_tok": 2, "hidden_size": HIDDEN, "moe_intermediate_size": 2}
ATTENTION = ("model.layers.{l}.self_attn.q_proj.weight", "fixed", "BF16", [EXPERTS, HIDDEN])
# config, prefix, tensors of one MoE layer: (name with {l} and {e}, what it is, type, shape of one expert or of all)
LAYOUTS = {
    "deepseek-fp8": ({"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}, [
        ATTENTION,
        ("model.layers.{l}.mlp.experts.{e}.gate_proj.weight", "single", "F8_E4M3", [2, HIDDEN]),
        ("model.layers.{l}.mlp.experts.{e}.gate_proj.weight_scale_inv", "single", "F32", [1, 1]),
        ("model.layers.{l}.mlp.experts.{e}.down_proj.weight", "single", "F8_E4M3", [HIDDEN, 2]),
        ("model.layers.{l}.mlp.gate.weight", "rows", "BF16", [HIDDEN]),
        ("model.layers.{l}.mlp.gate.e_score_correction_bias", "rows", "F32", []),
        ("model.layers.{l}.mlp.shared_experts.gate_proj.weight", "fixed", "F8_E4M3", [EXPERTS, HIDDEN]),
    ]),
    "gpt-oss-mxfp4": ({"num_local_experts": EXPERTS, "intermediate_size": 2}, [
        ATTENTION,
        ("model.layers.{l}.mlp.experts.gate_up_proj_blocks", "rows", "U8", [4, 1, 16]),
        ("model.layers.{l}.mlp.experts.gate_up_proj_scales", "rows", "U8", [4, 1]),
        ("model.layers.{l}.mlp.experts.gate_up_proj_bias", "rows", "BF16", [4]),
        ("model.layers.{l}.mlp.experts.down_proj_blocks", "rows", "U8", [3, 1, 16]),
        ("model.layers.{l}.mlp.router.weight", "rows", "BF16", [HIDDEN]),
        ("model.layers.{l}.mlp.router.bias", "rows", "BF16", []),
    ]),
    "llama4": ({"text_config": {**BASE, "num_local_experts": EXPERTS, "intermediate_size": 2}}, [
        ("language_model.model.layers.{l}.feed_forward.experts.gate_up_proj", "rows", "BF16", [HIDDEN, 4]),
        ("language_model.model.layers.{l}.feed_forward.experts.down_proj", "rows", "BF16", [2, HIDDEN]),
        ("language_model.model.layers.{l}.feed_forward.router.weight", "rows", "BF16", [HIDDEN]),
        ("language_model.model.layers.{l}.feed_forward.shared_expert.up_proj.weight", "fixed", "BF16", [EXPERTS, 3]),
        ("vision_model.layers.{l}.mlp.gate.weight", "fixed", "BF16", [EXPERTS, HIDDEN]),
    ]),
    "granite": ({"num_local_experts": EXPERTS, "intermediate_size": 2}, [
        ("model.layers.{l}.block_sparse_moe.input_linear.weight", "rows", "BF16", [4, HIDDEN]),
        ("model.layers.{l}.block_sparse_moe.output_linear.weight", "rows", "BF16", [HIDDEN, 2]),
        ("model.layers.{l}.block_sparse_moe.router.layer.weight", "rows", "F32", [HIDDEN]),
        ("model.layers.{l}.shared_mlp.input_linear.weight", "fixed", "BF16", [EXPERTS, HIDDEN]),
    ]),
    "minimax": ({"num_local_experts": EXPERTS, "intermediate_size": 2}, [
        ("model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight", "single", "F16", [2, HIDDEN]),
        ("model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight", "single", "F16", [HIDDEN, 2]),
        ("model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight", "single", "F16", [2, HIDDEN]),
        ("model.layers.{l}.block_sparse_moe.gate.weight", "rows", "F32", [HIDDEN]),
        ("model.layers.{l}.block_sparse_moe.e_score_correction_bias", "rows", "F32", []),
    ]),
    "qwen2-gptq": ({"num_experts": EXPERTS}, [
        ATTENTION,
        ("model.layers.{l}.mlp.experts.{e}.up_proj.qweight", "single", "I32", [2, 1]),
        ("model.layers.{l}.mlp.experts.{e}.up_proj.scales", "single", "F16", [1, 2]),
        ("model.layers.{l}.mlp.gate.weight", "rows", "F16", [HIDDEN]),
        ("model.layers.{l}.mlp.shared_expert.up_proj.qweight", "fixed", "I32", [EXPERTS, 2]),
        ("model.layers.{l}.mlp.shared_expert_gate.weight", "fixed", "F16", [1, HIDDEN]),
    ]),
    "ernie": ({"num_experts": EXPERTS}, [
        ATTENTION,
        ("model.layers.{l}.mlp.experts.{e}.up_proj.weight", "single", "BF16", [2, HIDDEN]),
        ("model.layers.{l}.mlp.gate.weight", "rows", "F32", [HIDDEN]),
        ("model.layers.{l}.mlp.moe_statics.e_score_correction_bias", "rows of 1", "F32", []),
    ]),
    "gemma4": ({"num_experts": EXPERTS}, [
        ATTENTION,
        ("model.layers.{l}.experts.gate_up_proj", "rows", "BF16", [4, HIDDEN]),
        ("model.layers.{l}.experts.down_proj", "rows", "BF16", [HIDDEN, 2]),
        ("model.layers.{l}.router.proj.weight", "rows", "BF16", [HIDDEN]),
        ("model.layers.{l}.router.per_expert_scale", "rows", "BF16", []),
        ("model.layers.{l}.router.scale", "fixed", "BF16", [HIDDEN]),
        ("model.layers.{l}.mlp.up_proj.weight", "fixed", "BF16", [2, HIDDEN]),
        ("model.layers.{l}.per_layer_input_gate.weight", "fixed", "BF16", [EXPERTS, HIDDEN]),
    ]),
}  # fmt: skip
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def layers_of(layout: str) -> list[int]:
    return [1, 2] if layout.startswith("deepseek") else [0, 1, 2]


def expert_placement(experts: int, devices: int, layers: list[int], groups: int, seed: int) -> Placement:
    rng = np.random.default_rng(seed)
    device = np.stack([rng.permutation(np.arange(experts) * devices // experts) for _ in layers])
    placement = Placement.from_devices(device, devices, layer_ids_L=np.array(layers))
    return keep_groups(placement, groups) if groups > 1 else placement


def random_placement(layout: str, seed: int, devices: int = EXPERTS) -> Placement:
    """Random new ids; for deepseek such that its 4 groups stay whole."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(EXPERTS) for _ in layers_of(layout)]
    if layout.startswith("deepseek"):
        rows = [np.concatenate([2 * group + rng.permutation(2) for group in rng.permutation(4)]) for _ in rows]
    slots = np.arange(EXPERTS) * devices // EXPERTS
    return Placement(np.array(rows), slots, EXPERTS, devices, np.array(layers_of(layout)))


def tensors_of(layout: str, order: dict[int, list[int]] | None = None, seed: int = 0) -> Tensors:
    """All tensors; ``order`` gives layers new ids, so that this is what relabelling must give."""
    out: Tensors = {}

    def data(key: str, dtype: str, shape) -> bytes:
        size = int(np.prod(shape)) * BITS[dtype] // 8
        return np.random.default_rng(list(f"{seed}{key}".encode())).bytes(size)

    def add(name: str, dtype: str, shape, parts: list[bytes]) -> None:
        out[name] = (dtype, tuple(shape), b"".join(parts))

    add("model.embed_tokens.weight", "BF16", [5, HIDDEN], [data("embed", "BF16", [5, HIDDEN])])
    for layer in layers_of(layout):
        ids = list(range(EXPERTS)) if order is None or layer not in order else order[layer]
        for template, kind, dtype, shape in LAYOUTS[layout][1]:
            if kind == "fixed":
                add(template.format(l=layer), dtype, shape, [data(f"{layer}{template}", dtype, shape)])
            elif kind.startswith("rows"):
                parts = [data(f"{layer}{template}{old}", dtype, shape) for old in ids]
                add(template.format(l=layer), dtype, [*[1] * kind.endswith("1"), EXPERTS, *shape], parts)
            else:
                for new, old in enumerate(ids):
                    add(template.format(l=layer, e=new), dtype, shape, [data(f"{layer}{template}{old}", dtype, shape)])
    return out


def header_of(tensors: Tensors) -> dict:
    at, entries = 0, {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    return entries


def write_shard(path: Path, tensors: Tensors, header: dict | None = None) -> None:
    text = json.dumps(header_of(tensors) if header is None else header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def write_checkpoint(folder: Path, layout: str, *, shards: int = 3, more: Tensors | None = None, **config) -> Path:
    """A checkpoint; tensors are dealt to shards in turn, so that renaming leads across them. One shard has no index."""
    folder.mkdir()
    tensors = {**tensors_of(layout), **(more or {})}
    (folder / "config.json").write_text(json.dumps({**BASE, **LAYOUTS[layout][0], **config}, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        write_shard(folder / "model.safetensors", tensors)
        return folder
    parts: list[Tensors] = [{} for _ in range(shards)]
    for at, (name, tensor) in zip(count(), tensors.items(), strict=False):
        parts[at % shards][name] = tensor
    weight_map = {}
    for at, part in enumerate(parts):
        file = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        write_shard(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


def read_checkpoint(folder: Path) -> Tensors:
    """All tensors as the format's own library reads them, each where the index says."""
    out: Tensors = {}
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"] if index.exists() else None
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            assert named is None or named[name] == file.name
            assert name not in out
            out[name] = (str(tensor["dtype"]), tuple(tensor["shape"]), bytes(tensor["data"]))
    assert named is None or named.keys() == out.keys()
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
