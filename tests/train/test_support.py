"""Training on four processes beside the rest of PyTorch and Hugging Face (support_cases.py); some of it on two in ``make test``."""

import pytest
from tests.helpers import few_or
from tests.train.support import LIKE, MINE

SCRIPT = "tests/train/support_cases.py"
CHOSEN = few_or(list(MINE), [name for name in MINE if name not in LIKE])
ABOUT_A_RANK = (
    "accumulation",
    "beside",
    "checkpoints",
    "frozen",
    "gradients",
    "kinds",
    "lonely",
    "loops",
    "memory",
    "optimizers",
    "passes",
    "plans",
    "recompute",
    "states",
    "steps",
    "titan",
)
"""Modules (``support_*``) whose cases are about what a rank does with tools of PyTorch, and whether the others hear of it: one other
rank is enough. Four are for what is dealt to ranks, sent between them and grouped: exchanges, routing, meshes, a family."""
NEED_FOUR = {
    "averaged_over_more_ranks_than_experts",
    "checkpoint_troubles",
    "optimizers_that_cannot_move",
    "one_rank_whose_check_fails",
    "one_rank_with_another_model",
    "one_rank_with_other_options",
    "rates_of_another_machine",
}
"""Cases of those modules that need owners who hold unequally many, groups of ranks, several who agree beside one who does not, or nodes of
several devices."""
TWO_DO = {
    "hf_gpt_oss",
    "hf_deepseek_v3",
    "fsdp2_ignored_params",
    "fsdp2_passes_over_experts",
    "clip_norms",
    "groups_foreach_fused",
    "precision_bfloat16",
    "autocast",
    "compile_aot_eager",
    "options_by_copies",
    "loads_of_the_first_iteration",
    "pairs_without_an_expert",
}
"""Cases of the other modules about a family, a type of numbers or a tool, or that others do on four
once more (pairs without an expert: the hard cases); hf_mixtral, hsdp and ddp are on four."""


def on_two(name: str) -> bool:
    about_a_rank = MINE[name].__module__.rpartition("support_")[2] in ABOUT_A_RANK and name not in NEED_FOUR
    return about_a_rank or name in TWO_DO


ON_TWO = few_or([], [name for name in CHOSEN if on_two(name)])


@pytest.mark.parametrize("case", [name for name in CHOSEN if name not in ON_TWO])
def test_case(case, launched):
    launched(SCRIPT)


@pytest.mark.parametrize("case", ON_TWO)
def test_case_on_two(case, launched):
    launched(SCRIPT, world=2)


def test_what_is_left_out_is_like_a_case_that_is_not():
    assert set(LIKE) < set(MINE) and set(LIKE.values()) <= set(MINE) - set(LIKE)
    assert NEED_FOUR | TWO_DO <= set(MINE)
