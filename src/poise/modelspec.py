"""The model's shape: what an expert weighs, what a token costs."""

from __future__ import annotations

from dataclasses import dataclass

from poise.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of one MoE model.

    Parameters
    ----------
    name : preset or config it came from.
    num_hidden_layers : decoder layers, dense ones included.
    moe_layer_ids : which of them are MoE layers, ascending; L = len(moe_layer_ids).
    num_experts, top_k : E routed experts, K chosen per token.
    hidden_size : width of the residual stream.
    expert_intermediate_size : inner width of one expert.
    num_expert_matrices : 3 for gated experts (gate, up, down), 2 for plain ones.
    weight_bytes : bytes per expert parameter.
    dispatch_bytes, combine_bytes : bytes per activation element on the way out and back (FP8 dispatch: 1 and 2).
    kv_bytes_per_token_layer : key/value cache bytes per token and layer (for ``stay`` traffic and for
        pricing redundant slots).
    num_expert_groups : routing groups (DeepSeek), 1 if none.
    """

    name: str
    num_hidden_layers: int
    moe_layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_intermediate_size: int
    num_expert_matrices: int = 3
    weight_bytes: float = 2.0
    dispatch_bytes: float = 2.0
    combine_bytes: float = 2.0
    kv_bytes_per_token_layer: float = 0.0
    num_expert_groups: int = 1

    def __post_init__(self) -> None:
        for attr in (
            "num_hidden_layers",
            "num_experts",
            "top_k",
            "hidden_size",
            "expert_intermediate_size",
            "num_expert_matrices",
            "weight_bytes",
            "dispatch_bytes",
            "combine_bytes",
            "num_expert_groups",
        ):
            if not getattr(self, attr) > 0:
                raise ModelError(f"{attr} must be above 0, got {getattr(self, attr)!r}")
        if self.top_k > self.num_experts:
            raise ModelError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        if not self.kv_bytes_per_token_layer >= 0:
            raise ModelError(f"kv_bytes_per_token_layer must be at least 0, got {self.kv_bytes_per_token_layer!r}")
        ids = self.moe_layer_ids
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= self.num_hidden_layers:
            raise ModelError(f"moe_layer_ids must ascend within 0..{self.num_hidden_layers - 1}, got {ids}")

    @property
    def num_moe_layers(self) -> int:
        """L."""
        return len(self.moe_layer_ids)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.num_expert_matrices * self.hidden_size * self.expert_intermediate_size

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return self.expert_parameters * self.weight_bytes

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs of one token in one expert."""
        return 2.0 * self.expert_parameters

    @property
    def dispatch_bytes_per_token(self) -> float:
        """Bytes of one token's hidden state on its way to an expert."""
        return self.hidden_size * self.dispatch_bytes

    @property
    def combine_bytes_per_token(self) -> float:
        """Bytes of one token's expert output on its way back."""
        return self.hidden_size * self.combine_bytes

    @classmethod
    def parse(cls, spec: str) -> ModelSpec:
        """A preset name (:data:`PRESETS`) or a path to a Hugging Face ``config.json``."""
        raise NotImplementedError
