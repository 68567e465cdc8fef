"""Speaks SGLang's recorder endpoints and replays the demo trace: every record is STEPS steps, whatever time it took.

As the engine does (0.5.x): the answers are a line of text, the dump is a ring buffer's content, unused rows and all,
saved with torch.save, dense layers have rows of zeros, and slots are split over ranks in order. What the engine has
not, under ``/replay``: its own measured balance, another domain, and a restart with the newest exported map (409
before there is one). As there, a start draws a seed and is told where its map was.
"""

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, urlsplit

import numpy as np

STEPS, TOKENS, RANKS, REDUNDANT, BUFFER = 12, 96, 8, 8, 20


class Traffic:
    """Steps of a domain: TOKENS of its tokens, drawn with a seed; a dense layer comes first."""

    def __init__(self, seed=0):
        with np.load(files("poise") / "data" / "demo_trace.npz", allow_pickle=False) as trace:
            self.experts, self.domain = trace["experts"], trace["domain"]
            self.names = trace["domain_names"].tolist()
            self.num_experts = int(trace["num_experts"])
        self.rng = np.random.default_rng(seed)

    def step(self, name):
        """Tokens of each expert, int32 [1 + L, E]."""
        rows = self.rng.choice(np.flatnonzero(self.domain == self.names.index(name)), TOKENS, replace=False)
        out = np.zeros((1 + self.experts.shape[1], self.num_experts), np.int32)
        for layer in range(self.experts.shape[1]):
            out[1 + layer] = np.bincount(self.experts[rows, layer].ravel(), minlength=self.num_experts)
        return out


def balance(map_LS, count_LE, ranks=RANKS):
    """Fullest over mean rank, mean over layers with tokens, when replicas share tokens evenly."""
    out = []
    for slots, count in zip(np.asarray(map_LS), count_LE, strict=True):
        if count.sum():
            share = count / np.bincount(slots, minlength=len(count))
            rank = share[slots].reshape(ranks, -1).sum(axis=1)
            out.append(rank.max() / rank.mean())
    return float(np.mean(out))


class Engine:
    def __init__(self, dump_dir, map_path, key):
        self.dump_dir, self.map_path, self.key = Path(dump_dir), Path(map_path), key
        self.traffic, self.lock, self.domain = Traffic(), Lock(), "english"
        experts, layers = self.traffic.num_experts, 1 + self.traffic.experts.shape[1]
        self.map_LS = np.tile(np.arange(experts + REDUNDANT) % experts, (layers, 1))
        self.ring, self.at = np.zeros((BUFFER, layers, experts), np.int32), 0
        self.recording, self.generation, self.down, self.location = False, 0, 0, "trivial"
        self.history = []

    def start(self):
        self.ring[:] = 0
        self.recording = True
        return "Start recording the expert distribution.\n"

    def stop(self):
        for _ in range(STEPS if self.recording else 0):
            self.ring[self.at % BUFFER] = self.traffic.step(self.domain)
            self.history.append([self.generation, self.domain, balance(self.map_LS, self.ring[self.at % BUFFER])])
            self.at += 1
        self.recording = False
        return "Stop recording the expert distribution.\n"

    def dump(self):
        import torch

        self.dump_dir.mkdir(exist_ok=True)
        data = {
            "rank": 0,
            "logical_count": torch.from_numpy(self.ring.copy()),
            "average_utilization_rate_over_window": None,
        }
        torch.save(data, self.dump_dir / f"expert_distribution_recorder_{time.time()}.pt")
        self.ring[:] = 0
        return "Dump expert distribution record.\n"

    def restart(self):
        self.map_LS = np.array(json.loads(self.map_path.read_text())["physical_to_logical_map"])
        self.generation, self.recording, self.down = self.generation + 1, False, 1
        self.location = str(self.map_path.absolute())
        return "restarted\n"

    def settings(self):
        return {"expert_distribution_recorder_mode": "stat", "ep_size": RANKS, "ep_num_redundant_experts": REDUNDANT,
                "enable_eplb": False, "init_expert_location": self.location, "random_seed": self.generation,
                "internal_states": []}  # fmt: skip

    def answer(self, method, target):
        """Status and text, or None: the connection is dropped, as by an engine that is starting."""
        parts = urlsplit(target)
        if parts.path == "/replay":
            return 200, json.dumps({"history": self.history, "recording": self.recording, "down": self.down})
        if parts.path == "/replay/restart":
            if not self.map_path.is_file():
                return 409, "no map yet: wait for the first plan that is taken\n"
            return 200, self.restart()
        if parts.path == "/replay/domain":
            self.domain = parse_qs(parts.query)["name"][0]
            return 200, "changed\n"
        if self.down:
            self.down -= 1
            return None
        if parts.path == "/server_info" and method == "GET":
            return 200, json.dumps(self.settings())
        for verb in ("start", "stop", "dump"):
            if parts.path == f"/{verb}_expert_distribution_record":
                return 200, getattr(self, verb)()
        return 404, "Not Found"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        engine = self.server.engine
        replay = self.path.startswith("/replay")
        with engine.lock:
            if not replay and engine.key and self.headers.get("Authorization") != f"Bearer {engine.key}":
                got = 401, json.dumps({"error": "Unauthorized"})
            else:
                got = engine.answer(self.command, self.path)
        if got is None:
            self.close_connection = True
            return
        body = got[1].encode()
        self.send_response(got[0])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *words):
        pass


def main():
    parser = argparse.ArgumentParser()
    for name in ("--dump-dir", "--map", "--key"):
        parser.add_argument(name, default="")
    parser.add_argument("--port", type=int, default=0)
    words = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", words.port), Handler)
    server.engine = Engine(words.dump_dir, words.map, words.key)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
