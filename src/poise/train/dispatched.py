"""Experts behind a token dispatcher, as torchtitan has them (``moe.routed_experts.inner_experts``).

Its module calls ``dispatcher.dispatch``, the experts with what that returns, and ``dispatcher.combine``. Here the
dispatcher hands tokens and routing on as they are, and the sharded experts send, compute and combine. What lies around
it (routers, their correction bias and its hook, shared experts) stays torchtitan's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from poise.runtime.experts import takes_counts
from poise.util.errors import ModelError, OptionError

SEAM = "token_dispatcher"
EARLY = "score_before_experts"
"""Of a dispatcher, or what lies around it: gate weights go to the experts' inputs, which is another function."""


class Routed(NamedTuple):
    """What a router chose, in place of the tokens per expert: expert ids and weights [T, K]."""

    ids_TK: Tensor
    weights_TK: Tensor


class PassThrough:
    """A token dispatcher that dispatches nothing. Others in its place would drop or send tokens a second time."""

    def __init__(self, before: Any) -> None:
        self.num_experts, self.top_k = getattr(before, "num_experts", None), getattr(before, "top_k", None)

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        """Torchtitan's ``parallelize`` names its mesh of expert parallelism here.

        Raises
        ------
        OptionError : there is one: two would shard the same experts.
        """
        if ep_mesh is not None:
            raise OptionError(
                f"experts are sharded by poise, and torchtitan's expert parallelism is on ({ep_mesh.size()} ranks)",
                hint="parallelism.expert_parallel_degree = 1",
            )

    def dispatch(
        self, x_Td: Tensor, weights_TK: Tensor, ids_TK: Tensor, counts_E: Tensor
    ) -> tuple[Tensor, Routed, None]:
        """Tokens as they are, and their routing in place of counts."""
        return x_Td, Routed(ids_TK, weights_TK), None

    def combine(self, out_Td: Tensor, metadata: None, x_Td: Tensor) -> Tensor:
        """The weighted sums, which the experts made."""
        return out_Td


def lies_behind_dispatcher(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module is experts that get their tokens from a dispatcher beside them.

    Raises
    ------
    ModelError : it takes sorted tokens, is named ``experts``, and there is none; or tokens are weighted before it.
    """
    parent, _, leaf = name.rpartition(".")
    seam = getattr(model.get_submodule(parent), SEAM, None) if name else None
    has_seam = callable(getattr(seam, "dispatch", None)) and callable(getattr(seam, "combine", None))
    if not (has_seam or leaf == "experts") or next(module.parameters(recurse=False), None) is None:
        return False
    if not takes_counts(module):
        return False
    if not has_seam:
        raise ModelError(
            f"{name} takes tokens sorted by expert, and {parent or 'the model'} has no {SEAM}",
            hint="experts are called as experts(tokens [T, d], ids [T, K], weights [T, K])",
        )
    around = (seam, model.get_submodule(parent), model.get_submodule(parent.rpartition(".")[0]))
    if any(getattr(one, EARLY, False) for one in around):
        raise ModelError(
            f"{parent} weights tokens before its experts ({EARLY} = True), and poise weights what they give",
            hint=f"{EARLY} = False, where the model was trained so",
        )
    return True


def pass_tokens_on(model: nn.Module, name: str) -> None:
    """Let the dispatcher beside these experts hand on tokens and routing."""
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, SEAM, PassThrough(getattr(parent, SEAM)))


def router_place(model: nn.Module, name: str) -> str:
    """The module whose forward has the router of these sharded experts: what holds them, or them and a dispatcher."""
    parent = name.rpartition(".")[0]
    behind = isinstance(getattr(model.get_submodule(parent), SEAM, None), PassThrough)
    return parent.rpartition(".")[0] if behind else parent
