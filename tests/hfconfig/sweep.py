"""Every family of the installed transformers, small, through all that poise does with a model: right, or refused.

python -m tests.hfconfig.sweep [--write] [--missing] [family ...]: a line of JSON a family; ``--write`` keeps them (outcomes.json).

record    the routing that is captured is what the experts were given, and the command records it
train     three steps on two ranks, a policy each, against a dense process; and the export loads and says the same
relabel   the relabelled checkpoint says what the one before says
serve     the same tokens as one device generates
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.hfconfig import families
from tests.hfconfig.table import OUTCOMES, STAGES
from tests.train.matrix import machine
from torch.distributed.device_mesh import init_device_mesh
from typer.testing import CliRunner

from poise.cli.main import app
from poise.machine.cluster import Cluster
from poise.planning.placement import Placement
from poise.runtime.capture import RouterCapture
from poise.serve import Engine
from poise.train import export_safetensors, full_state_dict, fully_shard_experts, parameter_groups
from poise.util.errors import PoiseError

LIMIT_S = 600.0
"""A stage that takes longer hangs."""
VOCABULARY = 61
SINGLE = {"inkling2"}
"""Families whose router computes in float32 whatever the model is."""
CALM = {"phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}}
"""Without noise: a dense run is to say the same."""
SHORT = (
    (r"is of family .* not known to serving", "unknown to serving"),
)  # fmt: skip
"""Reasons, as the table has them; of others the beginning."""


class Wrong(AssertionError):
    """Neither right nor refused."""


def dtype_of(family: str) -> torch.dtype:
    return torch.float32 if family in SINGLE else torch.float64


def near(family: str) -> float:
    return 2e-4 if family in SINGLE else 1e-9


def config_of(family: str) -> Any:
    kind, around = families.config_class(family)
    config = kind(**copy.deepcopy({**families.published(family), **CALM.get(family, {})}))
    return config if around is None else around(text_config=config)


def model_of(family: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """With weights that make every expert and every bias matter; the same on every call."""
    config = config_of(family)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = families.model_class(family)(config).to(dtype or dtype_of(family)).eval()
    with contextlib.suppress(Exception):
        model.set_experts_implementation("eager")
    random = torch.Generator().manual_seed(1)
    noise = lambda like: torch.randn(like.shape, generator=random, dtype=torch.float64).to(like.dtype)  # noqa: E731
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):  # experts by the token's number
                experts = config.n_routed_experts
                value.copy_(torch.stack([torch.randperm(experts, generator=random)[: value.shape[1]] for _ in value]))
            elif value.is_floating_point() and "inv_freq" not in name:
                value.copy_(value + 0.1 * noise(value) if value.dim() < 2 else 0.3 * noise(value))
    return model


def tokens(step: int, rank: int | None = None) -> torch.Tensor:
    """Ids [4, 8] of a step, or a rank's half of them."""
    every = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(100 + step))
    return every if rank is None else every[2 * rank : 2 * rank + 2]


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.double()


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    said = logits(model, ids)[:, :-1]
    return F.cross_entropy(said.reshape(-1, said.shape[-1]), ids[:, 1:].reshape(-1))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a.double() - b.double()).abs().max() / (b.double().abs().max() + 1e-30))


def shaken(family: str) -> float:
    """By how much logits differ where experts' weights differ by far less than float32 tells apart: in a family that
    computes in it here and there, a sum in another order does as much."""
    model, other = model_of(family), model_of(family)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "expert" in name:
                weight.mul_(1 + 1e-9 * torch.randn(weight.shape, generator=random, dtype=weight.dtype))
        return apart(logits(other, tokens(0)), logits(model, tokens(0)))


def check(good: bool, what: str) -> None:
    if not good:
        raise Wrong(what)


def save(family: str, folder: Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = model_of(family, dtype)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)
    return model


def again(family: str, folder: Path) -> torch.nn.Module:
    model = families.model_class(family).from_pretrained(folder, dtype=dtype_of(family)).eval()
    with contextlib.suppress(Exception):
        model.set_experts_implementation("eager")
    return model


def command(*words: str) -> str:
    """What the command prints; its refusal as the error that it is."""
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        said = " ".join((done.stderr or done.output).split()).rpartition("error: ")[2]
        raise PoiseError(said.partition(" hint: ")[0])
    return done.stdout


def truth_of(family: str) -> families.Truth:
    _, config, model = families.build(family, {**families.published(family), **CALM.get(family, {})})
    return families.truth(model, config)


# ---- stages --------------------------------------------------------------------------------------------------------


def record(family: str, folder: Path, rank: int) -> None:
    model, truth = save(family, folder / "model", torch.float32), truth_of(family)
    given: dict[int, list[torch.Tensor]] = {}

    def look(number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, named: Any) -> None:
            ids = [
                one
                for one in (*args, *named.values())
                if torch.is_tensor(one) and one.dtype in (torch.int64, torch.int32)
            ]
            given.setdefault(number, []).extend(one.reshape(-1, one.shape[-1]) for one in ids[:1] if one.dim() > 1)

        return hook

    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            number = int(re.findall(r"\.(\d+)\.", name)[0])
            module.register_forward_pre_hook(look(number), with_kwargs=True)
    with torch.no_grad(), RouterCapture(model) as capture:
        logits(model, tokens(0))
    captured = {number: torch.cat(calls) for number, calls in capture.calls.items()}
    check(sorted(captured) == list(truth.moe_layer_ids), f"layers {sorted(captured)} of {truth.moe_layer_ids}")
    for number, calls in given.items():
        if calls:
            right, got = torch.cat(calls).sort(-1)[0], captured[number].sort(-1)[0]
            got = got.clamp(max=truth.num_experts) if truth.num_zero_experts else got
            right = right.clamp(max=truth.num_experts) if truth.num_zero_experts else right
            check(got.shape == right.shape and bool((got == right).all()), f"other experts in layer {number}")
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in range(3, 20)))
    out = command("record", str(folder / "model"), str(folder / "text.txt"), "-o", str(folder / "trace.npz"),
                  "--max-new-tokens", "3", "--json")  # fmt: skip
    said = json.loads(out[out.index("{") : out.rindex("}") + 1])
    got = (said["experts"], said["top_k"], said["layers"])
    right = (truth.num_experts + (0 if said["experts"] == truth.num_experts else truth.num_zero_experts), truth.top_k,
             len(truth.moe_layer_ids))  # fmt: skip
    check(got == right, f"E, K, L {got}, not {right}")


def train(family: str, folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    dense, model = model_of(family).train(), model_of(family).train()
    run = fully_shard_experts(model, mesh=mesh, policy="poise", cluster=machine(2))
    # not Adam, which makes of a gradient that is rounding alone a step as large as any
    wanted, mine = (torch.optim.SGD(of, lr=1e-2, momentum=0.9) for of in (dense.parameters(), parameter_groups(model)))
    halves = model_of(family).train()  # dense, too, in two halves: what rounding alone makes of it
    rounded = torch.optim.SGD(halves.parameters(), lr=1e-2, momentum=0.9)
    error, noise, replicas = 0.0, shaken(family) / 10, 0
    for step, policy in enumerate(("poise", "hecate:overlap=4", "full-replication")):
        run.set_policy(policy, step_slots=2 if step == 0 else 8)
        wanted.zero_grad()
        right = loss_of(dense, tokens(step))
        right.backward()
        mine.zero_grad()
        loss = loss_of(model, tokens(step, rank))
        loss.backward()
        replicas += sum(one.replicas for one in run.metrics)
        for weight in model.parameters():
            if weight not in run.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)
                weight.grad /= 2
        for weight in dense.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        rounded.zero_grad()
        parts = [loss_of(halves, tokens(step, half)) / 2 for half in (0, 1)]
        torch.stack(parts).sum().backward()
        noise = max(noise, abs(sum(part.item() for part in parts) - right.item()) / abs(right.item()))
        for optimizer in (wanted, rounded, mine):
            optimizer.step()
        both = loss.detach().clone()
        dist.all_reduce(both)
        error = max(error, abs(both.item() / 2 - right.item()) / abs(right.item()))
    check(error <= max(near(family), 10 * noise), f"loss {error:.1e} off, by rounding {noise:.1e}")
    check(replicas > 0, "no replicas")
    full = full_state_dict(model)
    export_safetensors(model, folder / "exported")
    if full is not None:
        state = dense.state_dict()
        check(set(state) <= set(full), f"no {sorted(set(state) - set(full))[:2]}")
        floating = {name: value for name, value in state.items() if value.is_floating_point()}
        worst = max(apart(full[name], value) for name, value in floating.items())
        noise = max(apart(halves.state_dict()[name], value) for name, value in floating.items())
        check(worst <= max(100 * near(family), 10 * noise), f"weights {worst:.1e} off, by rounding {noise:.1e}")
        right = logits(dense.eval(), tokens(9))
        error = apart(logits(again(family, folder / "exported"), tokens(9)), right)
        dense.save_pretrained(folder / "plain")  # what saving and loading alone makes of it
        plain = apart(logits(again(family, folder / "plain"), tokens(9)), right)
        check(  # a family that computes in float32 makes 1e-6 of weights that differ by 1e-9
            error <= max(100 * near(family), 10 * noise, 1e-5, 2 * plain),
            f"exported model {error:.1e} off, plain {plain:.1e}",
        )


def some_placement(family: str) -> Placement:
    truth, random = truth_of(family), np.random.default_rng(0)
    device_LE = np.zeros((len(truth.moe_layer_ids), truth.num_experts), int)
    for row in device_LE:
        row[random.permutation(truth.num_experts)[: truth.num_experts // 2]] = 1
    return Placement.from_devices(device_LE, 2, layer_ids_L=np.array(truth.moe_layer_ids, np.int32))


def relabel(family: str, folder: Path, rank: int) -> None:
    save(family, folder / "model")
    some_placement(family).save(folder / "plan.npz")
    command("export", str(folder / "plan.npz"), "--to", "checkpoint", "--checkpoint", str(folder / "model"), "-o",
            str(folder / "out"))  # fmt: skip
    before, after = again(family, folder / "model"), again(family, folder / "out")
    moved = [name for name, one in before.named_parameters()
             if "expert" in name and not torch.equal(one, after.get_parameter(name))]  # fmt: skip
    check(bool(moved), "nothing moved")
    error = apart(logits(after, tokens(0)), logits(before, tokens(0)))
    noise = shaken(family)
    check(error <= max(near(family), 10 * noise), f"logits {error:.1e} off, by rounding {noise:.1e}")


def serve(family: str, folder: Path, rank: int) -> None:
    model, plain = model_of(family), model_of(family)
    engine = Engine(model, some_placement(family), Cluster.parse("1x2"))
    prompts = [tokens(7)[i, :n].tolist() for i, n in enumerate((8, 3, 5))]
    for prompt, got in zip(prompts, engine.generate(prompts, 4), strict=True):
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(logits(plain, torch.tensor([ids]))[0, -1].argmax()))
        check(ids[len(prompt) :] == got, f"tokens {got}, not {ids[len(prompt) :]}")


# ---- running them --------------------------------------------------------------------------------------------------


def words_of(error: PoiseError) -> str:
    """A refusal in few words."""
    said = re.sub(r"^rank \d+: ", "", " ".join(error.message.split()))  # whose error it is that all ranks raise
    said = re.sub(r"/\S+/model\b", "it", said)  # the folder of this run
    return next((words for pattern, words in SHORT if re.search(pattern, said)), said[:70])


def one(family: str, stage: str, folder: Path, rank: int, world: int) -> str:
    """What a stage gives on this rank."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                                timeout=timedelta(seconds=LIMIT_S / 2))  # fmt: skip
    try:
        globals()[stage](family, folder, rank)
    except PoiseError as error:
        return f"refused: {words_of(error)}"
    except Wrong as error:
        return f"WRONG: {error}"
    except BaseException as error:
        traceback.print_exc()
        return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "yes"


def outcome(family: str, stage: str) -> str:
    """What a stage gives, on all ranks alike, in processes of its own."""
    world = 2 if stage in ("train", "serve") else 1
    with tempfile.TemporaryDirectory() as name:
        folder, running = Path(name), {}
        for rank in range(world):
            number = os.fork()
            if not number:
                with (folder / f"log{rank}").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    said = one(family, stage, folder, rank, world)
                    (folder / f"said{rank}").write_text(said)
                    os._exit(0)
            running[number] = rank
        until = time.monotonic() + LIMIT_S
        while running and time.monotonic() < until:
            for number in list(running):
                if os.waitpid(number, os.WNOHANG)[0]:
                    del running[number]
            time.sleep(0.05)
        for number in running:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
        files = [folder / f"said{rank}" for rank in range(world)]
        all_said = [file.read_text() if file.exists() else "WRONG: it hangs, or died" for file in files]
        if os.environ.get("POISE_SWEEP_LOG"):
            print((folder / "log0").read_text(), file=sys.stderr)
    wrong = [said for said in all_said if said.startswith("WRONG")]
    return wrong[0] if wrong else all_said[0] if len(set(all_said)) == 1 else f"WRONG: ranks say {all_said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--missing", action="store_true", help="those that outcomes.json has not")
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kept = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    todo = [name for name in options.families or families.names() if not (options.missing and name in kept)]
    for family in todo:
        found = {stage: outcome(family, stage) for stage in options.stage or STAGES}
        print(json.dumps({family: found}), flush=True)
        kept[family] = {**kept.get(family, {}), **found}
        if options.write:
            lines = (f" {json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
            OUTCOMES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
