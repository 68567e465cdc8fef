"""SGLang's own server, and a client that asks it over HTTP for the answers to all prompts, greedily.

Usage: python sglang_http.py RUN.json, where the file holds ``model``, ``settings`` (fields of SGLang's ``ServerArgs``, with
``tp_size`` and ``ep_size``), ``max_tokens``, ``record`` (true or false), and what serving.py wants.

The server is ``sglang.srt.entrypoints.http_server.launch_server`` with its tokenizer manager, a scheduler for each rank and
its detokenizer, all processes of their own. They are forked where SGLang would start each anew: four imports of SGLang
take minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
import urllib.request
from typing import Any

import serving  # type: ignore[import-not-found]


def main() -> None:
    asked = serving.asked()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    server = os.fork()
    if not server:
        start(asked, port)
        os._exit(0)
    address = f"http://127.0.0.1:{port}"
    while not healthy(address):
        if os.waitpid(server, os.WNOHANG)[0]:
            raise SystemExit("the server has ended")
        time.sleep(1.0)
    if asked["record"]:
        post(f"{address}/start_expert_distribution_record")
    serving.serve(asked, lambda prompts: answers(address, prompts, asked["max_tokens"]))
    if asked["record"]:
        post(f"{address}/stop_expert_distribution_record")
        post(f"{address}/dump_expert_distribution_record")
    os.kill(server, signal.SIGKILL)  # what it started ends with it, or by who started this
    serving.end()


def start(asked: dict[str, Any], port: int) -> None:
    """The server, until it ends."""
    from sglang.srt.entrypoints.http_server import launch_server  # type: ignore[import-not-found]
    from sglang.srt.plugins import load_plugins  # type: ignore[import-not-found]
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]

    begin = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: begin("fork", force=True)
    load_plugins()  # as its command does
    launch_server(ServerArgs(
        model_path=asked["model"], host="127.0.0.1", port=port, device="cpu", dtype="float32", skip_tokenizer_init=True,
        attention_backend="torch_native", sampling_backend="pytorch", grammar_backend="none", disable_radix_cache=True,
        disable_overlap_schedule=True, context_length=256, max_total_tokens=4096, max_running_requests=8, random_seed=0,
        skip_server_warmup=True, watchdog_timeout=3600, **asked["settings"],
    ))  # fmt: skip


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=60) as got:
            return bool(got.status == 200)
    except OSError:
        return False


def answers(address: str, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Of each prompt its tokens, and the log of each one's probability; one request for all."""
    asked = {
        "input_ids": prompts, "return_logprob": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
    }  # fmt: skip
    rows = [row["meta_info"]["output_token_logprobs"] for row in json.loads(post(f"{address}/generate", asked))]
    return [{"tokens": [token for _, token, *_ in row], "logprobs": [log for log, *_ in row]} for row in rows]


def post(address: str, what: object = None) -> bytes:
    request = urllib.request.Request(address, json.dumps(what).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=3600) as got:
        return got.read()


if __name__ == "__main__":
    main()
