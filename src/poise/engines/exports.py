"""What ``poise export`` can write: one target a name, each with the advice how to run what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from poise.engines import ascend, sglang, tensorrt, vllm
from poise.engines.checkpoints import checkpoint, megatron
from poise.errors import OptionError
from poise.modelspec import ModelSpec
from poise.planning.placement import Placement
from poise.planning.problem import Progress

STATIC_ENV = "POISE_STATIC_MAP"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What a target may need beside the placement.

    Parameters
    ----------
    model : the model's sizes; with them every MoE layer gets a row, whether it was planned or not.
    num_hidden_layers : decoder layers, dense ones included; default: the model's.
    num_mtp_layers : layers of multi-token prediction that the engine will run.
    checkpoint : folder of the Hugging Face checkpoint to relabel.
    progress : called by long work.
    """

    model: ModelSpec | None = None
    num_hidden_layers: int | None = None
    num_mtp_layers: int = 0
    checkpoint: Path | None = None
    progress: Progress | None = None

    @property
    def decoder_layers(self) -> int | None:
        """Decoder layers by either option."""
        if self.num_hidden_layers is not None:
            return self.num_hidden_layers
        return None if self.model is None else self.model.num_hidden_layers

    @property
    def moe_layers(self) -> tuple[int, ...] | None:
        """The model's MoE layers, None if it was not named."""
        return None if self.model is None else self.model.moe_layer_ids


@dataclass(frozen=True, slots=True)
class Written:
    """What came of an export.

    Parameters
    ----------
    filled : empty slots that were filled with replicas.
    unplanned : layers with a trivial row, as nothing was planned for them.
    command : how to start the engine with it, to be copied as it is; lines of YAML where the engine takes a file.
    notes : what to mind.
    facts : more for ``--json``.
    """

    filled: int = 0
    unplanned: int = 0
    command: str = ""
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


Writer = Callable[[Placement, Path, ExportOptions], Written]


@dataclass(frozen=True, slots=True)
class Target:
    """One name of ``--to``: what it writes, in a line, by whom, and whether that is a folder."""

    summary: str
    write: Writer
    folder: bool = False


def _redundant(placement: Placement) -> int:
    return placement.num_slots - placement.num_experts


def _quoted(value: dict[str, Any]) -> str:
    return quote(json.dumps(value))


def _on_ranks(placement: Placement) -> str:
    """Flags of vLLM for as many ranks as the placement has devices."""
    return f"--enable-expert-parallel --tensor-parallel-size {placement.num_devices}"


def _ranks_note(placement: Placement) -> str:
    return f"tensor-parallel x data-parallel size must be {placement.num_devices}: so many ranks share the experts"


def _npz(placement: Placement, path: Path, options: ExportOptions) -> Written:
    placement.save(path)
    return Written()


def _sglang(placement: Placement, path: Path, options: ExportOptions) -> Written:
    layers = options.decoder_layers
    if layers is None:
        raise OptionError("SGLang's map needs every decoder layer", hint="give --model or --num-hidden-layers")
    filled = sglang.write(placement, path, num_hidden_layers=layers)
    return Written(
        filled,
        command=f"--ep-size {placement.num_devices} --ep-num-redundant-experts {_redundant(placement)} "
        f"--init-expert-location {quote(str(path))}",
        notes=(
            "the flags are those of 'python -m sglang.launch_server'; record a while, then 'poise verify' tells "
            "whether the map is live",
        ),
    )


def _tensorrt(placement: Placement, path: Path, options: ExportOptions) -> Written:
    made = tensorrt.write(
        placement, path, layer_ids=options.moe_layers, num_hidden_layers=options.decoder_layers,
        num_mtp_layers=options.num_mtp_layers,
    )  # fmt: skip
    ranks = placement.num_devices
    notes = [
        "the map is ignored without a word unless the architecture is on the engine's list, expert parallelism is "
        "above 1 and attention runs data-parallel (NVIDIA/TensorRT-LLM #18626, #13386)",
    ]
    if options.moe_layers is None:
        notes.append("without --model only the placement's layers have a row; a layer without one ends the start")
    if not options.num_mtp_layers:
        notes.append("with multi-token prediction give --num-mtp-layers: those layers need a row too (#13974)")
    return Written(
        made.filled,
        made.unplanned,
        command=f"moe_config: {{load_balancer: {json.dumps(str(path), ensure_ascii=False)}}}\n"
        f"enable_attention_dp: true\ntensor_parallel_size: {ranks}\nmoe_expert_parallel_size: {ranks}",
        notes=("these are keys of the file for 'trtllm-serve --config'", *notes),
        facts={"layers": made.layers},
    )


def _ascend(placement: Placement, path: Path, options: ExportOptions) -> Written:
    filled, unplanned = ascend.write(placement, path, layer_ids=options.moe_layers)
    notes = [
        _ranks_note(placement),
        "model runner v1; with dynamic_eplb the engine moves experts away from the map",
    ]
    if options.moe_layers is None:
        notes.append("layers are found by their place in the list: the placement is taken to have every MoE layer")
    config = {"eplb_config": {"expert_map_path": str(path)}}
    return Written(
        filled,
        unplanned,
        command=f"{_on_ranks(placement)} --additional-config {_quoted(config)}",
        notes=tuple(notes),
    )


def _instead(number: int) -> str:
    return (
        f"vLLM's pull request #{number} is open: no release loads this file. What works today: --to checkpoint "
        f"(no replicas), or the plugin of poise with {STATIC_ENV} (docs/engines.md)"
    )


def _vllm_34811(placement: Placement, path: Path, options: ExportOptions) -> Written:
    vllm.write_34811(placement, path)
    return Written(
        command=f"{_on_ranks(placement)} --expert-placement-strategy custom --expert-placement-file {quote(str(path))}",
        notes=(_instead(34811), _ranks_note(placement)),
    )


def _vllm_49572(placement: Placement, path: Path, options: ExportOptions) -> Written:
    filled, unplanned = vllm.write_49572(placement, path, layer_ids=options.moe_layers)
    config = {"num_redundant_experts": _redundant(placement), "initial_expert_map_path": str(path)}
    return Written(
        filled,
        unplanned,
        command=f"{_on_ranks(placement)} --enable-eplb --eplb-config {_quoted(config)}",
        notes=(_instead(49572), _ranks_note(placement)),
    )


def _order(framework: megatron.Framework) -> Writer:
    def write(placement: Placement, path: Path, options: ExportOptions) -> Written:
        groups = 1 if options.model is None else options.model.num_expert_groups
        megatron.write_order(placement, path, framework=framework, num_groups=groups)
        notes = [
            "the order of experts, and of the router's rows, of each layer: docs/checkpoints.md says how to apply it"
        ]
        if options.model is None:
            notes.append("without --model routing groups are not checked: an order that breaks them changes the model")
        return Written(notes=tuple(notes), facts={"routing_groups": groups})

    return write


def _checkpoint(placement: Placement, path: Path, options: ExportOptions) -> Written:
    if options.checkpoint is None:
        raise OptionError("a relabelled checkpoint needs the one to relabel", hint="give --checkpoint FOLDER")
    made = checkpoint.relabel_checkpoint(placement, options.checkpoint, path, progress=options.progress)
    return Written(
        command=f"vllm serve {quote(str(path))} {_on_ranks(placement)}",
        notes=(
            f"or any engine that gives rank r of {placement.num_devices} the r-th block of experts",
            _ranks_note(placement),
            *made.notes,
        ),
        facts={"files": made.files, "tensors": made.tensors, "bytes": made.bytes, "moved_experts": made.moved_experts},
    )


TARGETS: dict[str, Target] = {
    "sglang": Target("JSON for --init-expert-location", _sglang),
    "tensorrt-llm": Target("YAML for moe_config.load_balancer", _tensorrt),
    "vllm-ascend": Target("JSON for eplb_config.expert_map_path", _ascend),
    "vllm-34811": Target("the file of vLLM's open proposal #34811; no release loads it", _vllm_34811),
    "vllm-49572": Target("the file of vLLM's open proposal #49572; no release loads it", _vllm_49572),
    "megatron": Target("order of experts for Megatron-LM", _order("megatron")),
    "deepspeed": Target("order of experts for DeepSpeed-MoE", _order("deepspeed")),
    "checkpoint": Target("relabelled Hugging Face checkpoint, for any engine", _checkpoint, folder=True),
    "npz": Target("poise's own file again", _npz),
}
