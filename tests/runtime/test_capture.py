"""Recording: what the routers of real model classes chose, once a token, whatever the batching."""

import json

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from poise.cli.main import app
from poise.routing.files import read
from poise.runtime.capture import Prompt, RouterCapture, find_routers, read_prompts, record
from poise.runtime.experts import recognise
from poise.util.errors import ModelError, TraceError

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_hidden_layers": 2, "num_local_experts": 6, "intermediate_size": 16},
    "Qwen2Moe": {"num_hidden_layers": 2, "num_experts": 6, "moe_intermediate_size": 16, "intermediate_size": 32,
                 "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {"num_hidden_layers": 3, "num_experts": 6, "moe_intermediate_size": 16, "mlp_only_layers": [1],
                 "intermediate_size": 32, "head_dim": 16},
    "Olmoe": {"num_hidden_layers": 2, "num_experts": 6, "intermediate_size": 16},
    "DeepseekV3": {"num_hidden_layers": 3, "n_routed_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 32,
                   "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                   "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1},
    "DeepseekV2": {"num_hidden_layers": 3, "n_routed_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 32,
                   "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                   "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_shared_experts": 1,
                   "topk_method": "greedy"},
    "LongcatFlash": {"num_layers": 2, "n_routed_experts": 6, "zero_expert_num": 5, "moe_topk": 3, "expert_ffn_hidden_size": 16,
                     "ffn_hidden_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                     "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
    "GptOss": {"num_hidden_layers": 2, "num_local_experts": 6, "intermediate_size": 16, "head_dim": 16},
}  # fmt: skip
LAYERS = {"Qwen3Moe": [0, 2], "DeepseekV3": [1, 2], "DeepseekV2": [1, 2]}


class Letters:
    """A tokenizer: one token a letter."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [3 + ord(letter) % 37 for letter in text]}


def build(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    model.set_experts_implementation("eager")  # double precision, so that batching cannot flip a near tie
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recorded_routing_is_that_of_each_sequence_alone(family):
    model = build(family)
    prompts = [Prompt("hello world", "a"), Prompt("abc", "b"), Prompt("a longer prompt", "a")]
    trace = record(model, Letters(), prompts, max_new_tokens=3, batch_size=2, temperature=0.0)
    assert trace.layer_ids.tolist() == LAYERS.get(family, [0, 1])
    assert trace.domain_names == ("a", "b") and trace.num_experts == max(6, trace.num_experts)
    for index, prompt in enumerate(prompts):
        mine = trace.experts[trace.request == index]
        assert len(mine) == len(prompt.text) + 3
        assert trace.is_decode[trace.request == index].tolist() == [False] * len(prompt.text) + [True] * 3
        assert (trace.domain[trace.request == index] == trace.domain_names.index(prompt.domain)).all()
        ids = torch.tensor([Letters()(prompt.text)["input_ids"]])
        for _ in range(3):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        with RouterCapture(model) as capture:
            model(input_ids=ids, use_cache=False)
        alone = capture.take()
        if family == "LongcatFlash":
            assert (alone >= trace.num_experts).any()
            alone = np.where(alone >= trace.num_experts, -1, alone)  # identity experts
        np.testing.assert_array_equal(np.sort(mine, axis=2), np.sort(alone, axis=2))


@torch.no_grad()
def test_heaviest_expert_comes_first():
    model = build("Olmoe")
    ids = torch.randint(3, 40, (1, 20))
    model(input_ids=ids, output_router_logits=True, use_cache=False)
    before = [len(module._forward_hooks) for module in model.modules()]
    with RouterCapture(model) as capture:
        got = model(input_ids=ids, output_router_logits=True, use_cache=False)
    top = np.stack([logits.topk(2).indices.numpy() for logits in got.router_logits], axis=1)
    np.testing.assert_array_equal(capture.take(), top)
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_identity_experts_are_recorded_and_not_run():
    with pytest.raises(ModelError, match="has 5 identity experts"):
        recognise(build("LongcatFlash").model.layers[0].mlp.experts)


def test_a_dense_model_is_refused():
    small = {**SMALL, "num_hidden_layers": 1, "intermediate_size": 16}
    small.pop("num_experts_per_tok")
    with pytest.raises(ModelError, match="no router"):
        find_routers(transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)))


def test_prompts(tmp_path):
    lines = [{"text": f"t{i}", "domain": "xy"[i % 2]} for i in range(10)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "z.txt").write_text("plain")
    prompts = read_prompts([tmp_path / "p.jsonl", tmp_path / "z.txt"], per_domain=2)
    assert [prompt.domain for prompt in prompts] == ["x", "x", "y", "y", "z"]
    for text in ("{", '{"text": 3}', '{"text": ""}', "[]", '{"domain": "x"}'):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(TraceError):
            read_prompts([tmp_path / "bad.jsonl"])
    with pytest.raises(TraceError):
        read_prompts([tmp_path / "none.txt"])


def test_record_from_the_command_line(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: 3 + i for i, word in enumerate("a b c d e".split())}}
    raw = Tokenizer(models.WordLevel(words, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    build("Olmoe").float().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"text": "a b c d", "domain": "x"}\n{"text": "e d", "domain": "y"}')
    words = [
        "record",
        tmp_path / "model",
        tmp_path / "p.jsonl",
        "-o",
        tmp_path / "t.npz",
        "--max-new-tokens",
        2,
        "--json",
    ]
    got = CliRunner().invoke(app, [str(word) for word in words])
    assert got.exit_code == 0, got.output
    assert read(tmp_path / "t.npz").num_tokens == json.loads(got.stdout)["tokens"] == 4 + 2 + 2 + 2
    words[1] = tmp_path
    got = CliRunner().invoke(app, [str(word) for word in words])
    assert got.exit_code == 2 and "config.json" in got.stderr
