"""Hugging Face's Trainer over sharded experts beside a dense loop on all ranks' tokens.

    torchrun --standalone --nproc-per-node 2 tests/train/trainer_cases.py --out results.jsonl [case ...]

Trainer with its own defaults (``max_grad_norm=1.0``, AdamW, its decay groups), in float32. ``POISE_CHECKPOINTS`` names
a folder that a launch on another number of ranks reads.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cases import read_options, run_cases
from tests.ranks import folder, registry
from tests.train import harness as h
from tests.train import support_models as c
from tests.train.matrix import machine

from poise.train import fully_shard_experts
from poise.train.hf import ShardedExpertsMixin
from poise.util.errors import PoiseError

MINE, case = registry()
NEAR, STEPS, BATCH = 1e-6, 4, 2
"""Relative error of losses in float32, optimizer steps, and sequences a rank takes at once."""


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sequences in order; a batch of step s on rank r is the same for every number of ranks."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, c.VOCABULARY, (96, 8), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(folder: Path, model: nn.Module, mixin: bool = True, fsdp: str = "", **options: Any) -> Any:
    """A Trainer as users build it; notes what every rank was given, and its losses."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainingArguments

    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # of transformers' own code
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()

    class Noted(*((ShardedExpertsMixin, Trainer) if mixin else (Trainer,))):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: nn.Module, inputs: Any, *more: Any, **named: Any) -> Tensor:
            self.noted.append(inputs["input_ids"].clone())
            loss = super().training_step(model, inputs, *more, **named)
            self.losses.append(float(loss))
            return loss

    arguments: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=1e-2,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, ddp_backend="gloo",
        disable_tqdm=True, weight_decay=0.01,
    )  # fmt: skip
    one = Noted(
        model=model, args=TrainingArguments(**{**arguments, **options}), train_dataset=Texts(), eval_dataset=Texts()
    )
    one.noted, one.losses = [], []
    if fsdp:  # accelerate turns FSDP on for GPUs only: what it would set there
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        state = one.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=fsdp == "efficient",
            transformer_cls_names_to_wrap=["MixtralDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT" if fsdp == "sharded" else "FULL_STATE_DICT",
        )  # fmt: skip
        one.is_fsdp_enabled = True
    return one


def build() -> nn.Module:
    return c.hf_model("mixtral", torch.float32)


def shard(model: nn.Module) -> Any:
    world = dist.get_world_size()
    return fully_shard_experts(model, mesh=init_device_mesh("cpu", (world,)), policy="hecate", cluster=machine(world))


class Dense:
    """The loop that Trainer stands for, on one process."""

    def __init__(self, decayed: list[str], max_norm: float = 1.0) -> None:
        self.model, self.max_norm = build(), max_norm
        weights = list(self.model.named_parameters())
        groups = [{"params": [w for name, w in weights if name in decayed], "weight_decay": 0.01},
                  {"params": [w for name, w in weights if name not in decayed], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)

    def step(self, ids: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = c.hf_loss(self.model, ids)
        loss.backward()
        if self.max_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return loss.item()


def everyone(ids: Tensor) -> Tensor:
    out = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(out, ids)
    return torch.cat(out)


def follow(one: Any, dense: Dense, accumulate: int = 1) -> float:
    """The largest relative error of a loss, where the dense loop gets what all ranks were given."""
    worst, world = 0.0, dist.get_world_size()
    for first in range(0, len(one.noted), accumulate):
        expected = dense.step(torch.cat([everyone(ids) for ids in one.noted[first : first + accumulate]]))
        mean = torch.tensor(sum(one.losses[first : first + accumulate]), dtype=torch.float64)
        dist.all_reduce(mean)
        worst = max(worst, abs(mean.item() / world - expected) / expected)
    return c.agreed(worst)


def weights_error(model: nn.Module, dense: nn.Module) -> float:
    """Of all weights; AdamW turns a gradient of rounding errors alone into a step, so that is no more than NEAR * 1e2."""
    return c.agreed(h.worst(c.of_all(model, "weight"), h.local_rows(model, dict(dense.named_parameters()))))


def decayed(one: Any) -> list[str]:
    return list(one.get_decay_parameter_names(build()))


@case
def data_parallel() -> dict:
    """The stock Trainer under DDP: clipping, evaluation; saved by the mixin, read by ``from_pretrained``."""
    from transformers import MixtralForCausalLM

    errors = {}
    with folder() as place:
        for name, options in {"defaults": {}, "no clipping": {"max_grad_norm": 0.0},
                              "accumulation": {"gradient_accumulation_steps": 2}}.items():  # fmt: skip
            model = build()
            shard(model)
            one = trainer(place / name.replace(" ", "-"), model, **options)
            one.train()
            dense = Dense(decayed(one), options.get("max_grad_norm", 1.0))
            errors[name] = follow(one, dense, options.get("gradient_accumulation_steps", 1))
            errors[f"{name}, weights"] = weights_error(model, dense.model) / 100
        loss = one.evaluate()["eval_loss"]
        with torch.no_grad():
            dense.model.eval()
            expected = torch.stack([c.hf_loss(dense.model, ids) for ids in Texts().ids.split(8)]).mean().item()
        errors["evaluation"] = abs(loss - expected) / expected / 10
        one.save_model(str(place / "saved"))
        dist.barrier()
        back = MixtralForCausalLM.from_pretrained(place / "saved", dtype=torch.float32).train()
        errors["saved"] = weights_error(model, back)
    assert max(errors.values()) <= NEAR, errors
    return errors


@case
def fsdp2() -> dict:
    """The stock Trainer, without the mixin, under FSDP2: full and sharded state dicts."""
    errors = {}
    with folder() as place:
        for kind in ("full", "sharded"):
            model = build()
            shard(model)
            one = trainer(place / kind, model, mixin=False, fsdp=kind, save_strategy="steps", save_steps=2)
            one.train()
            dense = Dense(decayed(one))
            errors[kind] = follow(one, dense)
            errors[f"{kind}, weights"] = weights_error(model, dense.model) / 100
            again = build()
            with torch.no_grad():
                for weight in again.parameters():
                    weight.zero_()
            shard(again)
            other = trainer(place / kind, again, mixin=False, fsdp=kind)
            other.train(resume_from_checkpoint=str(place / kind / "checkpoint-2"))
            assert len(other.noted) == STEPS - 2
            errors[f"{kind}, resumed"] = weights_error(again, model) if kind == "none" else c.agreed(h.worst(
                c.of_all(again, "weight"), c.of_all(model, "weight")))  # fmt: skip
        lazy = build()
        shard(lazy)
        said = c.raised(PoiseError, lambda: trainer(place / "lazy", lazy, fsdp="efficient").train())
        assert "cpu_ram_efficient_loading" in said
    assert max(errors.values()) <= NEAR, errors
    return {**errors, "said": said}


@case
def best_model_at_the_end() -> dict:
    """``load_best_model_at_end``: all weights are those of the checkpoint that was best."""
    kept: dict[int, dict[str, Tensor]] = {}
    with folder() as place:
        model = build()
        shard(model)
        one = trainer(place, model, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3,
                      load_best_model_at_end=True, metric_for_best_model="judged", greater_is_better=False)  # fmt: skip

        def judge(*_: Any, **__: Any) -> dict[str, float]:
            step = one.state.global_step
            kept[step] = {name: weight.clone() for name, weight in c.of_all(model, "weight").items()}
            found = {"eval_judged": float(step != 2)}
            one.control = one.callback_handler.on_evaluate(one.args, one.state, one.control, found)
            return found

        one.evaluate = judge
        one.train()
        assert one.state.best_model_checkpoint.endswith("checkpoint-2")
    error = c.agreed(h.worst(c.of_all(model, "weight"), kept[2]))
    assert error == 0.0, error
    return {"error": error}


def checkpoints() -> Path:
    return Path(os.environ["POISE_CHECKPOINTS"])


@case
def checkpoint_and_resume() -> dict:
    """Written amid a run, resumed at the same number of ranks: as if there had been no interruption."""
    model = build()
    shard(model)
    one = trainer(checkpoints(), model, save_strategy="steps", save_steps=2)
    one.train()
    again = build()
    with torch.no_grad():
        for weight in again.parameters():
            weight.zero_()
    shard(again)
    other = trainer(checkpoints(), again)
    other.train(resume_from_checkpoint=str(checkpoints() / "checkpoint-2"))
    assert len(other.noted) == STEPS - 2
    error = c.agreed(h.worst(c.of_all(again, "weight"), c.of_all(model, "weight")))
    assert error <= NEAR, error
    return {"error": error}


@case
def resume_elsewhere() -> dict:
    """On another number of ranks: weights and moments are those of the file."""
    model = build()
    shard(model)
    one = trainer(checkpoints(), model, max_steps=3)
    found: dict[str, Tensor] = {}

    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            optimizer = getattr(one.optimizer, "optimizer", one.optimizer)
            for name, weight in model.named_parameters():
                found.setdefault(name, c.whole(optimizer.state[weight]["exp_avg"]).clone())

    one.add_callback(Look())
    one.train(resume_from_checkpoint=str(checkpoints() / "checkpoint-2"))
    saved = torch.load(checkpoints() / "checkpoint-2" / "optimizer.pt", weights_only=True)
    order = [w for group in one.optimizer.param_groups for w in group["params"]]
    names = {id(weight): name for name, weight in model.named_parameters()}
    expected = {names[id(weight)]: saved["state"][number]["exp_avg"] for number, weight in enumerate(order)}
    error = c.agreed(h.worst(found, h.local_rows(model, expected)))
    assert error == 0.0 and len(found) == len(expected), error
    return {"ranks": dist.get_world_size()}


@case
def stock_trainer_that_saves_is_refused() -> dict:
    """Under DDP it writes on rank 0, which has a part of the experts: refused, with a hint at the mixin."""
    with folder() as place:
        model = build()
        shard(model)
        one = trainer(place, model, mixin=False)
        one.train()
        said = ""
        if dist.get_rank() == 0:  # the others have nothing to write, and go on
            try:
                one.save_model(str(place / "saved"))
            except PoiseError as error:
                said = str(error)
            assert "ShardedExpertsMixin" in said, said
            assert not list((place / "saved").glob("*.safetensors"))
    return {"said": said}


if __name__ == "__main__":
    run_cases(MINE, read_options())
