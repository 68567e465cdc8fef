"""What the flags of a launch say of experts: ranks, redundant slots, EPLB, the map; checked against each other."""

from __future__ import annotations

import re
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
    },
    "vllm": {
        "tp": ("tensor-parallel-size", "tp"), "dp": ("data-parallel-size", "dp"),
        "on": ("enable-expert-parallel", "ep"),
        "redundant": ("num-redundant-experts",), "eplb": ("enable-eplb",), "config": ("eplb-config",),
        "backend": ("all2all-backend",),
    },
    "tensorrt-llm": {
        "tp": ("tensor-parallel-size", "tp-size"), "ep": ("moe-expert-parallel-size", "ep-size"),
        "moe": ("moe-config",),
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
    own : the engine's own EPLB rearranges.
    map_file : a map that is loaded; "": none.
    backend : all-to-all; "": not said.
    gpu, gpus_per_node : what it runs on, as far as it is said.
    unknown : flags of experts that are not read here. notes : for the reader.
    """

    engine: str
    role: str
    model: str
    ranks: int | None
    redundant: int | None
    slots: int | None
    own: bool
    map_file: str
    backend: str
    gpu: str
    gpus_per_node: int | None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def preset(self) -> str:
        """The model preset whose name its model's begins with; "": none."""
        name = re.split(r"[/\\]", self.model.lower().rstrip("/"))[-1]
        return max((one for one in MODELS if name.startswith(one)), key=len, default="")

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
        if self.ranks == 1:
            return f"{where}: no expert moves, and no map matters"
        many = "as many slots as its map has" if self.redundant is None and self.slots is None else (
            f"{self.redundant} redundant slots a layer" if self.slots is None else f"{self.slots} slots a layer"
        )  # fmt: skip
        if self.map_file:
            how = f"the map {self.map_file} is loaded"
        elif self.own:
            how = "EPLB on, no planned map: it starts with none and rearranges by what it counts"
        elif self.redundant:
            how = f"EPLB off and no map: they hold experts 0 to {self.redundant - 1} again, whatever is used"
        else:
            how = "EPLB off and no map: experts lie in blocks by their numbers"
        return f"{where}, {many}, {how}"


def expert_settings(launch: Launch) -> ExpertSettings:
    """What a launch says of experts.

    Raises
    ------
    OptionError : a number that is none, or two that contradict each other.
    """
    names = {spelled: role for role, all_of in SPELLED[launch.engine].items() for spelled in all_of}
    given: dict[str, Any] = {}
    for flag, value in launch.flags.items():
        role = names.get(flag)
        if role is None:
            continue
        if role in given and given[role] != value:
            raise OptionError(f"{role} is given as {given[role]!r:.40} and as {value!r:.40}", hint="keep one of them")
        given[role] = value
    others = (flag for flag in launch.flags if flag not in names and flag not in ALSO)
    unknown = tuple(sorted(flag for flag in others if _EXPERTS.search(flag)))
    notes: list[str] = []
    tp, dp = _number("tensor parallel size", given, "tp", notes), _number("data parallel size", given, "dp", notes)
    ranks: int | None = 1
    own, map_file, slots = _on(given.get("eplb", False)), str(given.get("map") or ""), None
    redundant = _number("redundant experts", given, "redundant", notes, least=0)
    if launch.engine == "vllm":
        settings = _json(given.get("config"))
        inner = _number("num_redundant_experts", settings, "num_redundant_experts", notes, least=0)
        if None not in (redundant, inner) and redundant != inner:
            raise OptionError(f"redundant experts are {redundant} by one flag and {inner} by --eplb-config")
        redundant = inner if redundant is None else redundant
        ranks = (tp or 1) * (dp or 1) if _on(given.get("on", False)) else 1
        if tp is None and dp is None and (own or "on" in given):
            ranks = launch.gpus
            notes += ["the recipe does not say over how many ranks"] if ranks is None else []
        map_file = str(launch.environment.get("POISE_STATIC_MAP", ""))
        if not own and redundant:
            raise OptionError(
                f"{redundant} redundant experts with EPLB off: vLLM does not start", hint="--enable-eplb, or 0"
            )
        if own and ranks == 1:
            raise OptionError(
                f"EPLB on 1 expert-parallel rank, {tp or 1} x {dp or 1} GPUs: vLLM does not start",
                hint="--enable-expert-parallel, over more than one",
            )
    elif launch.engine == "sglang":
        ranks = _ranks(given, notes)
        spread = given.get("backend") not in (None, "none") or _on(given.get("deepep", False))
        if spread and tp and ranks != tp:
            notes.append(f"an all-to-all backend makes the expert-parallel size {tp} (it says {ranks})")
            ranks = tp
        map_file = "" if map_file == "trivial" else map_file
    else:
        ranks, balancer = _ranks(given, notes), _balancer(given.get("moe"))
        if isinstance(balancer, str):
            map_file = balancer
        elif balancer is not None:
            slots = _number("num_slots", balancer, "num_slots", notes)
            own = bool(balancer.get("layer_updates_per_iter"))
            map_file = "initial_global_assignments" if balancer.get("initial_global_assignments") else ""
    if map_file == "" and redundant is None and slots is None and "redundant" not in given:
        redundant = 0
    devices = (tp or 1) * (dp or 1)
    if launch.gpus is not None and tp is not None and devices != launch.gpus:
        raise OptionError(
            f"the {launch.role or 'engine'} has {launch.gpus} GPUs and is started over {devices}",
            hint="resources and parallel sizes of the recipe disagree",
        )
    if tp is not None and ranks is not None and ranks > devices:
        raise OptionError(f"{ranks} expert-parallel ranks on {devices} GPUs")
    if own and map_file and launch.engine == "sglang":
        notes.append("the map is a start only: --enable-eplb replaces it")
    return ExpertSettings(
        launch.engine, launch.role, launch.model, ranks, redundant, slots, own, map_file,
        str(given.get("backend") or ""), launch.gpu.lower(), launch.gpus_per_node, unknown, tuple(notes),
    )  # fmt: skip


def _ranks(given: dict[str, Any], notes: list[str]) -> int | None:
    """1 where nothing is said; None where it cannot be read."""
    return _number("expert parallel size", given, "ep", notes) if given.get("ep") is not None else 1


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


def _json(value: Any) -> dict[Any, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
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
