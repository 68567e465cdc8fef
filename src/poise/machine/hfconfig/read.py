"""From a configuration to the sizes of its experts: the family's own rule, or the plain keys, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from poise.machine.hfconfig.families import (
    EXPERTS,
    FAMILIES,
    LATENT,
    OWN,
    REFUSED,
    SWITCHES,
    TOP_K,
    ZERO,
    Family,
    family_of,
)
from poise.machine.hfconfig.families import PLAIN as PLAIN_WIDTH
from poise.machine.hfconfig.fields import MOST_LAYERS, Config, agreed, damaged, get, number, present, same_everywhere
from poise.machine.hfconfig.layers import PLAIN, block_words
from poise.util.errors import ModelError

TEXT = ("text_config", "thinker_config", "llm_config", "language_config", "language_model_config")
"""Nested configurations of the language model. A speech model beside it (Qwen3-Omni's talker) is not read."""
DENSE_WIDTH = "dense_intermediate_size"
BLOCKS = "hybrid_override_pattern"
WIDTHS = (OWN, "expert_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
ONE_FAMILY_ONLY = frozenset({
    BLOCKS, "layers_block_type", "expert_layer_period", "expert_layer_offset", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval",
})  # fmt: skip
"""Keys that one family reads; another may count differently."""
GATED = frozenset({"silu", "swish", "swiglu", "swiglu_oai", "swigluoai", "gelu_pytorch_tanh", "geglu"})
WAY_OUT = (
    "poise does not know this family; give it a config with num_hidden_layers, num_experts, num_experts_per_tok, "
    "hidden_size, moe_intermediate_size and mlp_layer_types alone"
)

READS = "remove the keys that the model's own code does not read"

_SPEAKS = re.compile(
    r"expert|moe|sparse|dense|latent|pattern|freq|period|interleave|block_type|layer_types|layers_type|routed|pyramid"
)
_OF_EXPERTS = re.compile(r"expert|moe|routed")
_HARMLESS = re.compile(
    r"router|aux|loss|jitter|scal|norm|share|scor|bias|dtype|capacity|drop|output_|gat(e|ing)|implementation|parallel_(?!expert)|_parallel"
    r"|kernel|backend|fp32|softmax|sigmoid|_act$|activation|ep_size|dispatch|limit|group"
)
_ELSEWHERE = re.compile(
    r"attn|attention|rope|rotary|sliding|window|index|vision|audio|image|video|mtp|nextn|mamba|conv|lightning|frequency_p"
)


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """What a configuration says of its experts.

    Parameters
    ----------
    layers, moe : decoder layers, and ids of those that are MoE layers.
    experts, top_k : E, K.
    hidden, inner, matrices : width of the residual stream, inner width and matrices of one expert.
    expert_hidden : width that experts take and give, 0 where it is ``hidden``.
    bias : parameters of one expert beside its matrices.
    zeros : identity experts beside the E.
    """

    layers: int
    moe: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    inner: int
    matrices: int
    expert_hidden: int
    bias: int
    zeros: int


def text_part(config: Config) -> Config:
    """The keys of the language model: a nested ``text_config`` and its like, laid over the keys around it.

    Raises
    ------
    ModelError : two nested configurations have experts, or the two levels name different quantizations.
    """
    for _ in range(3):
        nested = [name for name in TEXT if isinstance(config.get(name), dict)]
        moe = [name for name in nested if _has_experts(config[name])]
        if len(moe) > 1:
            raise ModelError(f"{' and '.join(moe)} both have experts", hint="give the config of one of them alone")
        if not nested:
            break
        config = _laid_over(config, config[(moe or nested)[0]], nested)
    return config


def _has_experts(part: Config) -> bool:
    deeper = [part[name] for name in TEXT if isinstance(part.get(name), dict)]
    return any(present(one, EXPERTS) for one in (part, *deeper))


def _laid_over(config: Config, inner: Config, nested: list[str]) -> Config:
    outer = {key: value for key, value in config.items() if key not in nested}
    said = {key: value for key, value in inner.items() if value is not None}
    for key in ("quantization_config", "compression_config"):
        if outer.get(key) and said.get(key) and outer[key] != said[key]:
            raise ModelError(
                f"the config and its language model have a {key} each, and they differ", hint="remove one of the two"
            )
    kinds = [str(part.get("model_type") or "") for part in (said, outer)]
    known = [kind for kind in kinds if family_of(kind)[1] or family_of(kind)[0] in REFUSED]
    return {**outer, **said, "model_type": (known or [kind for kind in kinds if kind] or [""])[0]}


def read_sizes(config: Config) -> ExpertSizes:
    """Sizes of the experts, from the keys of the language model (:func:`text_part`).

    Raises
    ------
    ModelError : a size is missing, of the wrong type or contradicted by another key; no layer is an MoE layer; or a
        family that poise does not know has keys that could change the answer.
    """
    name, family = family_of(str(config.get("model_type") or ""))
    if name in REFUSED:
        raise ModelError(f"poise cannot describe {name}: {REFUSED[name]}")
    if family is None:
        _check_unknown(config, name)
        family = Family(PLAIN[0])
        known = False
    else:
        known = True
    _check_switch(config, family)
    _check_alike(config)
    layers = _count(config, family)
    moe = _moe_layers(config, family, name, layers) if known else _plain_layers(config, name, layers)
    experts, top_k = agreed(config, EXPERTS, moe, layers), agreed(config, TOP_K, moe, layers)
    if family.chosen not in (0, top_k):
        raise ModelError(
            f"{', '.join(present(config, TOP_K))} is {top_k}, routers of {name} choose {family.chosen} experts",
            hint=f"set it to {family.chosen}, or remove model_type if the code is another",
        )
    if experts < 2:
        raise ModelError(
            f"{', '.join(present(config, EXPERTS))} is {experts}: no token has a choice, the model is dense",
            hint="is it a Mixture-of-Experts model?",
        )
    hidden = number(config, *family.hidden)
    matrices = number(config, "poise_matrices", default=0) or (family.matrices if known else _matrices(config, name))
    inner = family.inner or (_width(config, family, moe, layers) if known else _plain_width(config, name, moe, layers))
    latent = _only(config, LATENT, family.latent, name)
    bias = (matrices - 1) * inner + (latent or hidden) if family.biases else 0
    zeros = family.zeros + _only(config, ZERO, family.zero, name)
    return ExpertSizes(layers, moe, experts, top_k, hidden, inner, matrices, latent, bias, zeros)


def _count(config: Config, family: Family) -> int:
    keys = family.layers.keys
    blocks = block_words(config, keys[0], keys[1:]) if BLOCKS in keys else None  # then their number may be left out
    layers = number(config, *family.count, default=len(blocks) if blocks else None)
    if not 1 <= layers <= MOST_LAYERS:
        raise damaged(f"{family.count[0]} must lie in 1..{MOST_LAYERS}, got {layers}")
    return layers


def _check_switch(config: Config, family: Family) -> None:
    """The model has experts at all."""
    for key in SWITCHES:
        value = config.get(key, False if key == family.switch else None)
        if value is not None and not value:
            raise ModelError(f"{key} is {value!r}: the model has no experts", hint="is it a Mixture-of-Experts model?")


def _check_alike(config: Config) -> None:
    """No list of layers that each have sizes of their own (pruned models)."""
    for key in ("block_configs", "layer_configs"):
        if get(config, key):
            raise ModelError(f"{key} gives every layer sizes of its own", hint="poise knows one size for all layers")


def _moe_layers(config: Config, family: Family, name: str, layers: int) -> tuple[int, ...]:
    """By the family's rule; keys that it does not read may not say otherwise."""
    found = family.layers.find(config, layers)
    if found is None:
        raise ModelError(f"the config has none of {', '.join(family.layers.keys)}", hint=f"{name} needs one of them")
    for rule in PLAIN:
        if not set(rule.keys) & set(family.layers.keys):
            other = rule.find(config, layers)
            if other is not None and other != found:
                raise ModelError(
                    f"{', '.join(present(config, rule.keys))} name {len(other)} MoE layers, the rule of {name} "
                    f"({family.layers.says}) {len(found)}: {_some(set(other) ^ set(found))} differ",
                    hint=READS,
                )
    return _any(found)


def _plain_layers(config: Config, name: str, layers: int) -> tuple[int, ...]:
    """Of a family that poise does not know: every key that speaks of layers says the same, or all are MoE layers."""
    said = [(rule, found) for rule in PLAIN if (found := rule.find(config, layers)) is not None]
    for rule, found in said[1:]:
        if found != said[0][1]:
            keys = present(config, (*said[0][0].keys, *rule.keys))
            raise ModelError(
                f"{', '.join(keys)} name different MoE layers in a config of {_called(name)}", hint=WAY_OUT
            )
    return _any(said[0][1] if said else list(range(layers)))


def _any(found: list[int]) -> tuple[int, ...]:
    if not found:
        raise ModelError("no layer is an MoE layer", hint="is it a Mixture-of-Experts model?")
    return tuple(found)


def _width(config: Config, family: Family, moe: Sequence[int], layers: int) -> int:
    if get(config, DENSE_WIDTH) is not None:  # then the plain width is the experts' (MiniMax-M3, Inkling)
        return agreed(config, (PLAIN_WIDTH, *present(config, (OWN,))), moe, layers)
    keys = present(config, family.width)
    if family.one_width and keys:
        return agreed(config, keys, moe, layers)
    if not keys:
        raise ModelError(f"the config has none of {', '.join(family.width)}", hint="is it a Mixture-of-Experts model?")
    return same_everywhere(get(config, keys[0]), keys[0], moe, layers)


def _plain_width(config: Config, name: str, moe: Sequence[int], layers: int) -> int:
    if present(config, WIDTHS):
        return agreed(config, WIDTHS, moe, layers)
    if len(moe) < layers and get(config, PLAIN_WIDTH) is not None:
        raise ModelError(
            f"intermediate_size is the width of dense layers or of experts, and {_called(name)} has both",
            hint=WAY_OUT,
        )
    return agreed(config, (OWN, PLAIN_WIDTH), moe, layers)


def _matrices(config: Config, name: str) -> int:
    """3, where the activation is one that gated experts have."""
    for key in ("mlp_hidden_act", "hidden_act", "hidden_activation", "activation_function"):
        value = config.get(key)
        if isinstance(value, str) and value.lower() not in GATED:
            raise ModelError(
                f"{key} is {value[:60]!r}, and it is not known whether the experts of {_called(name)} are gated",
                hint="add poise_matrices: 3 (gated) or 2 to the config",
            )
    return 3


def _only(config: Config, keys: Sequence[str], own: str, name: str) -> int:
    """The value of the family's own key, 0 if it has none; the others may not be set."""
    for key in keys:
        if key != own and get(config, key):
            raise ModelError(f"{key} is {get(config, key)!r}, which {_called(name)} is not known to read", hint=READS)
    return number(config, own, default=0) if own else 0


def _check_unknown(config: Config, name: str) -> None:
    """No key of the config speaks of experts in a way that poise does not understand."""
    understood = {key for rule in PLAIN for key in rule.keys if key not in ONE_FAMILY_ONLY}
    understood |= {DENSE_WIDTH} if present(config, WIDTHS) else set()
    understood |= {*EXPERTS, *TOP_K, *WIDTHS, *SWITCHES, "expert_dtype", "model_type"}
    odd = [key for key, value in config.items() if key not in understood and _speaks(key, value)]
    if odd:
        raise ModelError(
            f"{_called(name)} has {_some(odd)}, which could change its MoE layers or experts", hint=WAY_OUT
        )


def _speaks(key: str, value: object) -> bool:
    """Whether a key that nobody explained could say something of experts or layers."""
    if value is None or value is False or value in (0, "", []) or not _SPEAKS.search(key):
        return False
    if key.endswith("layer_types") and isinstance(value, list):
        return any(re.search(r"moe|mlp|ffn|dense|sparse_m|expert", str(word)) for word in value)
    return not _HARMLESS.search(key) and (bool(_OF_EXPERTS.search(key)) or not _ELSEWHERE.search(key))


def _called(name: str) -> str:
    return (
        f"the unknown family {name[:60]!r}" if name and name not in FAMILIES else name or "a config without model_type"
    )


def _some(items: object) -> str:
    shown = sorted(map(str, items))  # type: ignore[call-overload]
    return ", ".join(item[:60] for item in shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
