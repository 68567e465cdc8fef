"""Seconds of a step beside routed experts and their all-to-alls: attention, dense layers, shared experts, the head.

By the roofline of the datasheet, at a stated context; nothing here is measured, and a part whose size the model's
config does not say counts nothing and is named. Tokens are spread evenly over devices (attention data parallelism), the
weights of these parts lie on every device. They are the same under every map: they turn milliseconds into a share of
the step. Per device with t = N / D tokens, parts one after another, each the larger of arithmetic and memory:

    attention   2 p t FLOP, p weights read                                  every layer
    scores      2 s FLOP for each new token and token it attends to         every layer
                decode: c tokens of cache, which are read; prefill: c / 2 on average, prompts of c tokens
    dense       2 m h w t FLOP of the m matrices, m h w weights read        dense layers; shared experts: MoE layers
    head        2 h v FLOP a token that is answered: all in decode, one of c in prefill

Left out: norms, router, embedding, sampling, communication of tensor parallelism. Windows of attention are not known:
every layer attends to the whole context, which is too much for models that do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from poise.machine.cluster import Cluster
from poise.machine.constants import EIGHT_BIT, FOUR_BIT, gpu_of, peak_of
from poise.machine.model import ModelSpec
from poise.util.errors import OptionError


@dataclass(frozen=True, slots=True)
class RestSeconds:
    """Seconds of a step, of all layers, on the slowest device.

    Parameters
    ----------
    attention_s, scores_s, dense_s, shared_s, head_s : projections; scores with what they read of the cache; dense
        layers; shared experts; output head.
    unknown : parts whose size the model does not say.
    """

    attention_s: float
    scores_s: float
    dense_s: float
    shared_s: float
    head_s: float
    unknown: tuple[str, ...] = ()

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.attention_s + self.scores_s + self.dense_s + self.shared_s + self.head_s


def rest_weight_bytes(model: ModelSpec) -> float:
    """Bytes of a weight beside the experts: 1 where experts have 8 bits, else 2 (4-bit checkpoints keep 16 bits)."""
    return 1.0 if FOUR_BIT <= model.weight_bytes < EIGHT_BIT else 2.0


def rest_bytes(model: ModelSpec) -> float:
    """Bytes of the weights beside the routed experts on one device, as far as the model says."""
    dense = model.num_hidden_layers - model.num_moe_layers
    each = model.num_expert_matrices * model.hidden_size
    inside = model.num_hidden_layers * model.attention_parameters
    inside += each * (dense * model.dense_intermediate_size + model.num_moe_layers * model.shared_expert_size)
    return rest_weight_bytes(model) * inside + 2.0 * 2.0 * model.vocab_size * model.hidden_size


def rest_seconds(model: ModelSpec, cluster: Cluster, tokens: float, *, context: int, decode: bool) -> RestSeconds:
    """What the rest of a step of N ``tokens`` takes; formulas in the module's docstring.

    Parameters
    ----------
    tokens : N, of all devices together.
    context : c, tokens that a decoded token attends to, or that a prompt has.

    Raises
    ------
    OptionError : tokens or context are not above 0.
    """
    if not (tokens > 0 and context > 0):
        raise OptionError(f"tokens and context must be above 0, got {tokens:g} and {context}")
    weight = rest_weight_bytes(model)
    peak = cluster.flops_per_s
    if weight < EIGHT_BIT and cluster.preset:
        gpu = gpu_of(cluster.preset)
        peak *= peak_of(gpu, weight) / peak_of(gpu, 2.0)
    own, slowest = tokens / cluster.num_devices, float(cluster.speed_D.min())

    def part(parameters: float, rows: float, bytes_: float = weight, flops_per_s: float = peak) -> float:
        if not parameters or not rows:
            return 0.0
        return max(2.0 * parameters * rows / flops_per_s, parameters * bytes_ / cluster.memory_bytes_per_s) / slowest

    layers, moe = model.num_hidden_layers, model.num_moe_layers
    wide = model.num_expert_matrices * model.hidden_size
    met = own * context if decode else own * context / 2.0
    size = model.cached_score_size if decode else model.score_size
    cache = model.kv_bytes_per_token_layer * own * (context if decode else 1.0)
    scores = max(2.0 * size * met / cluster.flops_per_s, cache / cluster.memory_bytes_per_s) / slowest
    unknown = [
        name
        for name, known, there in (
            ("attention", model.attention_parameters, True),
            ("dense layers", model.dense_intermediate_size, layers > moe),
            ("head", model.vocab_size, True),
        )
        if there and not known
    ]
    return RestSeconds(
        layers * part(model.attention_parameters, own), layers * scores,
        (layers - moe) * part(wide * model.dense_intermediate_size, own),
        moe * part(wide * model.shared_expert_size, own),
        part(model.vocab_size * model.hidden_size, own if decode else own / context, 2.0, cluster.flops_per_s),
        tuple(unknown),
    )  # fmt: skip
