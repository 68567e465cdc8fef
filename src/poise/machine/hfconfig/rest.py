"""What a configuration says of a model beside its routed experts: attention, dense layers, shared experts, the head.

Sizes that only the time of the whole step needs. A key that is missing or odd gives 0, never an error: no plan depends
on them, and who uses them says what is not known (:mod:`poise.cost.rest`).
"""

from __future__ import annotations

from dataclasses import dataclass

from poise.machine.hfconfig.fields import MOST, Config, get
from poise.machine.hfconfig.read import DENSE_WIDTH, ExpertSizes

DENSE_WIDTHS = ("intermediate_size_mlp", DENSE_WIDTH, "prefix_dense_intermediate_size")
SHARED_WIDTHS = (
    "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
    "share_expert_dim",
)  # fmt: skip
SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")


@dataclass(frozen=True, slots=True)
class RestSizes:
    """Sizes beside the routed experts; 0: there is no such part, or the config does not say.

    Parameters
    ----------
    shared : summed inner width of the shared experts of an MoE layer, in the mean of them where they differ.
    dense : inner width of a dense layer.
    vocabulary : entries of the output head.
    attention : parameters of the projections of one layer's attention.
    score, cached_score : sum over heads of the widths of a key and a value that a new token meets, among new tokens
        and in the cache; they differ for latent attention, whose cache is narrower than its heads together.
    """

    shared: int
    dense: int
    vocabulary: int
    attention: int
    score: int
    cached_score: int


def read_rest(config: Config, sizes: ExpertSizes) -> RestSizes:
    """Sizes from the keys of the language model (:func:`poise.machine.hfconfig.read.text_part`)."""
    dense = 0
    if len(sizes.moe) < sizes.layers:  # else the plain width may be that of experts
        dense = _known(config, *DENSE_WIDTHS, "intermediate_size", "ffn_hidden_size")
    return RestSizes(_shared(config, sizes), dense, _known(config, "vocab_size"), *_attention(config, sizes.hidden))


def _known(config: Config, *names: str) -> int:
    """The first of these keys that holds a whole number above 0, or a list of it (a layer each); 0 where none does."""
    for name in names:
        value = get(config, name)
        if isinstance(value, list) and value and all(type(one) is int and one == value[0] for one in value):
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST:
            return value
    return 0


def _shared(config: Config, sizes: ExpertSizes) -> int:
    if str(config.get("model_type") or "").removesuffix("_text") == "llama4":
        return sizes.inner  # one, in the family's code
    width = _mean(config, SHARED_WIDTHS, sizes)
    return round(width or _mean(config, SHARED_COUNTS, sizes) * sizes.inner)


def _mean(config: Config, names: tuple[str, ...], sizes: ExpertSizes) -> float:
    """As :func:`_known`; of a list, a number each decoder layer or each MoE layer, the mean over MoE layers.

    Times and parameters are linear in it, so that the mean gives those of all layers together.
    """
    for name in names:
        value = get(config, name)
        if not isinstance(value, list):
            if known := _known(config, name):
                return known
            continue
        if len(value) not in (sizes.layers, len(sizes.moe)):
            continue
        each = [value[layer] for layer in sizes.moe] if len(value) == sizes.layers else value
        if all(type(one) is int and 0 <= one < MOST for one in each) and any(each):
            return sum(each) / len(each)
    return 0.0


def _attention(config: Config, hidden: int) -> tuple[int, int, int]:
    """Parameters, and widths of keys and values of new tokens and of the cache."""
    heads = _known(config, "num_attention_heads", "n_heads")
    latent = _known(config, "kv_lora_rank", "attention_kv_lora_dim")
    if latent:
        plain = _known(config, "qk_nope_head_dim", "attention_qk_dim")
        rope = _known(config, "qk_rope_head_dim", "attention_qk_rope_dim")
        value = _known(config, "v_head_dim", "attention_v_dim")
        if not (heads and plain and value):
            return 0, 0, 0
        query, wide = _known(config, "q_lora_rank", "attention_q_lora_dim"), heads * (plain + rope)
        parameters = query * (hidden + wide) if query else hidden * wide
        parameters += hidden * (latent + rope) + latent * heads * (plain + value) + heads * value * hidden
        return parameters, heads * (plain + rope + value), heads * (2 * latent + rope)
    if not heads:
        return 0, 0, 0
    keys = _known(config, "num_key_value_heads", "num_attention_groups", "attn_config.kv_n_heads") or heads
    width = _known(config, "head_dim") or hidden // heads
    return 2 * hidden * width * (heads + keys), 2 * heads * width, 2 * heads * width
