"""One rank of a run of vLLM, with the Python of its environment: all prompts are answered greedily.

Usage: python one_run.py RUN.json, where the file holds ``model``, ``ranks``, ``eplb`` (vLLM's ``--eplb-config``, or
null), ``max_tokens``, and what serving.py wants.
"""

from __future__ import annotations

from typing import Any

import serving  # type: ignore[import-not-found]


def main() -> None:
    asked = serving.asked()
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    more: dict[str, Any] = {}
    if asked["ranks"] > 1:
        more = {"tensor_parallel_size": asked["ranks"], "enable_expert_parallel": True,
                "distributed_executor_backend": "external_launcher"}  # fmt: skip
    if asked["eplb"] is not None:
        more |= {"enable_eplb": True, "eplb_config": asked["eplb"]}
    engine = LLM(
        asked["model"], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, max_num_seqs=8,
        max_num_batched_tokens=512, seed=0, enable_prefix_caching=False, **more,
    )  # fmt: skip
    greedy = SamplingParams(
        temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True, detokenize=False, logprobs=0
    )

    def answers(prompts: list[list[int]]) -> list[dict[str, Any]]:
        said = engine.generate([{"prompt_token_ids": one} for one in prompts], greedy, use_tqdm=False)
        return [answer(one.outputs[0]) for one in said]

    serving.serve(asked, answers, **(counted() if asked["phases"] else {}))
    serving.end()


def answer(one: Any) -> dict[str, Any]:
    """Tokens, and the log of each one's probability."""
    chosen = zip(one.token_ids, one.logprobs, strict=True)
    return {"tokens": list(one.token_ids), "logprobs": [near[token].logprob for token, near in chosen]}


def counted() -> dict[str, Any]:
    """What the stand-in counts, and how ranks tell one another."""
    import torch
    from cpu_stand_in.seen import COUNTS  # type: ignore[import-not-found]
    from vllm.distributed.parallel_state import get_world_group  # type: ignore[import-not-found]

    def gather(mine: list[int]) -> list[list[int]]:
        world = get_world_group()
        each = [torch.zeros(len(mine), dtype=torch.int64) for _ in range(world.world_size)]
        torch.distributed.all_gather(each, torch.tensor(mine), group=world.cpu_group)
        return [one.tolist() for one in each]

    return {"counts": lambda: dict(COUNTS), "gather": gather}


if __name__ == "__main__":
    main()
