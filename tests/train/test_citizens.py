"""Cases on four processes beside the rest of PyTorch and Hugging Face (citizen_cases.py), all in one launch."""

import json

import pytest
from tests.train.launch import torchrun

CASES = (
    "hf_mixtral", "hf_qwen3_moe", "hf_olmoe", "hf_gpt_oss", "hf_deepseek_v3", "fsdp2_passes_over_experts",
    "fsdp2_ignored_params", "hsdp", "ddp", "hf_fsdp2", "groups_foreach_fused", "clip_norms", "precision_float32",
    "precision_bfloat16", "autocast", "accumulation", "checkpoint_block", "checkpoint_experts_only",
    "checkpoint_hugging_face", "checkpoint_router_flips", "checkpoint_two_passes_open", "checkpoint_reentrant_is_refused",
    "errors", "failed_backward_is_forgotten", "gradcheck", "directional_derivative_of_expert_weights", "second_backward",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("citizens") / "results.jsonl"
    said = torchrun(4, "tests/train/citizen_cases.py", "--out", str(out), check=False)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {line["case"]: line for line in lines if not line["failed"]}, lines, said


@pytest.mark.parametrize("case", CASES)
def test_case(case, results):
    passed, lines, said = results
    failed = [f"rank {line['rank']}: {line['failed']}" for line in lines if line["case"] == case and line["failed"]]
    assert not failed, "\n".join(failed)
    assert case in passed, f"{case} did not run\n{said[-3000:]}"
