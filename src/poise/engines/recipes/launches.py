"""Recipe files as what they start: each engine instance with its flags. Nothing in a file is run or looked up.

Read are srt-slurm's and InferenceX's YAML (``backend`` with ``sglang_config``, ``vllm_config`` or ``trtllm_config`` a
role), llm-d's (``prefill`` and ``decode`` with ``extra-args``), an options file of TensorRT-LLM, and shell scripts with
``sglang.launch_server``, ``vllm serve`` or ``trtllm-serve``. Variables of a script are known where it sets them to a
plain text; what another one holds is not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poise.util.errors import OptionError
from poise.util.files import read_bounded
from poise.util.yamlfile import parse_yaml

MAX_RECIPE = 1 << 20
MOST_LAUNCHES = 16
ROLES = ("prefill", "decode", "aggregated", "agg")
CONFIGS = {"sglang_config": "sglang", "vllm_config": "vllm", "trtllm_config": "tensorrt-llm"}
_ASSIGNED = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=([^\s;&|`$()]*)[ \t]*(?:#.*)?")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}$]*))?\})")
_COMMANDS = (
    (re.compile(r"sglang\.launch_server|(?:^|[\s/])sglang[ \t]+serve"), "sglang"),
    (re.compile(r"vllm\.entrypoints\S*|(?:^|[\s/])vllm[ \t]+serve"), "vllm"),
    (re.compile(r"(?:^|[\s/])trtllm-serve(?:[ \t]+serve)?"), "tensorrt-llm"),
)


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
    """

    engine: str
    role: str
    flags: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    gpus: int | None = None
    gpu: str = ""
    gpus_per_node: int | None = None


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
            )  # fmt: skip
    for role in ("prefill", "decode"):
        words = _part(recipe, role).get("extra-args")
        if isinstance(words, str):
            yield Launch("vllm", role, _flags(_words(words)), _part(_part(recipe, role), "env"), named)
    if "moe_config" in recipe or "moe_expert_parallel_size" in recipe:
        yield Launch("tensorrt-llm", "", _dashed(recipe), model=str(recipe.get("model", "")))


def _of_script(text: str) -> Iterator[Launch]:
    known: dict[str, str] = {}
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        if found := _ASSIGNED.fullmatch(line.strip()):
            known[found[1]] = found[2].strip("\"'")
            continue
        if line.lstrip().startswith("#"):
            continue
        for pattern, engine in _COMMANDS:
            if start := pattern.search(line):
                before, words = line[: start.start()], _words(_filled(line[start.end() :], known))
                environment = known | {
                    name: value for name, eq, value in (word.partition("=") for word in before.split()) if eq
                }
                flags = _flags(words)
                named = flags.get("model-path") or flags.get("model")
                if named is None and words and not words[0].startswith("-"):
                    named = words[0]
                role = str(flags.get("disaggregation-mode", ""))
                yield Launch(
                    engine, role if role in ("prefill", "decode") else "", flags, environment, str(named or "")
                )
                break


def _filled(line: str, known: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        return known.get(found[1] or found[2], found[0] if found[3] is None else found[3])

    return _VARIABLE.sub(value, line)


def _words(line: str) -> list[str]:
    """The words of a command up to where another begins."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise OptionError(f"a command of the recipe cannot be read: {error}") from None
    end = next(
        (at for at, word in enumerate(words) if word in ("&", "|", "||", "&&", ";", ">", "2>&1", "2>")), len(words)
    )
    return words[:end]


def _flags(words: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*(?:=.*)?", word, re.DOTALL):
            continue
        name, eq, value = word.lstrip("-").partition("=")
        given: str | None = value if eq else None
        if not eq and at < len(words) and not re.fullmatch(r"--?[A-Za-z].*", words[at], re.DOTALL):
            given = words[at]
            at += 1
        _put(out, name.replace("_", "-"), given)
    return out


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
