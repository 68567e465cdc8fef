"""One rank of a run of SGLang, with the Python of its environment: all prompts are answered greedily.

Usage: python sglang_run.py RUN.json, where the file holds ``model``, ``ranks``, ``settings`` (fields of SGLang's
``ServerArgs``), ``max_tokens``, ``record`` (true or false: SGLang's recorder dumps after all rounds), and what
serving.py wants.

What serves is SGLang's model runner with its own batches, as its ``benchmark.one_batch`` drives them: without the
scheduler, the tokenizer and HTTP, which are processes of their own.
"""

from __future__ import annotations

import os
from array import array
from typing import Any

import serving  # type: ignore[import-not-found]


def main() -> None:
    asked = serving.asked()
    runner = start(asked, serving.RANK)
    from sglang.srt.eplb.expert_distribution import (  # type: ignore[import-not-found]
        get_global_expert_distribution_recorder as recorder,
    )

    if asked["record"]:
        recorder().start_record()
    serving.serve(asked, lambda prompts: answers(runner, prompts, asked["max_tokens"]))
    if asked["record"]:
        recorder().stop_record()
        recorder().dump_record()
    serving.end()


def start(asked: dict[str, Any], rank: int) -> Any:
    """SGLang's runner, its model loaded."""
    from sglang.benchmark import one_batch  # type: ignore[import-not-found]
    from sglang.srt.plugins import load_plugins  # type: ignore[import-not-found]
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank  # type: ignore[import-not-found]
    from sglang.srt.server_args import PortArgs, ServerArgs  # type: ignore[import-not-found]

    load_plugins()  # as each of SGLang's own processes does
    given = ServerArgs(
        model_path=asked["model"], device="cpu", dtype="float32", skip_tokenizer_init=True, tp_size=asked["ranks"],
        ep_size=asked["ranks"], attention_backend="torch_native", disable_radix_cache=True, context_length=256,
        max_total_tokens=4096, max_running_requests=8, random_seed=0, **asked["settings"],
    )  # fmt: skip
    given.resolve_once()
    ports = PortArgs.init_new(given)
    ports.nccl_port = int(os.environ.get("MASTER_PORT", ports.nccl_port))
    ranks = SpawnRanks(world_rank=spawn_world_rank(given, tp_rank=rank, pp_rank=0), gpu_id=rank)
    publish(given, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    one_batch.configure_logger(given, prefix=f" TP{rank}")
    one_batch.suppress_other_loggers = one_batch.get_tokenizer = lambda *arguments, **named: None
    return one_batch.load_model(given, ports, rank, rank)[0]


def answers(runner: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Of each prompt its tokens, and the log of each one's probability."""
    from sglang.srt.managers.schedule_batch import Req  # type: ignore[import-not-found]
    from sglang.srt.sampling.sampling_params import SamplingParams  # type: ignore[import-not-found]

    requests = []
    for number, prompt in enumerate(prompts):
        greedy = SamplingParams(temperature=0, max_new_tokens=max_tokens, ignore_eos=True)
        greedy.normalize(None)
        one = Req(rid=str(number), origin_input_text="", origin_input_ids=array("q", prompt), sampling_params=greedy)
        one.full_untruncated_fill_ids = one.origin_input_ids
        one.logprob_start_len = -1
        one.extend_end = len(one.origin_input_ids)
        requests.append(one)
    runner.clear()
    chosen, logits, batch = runner.extend(requests)
    out = [{"tokens": [], "logprobs": []} for _ in prompts]
    while True:
        note(out, chosen, logits)
        if len(out[0]["tokens"]) == max_tokens:
            return out
        chosen, logits = runner.decode(chosen, batch)


def note(out: list[dict[str, Any]], chosen: Any, logits: Any) -> None:
    likely = logits.float().log_softmax(-1).gather(1, chosen[:, None].long())[:, 0]
    for row, token, log in zip(out, chosen.tolist(), likely.tolist(), strict=True):
        row["tokens"].append(token)
        row["logprobs"].append(log)


if __name__ == "__main__":
    main()
