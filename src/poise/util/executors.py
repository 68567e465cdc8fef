"""Where independent pieces of work run: here, or on any executor of :mod:`concurrent.futures`.

What is run never depends on where: pieces share nothing and their results are taken in the order they were given, so
they are the same bit for bit.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from poise.util.errors import CommunicationError, NoResultError, OptionError, told
from poise.util.processes import SeeingProcesses
from poise.util.wish import Wish
from poise.util.words import close_to

S = TypeVar("S")
T = TypeVar("T")
KINDS = ("serial", "threads", "processes", "ray", "dask")
FORMS = "serial, threads, processes (both also :N), ray://local, ray://ADDRESS, dask://local, dask://ADDRESS"
LOCAL = "local"
AHEAD = 4
"""Pieces a worker that may be on their way at once: results are not piled up."""


class Serial(Executor):
    """Runs each piece at once, where it is submitted."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """A future that is done."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class RayExecutor(Executor):
    """Pieces as tasks of a Ray cluster that this process is connected to."""

    def __init__(self, ray: Any) -> None:
        self._task = ray.remote(_called)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """A task with the default resources: one core."""
        future: Future[T] = self._task.remote(fn, args, kwargs).future()
        return future


def _called(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    return fn(*args, **kwargs)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(make: Callable[[S], T], items: Iterable[S], threads: int, name: str) -> list[T]:
    """Results in the order of ``items``, made in so many threads of this process; with one, here in turn."""
    if threads < 2:
        return [make(item) for item in items]
    with ThreadPoolExecutor(threads, name) as pool:
        return list(pool.map(make, items))


@contextmanager
def executor_of(spec: str) -> Iterator[Executor]:
    """The executor that a text names (:data:`FORMS`), shut down at the end. An error ends pieces in processes of this
    machine at once; those in threads go on to their own end or their plan's.

    Raises
    ------
    OptionError : an unknown kind, or a number of workers that is none.
    NoResultError : Ray or Dask is not installed, or there is no cluster at the address.
    """
    kind, where = _parsed(spec)
    if kind in ("ray", "dask"):
        with (_ray if kind == "ray" else _dask)(where) as executor:
            yield executor
        return
    if kind == "serial":
        yield Serial()
        return
    workers = int(where) if where else cores()
    made = ThreadPoolExecutor(workers, "poise") if kind == "threads" else SeeingProcesses(workers)
    with made:
        try:
            yield made
        except BaseException:
            if not isinstance(made, ThreadPoolExecutor):
                made.end()
            made.shutdown(wait=False, cancel_futures=True)  # nobody wants the rest
            raise


def place_of(executor: Executor | None, wish: Wish) -> int | None:
    """Where workers of an executor of this machine's processes see a wish; None: they do not."""
    return executor.place_of(wish) if isinstance(executor, SeeingProcesses) else None


def hears(executor: Executor) -> bool:
    """Whether its pieces can be told to end: those of this process's own, here or in other processes."""
    return isinstance(executor, Serial | ThreadPoolExecutor | SeeingProcesses)


def _parsed(spec: str) -> tuple[str, str]:
    """Kind, and the number of workers or the address."""
    kind, apart, where = spec.partition("://" if "://" in spec else ":")
    if kind not in KINDS:
        raise OptionError(f"unknown executor {spec!r}", hint=close_to(kind, KINDS))
    if kind in ("ray", "dask"):
        name, _, workers = where.partition(":")
        if apart != "://" or not where or (name == LOCAL and workers and not _number(workers)):
            raise OptionError(f"{spec!r} names no cluster", hint=f"{kind}://{LOCAL}, {kind}://{LOCAL}:2 or its address")
        return kind, where
    if apart == "://" or (apart and (kind == "serial" or not _number(where))):
        raise OptionError(f"{spec!r}: {kind} takes {'nothing' if kind == 'serial' else 'a number of workers'}",
                          hint=f"one of {FORMS}")  # fmt: skip
    return kind, where


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text) <= 4096


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NoResultError(
            f"an executor of {package} needs {name}: {told(error)}", hint=f"pip install 'poise-moe[{package}]'"
        ) from None


def _workers(where: str) -> int:
    """Of a local cluster."""
    _, _, workers = where.partition(":")
    return int(workers) if workers else cores()


def _is_local(where: str) -> bool:
    return where.partition(":")[0] == LOCAL


@contextmanager
def _ray(where: str) -> Iterator[Executor]:
    ray = _module("ray", "ray")
    mine = not ray.is_initialized()
    try:
        if mine and _is_local(where):
            ray.init(num_cpus=_workers(where), include_dashboard=False, log_to_driver=False)
        elif mine:
            ray.init(address=where if where == "auto" else f"ray://{where}", log_to_driver=False)
    except Exception as error:
        raise NoResultError(f"no Ray cluster at {where!r}: {told(error)}") from None
    try:
        yield RayExecutor(ray)
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _dask(where: str) -> Iterator[Executor]:
    distributed = _module("distributed", "dask")
    try:
        if _is_local(where):
            client = distributed.Client(
                n_workers=_workers(where), threads_per_worker=1, processes=True, dashboard_address=None
            )
        else:
            client = distributed.Client(where if "://" in where else f"tcp://{where}", timeout="10s")
    except Exception as error:
        raise NoResultError(f"no Dask cluster at {where!r}: {told(error)}") from None
    with client:
        yield client.get_executor(pure=False)


class Given:
    """What a piece gave: its value, or the error that it ended with, which some executors would wrap."""

    def __init__(self, value: Any, error: Exception | None) -> None:
        self.value, self.error = value, error

    def taken(self) -> Any:
        """The value; raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


def _outcome(fn: Callable[..., Any], args: tuple[Any, ...]) -> Given:
    try:
        return Given(fn(*args), None)
    except Exception as error:
        return Given(None, error)


def begun(executor: Executor, fn: Callable[..., Any], *args: Any) -> Future[Given]:
    """A piece on its way; ``fn`` is a function of a module and all of it can be pickled. See :func:`taken`."""
    return executor.submit(_outcome, fn, args)


def taken(future: Future[Given]) -> Any:
    """What a piece gave.

    Raises
    ------
    CommunicationError : a worker died. Anything that the piece raised.
    """
    try:
        outcome = future.result()
    except Exception as error:
        if isinstance(error, BrokenExecutor) or type(error).__module__.partition(".")[0] in ("ray", "distributed"):
            raise CommunicationError(f"a worker of the executor failed: {told(error)}") from error
        raise
    return outcome.taken()


def in_order(executor: Executor, fn: Callable[..., T], pieces: Iterable[Any], workers: int = 0) -> Iterator[T]:
    """``fn`` of each piece, in the order of the pieces, a bounded number of them on their way.

    Raises
    ------
    CommunicationError : a worker died. What the first piece, in order, that fails raised; later ones are given up.
    """
    ahead = AHEAD * (workers or max(cores(), 8))
    waiting: list[Future[Given]] = []
    try:
        for piece in pieces:
            waiting.append(begun(executor, fn, piece))
            if isinstance(executor, Serial) or len(waiting) >= ahead:
                yield taken(waiting.pop(0))
        while waiting:
            yield taken(waiting.pop(0))
    finally:
        for future in waiting:
            future.cancel()
