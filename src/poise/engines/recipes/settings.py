"""What the flags of a launch say of experts: ranks, redundant slots, EPLB, the map; checked against each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from poise.engines.recipes.launches import Launch
from poise.machine.presets import DEVICES, MODELS
from poise.util.errors import InputError, OptionError
from poise.util.jsonfile import parse_json

SPELLED: dict[str, dict[str, tuple[str, ...]]] = {
    "sglang": {
        "tp": ("tensor-parallel-size", "tp-size", "tp"), "ep": ("expert-parallel-size", "ep-size", "ep"),
        "redundant": ("ep-num-redundant-experts",), "eplb": ("enable-eplb",), "map": ("init-expert-location",),
        "backend": ("moe-a2a-backend",), "steps": ("eplb-rebalance-num-iterations",),
        "dispatch": ("ep-dispatch-algorithm",), "deepep": ("enable-deepep-moe",),
        "pp": ("pipeline-parallel-size", "pp-size", "pp"), "dp": ("data-parallel-size", "dp-size", "dp"),
        "attention": ("enable-dp-attention",),
    },
    "vllm": {
        "tp": ("tensor-parallel-size", "tp"), "dp": ("data-parallel-size", "dp"),
        "on": ("enable-expert-parallel", "ep"),
        "redundant": ("num-redundant-experts",), "eplb": ("enable-eplb",), "config": ("eplb-config",),
        "backend": ("all2all-backend",), "pp": ("pipeline-parallel-size", "pp"),
        "off": ("no-enable-expert-parallel",), "eplb-off": ("no-enable-eplb",),
    },
    "tensorrt-llm": {
        "tp": ("tensor-parallel-size", "tp-size"), "ep": ("moe-expert-parallel-size", "ep-size"),
        "moe": ("moe-config",), "pp": ("pipeline-parallel-size", "pp-size"),
    },
}  # fmt: skip
"""Every spelling of the flags that are read, by engine."""
ALSO = {
    "moe-runner-backend", "moe-dense-tp-size", "deepep-mode", "deepep-config", "expert-distribution-recorder-mode",
    "expert-distribution-recorder-buffer-size", "enable-expert-distribution-metrics", "moe-backend",
    "moe-tensor-parallel-size", "moe-cluster-parallel-size", "eplb-algorithm", "disable-shared-experts-fusion",
    "eplb-rebalance-layers-per-chunk", "eplb-min-rebalancing-utilization-threshold", "enable-return-routed-experts",
}  # fmt: skip
"""Flags of experts that decide nothing of where they lie."""
ALLOWED = {"instruct", "base", "thinking", "chat", "hf", "v0.1", "preview"}
"""What a model's name may say beyond its preset's: the same layers and the same weights' type. Dates beside."""
MORE = {"llama-4-maverick": {"17b", "128e"}, "llama-4-scout": {"17b", "16e"}}
OTHER = {"kimi-k2": {"thinking"}}  # published in 4 bits
TYPES = {"fp8": {"fp8"}, "mxfp4": {"mxfp4", "fp4"}, "": {"bf16", "bfloat16", "auto", "fp16", "float16"}}
"""What recipes call the weights' types, by ``quant_method`` of a preset."""
PARALLEL = {"tp": "tensor", "dp": "data", "pp": "pipeline"}
_EXPERTS = re.compile(r"expert|eplb|redundan|(?:^|-)(?:moe|ep)(?:-|$)")


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """One instance of a recipe.

    Parameters
    ----------
    engine, role, model : as in :class:`poise.engines.recipes.launches.Launch`.
    ranks : that experts are spread over; 1: they are not; None: the recipe does not say.
    redundant : slots a layer beyond one an expert; None: only the map file, or an unknown variable, says.
    slots : slots a layer in all, where the recipe says that instead (TensorRT-LLM).
    own : the engine's own EPLB rearranges; None: the recipe does not say.
    map_file : a map that is loaded; "": none.
    backend : all-to-all; "": not said.
    gpu, gpus_per_node : what it runs on, as far as it is said.
    unknown : flags of experts that are not read here. notes : for the reader.
    stages : of a pipeline, each with layers and ranks of its own; None: the recipe does not say.
    precision : as in :class:`poise.engines.recipes.launches.Launch`.
    doubtful : words that may hold any flag.
    """

    engine: str
    role: str
    model: str
    ranks: int | None
    redundant: int | None
    slots: int | None
    own: bool | None
    map_file: str
    backend: str
    gpu: str
    gpus_per_node: int | None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stages: int | None = 1
    precision: str = ""
    doubtful: tuple[str, ...] = ()

    @property
    def preset(self) -> str:
        """The preset of just its model, with weights of just its type; "": none."""
        name = re.split(r"[/\\]", self.model.lower().rstrip("/"))[-1]
        near = (one for one in MODELS if name == one or name.startswith(f"{one}-"))
        found = max(near, key=len, default="")
        own = TYPES[MODELS[found].get("quantization_config", {}).get("quant_method", "")] if found else set()
        allowed = (ALLOWED | MORE.get(found, set()) | own) - OTHER.get(found, set())
        words = name[len(found) :].split("-")[1:]
        if any(word not in allowed and not re.fullmatch(r"[0-9]{4}", word) for word in words):
            return ""
        return found if self.precision.lower() in own | {""} else ""

    @property
    def cluster(self) -> str:
        """A cluster spec of as many devices; "": the recipe does not say on what it runs."""
        ranks = self.ranks or 0
        each = min(self.gpus_per_node or 0, ranks)
        if self.gpu not in DEVICES or not each or ranks % each:
            return ""
        return f"{ranks // each}x{each}:{self.gpu}"

    def redundant_of(self, experts: int, ranks: int) -> int | None:
        """Redundant slots a layer of a model of so many experts over so many ranks.

        Raises
        ------
        OptionError : fewer slots than experts, or slots that ranks cannot share evenly.
        """
        many = self.redundant
        if self.slots is not None:
            if self.slots < experts:
                raise OptionError(f"{self.slots} slots a layer cannot hold {experts} experts")
            many = self.slots - experts
        if many is not None and (experts + many) % ranks:
            raise OptionError(
                f"{experts} experts and {many} redundant slots are not shared evenly by {ranks} ranks",
                hint=f"{-experts % ranks} redundant slots, or {ranks} more",
            )
        return many

    def sentence(self) -> str:
        """What it sets, and what that leaves to chance."""
        where = f"{self.role or 'both phases'}, {self.engine}, {self.ranks or '?'} expert-parallel ranks"
        if self.doubtful:
            return (
                f"{where}: what it sets of experts is unknown, {', '.join(self.doubtful)} may hold any flag and is not "
                "set once in the recipe"
            )
        if self.ranks == 1:
            return f"{where}: no expert moves, and no map matters"
        if self.slots is not None:
            many = f"{self.slots} slots a layer"
        elif self.redundant is not None:
            many = f"{self.redundant} redundant slots a layer"
        else:
            many = "as many slots as its map has" if self.map_file else "an unknown number of slots"
        if self.own is None:
            how = "whether EPLB is on is not said"
        elif self.map_file:
            how = f"the map {self.map_file} is loaded"
        elif self.own:
            how = "EPLB on, no planned map: it starts with none and rearranges by what it counts"
        elif self.redundant:
            how = f"EPLB off and no map: they hold experts 0 to {self.redundant - 1} again, whatever is used"
        elif self.redundant is None and self.slots is None:
            how = "EPLB off and no map"
        else:
            how = "EPLB off and no map: experts lie in blocks by their numbers"
        return f"{where}, {many}, {how}"


@dataclass(slots=True)
class _Read:
    """What is read of a launch: flags by their roles in :data:`SPELLED`, and fields of :class:`ExpertSettings`."""

    given: dict[str, Any]
    notes: list[str]
    tp: int | None
    dp: int | None
    own: bool | None
    redundant: int | None
    map_file: str
    ranks: int | None = None
    slots: int | None = None


def expert_settings(launch: Launch) -> ExpertSettings:
    """What a launch says of experts.

    Raises
    ------
    OptionError : a number that is none, or two that contradict each other.
    """
    names = {spelled: role for role, all_of in SPELLED[launch.engine].items() for spelled in all_of}
    given = _given(launch, names)
    inner = _dotted(launch, given)
    others = (flag for flag in launch.flags if flag not in names and flag not in ALSO and flag not in inner)
    unknown = tuple(sorted(flag for flag in others if _EXPERTS.search(flag)))
    notes: list[str] = []
    tp, dp, pp = (_size(f"{what} parallel size", given, key, notes) for key, what in PARALLEL.items())
    if launch.engine == "sglang":
        within = _said("attention of data parallelism", given, "attention", notes)
        if within is not False:
            dp = 1 if within else None  # within the tensor parallel group
    own = _said("EPLB", given, "eplb", notes)
    redundant = _number("redundant experts", given, "redundant", notes, least=0)
    read = _Read(given, notes, tp, dp, own, redundant, str(given.get("map") or ""))
    READ[launch.engine](launch, read)
    if "$" in read.map_file:
        notes.append(f"the map is {read.map_file[:60]}, which the recipe does not set")
    if any("redundan" in flag for flag in unknown):
        given.setdefault("redundant", None)
    if read.map_file == "" and read.redundant is None and read.slots is None and "redundant" not in given:
        read.redundant = 0
    _check_gpus(launch, read, pp)
    if read.own and read.map_file and launch.engine == "sglang":
        notes.append("the map is a start only: --enable-eplb replaces it")
    if pp is not None and pp > 1:
        notes.append(f"{pp} stages of a pipeline: each spreads the experts of its own layers over its own ranks")
    cache = str(launch.flags.get("kv-cache-dtype") or "auto")
    if cache not in ("auto", "bfloat16", "bf16", "float16", "fp16"):
        notes.append(f"the key/value cache is of {cache[:40]}: more tokens than those of 16 bits counted here fit")
    if launch.doubtful:
        read.ranks = read.redundant = read.slots = read.own = None
        read.map_file = ""
    return ExpertSettings(
        launch.engine, launch.role, launch.model, read.ranks, read.redundant, read.slots, read.own, read.map_file,
        str(given.get("backend") or ""), launch.gpu.lower(), launch.gpus_per_node, unknown, tuple(notes), pp,
        launch.precision, launch.doubtful,
    )  # fmt: skip


def _given(launch: Launch, names: dict[str, str]) -> dict[str, Any]:
    """Values of the flags that are read, by role."""
    given: dict[str, Any] = {}
    for flag, value in launch.flags.items():
        role = names.get(flag)
        if role is None:
            continue
        if role in given and given[role] != value:
            raise OptionError(f"{role} is given as {given[role]!r:.40} and as {value!r:.40}", hint="keep one of them")
        given[role] = value
    return given


def _vllm(launch: Launch, read: _Read) -> None:
    given, notes = read.given, read.notes
    settings = _json(given.get("config"), notes)
    there = _number("num_redundant_experts", settings, "num_redundant_experts", notes, least=0)
    if None not in (read.redundant, there) and read.redundant != there:
        raise OptionError(f"redundant experts are {read.redundant} by one flag and {there} by --eplb-config")
    read.redundant = there if read.redundant is None else read.redundant
    if "$" in str(settings.get("num_redundant_experts", "")) or settings.get("$"):
        given.setdefault("redundant", None)
    on = _said("expert parallelism", given, "on", notes)
    on, read.own = (False if "off" in given else on), (False if "eplb-off" in given else read.own)
    read.ranks = 1 if on is False else None if on is None or read.tp is None or read.dp is None else read.tp * read.dp
    if "tp" not in given and "dp" not in given and (read.own or on):
        read.ranks = launch.gpus
        notes += ["the recipe does not say over how many ranks"] if read.ranks is None else []
    read.map_file = str(launch.environment.get("POISE_STATIC_MAP", ""))
    if read.own is False and read.redundant and not launch.doubtful:
        raise OptionError(
            f"{read.redundant} redundant experts with EPLB off: vLLM does not start", hint="--enable-eplb, or 0"
        )
    if read.own and read.ranks == 1 and not launch.doubtful:
        raise OptionError(
            f"EPLB on 1 expert-parallel rank, {read.tp or '?'} x {read.dp or '?'} GPUs: vLLM does not start",
            hint="--enable-expert-parallel, over more than one",
        )


def _sglang(launch: Launch, read: _Read) -> None:
    given, notes = read.given, read.notes
    read.ranks = _ranks(given, notes)
    spread = given.get("backend") not in (None, "none") or _on(given.get("deepep", False))
    if "$" in str(given.get("backend") or ""):
        notes.append(f"the all-to-all backend is {str(given['backend'])[:40]}, which the recipe does not set")
        read.ranks = read.ranks if read.ranks == read.tp else None
    elif spread and "tp" in given and read.ranks != read.tp:
        says = f" (it says {read.ranks})" if read.ranks else ""
        notes += [f"an all-to-all backend makes the expert-parallel size {read.tp}{says}"] if read.tp else []
        read.ranks = read.tp
    read.map_file = "" if read.map_file == "trivial" else read.map_file


def _tensorrt(launch: Launch, read: _Read) -> None:
    given, notes = read.given, read.notes
    read.ranks, balancer = _ranks(given, notes), _balancer(given.get("moe"))
    if isinstance(balancer, str):
        read.map_file = balancer
    elif balancer is not None:
        read.slots = _number("num_slots", balancer, "num_slots", notes)
        read.own = bool(balancer.get("layer_updates_per_iter"))
        read.map_file = "initial_global_assignments" if balancer.get("initial_global_assignments") else ""
        if read.slots is None and "num_slots" in balancer:
            given["redundant"] = None
    elif "$" in str(given.get("moe") or ""):
        notes.append(f"moe_config is {str(given['moe'])[:40]}, which the recipe does not set")
        read.own, given["redundant"] = None, None


READ: dict[str, Callable[[Launch, _Read], None]] = {"vllm": _vllm, "sglang": _sglang, "tensorrt-llm": _tensorrt}
"""What is an engine's own."""


def _check_gpus(launch: Launch, read: _Read, stages: int | None) -> None:
    """Refuse more ranks than GPUs, and sizes that the recipe's resources do not hold."""
    tp, dp = read.tp, read.dp
    if "tp" not in read.given or tp is None or dp is None or launch.doubtful:
        return
    devices, group = None if stages is None else tp * dp * stages, tp * (dp if launch.engine == "vllm" else 1)
    if launch.gpus is not None and devices not in (None, launch.gpus):
        assert devices is not None
        if launch.gpus != launch.gpus_per_node or devices % launch.gpus:
            raise OptionError(
                f"the {launch.role or 'engine'} has {launch.gpus} GPUs and is started over {devices}",
                hint="resources and parallel sizes of the recipe disagree",
            )
        read.notes.append(
            f"its resources are {launch.gpus} GPUs, as many as a node has, and it is started over {devices}: taken as "
            f"{devices // launch.gpus} such nodes"
        )
    if read.ranks is not None and read.ranks > group:
        raise OptionError(f"{read.ranks} expert-parallel ranks on {group} GPUs")


def _dotted(launch: Launch, given: dict[str, Any]) -> set[str]:
    """Put ``--eplb-config.KEY VALUE`` of vLLM beside what ``--eplb-config`` has; the flags that were."""
    found = {flag for flag in launch.flags if launch.engine == "vllm" and flag.startswith("eplb-config.")}
    if found:
        settings = dict(_json(given.get("config"), []))
        for flag in found:
            key, value = flag.partition(".")[2].replace("-", "_"), launch.flags[flag]
            if str(settings.get(key, value)) != str(value):
                raise OptionError(
                    f"{key:.60} is {settings[key]!r:.40} in --eplb-config and {value!r:.40} by --{flag:.60}"
                )
            settings[key] = value
        given["config"] = settings
    return found


def _size(what: str, given: dict[str, Any], key: str, notes: list[str]) -> int | None:
    """1 where nothing is said; None where it cannot be read."""
    return _number(what, given, key, notes) if given.get(key) is not None else 1


def _ranks(given: dict[str, Any], notes: list[str]) -> int | None:
    return _size("expert parallel size", given, "ep", notes)


def _said(what: str, given: dict[str, Any], key: str, notes: list[str]) -> bool | None:
    """Whether a flag is on; None where a variable says."""
    value = given.get(key, False)
    if "$" in str(value):
        notes.append(f"{what} is {str(value)[:40]}, which the recipe does not set")
        return None
    return _on(value)


def _on(value: Any) -> bool:
    """A flag without a value is on."""
    return value is None or value is True or str(value).lower() in ("true", "1", "yes")


def _number(what: str, given: Any, key: str, notes: list[str], *, least: int = 1) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    text = str(value)
    if "$" in text:
        notes.append(f"the {what} is {text[:40]}, which the recipe does not set")
        return None
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < least:
        raise OptionError(f"the {what} must be a whole number of at least {least}, got {text[:40]!r}")
    return int(text)


def _json(value: Any, notes: list[str]) -> dict[Any, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    if "$" in str(value):
        notes.append(f"--eplb-config is {str(value)[:60]}, which the recipe does not set")
        return {"$": True}
    try:
        got = parse_json(str(value), InputError)
    except InputError as error:
        raise OptionError(f"--eplb-config is no JSON: {error.message}") from None
    return got if isinstance(got, dict) else {}


def _balancer(value: Any) -> Any:
    balancer = value.get("load_balancer", value.get("load-balancer")) if isinstance(value, dict) else None
    if balancer is not None and not isinstance(balancer, str | dict):
        raise OptionError(f"load_balancer is a {type(balancer).__name__}, it must be a file or a mapping")
    return balancer
