"""Recipe files as what they start: each engine instance with its flags. Nothing in a file is run or looked up.

Read are srt-slurm's and InferenceX's YAML (``backend`` with ``sglang_config``, ``vllm_config`` or ``trtllm_config`` a
role), llm-d's (``prefill`` and ``decode`` with ``extra-args``), an options file of TensorRT-LLM, and shell scripts with
``sglang.launch_server``, ``vllm serve`` or ``trtllm-serve``. Variables of a script are known where it sets them
once; a word of another one may hold any flag: it is doubtful, and whoever reads a launch says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from poise.engines.recipes.shell import MOST, Known, Word, assignments, bare, commands, expand, known_names
from poise.util.errors import OptionError
from poise.util.files import read_bounded
from poise.util.yamlfile import parse_yaml

MAX_RECIPE = 1 << 20
MOST_LAUNCHES = 16
ROLES = ("prefill", "decode", "aggregated", "agg")
CONFIGS = {"sglang_config": "sglang", "vllm_config": "vllm", "trtllm_config": "tensorrt-llm"}
_NO_LAUNCH = {
    *(
        "awk",
        "cat",
        "command",
        "cp",
        "curl",
        "echo",
        "grep",
        "egrep",
        "fgrep",
        "head",
        "kill",
        "killall",
        "ls",
        "mkdir",
    ),
    *("mv", "pgrep", "pip", "pip3", "pkill", "printf", "ps", "rm", "sed", "sleep", "tail", "test", "touch", "type"),
    *("wait", "wget", "which", "[", "[["),
}
"""Commands that start nothing, whatever they name."""
_FILES = {"config", "config-file", "extra-llm-api-options"}
"""Flags whose file holds flags."""
_VALUED = re.compile(
    r"(?!enable-|disable-|no-|skip-|use-|return-|allow-)(?:^|.*-)(?:size|len|length|seqs|requests|tokens|bs|fraction|utilization|dtype|type|backend|port|ports|addr|host|ip|path"
    r"|model|name|rank|ranks|nodes|nnodes|mode|parser|template|level|tokenizer|quantization|seed|dir|iterations|location|experts"
    r"|size-local|config|address|algorithm|format|tp|dp|pp|q)"
)
"""Flags that are followed by one value."""
_SCRIPT = re.compile(r"-[a-z]*c|eval")
"""What a script in one word comes after."""
_ENGINE = re.compile(r"sglang|vllm|trtllm")
_MODEL = re.compile(r"model|path|name|repo|weights|checkpoint|ckpt", re.IGNORECASE)
"""Variables that are one word."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One engine instance.

    Parameters
    ----------
    engine : ``vllm``, ``sglang`` or ``tensorrt-llm``.
    role : ``prefill``, ``decode``, or "" for one that does both.
    flags : by name with dashes and without the leading ones; values as JSON or texts have them, None: none.
    environment : variables that the recipe sets.
    model : as the recipe names it; "": it does not.
    gpus : GPUs of one instance by the recipe's resources; None: not said.
    gpu : what a GPU is called there; "": not said.
    gpus_per_node : None: not said.
    precision : of the weights, as the recipe calls it; "": not said.
    doubtful : words that may hold any flag: variables that the recipe does not set once, files of flags.
    """

    engine: str
    role: str
    flags: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    gpus: int | None = None
    gpu: str = ""
    gpus_per_node: int | None = None
    precision: str = ""
    doubtful: tuple[str, ...] = ()


def read_launches(path: str | Path) -> tuple[Launch, ...]:
    """What a recipe starts.

    Raises
    ------
    OptionError : no such file, more than a mebibyte, no recipe that is known, or a flag twice with different values.
    """
    data = read_bounded(path, MAX_RECIPE, OptionError)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise OptionError("a recipe is UTF-8 text") from None
    if str(path).endswith((".yaml", ".yml")):
        value = parse_yaml(data, OptionError)
        found = tuple(_of_yaml(value)) if isinstance(value, dict) else ()
    else:
        found = tuple(_of_script(text))
    if not found:
        raise OptionError(
            "the recipe starts no engine that is known",
            hint="srt-slurm's YAML, TensorRT-LLM's options, or a script that starts SGLang, vLLM or TensorRT-LLM",
        )
    if len(found) > MOST_LAUNCHES:
        raise OptionError(f"the recipe starts {len(found)} engines, at most {MOST_LAUNCHES} are read")
    return found


def _of_yaml(recipe: dict[Any, Any]) -> Iterator[Launch]:
    backend, resources = _part(recipe, "backend"), _part(recipe, "resources")
    model = _part(recipe, "identity").get("model", {})
    named = model.get("repo") if isinstance(model, dict) else None
    named = str(named or _part(recipe, "model").get("path") or "")
    for key, engine in CONFIGS.items():
        for role, flags in _part(backend, key).items():
            if role not in ROLES or not isinstance(flags, dict):
                continue
            environment = _part(backend, f"{role}_environment")
            shown = str(flags.get("model-path") or flags.get("model") or "") if not named else named
            yield Launch(
                engine, role if role in ("prefill", "decode") else "", _dashed(flags), environment, shown,
                _gpus(resources, role), str(resources.get("gpu_type", "")), _count(resources.get("gpus_per_node")),
                _precision(_dashed(flags)) or str(_part(recipe, "model").get("precision") or ""),
            )  # fmt: skip
    for role in ("prefill", "decode"):
        words = _part(recipe, role).get("extra-args")
        if isinstance(words, str):
            flags, doubtful = _flags([one for part in commands(words) for raw in part.words for one in expand(raw, {})])
            yield Launch("vllm", role, flags, _part(_part(recipe, role), "env"), named, doubtful=doubtful)
    if "moe_config" in recipe or "moe_expert_parallel_size" in recipe:
        yield Launch("tensorrt-llm", "", _dashed(recipe), model=str(recipe.get("model", "")))


def _of_script(text: str, outer: Known | None = None) -> Iterator[Launch]:
    every = commands(text)
    known: Known = {**(outer or {}), **known_names(every)}
    total = 0
    for command in every:
        own, written = assignments(bare(command.words), known)
        words: list[Word] = []
        for raw in written:
            words += (filled := expand(raw, known))
            total += sum(len(one.text) for one in filled)
            if total > MOST:
                raise OptionError(f"commands of the recipe have more than {MOST} characters, variables filled in")
        texts = [one.text for one in words]
        if not texts or texts[0].rsplit("/", 1)[-1] in _NO_LAUNCH or texts[0].endswith(":"):
            continue
        for script in (two for one, two in pairwise(texts) if outer is None and _SCRIPT.fullmatch(one)):
            if _ENGINE.search(script):
                yield from _of_script(script, known)
        if found := _started(texts):
            engine, at = found
            yield _launch(
                engine, words[at:], {**{name: one for name, one in known.items() if isinstance(one, str)}, **own}
            )


def _started(words: list[str]) -> tuple[str, int] | None:
    """The engine that a command starts, and the place of its first argument."""
    for at, (word, after) in enumerate(pairwise([*words, ""])):
        name = word.rsplit("/", 1)[-1]
        if (word == "-m" and after == "sglang.launch_server") or (name == "sglang" and after == "serve"):
            return "sglang", at + 2
        if (word == "-m" and re.fullmatch(r"vllm\.entrypoints\.[\w.]+", after)) or (
            name == "vllm" and after == "serve"
        ):
            return "vllm", at + 2
        if name == "trtllm-serve":
            return "tensorrt-llm", at + 1 + (after == "serve")
    return None


def _launch(engine: str, words: list[Word], environment: Mapping[str, str]) -> Launch:
    first = next((one for one in words[:1] if not one.text.startswith("-")), None)
    if first and first.many and not _MODEL.search(first.text):
        first = None  # its flags, for all that is known
    flags, doubtful = _flags(words[1:] if first else words)
    named = flags.get("model-path") or flags.get("model") or (first.text if first else "")
    role = str(flags.get("disaggregation-mode", ""))
    return Launch(
        engine, role if role in ("prefill", "decode") else "", flags, environment, str(named),
        precision=_precision(flags), doubtful=doubtful,
    )  # fmt: skip


def _precision(flags: Mapping[str, Any]) -> str:
    return str(flags.get("quantization") or flags.get("q") or "")


def _flags(words: list[Word]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Flags by name, and words that may hold others."""
    out: dict[str, Any] = {}
    doubtful: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*(?:=.*)?", word.text, re.DOTALL):
            if "$" in word.text:
                doubtful.append(word.text[:60])
            continue
        name, eq, value = word.text.lstrip("-").partition("=")
        name = name.replace("_", "-")
        given: str | None = value if eq else None
        if not eq and at < len(words) and not re.fullmatch(r"--?[A-Za-z].*", words[at].text, re.DOTALL):
            if words[at].many and not _VALUED.fullmatch(name):
                doubtful.append(words[at].text[:60])  # a flag without a value, and more flags
            else:
                given = words[at].text
            at += 1
        if name in _FILES:
            doubtful.append(f"--{name} {given or ''}".strip()[:60])
        _put(out, name, given)
    return out, tuple(doubtful)


def _put(out: dict[str, Any], name: str, value: Any) -> None:
    if name in out and out[name] != value:
        raise OptionError(f"--{name:.60} is given as {out[name]!r:.60} and as {value!r:.60}", hint="keep one of them")
    out[name] = value


def _dashed(flags: Mapping[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in flags.items():
        _put(out, str(name).replace("_", "-"), value)
    return out


def _part(value: Mapping[Any, Any], key: str) -> dict[Any, Any]:
    got = value.get(key)
    return got if isinstance(got, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _gpus(resources: Mapping[Any, Any], role: str) -> int | None:
    """GPUs of one instance of a role."""
    role = "agg" if role == "aggregated" else role
    if (given := _count(resources.get(f"gpus_per_{role}"))) is not None:
        return given
    nodes, workers = (_count(resources.get(f"{role}_{what}")) for what in ("nodes", "workers"))
    each = _count(resources.get("gpus_per_node"))
    if nodes is None or each is None or nodes * each % (workers or 1):
        return None
    return nodes * each // (workers or 1)
