"""Frozen cases: traffic to fit on, other traffic to judge on, a machine, a model and a size. New ones are appended.

A case is known by the hash of all that decides its figures (:meth:`FrozenCase.digest`), constants of the machine too:
results are compared where the hashes are the same. ``tests/bench/frozen.txt`` has every hash; where one changes it is a
new case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from poise.bench.traffic import FileTraffic, MadeTraffic
from poise.cost.split import Split
from poise.cost.traffic import DataFlow
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.planning.engine_rules import parse_engine
from poise.routing.synthetic import WORKLOADS

FORM = 1
"""Of what is hashed."""
CaseTraffic = FileTraffic | MadeTraffic


@dataclass(frozen=True, slots=True)
class FrozenCase:
    """One fit and one judgement.

    Parameters
    ----------
    name : how it is asked for and shown.
    fit, judge : traffic that methods are given, and that they are judged on.
    cluster : machine, as :meth:`poise.machine.cluster.Cluster.parse` takes it.
    model : preset, or None: generic sizes.
    tokens : N of a step; with ``recorded`` that of the steps as recorded.
    redundant : R, redundant slots in all.
    traffic, split, engine : how a step is priced, and who holds the maps.
    warm_up : steps that run but are not judged.
    step_slots : M of fast loops.
    recorded : steps are taken as they were recorded.
    seed : of the steps that are drawn, and of searches.
    """

    name: str
    fit: CaseTraffic
    judge: CaseTraffic
    cluster: str
    model: str | None
    tokens: int
    redundant: int
    traffic: DataFlow = "home_node_dedup"
    split: Split = "even"
    engine: str = "any"
    warm_up: int = 0
    step_slots: int = 2
    recorded: bool = False
    seed: int = 0

    @property
    def needs(self) -> tuple[tuple[str, str], ...]:
        """Files (name, sha256) that must be in the data folder; none: it runs anywhere."""
        return tuple(dict.fromkeys((*self.fit.needs, *self.judge.needs)))

    @property
    def tokens_per_step(self) -> int | None:
        """N for batching; None: steps are as recorded."""
        return None if self.recorded else self.tokens

    def digest(self) -> str:
        """sha256 over everything but the name: traffic by its hashes, sizes of the model, constants of the machine."""
        said = {key: value for key, value in asdict(self).items() if key != "name"}
        model = None if self.model is None else ModelSpec.parse(self.model)
        # what is chosen for the machine hangs on the type of the weights and the size of a step
        sizes = model or ModelSpec.generic(1, 1, np.zeros(1, np.int32))
        machine = settle(Cluster.parse(self.cluster), sizes, self.tokens, engine=parse_engine(self.engine).kernels)
        whole = {"form": FORM, **said, "sizes": model and asdict(model), "machine": machine_facts(machine)}
        text = json.dumps(_rounded(whole), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def machine_facts(cluster: Cluster) -> dict[str, Any]:
    """All constants of a cluster as JSON has them."""
    out = {}
    for field in fields(cluster):
        value = getattr(cluster, field.name)
        value = value.to_dict() if hasattr(value, "to_dict") else value
        out[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
    return out


def _rounded(value: Any) -> Any:
    """Floats to twelve digits: a last bit that differs by machine is no other case."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


SHIPPED = ("demo_trace.npz", "d502a61cb80dd5a121ce006a502b2bc68047d4330292c6bc7eee89cfe0ec95ca")
LLAMA = {
    "abstract_algebra": "66c8ccc9ad19ae2c9c9870b0372edd4edc7cb71572b06dacdc9e740b3ea4e56a",
    "anatomy": "2f62445f79eb5358d9e27918d5b1409c60ddb5c68a0325f23c2132153fcba238",
}
"""Llama-4 Maverick on two MMLU subjects, ``llama4-maverick/NAME.npz``: 23 layers, one expert of 128 a token."""
DEEPSEEK = {
    "decode_in1000out1000": "3fd526b1dd6a42fadb65638ef51d474b74c38b6196780aae0ec577c6ee180708",
    "decode_in500out1500": "d73f947447b39799c0b6029c2b54e97a9263ae0117ca3252c3382552c928e4d0",
    "prefill_in1000out1000": "97e962ee66155b2143636613d502e2a72af841fca5496897abb4d26d0c2229cb",
    "prefill_in4096": "b007f83945fbeee9b946ba45080031fc23642740e723c271caf5eb547d1f43cc",
    "prefill_in512": "bd734202496c7a2c80451a07f24a2a3121498ed52d439d9e0f734bc5e970778a",
}
"""DeepSeek-R1's loads of five workloads, ``deepseek-r1/NAME.json``."""
WORKLOAD = {"steps": 16, "tokens_per_step": 1024, "num_layers": 2, "num_experts": 64, "top_k": 8, "ranks": 8}
MADE = {
    ("balanced", 0): "0131361af726819ee48e86947fae1c01a68aac1ee0101a47366165669c870d66",
    ("balanced", 1): "55bfc39c24d0de10da000c20102ea7de414fb4f869a3110cd574ec4397b79175",
    ("hot-experts", 0): "fc8f61cd28840c38dd9bfc76dfa5b5d3865a054a4e521a74f86b4e9067acbcbe",
    ("hot-experts", 1): "e949248ebad090c437bb4bb49e53c70de3669d262622e8619075cd55e7f72826",
    ("hot-rank", 0): "c1c6f86b167dcdd31b59152314d3ea5d0d8d8d637a6dd2ebad20563dc43f25c9",
    ("hot-rank", 1): "5a8c6c58818f0fb62e17ca50f8dc85f20c5e5bbbd2543cc13fd7ef5a6f1e0c6b",
    ("spread-hot", 0): "5af5cf2cb2ab910e56081eedf55249b85748b71aba9bb43efdc7304943fe4abb",
    ("spread-hot", 1): "cbbf98740e204a4d1607be04efd4587a44fa2e610850657f98c28cf1879d1caa",
    ("ragged-source", 0): "7365755dda2bbc464801b7d9e46d535ab8f737d88347c7396b21fe5fcf68f658",
    ("ragged-source", 1): "bb1fbeec3beb9d12e78a64c22bfbf2aaf133aaccc6f659cc1721ade5edc6e863",
    ("zero-load", 0): "304e9347416120acd226914c18bb4573a0356ae86df2d7027e59d3a447ed18de",
    ("zero-load", 1): "f3ef2e152c0d2f21ce13393a382e99e27ce468c2bc67f19424bccb7508421392",
    ("rotating", 0): "4f0cdc1cd0d47495bfa40ded9f728ce636f9eef123ef57ba693262f8e023062b",
    ("rotating", 1): "f30005ea64688947a068dc77abdf5bdd9c241cda365301d122dedb4a3d0275f6",
    ("burst", 0): "801c1d8d52e3622c663b3ecc6af26c54be132455babdb2ff5067473f4d075978",
    ("burst", 1): "b69d3a86a5e85da12e159f053dff00997e423cc28e91d9128360ee12c5166435",
}
"""Hashes of what the recipes make (:func:`poise.bench.traffic.content`), by workload and seed."""


def cases_of_files() -> Iterator[FrozenCase]:
    """The 76 cases of benchmarks/choice.py: other requests, another subject, a workload that was left out, the demo."""
    subjects = {name: FileTraffic(((f"llama4-maverick/{name}.npz", digest),)) for name, digest in LLAMA.items()}
    pairs = [(f"{a} -> {b}", subjects[a], subjects[b]) for a, b in product(subjects, repeat=2) if a != b]
    pairs += [(f"{name}, other requests", *_halves(one.files[0])) for name, one in subjects.items()]
    for (name, fit, judge), (cluster, devices), tokens, each in product(
        pairs, (("1x8:h200", 8), ("2x4:h200", 8), ("2x8:h100", 16)), (512, 4096), (0, 1)
    ):
        where = f"llama-4 {name}, {cluster}, N = {tokens}, R = {each * devices}"
        yield FrozenCase(where, fit, judge, cluster, "llama-4-maverick", tokens, each * devices)
    loads = {name: (f"deepseek-r1/{name}.json", digest) for name, digest in DEEPSEEK.items()}
    for name, each in product(loads, (0, 1)):
        others = FileTraffic(tuple(file for other, file in loads.items() if other != name))
        for cluster, tokens in (("8x8:h200", 8192), ("4x8:b200", 65536)):
            redundant = each * (64 if cluster.startswith("8") else 32)
            where = f"deepseek, {name} left out, {cluster}, N = {tokens}, R = {redundant}"
            yield FrozenCase(
                where, others, FileTraffic((loads[name],)), cluster, "deepseek-r1", tokens, redundant, "home"
            )
    for cluster, tokens, redundant in product(("2x4:h100", "1x8:a100"), (1024, 8192), (0, 8)):
        where = f"demo, other requests, {cluster}, N = {tokens}, R = {redundant}"
        yield FrozenCase(where, *_halves(SHIPPED, ships=True), cluster, None, tokens, redundant)


def _halves(file: tuple[str, str], domain: str = "", *, ships: bool = False) -> tuple[FileTraffic, FileTraffic]:
    """Every second request of a file, or of one domain of it, and the others."""
    of = f"domain={domain}," if domain else ""
    return FileTraffic((file,), f"{of}half=even", ships), FileTraffic((file,), f"{of}half=odd", ships)


def cases_of_one_domain() -> Iterator[FrozenCase]:
    """Skewed traffic of the trace that ships: one kind of text, and what it turns to; for fast loops too."""
    fit, judge = _halves(SHIPPED, "python", ships=True)
    turned = FileTraffic((SHIPPED,), "domain=dictionary", ships=True)
    for (name, judged), tokens, redundant in product(
        (("python, other requests", judge), ("python -> dictionary", turned)), (256, 1024), (0, 8)
    ):
        where = f"demo {name}, 2x4:h100, N = {tokens}, R = {redundant}"
        warm_up = 5 if tokens == 256 else 1
        yield FrozenCase(where, fit, judged, "2x4:h100", "gpt-oss-20b", tokens, redundant, warm_up=warm_up)


def cases_of_workloads() -> Iterator[FrozenCase]:
    """Token imbalances W0 to W7, from rank to rank and step to step, on the sizes of a small model."""
    for name, words in WORKLOADS.items():
        fit, judge = (
            MadeTraffic("workload", (("workload", name), *WORKLOAD.items(), ("seed", seed)), MADE[name, seed])
            for seed in (0, 1)
        )
        for cluster, redundant in (("1x8:h200", 0), ("2x4:h100", 8)):
            where = f"{words.partition(':')[0]} {name}, {cluster}, N = {WORKLOAD['tokens_per_step']}, R = {redundant}"
            yield FrozenCase(
                where, fit, judge, cluster, "olmoe-1b-7b", WORKLOAD["tokens_per_step"], redundant, warm_up=4,
                recorded=True,
            )  # fmt: skip


@cache
def frozen_cases() -> Mapping[str, FrozenCase]:
    """All of them by name, in order."""
    every = [*cases_of_files(), *cases_of_one_domain(), *cases_of_workloads()]
    return {case.name: case for case in every}
