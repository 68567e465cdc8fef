"""Tables of numbers in JSON, read piece by piece: a file of loads wants its numbers, not a Python object for each."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from poise.routing.trace import kept
from poise.util import room
from poise.util.errors import TraceError
from poise.util.files import READ_BYTES
from poise.util.jsonfile import MAX_ROOM, json_room

MAX_VALUE_BYTES = 128 << 20
"""Most characters of one value, apart from tables; of a table of one of its entries."""
LONG, AHEAD = 1 << 20, 64
"""Text that is looked through before it is parsed; text behind an error, or a number, with which it is final."""
BLOCK_NUMBERS = 1 << 20
PAIR_ROOM = 256
"""Bytes of memory that an entry of an object takes, beside its value."""
CUT = ("Unterminated string", "Invalid \\")
"""Errors that may be of a text that goes on, wherever they are."""


class Ragged(ValueError):
    """A table has rows of different lengths, or holds something else than numbers."""


def read_tables(stream: BinaryIO, names: Collection[str], decoder: json.JSONDecoder) -> Any:
    """What a JSON file holds; of an object, values of the keys ``names`` as arrays, and so a list that is all there is.

    Parameters
    ----------
    stream : the file, from its beginning.
    names : keys of tables. Other values are what ``decoder`` makes of them.
    decoder : parses the pieces; its ``object_pairs_hook`` also makes the object.

    Raises
    ------
    ValueError : not JSON; a :class:`Ragged` one: no full table of numbers.
    TraceError : a value is too large, or the numbers do not fit into memory.
    """
    text = _Text(stream, decoder)
    first = text.peek()
    if first == "[":
        out: Any = _table(text)
    elif first == "{":
        out = _object(text, names, decoder)
    else:
        out = text.value()
    if text.peek():
        raise ValueError(f"extra data after {text.said()}")
    return out


def _object(text: _Text, names: Collection[str], decoder: json.JSONDecoder) -> Any:
    pairs: list[tuple[str, Any]] = []
    text.take("{")
    left = MAX_ROOM
    while text.peek() != "}":
        if pairs:
            text.take(",")
        key = text.value()
        if not isinstance(key, str):
            raise ValueError(f"a key of an object is no text before {text.said()}")
        text.take(":")
        is_table = key in names and text.peek() == "["
        pairs.append((key, _table(text) if is_table else text.value()))
        left -= PAIR_ROOM + len(key) + (0 if is_table else text.room())
        if left < 0:
            raise TraceError(f"values of an object in JSON may take more than {MAX_ROOM} bytes in memory")
    text.take("}")
    hook: Callable[[list[tuple[str, Any]]], Any] | None = decoder.object_pairs_hook
    return dict(pairs) if hook is None else hook(pairs)


def _table(text: _Text) -> NDArray[Any]:
    """A list of rows, of tables, or of numbers."""
    blocks: list[NDArray[Any]] = []
    rows: list[NDArray[Any]] = []
    held = many = 0
    text.take("[")
    while text.peek() != "]":
        if blocks or rows:
            text.take(",")
        try:
            rows.append(np.array(text.value()))
        except OverflowError as error:
            raise Ragged(str(error)) from None
        if rows[-1].shape != rows[0].shape or (blocks and rows[-1].shape != blocks[0].shape[1:]):
            raise Ragged("its rows differ in length")
        if rows[-1].dtype.kind not in "iuf":
            raise Ragged(f"it holds {rows[-1].dtype}")
        held += rows[-1].size + 1
        if held > BLOCK_NUMBERS:
            many += _close(rows, blocks)
            more = max(room.FREE_BYTES + 1, blocks[-1].nbytes)  # how many are to come is not known
            room.require(more, f"a table in JSON goes on after {many} bytes and", TraceError, hint="give it as .npz")
            held = 0
    text.take("]")
    _close(rows, blocks)
    if not blocks:
        return np.zeros((0,))
    out = np.empty((sum(map(len, blocks)), *blocks[0].shape[1:]), np.result_type(*blocks))
    at = len(out)
    while blocks:  # each is let go once it is copied
        block = blocks.pop()
        at -= len(block)
        out[at : at + len(block)] = block
    out.flags.writeable = False
    return out


def _close(rows: list[NDArray[Any]], blocks: list[NDArray[Any]]) -> int:
    """Move rows to a block of the smallest type that holds them, and the bytes that it has."""
    if not rows:
        return 0
    block = np.stack(rows)
    rows.clear()
    if block.dtype.kind in "iu" and block.size:
        block = kept(block, np.result_type(*map(np.min_scalar_type, (block.min(), block.max()))))
    blocks.append(block)
    return block.nbytes


class _Text:
    """The text of a stream, of which a part is held."""

    def __init__(self, stream: BinaryIO, decoder: json.JSONDecoder) -> None:
        self._stream, self._parse = stream, decoder.raw_decode
        head = stream.read(max(4, READ_BYTES))
        self._decode = codecs.getincrementaldecoder(json.detect_encoding(head[:4]))("surrogatepass").decode
        self._text, self._at, self._before, self._last, self._ended = "", 0, 0, 0, not head
        self._text = self._decode(head, self._ended)

    def peek(self) -> str:
        """The next character that is no space; ``""`` at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\n\r":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, mark: str) -> None:
        """Go on behind a character that must come."""
        if self.peek() != mark:
            raise ValueError(f"{mark!r} is expected at {self.said()}")
        self._at += 1

    def value(self) -> Any:
        """The value that comes."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                going_on = error.msg.startswith(CUT) or len(self._text) - error.pos < AHEAD
                if going_on and self._more():
                    continue
                raise ValueError(f"{error.msg} at character {self._before + error.pos}") from None
            if isinstance(value, int | float) and len(self._text) - end < AHEAD and self._more():
                continue
            self._last, self._at = self._at, end
            return value

    def room(self) -> int:
        """Bytes of memory that the last value may take."""
        return json_room(self._text[self._last : self._at].encode("utf-8", "surrogatepass"), MAX_ROOM, TraceError)

    def said(self) -> str:
        """Where it is."""
        return f"character {self._before + self._at}"

    def _more(self) -> bool:
        """Hold twice as much of the text from here on; False: there is no more."""
        if self._ended:
            return False
        left = len(self._text) - self._at
        if left > MAX_VALUE_BYTES:
            raise TraceError(f"a value in JSON of more than {MAX_VALUE_BYTES} characters")
        if left > LONG:
            json_room(self._text[self._at :].encode("utf-8", "surrogatepass"), MAX_ROOM, TraceError)
        data = self._stream.read(max(READ_BYTES, left))
        self._ended = not data
        self._text, self._before = self._text[self._at :] + self._decode(data, self._ended), self._before + self._at
        self._at = 0
        return True
