"""Serving against the plain transformers model, all cases in one launch.

    torchrun --standalone --nproc-per-node 4 tests/serve/run_cases.py --out results.jsonl [case ...]

Every case asserts on all ranks alike and returns what it measured.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.helpers import few_or
from tests.serve import models as m

from poise.cost.traffic import DATA_FLOWS
from poise.cost.weights import StepPrice, fetch_seconds, step_price
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.serve import Engine, ServingPolicy, from_folder
from poise.serve.batch import Chunk, StepBatch
from poise.serve.load import from_config
from poise.serve.model import FAMILIES
from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import Fetch, LayerView, StepPlan, StepPolicy
from poise.stepwise.registry import parse_policy
from poise.util.errors import ModelError, OptionError, PlacementError

EXACT = 1e-9
"""Of float64 runs; measured errors are 1e-15. Norms pass through float32, where a last bit may flip."""
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


@cache
def plain(family: str) -> Any:
    return m.dense(family)


@cache
def answers(family: str, count: int = 5, new: int = 8) -> list[list[int]]:
    return [m.plain_greedy(plain(family), prompt, new) for prompt in m.prompts(count)]


def place(kind: str, family: str = "olmoe", seed: int = 0) -> Placement:
    return m.placement(kind, m.moe_layers(plain(family)), dist.get_world_size(), seed)


def engine(family: str = "olmoe", kind: str = "replicas", **options: Any) -> Engine:
    return Engine(copy.deepcopy(plain(family)), place(kind, family), m.machine(), **options)


def agreed(value: float) -> float:
    out = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(out, op=dist.ReduceOp.MAX)
    return float(out)


# ---- 1. logits of every family, flow and placement ------------------------------------------------------------------


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
    bound = max(
        float((m.stepwise_logits(plain(family), tokens) - full).norm(dim=1).div(full.norm(dim=1)).max())
        for tokens, full in zip(sequences, truth, strict=True)
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


for each in m.CONFIGS:
    logits_case(each)


# ---- 2. tokens, batching ---------------------------------------------------------------------------------------------


@case
def greedy_across_a_swap() -> dict:
    """Every flow: prompts of 1 to 23 tokens in chunks of 6, another placement in the middle, few bytes a step."""
    out = {}
    ways = (("contiguous", "replicas"), ("replicas", "uneven"), ("uneven", "contiguous"))
    for family in ("olmoe", "deepseek_v3"):
        for number, traffic in list(enumerate(DATA_FLOWS))[:: few_or(1, 2) if family == "deepseek_v3" else 1]:
            one = (ways[(number + (family == "olmoe")) % 3],)
            for before, after in few_or(ways, one) if family == "olmoe" else one:
                served = engine(family, before, traffic=traffic, budget=6)
                target = place(after, family, seed=3)

                def swap(running: Engine, target: Placement = target) -> None:
                    if len(running.steps) == 3:
                        running.swap(target, bytes_per_step=2**15)

                got = served.generate(m.prompts(), 8, before_step=swap)
                assert got == answers(family), (family, traffic, before)
                record = served.swaps[0]
                assert len(served.swaps) == 1 and not served.swapping
                assert (served.placement.count_LED() == target.count_LED()).all()
                steps = list(served.steps)
                assert 3 < 3 + record.steps < len(steps), "the switch came amid the run"
                assert [step.swapping for step in steps[3 : 3 + record.steps]] == [True] * record.steps
                assert all(step.stall_s == 0 for step in steps if not step.swapping)
                held = [served.placement.experts_of(row, served.rank) for row in range(target.num_layers)]
                for mine, bank, layer in zip(held, banks(served), m.moe_layers(plain(family)), strict=True):
                    for name, weight in bank.items():
                        full = getattr(m.block_of(plain(family), layer).experts, name)
                        assert torch.equal(weight, full[mine])
                out[f"{family} {traffic} {before}"] = [record.rounds, record.steps, record.fetched]
    assert max(rounds for rounds, *_ in out.values()) > 3
    return out


def banks(served: Engine) -> list[Any]:
    return [served.experts[layer].bank for layer in sorted(served.experts)]


@case
def fast_loops() -> dict:
    """Step replicas planned every step, by policies that keep replicas and that do not, across a swap."""
    price, out = tiny_price(), {}
    for number, policy in enumerate(("poise", "hecate", "smart-moe:interval=1,threshold=0.0")):
        for traffic in DATA_FLOWS[number % few_or(2, 3) :: few_or(2, 3)]:
            fast = ServingPolicy(parse_policy(policy), price, step_slots=2)
            served = engine("olmoe", "contiguous", traffic=traffic, fast=fast)

            def swap(running: Engine) -> None:
                if len(running.steps) == 2:
                    running.swap(place("replicas", seed=3), bytes_per_step=2**15)

            assert served.generate(m.prompts(), 12, before_step=swap) == answers("olmoe", new=12), (policy, traffic)
            assert len(served.swaps) == 1
            out[f"{policy} {traffic}"] = len(served.steps)
    return out


@dataclass(frozen=True)
class OneByOne(StepPolicy):
    """Brings one replica after the other in the background."""

    name: ClassVar[str] = "one-by-one"
    summary: ClassVar[str] = ""
    keeps: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def before_gate(self, view: LayerView) -> np.ndarray:
        return view.before_ED

    def in_background(self, view: LayerView, holders_ED: np.ndarray) -> Fetch | None:
        coming = np.zeros_like(holders_ED)
        lacking = ~holders_ED & (holders_ED.sum(axis=0) < view.slots_D)
        if lacking.any():
            coming[tuple(np.argwhere(lacking)[view.step % lacking.sum()])] = True
        return Fetch(coming, np.zeros_like(coming)) if coming.any() else None

    def after_gate(self, view: LayerView, holders_ED: np.ndarray, load_SE: np.ndarray) -> StepPlan:
        return StepPlan(holders_ED, even_quota(load_SE.sum(axis=0), holders_ED))


@case
def replicas_in_the_background() -> dict:
    """A swap comes while a fast loop's own replicas are on their way: those are taken in first, then forgotten."""
    price, landed = tiny_price(fetches=3.5), 0
    for number, traffic in enumerate(DATA_FLOWS):
        for at in few_or((3, 4), (3 + number % 2,)):
            served = engine("olmoe", "contiguous", traffic=traffic, fast=ServingPolicy(OneByOne(), price, step_slots=2))

            def swap(running: Engine, at: int = at) -> None:
                if len(running.steps) == at:
                    running.swap(place("replicas", seed=3))

            assert served.generate(m.prompts(), 12, before_step=swap) == answers("olmoe", new=12), traffic
            for layer in served.experts.values():
                landed += int(layer.split._driver.held_ED.sum() > layer.placement.count_LED()[layer.index].sum())
    assert landed > 0
    return {"layers that kept replicas": landed}


def tiny_price(fetches: float = 0.0) -> StepPrice:
    """``fetches``: steps that one expert takes in the background; 0: it comes at once."""
    model = ModelSpec("tiny", 2, (0, 1), m.EXPERTS, m.TOP_K, hidden_size=32, expert_intermediate_size=16,
                      num_expert_matrices=3, dispatch_bytes=8.0, combine_bytes=8.0, kv_bytes_per_token_layer=1.0)  # fmt: skip
    price = step_price(8, m.EXPERTS, slow_machine(), model, window_s=1.0, control_s=0.0)
    if not fetches:
        return price
    none, one = np.zeros((m.EXPERTS, 4), bool), np.zeros((m.EXPERTS, 4), bool)
    none[:, 0], one[0, 1] = True, True
    return replace(price, window_s=fetch_seconds(none, one, price) / fetches)


def slow_machine() -> Cluster:
    """For which replicas pay even for these few tokens."""
    return Cluster(np.array([0, 0, 1, 1], np.int32), np.ones(4), 1e6, 1e6, 1e9, 1e12, 1e12,
                   intra_latency_s=1e-9, inter_latency_s=1e-9)  # fmt: skip


@case
def swap_memory_and_bytes() -> dict:
    """Staged bytes: what came, and at most one layer made anew; a switch among equal counts makes nothing anew."""
    served = engine("olmoe", "contiguous")
    shifted = np.roll(served.placement.count_LED(), 1, axis=2)
    before = [{name: weight.data_ptr() for name, weight in bank.items()} for bank in banks(served)]
    served.swap(Placement.from_counts(shifted, method="shifted"), bytes_per_step=1)
    while served.swapping:
        served.step()  # without tokens
    record = served.swaps[0]
    one = sum(weight[0].nbytes for weight in banks(served)[0].values())
    assert record.fetched == 4 and record.bytes_fetched == 4 * one == record.bytes_staged
    assert record.rounds == 4, "a rank's four experts come one by one, all ranks at once"
    after = [{name: weight.data_ptr() for name, weight in bank.items()} for bank in banks(served)]
    assert before == after
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    return {"bytes": record.bytes_staged, "stall_s": record.stall_s, "worst_s": record.worst_s}


@case
def swap_twice_in_one_run() -> dict:
    served = engine("olmoe", "contiguous", traffic="stay")
    targets = [place("replicas", seed=5), place("uneven", seed=6), place("contiguous")]

    def swap(running: Engine) -> None:
        if targets and not running.swapping and len(running.steps) > 1:
            running.swap(targets.pop(0))

    assert served.generate(m.prompts(), 8, before_step=swap) == answers("olmoe")
    assert len(served.swaps) == 3
    return {"stalls": [record.stall_s for record in served.swaps]}


@case
def ranks_without_requests() -> dict:
    """One rank has every request; then a single request of one token, so that most ranks have nothing."""
    for traffic in DATA_FLOWS:
        served = engine(traffic=traffic)
        assert served.generate(m.prompts(), 8, homes=[2] * 5) == answers("olmoe")
        assert served.generate(m.prompts(1), 8, homes=[1]) == answers("olmoe")[:1]
        assert served.model.cache.nbytes == 0, "all caches are freed"
    return {}


@case
def chunked_prefill() -> dict:
    """Budgets of one token to all of them give the same tokens; how many steps they take."""
    out = {}
    for traffic in ("home_node_dedup", "stay"):
        for budget in (1, 5, 64):
            served = engine(traffic=traffic, budget=budget)
            assert served.generate(m.prompts(), 8) == answers("olmoe"), (traffic, budget)
            assert max(step.local_tokens for step in served.steps) <= budget
            out[f"{traffic} {budget}"] = len(served.steps)
    assert out["stay 1"] > out["stay 5"] > out["stay 64"] == 8
    return out


@case
def continuous_batching() -> dict:
    """Requests come while others run, and wait for room: at most one of a rank is live."""
    served = engine("qwen3_moe", traffic="stay", most_live=1, budget=9)
    requests = []
    for prompt in m.prompts():
        requests.append(served.submit(prompt, 8, home=0))
        served.step()
    while served.busy:
        served.step()
    assert [request.sampled for request in requests] == answers("qwen3_moe")
    return {"steps": len(served.steps)}


@case
def end_of_text() -> dict:
    """A token that ends a request is kept as its last."""
    full = answers("mixtral")
    eos = full[1][3]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in full]
    assert cut != full
    for traffic in ("home", "stay"):
        assert engine("mixtral", traffic=traffic, eos=eos).generate(m.prompts(), 8) == cut
    return {}


@case
def sampling() -> dict:
    """With a seed all flows draw the same, which is not the greedy answer."""
    draws = [engine(traffic=traffic, temperature=2.0, seed=4).generate(m.prompts(), 8) for traffic in DATA_FLOWS]
    assert all(draw == draws[0] for draw in draws) and draws[0] != answers("olmoe")
    assert engine(temperature=2.0, seed=5).generate(m.prompts(), 8) != draws[0]
    return {}


@case
def one_expert_twice_on_a_rank() -> dict:
    """What published EPLB may give; before and after a swap."""
    count = place("contiguous").count_LED()
    count[:, 0, 0] += 1
    count[:, 3, 2] += 2
    twice = Placement.from_counts(count)
    served = Engine(copy.deepcopy(plain("olmoe")), twice, m.machine())
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    other = Placement.from_counts(np.roll(count, 1, axis=2))
    served.swap(other)
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    assert len(served.swaps) == 1 and served.placement.has_duplicates
    return {}


# ---- 3. models from disk ---------------------------------------------------------------------------------------------


@case
def served_from_disk() -> dict:
    """A checkpoint of every family: experts of the rank's slots alone are read where they are stored one by one."""
    out = {}
    for family in ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"):
        folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(folder, src=0)
        if dist.get_rank() == 0:
            plain(family).save_pretrained(folder[0], max_shard_size="60KB")
        dist.barrier()
        parts = from_folder(folder[0], place("replicas", family), dtype=torch.float64)
        held = [len(parts.placement.experts_of(row, dist.get_rank())) for row in range(len(parts.banks))]
        assert [len(next(iter(bank.values()))) for bank in parts.banks.values()] == held
        kept = sum(weight.numel() for weight in parts.model.parameters())
        dense = sum(weight.numel() for name, weight in plain(family).named_parameters() if ".experts." not in name)
        assert kept == dense
        served = Engine(parts, parts.placement, m.machine(), traffic="stay")
        assert served.generate(m.prompts(), 8) == answers(family), family
        out[family] = held
        dist.barrier()
    return out


@case
def bfloat16_from_disk() -> dict:
    """Stored in float32, served in bfloat16; the correction bias stays in float32 as in transformers."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    if dist.get_rank() == 0:
        m.dense("deepseek_v3", torch.float32).save_pretrained(folder[0])
    dist.barrier()
    parts = from_folder(folder[0], place("uneven", "deepseek_v3"), dist.get_rank(), dtype=torch.bfloat16)
    types = {name: weight.dtype for name, weight in parts.model.state_dict().items()}
    assert types.pop("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert types.pop("model.layers.2.mlp.gate.e_score_correction_bias") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    assert {weight.dtype for bank in parts.banks.values() for weight in bank.values()} == {torch.bfloat16}
    tokens = {}
    for traffic in DATA_FLOWS:
        parts = from_folder(folder[0], place("uneven", "deepseek_v3"), dist.get_rank(), dtype=torch.bfloat16)
        tokens[traffic] = Engine(parts, parts.placement, m.machine(), traffic=traffic).generate(m.prompts(), 4)
    return {traffic: got == tokens["home"] for traffic, got in tokens.items()}


@case
def the_same_from_config_on_every_rank() -> dict:
    torch.manual_seed(dist.get_rank())
    before = torch.random.get_rng_state()
    model = from_config(m.CONFIGS["olmoe"], seed=7)
    assert torch.equal(before, torch.random.get_rng_state())
    total = torch.stack([weight.detach().double().sum() for weight in model.parameters()]).sum()
    low, high = total.clone(), total.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    assert low == high
    return {}


# ---- 4. misuse -------------------------------------------------------------------------------------------------------


@case
def placements_of_another_shape() -> dict:
    served = engine()
    wrong = [
        Placement.from_counts(served.placement.count_LED()[:1]),
        Placement.from_devices(np.zeros((2, 6), np.int64), 4),
        Placement.from_devices(np.zeros((2, m.EXPERTS), np.int64), 3),
        Placement.from_devices(np.zeros((2, m.EXPERTS), np.int64), 4, layer_ids_L=np.array([0, 2], np.int32)),
    ]
    for other in wrong:
        with pytest.raises(PlacementError):
            served.swap(other)
        with pytest.raises((PlacementError, OptionError)):
            Engine(copy.deepcopy(plain("olmoe")), other, m.machine())
    assert not served.swapping and served.generate(m.prompts(), 8) == answers("olmoe")
    by_order = Placement.from_counts(place("replicas", "deepseek_v3").count_LED())
    Engine(copy.deepcopy(plain("deepseek_v3")), by_order, m.machine())
    return {}


@case
def unknown_families() -> dict:
    from transformers import GraniteMoeConfig, LlamaConfig

    assert "granitemoe" not in FAMILIES
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    said = []
    for unknown in (GraniteMoeConfig(**config, num_local_experts=8), LlamaConfig(**config)):
        with pytest.raises(ModelError) as caught:
            Engine(from_config(unknown), place("contiguous"), m.machine())
        said.append(str(caught.value))
    assert "granitemoe" in said[0]
    with pytest.raises(ModelError, match=r"config\.json"):
        from_folder("/nowhere", place("contiguous"), 0)
    return {"said": said}


@case
def swap_while_swapping() -> dict:
    served = engine("olmoe", "contiguous")
    served.swap(place("replicas", seed=3))
    with pytest.raises(OptionError, match="on its way"):
        served.swap(place("uneven"))
    assert served.generate(m.prompts(), 8) == answers("olmoe")
    served.swap(place("contiguous"))
    with pytest.raises(OptionError):
        engine().swap(place("uneven"), bytes_per_step=0)
    return {}


@case
def wrong_options() -> dict:
    for options in ({"traffic": "teleport"}, {"budget": 0}, {"most_live": 0}, {"temperature": -1.0}):
        with pytest.raises(OptionError):
            engine(**options)
    served = engine()
    for call in (
        lambda: served.submit([], 3), lambda: served.submit([2], 0), lambda: served.submit([2], 3, home=4),
        lambda: served.generate([[2]], 3, homes=[0, 1]),
    ):  # fmt: skip
        with pytest.raises(OptionError):
            call()
    with pytest.raises(ModelError, match="in steps of"):
        served.model.model(input_ids=torch.tensor([[3]]))
    return {}


@case
def ranks_that_disagree() -> dict:
    """One rank got another prompt, of the same length: found out at the end of the step."""
    served = engine()
    served.submit([3 if served.rank else 4, 5], 3, home=0)
    with pytest.raises(OptionError, match="different tokens"):
        served.step()
    return {}


if __name__ == "__main__":
    run_cases(CASES, read_options())
