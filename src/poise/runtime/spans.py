"""One hook for training and serving: what this rank did, and when.

Whoever wants to know calls :func:`record` with a function; it is called after each part of a step, on the thread that
did it. Names of the parts:

- Every layer, forward: ``dispatch`` and ``combine`` (the two all-to-alls), ``experts``.
- Training, forward: ``counts`` (the exchange of counts), ``plan`` (what the counts change), ``arrange`` (rows that came
  are put in the order of the experts), ``weights`` (the wait for replicas).
- Training, backward, each after the word ``backward``: ``weights``, ``dispatch``, ``arrange``, ``experts`` (not where
  no token came), ``reduce`` (gradients are added or sent to their owners, and the gather for the layer before begins),
  ``combine``. Gradients leave before ``weights``; ``dispatch`` is what of their way is left then.
- ``early plan``: replicas before the gate, on a thread of its own when they are planned ahead.
- Sparse collectives: ``gather`` and ``reduce``, from the first message that is posted to the last that has arrived.

Times are the host's: on CUDA they tell when work was queued, not when the device did it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SpanRecorder = Callable[[str, float, float], None]
"""Told of what this rank did: name, start and end in seconds on the monotonic clock."""

BACKWARD = "backward "
"""What the names of parts of a backward pass begin with."""

_recorder: SpanRecorder | None = None


def record(recorder: SpanRecorder | None) -> SpanRecorder | None:
    """From now on this process tells ``recorder`` of every span (None: nobody); the recorder before."""
    global _recorder
    before, _recorder = _recorder, recorder
    return before


@contextmanager
def span(name: str) -> Iterator[None]:
    """What runs inside is one part of a step; it is told when it ends without an error."""
    began = time.monotonic()
    yield
    ended(name, began)


def ended(name: str, began: float) -> None:
    """A part that began at ``began`` ends now; for parts that do not begin and end in one function."""
    if _recorder is not None:
        _recorder(name, began, time.monotonic())
