"""What ``poise export`` can write: one target a name, each with the advice how to run what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from poise.engines import ascend, hygon, sglang, tensorrt
from poise.engines.checkpoints import checkpoint, megatron
from poise.engines.dumps.mapping import MAX_MTP_LAYERS
from poise.engines.proposals import PROPOSALS, Layers, Proposal
from poise.machine.model import ModelSpec
from poise.planning.placement import Placement
from poise.planning.problem import Progress
from poise.util.errors import OptionError, PlacementError

STATIC_ENV = "POISE_STATIC_MAP"
UNKNOWN_LAYERS = "without --model it is not known whether the placement has every MoE layer"
MTP_OWN_MAP = "the engine runs them as a model of its own, which this file does not reach"
TRIVIAL = "they start as the engine would start them"
IDS_STAY = "their experts keep their ids"
MTP_IDS = "their experts keep their ids unless the placement has these layers"


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
    model_class : the class that the engine runs the model as, which a file may name.

    Raises
    ------
    OptionError : num_hidden_layers is not the model's.
    """

    model: ModelSpec | None = None
    num_hidden_layers: int | None = None
    num_mtp_layers: int = 0
    checkpoint: Path | None = None
    progress: Progress | None = None
    model_class: str | None = None

    def __post_init__(self) -> None:
        said = self.num_hidden_layers
        if self.model is not None and said not in (None, self.model.num_hidden_layers):
            raise OptionError(
                f"num_hidden_layers is {said}, {self.model.name} has {self.model.num_hidden_layers}",
                hint="leave --num-hidden-layers out, or check --model",
            )

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
    unplanned : MoE layers of the model, and layers of multi-token prediction that have a row, that nothing was planned
        for; None: not known, as no model was named.
    command : how to start the engine with it, to be copied as it is; lines of YAML where the engine takes a file.
    notes : what to mind.
    facts : more for ``--json``.
    """

    filled: int = 0
    unplanned: int | None = None
    command: str = ""
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


NEAR_SGLANG = (
    "planned for the split near: with an all-to-all backend (--moe-a2a-backend) ranks use replicas of their own rank "
    "and node first, without one they do not"
)
Writer = Callable[[Placement, Path, ExportOptions], Written]


@dataclass(frozen=True, slots=True)
class Target:
    """One name of ``--to``.

    Parameters
    ----------
    summary : what it writes, in a line.
    writer : who writes it.
    folder : whether that is a folder.
    mtp : why layers of multi-token prediction have no row in it; empty: they have one each, behind the model's own.
    unplanned : what becomes of MoE layers that nothing was planned for.
    """

    summary: str
    writer: Writer
    folder: bool = False
    mtp: str = ""
    unplanned: str = TRIVIAL

    def write(self, placement: Placement, path: Path, options: ExportOptions) -> Written:
        """Write the file or folder.

        Raises
        ------
        PlacementError : the target cannot hold the placement, or the placement has a layer that is no MoE layer of the
            model. OptionError : an option is missing, or makes no sense for the target.
        """
        if not 0 <= options.num_mtp_layers <= MAX_MTP_LAYERS:
            raise OptionError(f"num_mtp_layers must lie in 0..{MAX_MTP_LAYERS}, got {options.num_mtp_layers}")
        if options.num_mtp_layers and self.mtp:
            raise OptionError(
                f"{options.num_mtp_layers} layers of multi-token prediction: {self.mtp}",
                hint="leave --num-mtp-layers out",
            )
        missing = _unplanned(placement, options)
        made = self.writer(placement, path, options)
        if missing is not None:
            return replace(made, unplanned=missing)
        return made if made.unplanned is not None else replace(made, notes=(*made.notes, UNKNOWN_LAYERS))


def _unplanned(placement: Placement, options: ExportOptions) -> int | None:
    """MoE layers without a planned row, those of multi-token prediction that run included; None without a model."""
    if options.model is None:
        return None
    planned, own = set(placement.layer_ids_L.tolist()), options.model.num_hidden_layers
    moe = set(options.model.moe_layer_ids)
    dense = sorted(layer for layer in planned - moe if layer < own)
    if dense:
        raise PlacementError(
            f"the placement has a row for layer {dense[0]}, the model's MoE layers are {min(moe)} to {max(moe)} "
            f"({len(moe)} of them)",
            hint="check --model",
        )
    return len((moe | set(range(own, own + options.num_mtp_layers))) - planned)


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
    near = placement.fitted is not None and placement.fitted.about.get("split") == "near"
    return Written(
        filled,
        command=f"--ep-size {placement.num_devices} --ep-num-redundant-experts {placement.redundant} "
        f"--init-expert-location {quote(str(path))}",
        notes=(
            "the flags are those of 'python -m sglang.launch_server'; record a while, then 'poise verify' tells "
            "whether the map is live",
            *((NEAR_SGLANG,) if near else ()),
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
        command=f"moe_config: {{load_balancer: {json.dumps(str(path), ensure_ascii=False)}}}\n"
        f"enable_attention_dp: true\ntensor_parallel_size: {ranks}\nmoe_expert_parallel_size: {ranks}",
        notes=("these are keys of the file for 'trtllm-serve --config'", *notes),
        facts={"layers": made.layers},
    )


def _ascend(placement: Placement, path: Path, options: ExportOptions) -> Written:
    filled, _ = ascend.write(
        placement, path, layer_ids=options.moe_layers, num_mtp_layers=options.num_mtp_layers,
        num_hidden_layers=options.decoder_layers,
    )  # fmt: skip
    notes = [
        _ranks_note(placement),
        "model runner v1; with dynamic_eplb the engine moves experts away from the map",
        "with mix_placement the engine wants shared experts in the map too: leave it off",
        *_by_place(placement, options),
    ]
    if not str(path).endswith(".json"):
        notes.append("the engine takes no file unless its name ends in .json")
    if options.num_mtp_layers == 0:
        notes.append("with more than one layer of multi-token prediction give --num-mtp-layers: each needs a row")
    config = {"eplb_config": {"expert_map_path": str(path)}}
    return Written(
        filled,
        command=f"{_on_ranks(placement)} --additional-config {_quoted(config)}",
        notes=tuple(notes),
    )


def _by_place(placement: Placement, options: ExportOptions) -> list[str]:
    """What engines that look rows up by their place make of a placement whose model is not known."""
    if options.model is not None:
        return []
    first, last = (int(placement.layer_ids_L[at]) for at in (0, -1))
    return [
        f"rows are found by their place: the first, of layer {first}, runs in the engine's first MoE layer, the last, "
        f"of layer {last}, in its MoE layer {placement.num_layers}"
    ]


def _proposed(proposal: Proposal) -> Target:
    """The target of an open proposal."""
    number = proposal.number

    def write(placement: Placement, path: Path, options: ExportOptions) -> Written:
        groups = 1 if options.model is None else options.model.num_expert_groups
        layers = Layers(options.moe_layers, options.decoder_layers, options.num_mtp_layers, groups)
        filled = proposal.write(placement, path, layers)
        instead = (
            f"vLLM's pull request #{number} is open: no release loads this file. What works today: --to checkpoint "
            f"(no replicas), or the plugin of poise with {STATIC_ENV} (docs/engines.md)"
        )
        places = _by_place(placement, options) if proposal.by_place else ()
        return Written(
            filled,
            command=f"{_on_ranks(placement)} {proposal.flags(placement, path)}",
            notes=(instead, _ranks_note(placement), *places),
        )

    return Target(
        f"the file of vLLM's open proposal #{number}; no release loads it", write,
        mtp=MTP_OWN_MAP if proposal.mtp is None else proposal.mtp,
        unplanned=proposal.unplanned or TRIVIAL,
    )  # fmt: skip


def _hygon(placement: Placement, path: Path, options: ExportOptions) -> Written:
    filled, _ = hygon.write(
        placement, path, layer_ids=options.moe_layers, model_class=options.model_class,
        model_name="model" if options.model is None else options.model.name,
    )  # fmt: skip
    notes = [
        _ranks_note(placement),
        "read by HYGON's plugin for vLLM, before the checkpoint is; the map is fixed from then on",
        *_by_place(placement, options),
    ]
    if options.model_class is None:
        notes.append(
            "without --model-class the file names no class of model: versions after pull request #69 want one "
            "(architectures in the model's config)"
        )
    config = {"num_redundant_experts": placement.redundant, "expert_map_path": str(path)}
    return Written(
        filled, command=f"{_on_ranks(placement)} --enable-eplb --eplb-config {_quoted(config)}", notes=tuple(notes)
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
        unplanned=made.kept_layers,
        command=f"vllm serve {quote(str(path))} {_on_ranks(placement)}",
        notes=(
            f"or any engine that gives rank r of {placement.num_devices} the r-th block of experts",
            _ranks_note(placement),
            *made.notes,
        ),
        facts={"files": made.files, "tensors": made.tensors, "bytes": made.bytes, "moved_experts": made.moved_experts},
    )


TARGETS: dict[str, Target] = {
    "sglang": Target("JSON for --init-expert-location", _sglang, mtp=MTP_OWN_MAP),
    "tensorrt-llm": Target("YAML for moe_config.load_balancer", _tensorrt),
    "vllm-ascend": Target("JSON for eplb_config.expert_map_path", _ascend),
    "vllm-hygon": Target("JSON for expert_map_path of HYGON's vLLM plugin", _hygon, mtp=MTP_OWN_MAP),
    **{name: _proposed(one) for name, one in PROPOSALS.items()},
    "megatron": Target("order of experts for Megatron-LM", _order("megatron"), mtp=MTP_IDS, unplanned=IDS_STAY),
    "deepspeed": Target("order of experts for DeepSpeed-MoE", _order("deepspeed"), mtp=MTP_IDS, unplanned=IDS_STAY),
    "checkpoint": Target("relabelled Hugging Face checkpoint, for any engine", _checkpoint, folder=True, mtp=MTP_IDS,
                         unplanned=IDS_STAY),
    "npz": Target("poise's own file again", _npz, mtp="the file has the placement's layers alone",
                  unplanned="the file does not have them"),
}  # fmt: skip
