"""YAML files of others, read as YAML 1.2 and JSON have it: a number is what is written, or it is no number.

YAML 1.1, which PyYAML reads, makes 750 of ``12:30``, 15 of ``017``, True of ``on``, a text of ``1e9``, and lets the
last of two equal keys win. So only PyYAML's events are used here; what they stand for is decided in this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from poise.util.errors import InputError
from poise.util.files import read_bounded

MAX_DEPTH = 32
MAX_VALUES = 1 << 20
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], int | float]], ...] = (
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
)
_OCTAL = re.compile(r"[-+]?0[0-9]+")


def read_yaml(path: Path, most: int, error: type[InputError]) -> Any:
    """What a YAML file holds: dicts, lists, texts, ints, finite floats, bools and None.

    Parameters
    ----------
    path : the file.
    most : bytes that are read at most.
    error : what is raised.

    Raises
    ------
    InputError : of the type ``error``: no such file, no regular file, too large, or as :func:`parse_yaml`.
    """
    data = read_bounded(path, most, error)
    try:
        return parse_yaml(data, error)
    except error as problem:
        raise error(f"{str(path)[:200]!r}: {problem.message}", hint=problem.hint) from None


def parse_yaml(data: bytes, error: type[InputError]) -> Any:
    """One document.

    Raises
    ------
    InputError : of the type ``error``: it is not YAML, has an alias, a tag, a key twice or one that is a list or
        mapping, an integer with a leading zero, a number beyond a float, more than MAX_VALUES values, or lists and
        mappings deeper than MAX_DEPTH.
    """
    try:
        return _Reader(yaml.parse(data.decode("utf-8-sig"), Loader=_LOADER), error).document()
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise error(f"not YAML: {reason[:200]}") from None


def dump_yaml(data: dict[str, Any]) -> str:
    """Keys and values as :func:`parse_yaml` reads them back, in their order; of a byte that is no UTF-8 the escape."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


class _Reader:
    def __init__(self, events: Iterator[Any], error: type[InputError]) -> None:
        self._events, self._error, self._values = events, error, 0

    def document(self) -> Any:
        value = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                value = self._value(next(self._events), 0)
                next(self._events)
                following = next(self._events)
                if not isinstance(following, yaml.StreamEndEvent):
                    raise self._wrong(following, "a second document begins", hint="a file holds one")
        return value

    def _wrong(self, event: Any, why: str, *, hint: str = "") -> InputError:
        mark = event.start_mark
        return self._error(f"line {mark.line + 1}, column {mark.column + 1}: {why}", hint=hint)

    def _value(self, event: Any, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._wrong(event, f"more than {MAX_VALUES} values")
        if isinstance(event, yaml.AliasEvent):
            raise self._wrong(event, "aliases are not read", hint="write the value out")
        if event.tag is not None:
            raise self._wrong(event, f"the tag {event.tag[:40]!r} is not read", hint="leave tags out")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if depth == MAX_DEPTH:
            raise self._wrong(event, f"lists and mappings deeper than {MAX_DEPTH}")
        if isinstance(event, yaml.SequenceStartEvent):
            rows = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                rows.append(self._value(event, depth + 1))
            return rows
        out: dict[Any, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                raise self._wrong(event, "a key is a list or a mapping")
            key = self._value(event, depth + 1)
            if key in out:
                raise self._wrong(event, f"key {str(key)[:80]!r} appears twice", hint="keep one of them")
            out[key] = self._value(next(self._events), depth + 1)
        return out

    def _scalar(self, event: Any) -> Any:
        if event.style:  # quoted, or a block of text
            return event.value
        try:
            value = scalar(event.value)
        except ValueError as problem:
            raise self._wrong(event, str(problem)) from None
        if isinstance(value, int) and _OCTAL.fullmatch(event.value):
            plain = event.value.lstrip("+-0") or "0"
            raise self._wrong(
                event,
                f"{event.value[:40]!r} is octal to some readers and decimal to others",
                hint=f"{plain} or 0o{plain}",
            )
        return value


def scalar(text: str) -> bool | int | float | str | None:
    """What a plain scalar stands for.

    Raises
    ------
    ValueError : a number beyond what a float holds, or of more digits than are read.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    for pattern, made in _NUMBERS:
        if pattern.fullmatch(text):
            if len(text) > 400:
                raise ValueError(f"a number of {len(text)} characters")
            value = made(text)
            if not isfinite(value):
                raise ValueError(f"{text[:40]} is beyond what a float holds")
            return value
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what would be read back as something else than a text."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    value = value.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        plain = isinstance(scalar(value), str)
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else "'")


_Dumper.add_representer(str, _text)
