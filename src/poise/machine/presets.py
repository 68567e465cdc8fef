"""Constants of machines and models, with the source of every number beside it.

Rates are peaks from the vendors' datasheets (dense, without sparsity; ports one way): a calibrated cluster file beats
them. 1 Gb/s = 1.25e8 bytes/s.
"""

from __future__ import annotations

from typing import Any

GB = 1e9
GIGABIT = 1.25e8


def _device(
    tflops: float, memory_gb: float, bandwidth_gb: float, intra_gb: float, network_gb: float
) -> dict[str, float]:
    return {
        "flops_per_s": tflops * 1e12,
        "memory_bytes": memory_gb * GB,
        "memory_bytes_per_s": bandwidth_gb * GB,
        "intra_bytes_per_s": intra_gb * GB,
        "inter_bytes_per_s": network_gb * GIGABIT,
    }


# TFLOP/s dense in the 16-bit type, GB, GB/s, port into the node's fabric in GB/s one way, network Gb/s a GPU
DEVICES: dict[str, dict[str, float]] = {
    # NVIDIA V100 datasheet: 125 TFLOPS (SXM2), 32 GB, 900 GB/s, NVLink2 300 GB/s both ways; 8 GPUs share 100 Gb/s
    # in the usual cloud instance, here 12.5 Gb/s a GPU
    "v100": _device(125, 32, 900, 150, 12.5),
    # NVIDIA A100 datasheet: 312 TFLOPS, 80 GB SXM, 2039 GB/s, NVLink3 600 GB/s both ways; DGX A100 guide: 8x 200 Gb/s
    "a100": _device(312, 80, 2039, 300, 200),
    # the same with one 100 Gb/s port for 8 GPUs
    "a100-100g": _device(312, 80, 2039, 300, 12.5),
    # NVIDIA H100 datasheet: 989 TFLOPS, 80 GB SXM, 3.35 TB/s, NVLink4 900 GB/s both ways; DGX H100 guide: 8x 400 Gb/s
    "h100": _device(989, 80, 3350, 450, 400),
    # H100 datasheet, PCIe column: 756 TFLOPS, 80 GB, 2 TB/s, PCIe Gen5 128 GB/s both ways; 100 Gb/s a GPU
    "h100-pcie": _device(756, 80, 2000, 64, 100),
    # H100 SXM with 100 Gb/s a GPU
    "h100-100g": _device(989, 80, 3350, 450, 100),
    # NVIDIA H200 datasheet: as H100 SXM with 141 GB and 4.8 TB/s; DGX H200 user guide: 8x 400 Gb/s
    "h200": _device(989, 141, 4800, 450, 400),
    # MoETuner's multi-node machine (arXiv 2502.06643): H200 with 800 Gb/s
    "h200-800g": _device(989, 141, 4800, 450, 800),
    # NVIDIA DGX B200 datasheet: 36 PFLOPS sparse 16-bit over 8 GPUs -> 2250 dense, 180 GB and 8 TB/s a GPU, NVLink5
    # 1800 GB/s both ways; 8x 400 Gb/s
    "b200": _device(2250, 180, 8000, 900, 400),
    # NVIDIA GB200 NVL72 datasheet, a GPU of 72: 360 PFLOPS sparse 16-bit over 72 -> 2500 dense, 186 GB, 8 TB/s,
    # NVLink5 1800 GB/s both ways in a domain of 72; 400 Gb/s a GPU
    "gb200": _device(2500, 186, 8000, 900, 400),
    # AMD Instinct MI300X datasheet: 1307 TFLOPS, 192 GB, 5.3 TB/s; 7 Infinity Fabric links of 128 GB/s both ways
    "mi300x": _device(1307, 192, 5300, 448, 400),
}


# Dense peaks of other types, TFLOP/s, from the same datasheets: H100 and H200 1979 in fp8; DGX B200
# 72 PFLOPS fp8 and 144 PFLOPS fp4, both sparse, over 8; GB200 NVL72 720 and 1440 PFLOPS sparse over 72. A100 has no fp8:
# engines compute with fp8 weights there in 16 bits (its 624 are int8).
PEAKS: dict[str, dict[str, float]] = {
    "a100": {"16bit": 312e12},
    "h100": {"16bit": 989e12, "8bit": 1979e12},
    "h200": {"16bit": 989e12, "8bit": 1979e12},
    "b200": {"16bit": 2250e12, "8bit": 4500e12, "4bit": 9000e12},
    "gb200": {"16bit": 2500e12, "8bit": 5000e12, "4bit": 10000e12},
}


def _config(layers: int, experts: int, top_k: int, hidden: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": top_k, "hidden_size": hidden,
        "moe_intermediate_size": inner, **more,
    }  # fmt: skip


FP8 = {"quantization_config": {"quant_method": "fp8"}}

MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LLAMA4 = {"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size_mlp": 16384,
          "shared_expert_intermediate_size": 8192, "vocab_size": 202048}  # fmt: skip
DEEPSEEK = _config(61, 256, 8, 7168, 2048, first_k_dense_replace=3, n_group=8, topk_group=4, num_attention_heads=128,
                   intermediate_size=18432, n_shared_experts=1, vocab_size=129280, **MLA, **FP8)  # fmt: skip

# From each model's config.json on its publisher's page (keys as there, but for Llama 4's shared expert, which is of the
# width of an expert in the family's code).
MODELS: dict[str, dict[str, Any]] = {
    # mistralai/Mixtral-8x7B-v0.1, Mixtral-8x22B-v0.1
    "mixtral-8x7b": _config(32, 8, 2, 4096, 14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000),
    "mixtral-8x22b": _config(56, 8, 2, 6144, 16384, num_attention_heads=48, num_key_value_heads=8, vocab_size=32000),
    # allenai/OLMoE-1B-7B-0924
    "olmoe-1b-7b": _config(16, 64, 8, 2048, 1024, num_attention_heads=16, num_key_value_heads=16, vocab_size=50304),
    # Qwen/Qwen3-30B-A3B, Qwen3-235B-A22B
    "qwen3-30b-a3b": _config(48, 128, 8, 2048, 768, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                             vocab_size=151936),
    "qwen3-235b-a22b": _config(94, 128, 8, 4096, 1536, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
                               vocab_size=151936),
    # Qwen/Qwen3-Next-80B-A3B-Instruct: three of four layers have linear attention, which is not counted here
    "qwen3-next-80b-a3b": _config(48, 512, 10, 2048, 512, shared_expert_intermediate_size=512, num_key_value_heads=2,
                                  head_dim=256, vocab_size=151936),
    # zai-org/GLM-4.5, GLM-4.6 and GLM-4.7: 16-bit weights
    "glm-4.5": _config(92, 160, 8, 5120, 1536, first_k_dense_replace=3, n_shared_experts=1, num_attention_heads=96,
                       num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151552),
    # meta-llama/Llama-4-Maverick-17B-128E (every second layer), Llama-4-Scout-17B-16E (every layer)
    "llama-4-maverick": _config(48, 128, 1, 5120, 8192, interleave_moe_layer_step=2, **LLAMA4),
    "llama-4-scout": _config(48, 16, 1, 5120, 8192, **LLAMA4),
    # deepseek-ai/DeepSeek-V3, DeepSeek-R1: fp8 weights, 8 groups, compressed key/value cache
    "deepseek-v3": DEEPSEEK,
    "deepseek-r1": DEEPSEEK,
    # moonshotai/Kimi-K2-Instruct
    "kimi-k2": _config(61, 384, 8, 7168, 2048, first_k_dense_replace=1, num_attention_heads=64,
                       intermediate_size=18432, n_shared_experts=1, vocab_size=163840, **MLA, **FP8),
    # openai/gpt-oss-20b, gpt-oss-120b: MXFP4 experts, 4.25 bits a weight
    "gpt-oss-20b": _config(24, 32, 4, 2880, 2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
                           vocab_size=201088, quantization_config={"quant_method": "mxfp4"}),
    "gpt-oss-120b": _config(36, 128, 4, 2880, 2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
                            vocab_size=201088, quantization_config={"quant_method": "mxfp4"}),
    # Hecate (arXiv 2502.02581), table of models: expert inner width 2 * hidden, two matrices, every layer MoE
    "gpt-moe-s": _config(12, 64, 2, 768, 1536, poise_matrices=2),
    "gpt-moe-l": _config(12, 64, 2, 1536, 3072, poise_matrices=2),
    "bert-moe": _config(12, 64, 2, 1024, 2048, poise_matrices=2),
    "bert-moe-deep": _config(24, 64, 2, 1024, 2048, poise_matrices=2),
}  # fmt: skip
