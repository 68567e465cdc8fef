"""Files as what they hold: the container is told from the first bytes, never from the name."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from poise.engines.checkpoints.shards import Shard, read_shard
from poise.engines.dumps.untrusted import MAX_JSON_BYTES, file_size, integer_npy, parse_json, read_bytes
from poise.errors import ModelError, NoResultError, TraceError
from poise.observe.npz import BROKEN

try:
    from poise.engines.dumps import torch_files
except ImportError:
    torch_files = None  # type: ignore[assignment]

Container = Literal["torch", "npz", "npy", "safetensors", "json", "json-lines", "yaml", "text"]
HEAD_BYTES = 4096
MAX_NPY_BYTES = 2 << 30
MAX_LINES_BYTES = 1 << 30
MAX_YAML_BYTES = 4 << 20
YAML_KEYS = re.compile(rb"^(num_slots|initial_global_assignments|layer_updates_per_iter)\s*:", re.MULTILINE)
DATED = re.compile(rb"\[\d{4}-\d\d-\d\d")
"""How a log line may begin that is no JSON list."""
UNUSED = frozenset({"misc_objects"})
"""Keys of a torch file that no reader uses; SGLang's is one list in every record."""
TAG_ERRORS = (KeyError, IndexError, AttributeError, TypeError, OverflowError)
"""What PyYAML raises on tags such as ``!!int ''`` instead of a YAMLError."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One file.

    Parameters
    ----------
    path, size : the file, and its bytes.
    container : what kind of file it is.
    value : torch, json, yaml: the object; json-lines: a list of objects; npy: an array; npz: names of its members;
        safetensors: a :class:`~poise.engines.checkpoints.shards.Shard`; text: None, readers go through the lines.
    """

    path: Path
    size: int
    container: Container
    value: Any

    @property
    def name(self) -> str:
        """File name, for messages."""
        return self.path.name


def open_part(path: Path) -> Part:
    """Read a file as far as its container goes.

    Raises
    ------
    TraceError : missing, too large, damaged, or of no kind that is known.
    NoResultError : a torch file, and PyTorch is not installed.
    """
    try:
        return _open(path)
    except TraceError as error:
        raise TraceError(f"{str(path)[:200]}: {error.message}", hint=error.hint) from None


def _open(path: Path) -> Part:
    size = file_size(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        raise TraceError(f"cannot be read: {error.strerror}") from None
    if not head.strip():
        raise TraceError("the file is empty")
    if head.startswith(b"PK"):
        names = _members(path)
        if not any(name.endswith("/data.pkl") for name in names):
            return Part(path, size, "npz", [name.removesuffix(".npy") for name in names])
        if torch_files is None:
            raise NoResultError(f"reading {path} needs PyTorch", hint="pip install 'poise-moe[torch]'")
        return Part(path, size, "torch", torch_files.load(path, skip=UNUSED))
    if head.startswith(b"\x93NUMPY"):
        return Part(path, size, "npy", integer_npy(read_bytes(path, MAX_NPY_BYTES)))
    if head[:1] == b"\x80":
        raise TraceError("a bare pickle", hint="pickles are not read; torch.save in its zip format is")
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return Part(path, size, "safetensors", _shard(path))
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] in (b"{", b"[") and not DATED.match(text):
        return _json(path, size)
    if YAML_KEYS.search(head):
        return Part(path, size, "yaml", _yaml(read_bytes(path, MAX_YAML_BYTES)))
    if b"\x00" in head:
        raise TraceError("a kind of file that is not known", hint="docs/dumps.md lists what is read")
    return Part(path, size, "text", None)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except BROKEN as error:
        raise TraceError(f"not a readable archive: {error}", hint="it may be truncated") from None


def _shard(path: Path) -> Shard:
    try:
        return read_shard(path)
    except ModelError as error:
        raise TraceError(error.message, hint=error.hint) from None


def _json(path: Path, size: int) -> Part:
    """One document, or one a line."""
    data = read_bytes(path, MAX_JSON_BYTES if size <= MAX_JSON_BYTES else MAX_LINES_BYTES).removeprefix(b"\xef\xbb\xbf")
    first, _, rest = data.strip().partition(b"\n")
    if rest and first.rstrip()[-1:] in (b"}", b"]"):
        try:
            parse_json(first)
        except TraceError:
            return Part(path, size, "json", parse_json(data))
        return Part(path, size, "json-lines", [parse_json(line) for line in data.splitlines() if line.strip()])
    return Part(path, size, "json", parse_json(data))


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise TraceError("aliases are not read", hint="write the value out")
        return super().compose_node(parent, index)


def _yaml(data: bytes) -> Any:
    try:
        return yaml.load(data.decode("utf-8"), Loader=_Loader)
    except TraceError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, *TAG_ERRORS) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise TraceError(f"not YAML: {reason[0][:200]}") from None
