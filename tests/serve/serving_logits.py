"""Cases about logits: every family, flow and placement against the plain transformers model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tests.helpers import few_or
from tests.ranks import agreed
from tests.serve import models as m
from tests.serve.harness import CASES, EXACT, answers, engine, plain

from poise.cost.traffic import DATA_FLOWS
from poise.serve.batch import Chunk, StepBatch


def steps_of(sequences: list[list[int]], homes: list[int]) -> list[list[Chunk]]:
    """Three steps: prompts and parts of prompts; decode beside the rest of a prompt; decode alone."""
    cuts = [(len(s) - 2, len(s) - 1, len(s)) if i != 1 else (7, len(s) - 1, len(s)) for i, s in enumerate(sequences)]
    steps = []
    for step in range(3):
        chunks = []
        for number in np.argsort(homes, kind="stable").tolist():
            start, stop = ((0, *cuts[number])[step], cuts[number][step])
            if stop > start:
                chunks.append(Chunk(number, homes[number], start, tuple(sequences[number][start:stop])))
        steps.append(chunks)
    return steps


def logits_error(family: str, kind: str, traffic: Any, sequences: list[list[int]], truth: list[Any]) -> float:
    """Largest relative error of any token's logits; rank 2 has no request."""
    served = engine(family, kind, traffic=traffic)
    homes = [0, 1, 3, 0, 1][: len(sequences)]
    for number, (tokens, home) in enumerate(zip(sequences, homes, strict=True)):
        if traffic == "stay" or home == served.rank:
            served.model.cache.open(number, len(tokens))
    worst, ended = 0.0, 0
    for chunks in steps_of(sequences, homes):
        batch = StepBatch(tuple(chunks), served.ranks)
        tags, logits = served.model.forward(batch, np.arange(batch.num_tokens))
        request_T = np.repeat([chunk.request for chunk in chunks], [len(chunk.tokens) for chunk in chunks])
        assert logits.shape == (len(tags), m.VOCABULARY)
        for tag, row in zip(tags.tolist(), logits, strict=True):
            expected = truth[request_T[tag]][batch.position_T[tag]]
            worst = max(worst, float((row - expected).norm() / expected.norm()))
        count = torch.tensor([len(tags)])
        dist.all_reduce(count)
        assert int(count) == batch.num_tokens, "every token ends on one rank"
        ended += len(tags)
    assert traffic == "stay" or served.rank != 2 or ended == 0
    return agreed(worst)


def family_logits(family: str) -> dict:
    sequences = [prompt + answer[:2] for prompt, answer in zip(m.prompts(5), answers(family), strict=True)]
    truth = [m.plain_logits(plain(family), tokens) for tokens in sequences]
    # a router that multiplies in float32 (DeepSeek) gives other last bits for other numbers of tokens
    mine = list(zip(sequences, truth, strict=True))[dist.get_rank() :: dist.get_world_size()]
    bound = agreed(
        max(
            float((m.stepwise_logits(plain(family), tokens) - full).norm(dim=1).div(full.norm(dim=1)).max())
            for tokens, full in mine
        )
    )
    errors, turn = {}, list(m.CONFIGS).index(family)
    for number, traffic in enumerate(DATA_FLOWS):
        one = (m.PLACEMENTS[(turn + number) % 3],)  # so that the families together have every pair
        for kind in few_or(m.PLACEMENTS, one):
            errors[f"{traffic} {kind}"] = logits_error(family, kind, traffic, sequences, truth)
    assert max(errors.values()) <= max(EXACT, 4 * bound), errors
    assert bound <= 1e-5 and (bound <= EXACT or family == "deepseek_v3"), bound
    return {"worst": max(errors.values()), "two plain runs": bound}


def logits_case(family: str) -> None:
    def run() -> dict:
        return family_logits(family)

    CASES[f"logits_{family.replace('-', '_')}"] = run


LIKE = {
    "logits_mixtral": "logits_mixtral_window",
    "logits_olmoe": "logits_qwen2_moe",
    "logits_qwen3_moe": "logits_qwen2_moe",
}
"""Cases of ``make test-all`` alone, and the case that ``make test`` runs for each; the others have every pair of flow and placement."""

for each in m.CONFIGS:
    logits_case(each)
