"""The one decorator of compiled functions: numba's, with a cache on disk where there can be one.

numba's own ``cache=True`` fails where no folder can be written, dies of a damaged cache file or runs what it holds, and
runs old machine code where only a function that is called, or a constant of another module, has changed. Here each of
these compiles anew.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar, overload

import numpy as np
from numba import njit, types
from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps
from numpy.typing import NDArray

from poise.util.compilation import COMPILATION

P = ParamSpec("P")
R = TypeVar("R")
CONSTANTS = (bool, int, float, str, tuple, np.generic)


@overload
def compiled(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def compiled(*, nogil: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def compiled(function: Callable[..., Any] | None = None, *, nogil: bool = False) -> Any:
    """Compile a function with numba (nopython mode) when it is first called.

    Types that the function names are what mypy checks its callers and itself by; numba infers its own.

    Parameters
    ----------
    function : a function of numbers and arrays; left out where the decorator has arguments.
    nogil : other threads run meanwhile.
    """
    return partial(_compiled, nogil=nogil) if function is None else _compiled(function, nogil=nogil)


def _compiled(function: Callable[..., Any], *, nogil: bool) -> Any:
    try:
        dispatcher = njit(cache=True, nogil=nogil)(function)
    except RuntimeError:  # numba: no folder for a cache can be written
        dispatcher = njit(nogil=nogil)(function)
    dispatcher._cache = _Cache(dispatcher._cache, function)
    dispatcher.get_call_template = partial(_call_template, dispatcher.get_call_template)
    return dispatcher


def _call_template(known: Callable[..., Any], args: Any, kws: Any) -> Any:
    """What a compiled caller gets: numba would compile once more for a constant, and for every width of int."""
    return known(tuple(map(_wide, args)), {name: _wide(kind) for name, kind in kws.items()})


def _wide(kind: Any) -> Any:
    """The type of an argument without its value; whole numbers with a sign as int64, as numba computes with them."""
    kind = types.unliteral(kind)
    return types.int64 if isinstance(kind, types.Integer) and kind.signed and kind.bitwidth < 64 else kind


def plain(array: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
    """The array in the one form that is compiled for: of a type, contiguous, and such that it may be written.

    Views, arrays that may not be written and narrower integers are types of their own to numba: a function that is
    called with each would be compiled for each. Copied if it is none such.

    Raises
    ------
    TypeError : numbers of another kind, as fractions where whole ones are asked for.
    """
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise TypeError(f"an array of {array.dtype} where {np.dtype(dtype)} is asked for")
    return np.require(array, dtype, ("C", "W"))


class _Cache:
    """numba's cache of one function, made to give up rather than fail."""

    def __init__(self, cache: Any, function: Callable[..., Any]) -> None:
        self._cache = cache
        file = getattr(cache, "_cache_file", None)
        self.stamp = _stamp(function, getattr(file, "_source_stamp", None))
        if file is not None:
            file.__class__ = _File
            file._source_stamp = self.stamp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target: Any) -> Any:
        try:
            with COMPILATION.load():
                found = self._cache.load_overload(signature, target)
        except Exception:  # what a damaged file raises when it is unpickled can be anything
            found = None
            self._empty()
        if found is None:
            COMPILATION.start(self)
        return found

    def save_overload(self, signature: Any, result: Any) -> None:
        COMPILATION.end(self)
        try:
            self._cache.save_overload(signature, result)
        except Exception:  # a full disk, or an index that another process damaged
            self._empty()

    def _empty(self) -> None:
        try:
            self._cache.flush()
        except OSError:
            pass


class _File(IndexDataCacheFile):  # type: ignore[misc]
    """numba's files of one function; what they hold under a key is proven to be what was saved under it."""

    def save(self, key: Any, data: Any) -> None:
        payload = dumps(data)
        super().save(key, (self._digest(key, payload), payload))

    def load(self, key: Any) -> Any:
        found = super().load(key)
        if found is None:
            return None
        digest, payload = found
        if digest != self._digest(key, payload):
            raise ValueError("a damaged cache file")
        return pickle.loads(payload)

    def _digest(self, key: Any, payload: bytes) -> bytes:
        return hashlib.sha256(f"{self._source_stamp}{key}{_fields(key[0])}".encode() + payload).digest()


def _fields(kind: Any) -> str:
    """Names of the fields of records among types, in order: a signature says only how many there are, and of what."""
    parts = kind if isinstance(kind, tuple) else getattr(kind, "types", ())
    return f"{getattr(kind, 'fields', '')}[{','.join(map(_fields, parts))}]"


def _stamp(function: Callable[..., Any], source: Any) -> str:
    """Of the function's file, and of the compiled functions and the constants of other modules that it names."""
    parts = [repr(source)]
    for name in sorted(set(function.__code__.co_names)):
        value = function.__globals__.get(name)
        if isinstance(value, Dispatcher):
            parts.append(f"{name}={getattr(getattr(value, '_cache', None), 'stamp', None)}")
        elif isinstance(value, np.ndarray):
            parts.append(f"{name}={value.dtype}{value.shape}{value.tobytes()!r}")
        elif isinstance(value, CONSTANTS):
            parts.append(f"{name}={value!r}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
