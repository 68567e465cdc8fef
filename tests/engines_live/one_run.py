"""One rank of a run, with the Python of an engine's environment: the engine starts, and answers all prompts greedily.

Usage: python one_run.py RUN.json, where the file holds ``model``, ``ranks``, ``eplb`` (vLLM's ``--eplb-config``, or
null), ``rounds`` of prompts (token ids), ``max_tokens`` and ``out``. A line of JSON a round goes to ``out.rank-N``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # who waits too long asks where it hangs
    asked = json.loads(Path(sys.argv[1]).read_text())
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
    with Path(f"{asked['out']}.rank-{os.environ.get('RANK', 0)}").open("w") as out:
        for number, prompts in enumerate(asked["rounds"]):
            print(f"ROUND {number}", file=sys.stderr, flush=True)
            said = engine.generate([{"prompt_token_ids": one} for one in prompts], greedy, use_tqdm=False)
            rows = [answer(one.outputs[0]) for one in said]
            out.write(json.dumps({"round": number, "answers": rows}) + "\n")
            out.flush()
    print("ROUNDS DONE", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(0)  # what gloo's threads do when the interpreter ends is not the engine's


def answer(one: Any) -> dict[str, Any]:
    """Tokens, and the log of each one's probability."""
    chosen = zip(one.token_ids, one.logprobs, strict=True)
    return {"tokens": list(one.token_ids), "logprobs": [near[token].logprob for token, near in chosen]}


if __name__ == "__main__":
    main()
