"""Relabelled checkpoints as files: copying, what is refused, bounded memory, damage."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tests.engines.checkpoint_cases import (
    EXPERTS,
    expert_placement,
    random_placement,
    read_checkpoint,
    tensors_of,
    write_checkpoint,
    write_shard,
)

from poise.engines import shards
from poise.engines.checkpoints import checkpoint
from poise.engines.checkpoints.checkpoint import relabel_checkpoint
from poise.engines.checkpoints.permutation import permutation
from poise.planning.placement import Placement
from poise.util.errors import InputError, ModelError, OptionError, PlacementError


@pytest.mark.parametrize("failure", [errno.EXDEV, errno.ENOSYS, None, "short"])
def test_copying_without_the_kernels_help(failure, tmp_path, monkeypatch):
    real = os.copy_file_range

    def copy(read, write, count, start, to):
        if failure == "short":
            return real(read, write, min(count, 3), start, to)
        if failure is None:
            return 0
        raise OSError(failure, "no")

    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 5)
    source = write_checkpoint(tmp_path / "model", "gpt-oss-mxfp4")
    placement = random_placement("gpt-oss-mxfp4", 0)
    relabel_checkpoint(placement, source, tmp_path / "new")
    assert read_checkpoint(tmp_path / "new") == tensors_of(
        "gpt-oss-mxfp4", dict(enumerate(permutation(placement).tolist()))
    )


def change(name, tensor):
    """Replace or add a tensor of the second layer's MoE module (None: remove it)."""

    def act(tensors):
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return act


LAYER = "model.layers.1"
MLP = f"{LAYER}.mlp"
UNKNOWN = [
    change(f"{MLP}.gate.tid2eid", ("I64", (5, 2), bytes(80))),
    change(f"{MLP}.tid2eid", ("F32", (5, 2), bytes(40))),
    change(f"{MLP}.order", ("I32", (5,), bytes(20))),
    change(f"{MLP}.gate.qweight", ("U8", (1, 1), bytes(1))),
    change(f"{MLP}.experts.magic", ("U8", (EXPERTS,), bytes(EXPERTS))),
    change(f"{MLP}.moe_statics.bias", ("F32", (1, EXPERTS), bytes(4 * EXPERTS))),
    # of the layer, but not of its MoE module
    change(f"{LAYER}.moe.router.expert_bias", ("F32", (EXPERTS,), bytes(4 * EXPERTS))),
    change(f"{LAYER}.moe.gate.weight", ("F32", (EXPERTS + 1, 1), bytes(4 * EXPERTS + 4))),
    change(f"{LAYER}.moe.router.scale", ("F32", (3,), bytes(12))),
    change(f"{LAYER}.self_attn.router.weight", ("F32", (3, 1), bytes(12))),
    change(f"{LAYER}.input_layernorm.weight", ("F32", (EXPERTS,), bytes(4 * EXPERTS))),  # the model is as wide
    change(f"{LAYER}.scale_of_each", ("F32", (2, EXPERTS), bytes(8 * EXPERTS))),
    change("model.expert_bias_of_all", ("F32", (3, EXPERTS), bytes(12 * EXPERTS))),
]


@pytest.mark.parametrize("act, match", [
    *[(act, "it is not known whether") for act in UNKNOWN],
    (change(f"{MLP}.gate.weight", None), "layer 1 has experts under 'model.layers.1.mlp' and no router"),
    (change(f"{MLP}.gate.weight", ("F32", (EXPERTS + 1, 1), bytes(4 * EXPERTS + 4))), "should begin with 8 experts"),
    (change(f"{MLP}.experts.gate_up_proj", ("F32", (), bytes(4))), "should begin with 8 experts"),
    (change(f"{MLP}.experts.down_proj", ("F4", (EXPERTS, 1), bytes(4))), "no whole number of bytes"),
    (change(f"{MLP}.experts.8.up_proj.qweight", ("I32", (2, 1), bytes(8))), "the placement has 8 experts"),
    (change("language_model.layers.1.mlp.experts.0.w", ("I32", (2, 1), bytes(8))), "layer 1 has experts under"),
    (lambda tensors: [tensors.pop(name) for name in list(tensors) if f"{MLP}.experts.5." in name], "7 of 8 experts, 5 is missing"),
    (lambda tensors: [tensors.pop(name) for name in list(tensors) if MLP in name], "layer 1 is in the placement and has no experts"),
    (lambda tensors: tensors.clear(), "no layer has"),
])  # fmt: skip
def test_what_is_not_known_is_refused(act, match, tmp_path):
    source = write_checkpoint(tmp_path / "model", "qwen2-gptq", shards=1)
    tensors = tensors_of("qwen2-gptq")
    act(tensors)
    write_shard(source / "model.safetensors", tensors)
    with pytest.raises(ModelError, match=match):
        relabel_checkpoint(random_placement("qwen2-gptq", 0), source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_all_that_may_follow_is_named_and_what_cannot_is_not(tmp_path):
    source = write_checkpoint(tmp_path / "model", "qwen2-gptq", shards=1)
    width = ("F32", (EXPERTS,), bytes(4 * EXPERTS))
    harmless = {
        f"{LAYER}.self_attn.q_norm.weight": width, f"{LAYER}.linear_attn.A_log": width, f"{LAYER}.shared_mlp.bias": width,
        f"{LAYER}.mlp.gate.global_scale": ("F32", (1,), bytes(4)), "model.norm.weight": width, "lm_head.weight": width,
        f"{LAYER}.post_attention_layernorm.weight": ("F32", (3,), bytes(12)), "mtp.layers.1.norm.weight": width,
    }  # fmt: skip
    write_shard(source / "model.safetensors", {**tensors_of("qwen2-gptq"), **harmless})
    placement = random_placement("qwen2-gptq", 0)
    relabel_checkpoint(placement, source, tmp_path / "new")
    got = read_checkpoint(tmp_path / "new")
    assert {name: got[name] for name in harmless} == harmless
    names = [f"model.layers.{layer}.moe.{what}" for layer in (0, 2) for what in ("a", "b", "c")]
    write_shard(source / "model.safetensors", {**tensors_of("qwen2-gptq"), **dict.fromkeys(names, width)})
    with pytest.raises(ModelError) as failure:
        relabel_checkpoint(placement, source, tmp_path / "other")
    assert all(repr(name) in failure.value.message for name in names[:4]) and "and 2 more" in failure.value.message
    only_last = Placement(placement.slot_expert_LS[2:], placement.slot_device_S, EXPERTS, EXPERTS, np.array([1]))
    relabel_checkpoint(only_last, source, tmp_path / "third")  # the layers that keep their ids do not matter


@pytest.mark.parametrize("act, match", [
    (change(f"{MLP}.gate.weight", ("F32", (EXPERTS + 1, 1), bytes(4 * EXPERTS + 4))), "rows of what is no routed expert"),
    (lambda tensors: [tensors.update({name.replace(".experts.", ".units.expert_"): tensors.pop(name)})
                      for name in list(tensors) if MLP in name], "this kind of checkpoint cannot be relabelled"),
])  # fmt: skip
def test_reasons_are_true(act, match, tmp_path):
    source = write_checkpoint(tmp_path / "model", "qwen2-gptq", shards=1)
    tensors = tensors_of("qwen2-gptq")
    act(tensors)
    write_shard(source / "model.safetensors", tensors)
    with pytest.raises(ModelError) as failure:
        relabel_checkpoint(random_placement("qwen2-gptq", 0), source, tmp_path / "new")
    assert match in failure.value.hint and "is the placement of this model" not in failure.value.hint


def edit_index(act):
    def edit(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        act(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


GATE = "model.layers.0.block_sparse_moe.router.layer.weight"


@pytest.mark.parametrize("act, kind, match", [
    (edit_index(lambda named: named.update({GATE: "../other.safetensors"})), ModelError, "not a safetensors file of the folder"),
    (edit_index(lambda named: named.update({GATE: "/etc/passwd"})), ModelError, "not a safetensors file of the folder"),
    (edit_index(lambda named: named.update({GATE: 3})), ModelError, "not a safetensors file of the folder"),
    (edit_index(lambda named: named.update({GATE: "none.safetensors"})), ModelError, "no such file"),
    (edit_index(lambda named: named.pop(GATE)), ModelError, f"has '{GATE}' in None"),
    (edit_index(lambda named: named.update({"more": next(iter(named.values()))})), ModelError, "it lies in None"),
    (edit_index(lambda named: named.clear()), ModelError, "no weight_map"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), ModelError, "an index that does not name it"),
    (lambda folder: (folder / "model.safetensors.index.json").unlink(), ModelError, "neither model.safetensors nor"),
    (lambda folder: (folder / "config.json").unlink(), ModelError, "cannot read"),
    (lambda folder: (folder / "config.json").write_text("[]"), ModelError, "holds a list"),
    (lambda folder: (folder / "config.json").write_text('{"num_experts": 9}'), ModelError, "num_hidden_layers"),
    (lambda folder: (folder / "poise-relabelling.json").write_text("{}"), PlacementError, "is not of format"),
    (lambda folder: os.truncate(folder / "model-00001-of-00003.safetensors", 300), ModelError, "bytes"),
    (lambda folder: shutil.rmtree(folder), ModelError, "is no folder"),
])  # fmt: skip
def test_damaged_folders_are_refused(act, kind, match, tmp_path):
    source = write_checkpoint(tmp_path / "model", "granite")
    act(source)
    with pytest.raises(kind, match=match):
        relabel_checkpoint(random_placement("granite", 0), source, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "model", "granite")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    named = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    write_shard(
        first,
        {name: tensor for name, tensor in tensors_of("granite").items() if named[name] in (first.name, second.name)},
    )
    with pytest.raises(ModelError, match="4 tensors lie in two shards"):
        relabel_checkpoint(random_placement("granite", 0), source, tmp_path / "new")


def test_targets_and_placements_that_do_not_fit(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "model", "granite")
    placement = random_placement("granite", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").touch()
    for target, match in [(source, "lies in"), (source / "in", "lies in"), (tmp_path / "full", "not empty"), (tmp_path / "file", "not a folder"),
                          (tmp_path / "no" / "where", "there is no folder")]:  # fmt: skip
        with pytest.raises(OptionError, match=match):
            relabel_checkpoint(placement, source, target)
    assert (tmp_path / "full" / "file").exists()
    rows, slots, layers = placement.slot_expert_LS, placement.slot_device_S, placement.layer_ids_L
    replicas = Placement(np.hstack([rows, rows]), np.sort(np.hstack([slots, slots])), EXPERTS, EXPERTS, layers)
    with pytest.raises(PlacementError, match="16 slots for 8 experts"):
        relabel_checkpoint(replicas, source, tmp_path / "new")
    with pytest.raises(PlacementError, match="the placement has 4 experts"):
        relabel_checkpoint(Placement(np.array([[0, 1, 2, 3]]), np.array([0, 0, 1, 1]), 4, 2), source, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
        with pytest.raises(OptionError, match=r"needs .* GB, .* has 1e-09 GB left"):
            relabel_checkpoint(placement, source, tmp_path / "new")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "copy_segments", full)
        with pytest.raises(ModelError, match="No space left"):
            relabel_checkpoint(placement, source, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "full", "file"}
    (tmp_path / "new").mkdir()  # an empty folder is as good as none
    relabel_checkpoint(placement, source, tmp_path / "new")
    assert (tmp_path / "new" / "config.json").exists()


SPARSE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)
from poise.engines.checkpoints.checkpoint import relabel_checkpoint
from poise.planning.placement import Placement
report = relabel_checkpoint(Placement.load(sys.argv[1]), sys.argv[2], sys.argv[3])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # ru_maxrss would count the parent's too
print(report.bytes, int(status["VmHWM"].split()[0]) * 1024)
"""


def test_twenty_gigabytes_stream_in_less_than_two(tmp_path):
    """A sparse checkpoint with 2.1 GB fused tensors, in a process that may have no more than 2 GB of addresses."""
    experts, block = 16, 2 * 8192 * 8192
    folder = tmp_path / "model"
    folder.mkdir()
    fused = [
        f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1, 2) for part in ("gate_up_proj", "down_proj")
    ]
    single = [
        (f"model.layers.3.mlp.experts.{{}}.{part}.weight", e)
        for part in ("gate_proj", "up_proj", "down_proj", "x_proj")
        for e in range(experts)
    ]
    size, weight_map = 0, {}
    for file, names in (("a.safetensors", fused), ("b.safetensors", single)):
        at, entries, marks = 0, {}, []
        for name in names:
            shape = [experts, 8192, 8192] if isinstance(name, str) else [8192, 8192]
            key = name if isinstance(name, str) else name[0].format(name[1])
            count = experts if isinstance(name, str) else 1
            entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + count * block]}
            marks += [(at + e * block, f"{key} {e}") for e in range(count)]
            at += count * block
        for layer in (0, 1, 2, 3) if file[0] == "a" else ():
            entries[f"model.layers.{layer}.mlp.gate.weight"] = {
                "dtype": "BF16",
                "shape": [experts, 4],
                "data_offsets": [at, at + 8 * experts],
            }
            marks += [(at + 8 * e, f"gate {layer}{e:02}"[:8]) for e in range(experts)]
            at += 8 * experts
        text = json.dumps(entries).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            start = stream.tell()
            stream.truncate(start + at)
            for offset, mark in marks:
                stream.seek(start + offset)
                stream.write(mark.encode())
            stream.seek(start + block // 2)
            stream.write(random.Random(0).randbytes(2**25))  # two blocks of data
        weight_map |= dict.fromkeys(entries, file)
        size += start + at
    assert size > 20e9
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "num_hidden_layers": 4,
                "num_experts": experts,
                "num_experts_per_tok": 2,
                "hidden_size": 4,
                "moe_intermediate_size": 4,
            }
        )
    )
    placement = expert_placement(experts, 4, [0, 1, 2, 3], 1, seed=5)
    placement.save(tmp_path / "placement.npz")
    command = [sys.executable, "-c", SPARSE, str(tmp_path / "placement.npz"), str(folder), str(tmp_path / "new")]
    got = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    )
    assert got.returncode == 0, got.stderr[-2000:]
    written, peak = map(int, got.stdout.split())
    assert written > 20e9 and peak < 2 * 2**30
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "new").iterdir())
    assert used < 2**28  # holes stayed holes
    order = permutation(placement)
    for file in ("a.safetensors", "b.safetensors"):
        shard = shards.read_shard(tmp_path / "new" / file)
        with shard.path.open("rb") as stream:
            for tensor in shard.tensors:
                parts = tensor.name.split(".")
                row, count = order[int(parts[2])], tensor.shape[0] if len(tensor.shape) == 3 else 1
                if "gate.weight" in tensor.name:
                    stream.seek(len(shard.header) + tensor.begin)
                    assert stream.read(8 * experts) == b"".join(f"gate {parts[2]}{old:02}"[:8].encode() for old in row)
                    continue
                for new in range(count):
                    stream.seek(len(shard.header) + tensor.begin + new * block)
                    want = (
                        f"{tensor.name} {row[new]}"
                        if count > 1
                        else tensor.name.replace(f"experts.{parts[5]}", f"experts.{row[int(parts[5])]}") + " 0"
                    )
                    assert stream.read(len(want)) == want.encode()


MUTATIONS = 2000


def mutated_json(rng: random.Random, data):
    """One value somewhere in JSON data replaced by another."""
    path, at = [], data
    while isinstance(at, dict | list) and at and (not path or rng.random() < 0.8):
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        path.append((at, key))
        at = at[key]
    holder, key = path[-1]
    if isinstance(holder, dict) and rng.random() < 0.3:
        if rng.random() < 0.5:
            del holder[key]
        else:
            holder[
                rng.choice(["x", "", "model.layers.1.mlp.gate.tid2eid", f"{MLP}.experts.9.w", "\ud800", "a" * 2000])
            ] = holder[key]
    else:
        holder[key] = rng.choice([
            None, True, -1, 0, 1, 7, 2**40, 2**63, 2**70, 1.5, 1e400, "", "F32", "F4", "Q8", [], [0, 0], [3, 1], [2**62] * 3,
            {}, {"a": 1}, "../x.safetensors", "\ud800", "model-00001-of-00003.safetensors", [[1]], [-1, 4], [8, 3], at, [at, at],
        ])  # fmt: skip


def mutated(rng: random.Random, data: bytes, stored: bool) -> bytes:
    """A header or an index with one value replaced, some bytes replaced, or cut off."""
    length = int.from_bytes(data[:8], "little") if stored else len(data)
    if rng.random() < 0.6:
        value = json.loads(data[8 : 8 + length] if stored else data)
        mutated_json(rng, value)
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :] if stored else text
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        raw[rng.randrange(min(len(raw), 8 + length))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)


def test_mutated_files_never_surprise(tmp_path):
    """2,000 mutated headers and indexes: a typed error, or what the format's own library finds is relabelled rightly."""
    rng = random.Random(7)
    folders = [write_checkpoint(tmp_path / f"model{shards}", "qwen2-gptq", shards=shards) for shards in (1, 3)]
    placement = random_placement("qwen2-gptq", 0)
    order = permutation(placement).tolist()
    files = [path for folder in folders for path in sorted(folder.glob("model*"))]
    refused = accepted = 0
    for turn in range(MUTATIONS):
        path = rng.choice([files[0], rng.choice(files)])
        good = path.read_bytes()
        path.unlink()  # cheaper than to cut it off and write it anew
        path.write_bytes(mutated(rng, good, path.suffix == ".safetensors"))
        target = tmp_path / f"new{turn}"
        try:
            relabel_checkpoint(placement, path.parent, target)
        except InputError:
            refused += 1
            assert not target.exists()
        else:
            accepted += 1
            want = {}
            for name, (dtype, shape, content) in read_checkpoint(path.parent).items():
                key = name
                if found := re.fullmatch(r"model\.layers\.([0-2])\.mlp\.experts\.([0-7])\.(.+)", name):
                    key = f"model.layers.{found[1]}.mlp.experts.{order[int(found[1])].index(int(found[2]))}.{found[3]}"
                elif found := re.fullmatch(r"model\.layers\.([0-2])\.mlp\.gate\.weight", name):
                    step = len(content) // EXPERTS
                    content = b"".join(content[old * step : old * step + step] for old in order[int(found[1])])
                want[key] = (dtype, shape, content)
            assert read_checkpoint(target) == want
            shutil.rmtree(target)
        path.unlink()
        path.write_bytes(good)
    assert refused > MUTATIONS // 2 and accepted > MUTATIONS // 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model1", "model3"]
