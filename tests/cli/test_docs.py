"""docs/engines.md, page by page: poise's commands as they stand; files in the engine's own layout where it would run."""

import ast
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tests.engines.dumps import npy_base64
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from poise.cli.main import app
from poise.planning.placement import Placement
from poise.routing.profile import load_LE
from poise.routing.synthetic import zipf_trace

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
LAYERS, EXPERTS, TOP_K, DEVICES, TOKENS = 48, 128, 8, 8, 2000


@cache
def routing():
    trace = zipf_trace(num_tokens=TOKENS, num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, exponent=0.8)
    return trace.experts.astype(np.int32)


def stat(folder):
    load = load_LE(routing(), EXPERTS)
    (folder / "dumps").mkdir()
    torch.save({"rank": 0, "logical_count": torch.from_numpy(np.stack([load, load])), "average_utilization_rate_over_window": 0.6},
               folder / "dumps" / "expert_distribution_recorder_1.pt")  # fmt: skip


def per_pass(folder):
    """The engine took the map, and counts what its slots get."""
    table = np.array(json.loads((folder / "experts.json").read_text())["physical_to_logical_map"])
    load = load_LE(routing(), EXPERTS)
    share = np.stack([load[i, row] // np.bincount(row, minlength=EXPERTS)[row] for i, row in enumerate(table)])
    records = [{"forward_pass_id": i, "rank": 0, "gatherer_key": "primary", "global_physical_count": torch.from_numpy(share)}
               for i in range(3)]  # fmt: skip
    (folder / "running").mkdir()
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(table)},
               folder / "running" / "expert_distribution_recorder_2_0.pt")  # fmt: skip


def answers(name):
    def write(folder):
        lines = []
        for chosen in np.array_split(routing().astype(np.int16), 20):
            lines.append(json.dumps({
                "choices": [{"index": 0, "routed_experts": npy_base64(chosen[-10:])}],
                "prompt_routed_experts": npy_base64(chosen[:-10]),
                "usage": {"prompt_tokens": len(chosen) - 10, "completion_tokens": 11},
            }))  # fmt: skip
        (folder / name).write_text("\n".join(lines) + "\n")

    return write


def log(folder):
    """What vLLM logs of passes of 500 tokens under the placement, after the plugin said that it is there."""
    plan, rng = Placement.load(folder / "placement.npz"), np.random.default_rng(0)
    lines = [
        "INFO [vllm_plugin.py:64] poise plans expert placement: PolicySettings(static_map=StaticMap(path='placement.npz'))"
    ]
    for step in range(8):
        chosen = routing()[rng.integers(0, TOKENS, 500)]
        count = plan.count_LED()
        device_LD = np.einsum("le,led->ld", load_LE(chosen, EXPERTS), count / count.sum(axis=2, keepdims=True))
        mean, most = device_LD.mean(axis=1).sum(), np.rint(device_LD.max(axis=1).sum())
        lines.append(
            f"INFO 11-25 10:00:00 [eplb_state.py:600] EPLB step: {step} for model Qwen/Qwen3-30B-A3B: avg_tokens={mean:.2f}, "
            f"max_tokens={int(most)}, balancedness={mean / most:.4f}"
        )
    (folder / "server.log").write_text("\n".join(lines) + "\n")


def statistics(folder):
    from safetensors.numpy import save_file

    (folder / "stats").mkdir()
    load = load_LE(routing(), EXPERTS)
    save_file(
        {f"{step}_{layer}": load[layer] for step in (100, 101) for layer in range(LAYERS)},
        folder / "stats" / "rank0.safetensors",
    )
    (folder / "stats" / "meta_info.json").write_text(
        json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K})
    )


def checkpoint(folder):
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=2, head_dim=8,
                            num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=TOP_K, vocab_size=32)  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "Qwen3-30B-A3B")


STAND_INS = {  # a line of the page that starts an engine -> what would be there afterwards
    "--expert-distribution-recorder-mode stat": stat,
    "--init-expert-location experts.json": per_pass,
    "--enable-return-routed-experts": answers("answers.jsonl"),
    "POISE_STATIC_MAP=": log,
    "EXPERT_STATISTIC_PATH=": statistics,
    "DYNAMIC_EPLB=true": lambda folder: shutil.copy(folder / "map.json", folder / "recorded.json"),
    "vllm serve Qwen3-30B-A3B-placed": answers("answers_placed.jsonl"),
}


def test_every_command_of_the_page_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path)
    ran, stood_in = [], set()
    for kind, text in re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL):
        if kind == "console":
            for line, stand_in in STAND_INS.items():
                if line in text:
                    stand_in(tmp_path)
                    stood_in.add(line)
        elif kind == "sh":
            for command in text.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                assert words[0] == "poise", command
                if "--time-limit" in words:  # as written but for how long is searched
                    at = words.index("--time-limit")
                    words[at : at + 2] = ["--work", "2"]
                done = CliRunner().invoke(app, words[1:])
                # the traffic here is so even that other maps explain the same balance: 1, undecided
                undecided = (
                    words[1] == "verify" and done.exit_code == 1 and "as predicted" in " ".join(done.output.split())
                )
                assert done.exit_code == 0 or undecided, (command, done.output)
                ran.append(words[1])
    assert stood_in == set(STAND_INS) and {"convert", "compare", "plan", "export", "verify"} <= set(ran)


def defined(tree: ast.Module) -> set[str]:
    """Functions, classes, their methods and names of a module: ``f``, ``C``, ``C.f``, ``NAME``."""
    out = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        out |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return out


def test_what_pages_name_is_there():
    """`path.py::name` of a test or of the source, in every page."""
    root = PAGE.parents[1]
    named = {
        (page.name, *match)
        for page in (root / "README.md", *root.glob("docs/**/*.md"))
        for match in re.findall(r"`((?:tests|src)/[\w/]+\.py)::([\w.]+)`", page.read_text("utf-8"))
    }
    assert len({file for _, file, _ in named if file.startswith("tests")}) > 10
    assert len({file for page, file, _ in named if page == "tour.md"}) > 15
    files = {file for _, file, _ in named if (root / file).is_file()}
    known = {file: defined(ast.parse((root / file).read_text("utf-8"))) for file in files}
    assert not [f"{page}: {file}::{name}" for page, file, name in sorted(named) if name not in known.get(file, ())]


def test_the_tour_stops_at_six_places_twice():
    tour = (PAGE.parent / "tour.md").read_text("utf-8")
    stops = re.findall(r"^\| (\w+) \| `src/poise/[\w/]+\.py::[\w.]+` \|", tour, flags=re.M)
    assert stops == ["trace", "profile", "problem", "plan", "runtime", "report"] * 2
    for where in ("a port priced", "a redundant expert decided", "a step replica decided", "a gradient reduced"):
        assert re.search(rf"^\| {where}\? \| `src/poise/[\w/]+\.py::[\w.]+`", tour, flags=re.M), where
