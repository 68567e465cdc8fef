"""``Rollout``: the routing of tokens that an engine has generated, as training on them knows it ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from poise.routing.batch import count_loads
from poise.routing.files import read
from poise.routing.trace import NO_EXPERT, RoutingTrace
from poise.util.errors import ModelError, OptionError, TraceError

UNKNOWN = -1
"""In place of a recorded token: nothing is known of this one (padding, or a last token that the engine never ran)."""


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """Experts of every recorded token and layer. Ranks may hold different tokens, each those that it trains on.

    Parameters
    ----------
    trace : as ``poise convert`` writes it; its layers are the model's MoE layers in the order they run.

    Raises
    ------
    TraceError : loads without tokens.
    """

    trace: RoutingTrace

    def __post_init__(self) -> None:
        if not isinstance(self.trace, RoutingTrace):
            raise TraceError(
                f"{getattr(self.trace, 'name', type(self.trace).__name__)} has loads, a rollout needs every token",
                hint="record routed experts of each token (docs/dumps.md), then 'poise convert'",
            )

    @classmethod
    def load(cls, path: str | Path) -> Rollout:
        """Of a file that ``poise convert`` or :meth:`poise.routing.trace.RoutingTrace.save` wrote.

        Raises
        ------
        TraceError : as :func:`poise.routing.files.read`, or loads without tokens.
        """
        found: Any = read(path)
        return cls(found)

    def rows(
        self, requests: Sequence[int], lengths: Sequence[int], width: int | None = None,
        *, padding: Literal["right", "left"] = "right",
    ) -> NDArray[np.int64]:  # fmt: skip
        """Which recorded token stands where in a batch of whole requests, int64 [len(requests), width].

        :data:`UNKNOWN` for padding, and for a request's last token where the engine, as usual, did not run it.

        Parameters
        ----------
        requests, lengths : number of each request in the trace, and its tokens in the batch, prompt and answer.
        width : of the batch; default: the longest request.
        padding : where shorter ones have it.

        Raises
        ------
        OptionError : a request that is not recorded, or as many tokens as neither all nor all but the last; a width
            below a length.
        """
        if len(requests) != len(lengths):
            raise OptionError(f"{len(requests)} requests and {len(lengths)} lengths")
        width = max(lengths, default=0) if width is None else width
        out = np.full((len(requests), width), UNKNOWN, np.int64)
        request_T = np.asarray(self.trace.request)
        order_T = np.argsort(request_T, kind="stable")
        sorted_T = request_T[order_T]
        for i, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            first, last = np.searchsorted(sorted_T, [request, request + 1])
            if last - first not in (length, length - 1) or last == first:
                raise OptionError(
                    f"request {request} has {last - first} recorded tokens, the batch {length}",
                    hint="a record has all tokens of a request, or all but the last",
                )
            if length > width:
                raise OptionError(f"request {request} has {length} tokens, the batch a width of {width}")
            start = 0 if padding == "right" else width - length
            out[i, start : start + last - first] = order_T[first:last]
        return out

    def fits(self, layers: int, experts: int) -> None:
        """Raise ModelError unless the record is of a model with so many MoE layers and experts."""
        for what, mine, theirs in (("MoE layers", self.trace.num_layers, layers),
                                   ("experts a layer", self.trace.num_experts, experts)):  # fmt: skip
            if mine != theirs:
                raise ModelError(
                    f"the rollout has {mine} {what}, the model {theirs}", hint="check poise convert's --model"
                )

    def within(self, rows_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of recorded tokens, int64 [T], checked; those of any shape and whole type are taken.

        Raises
        ------
        OptionError : another type, or a number beyond the recorded tokens.
        """
        rows = np.asarray(rows_T)
        if rows.dtype.kind not in "iu":
            raise OptionError(f"rows of a rollout are whole numbers, got {rows.dtype}")
        rows = rows.reshape(-1).astype(np.int64)
        if rows.size and (rows.min() < UNKNOWN or rows.max() >= self.trace.num_tokens):
            wrong = rows.min() if rows.min() < UNKNOWN else rows.max()
            raise OptionError(
                f"row {wrong} of a rollout of {self.trace.num_tokens} tokens", hint="-1 is a token unknown"
            )
        return rows

    def counts(self, rows_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """Recorded pairs of each expert over tokens int64 [T], int64 [L, E]."""
        known = rows_T[rows_T != UNKNOWN]
        loads = count_loads(self.trace.experts[known], np.array([len(known)]), self.trace.num_experts)
        return loads[0].astype(np.int64)

    def experts(self, rows_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """Recorded experts of tokens int64 [T], int16 [T, L, K]; -1 throughout for tokens unknown.

        Raises
        ------
        OptionError : picks of known tokens that compute nothing, which no router of E experts can be made to choose.
        """
        known_T = rows_T != UNKNOWN
        out = np.full((len(rows_T), *self.trace.experts.shape[1:]), UNKNOWN, np.int16)
        out[known_T] = self.trace.experts[rows_T[known_T]]
        idle = int((out[known_T] == NO_EXPERT).sum())
        if idle:
            raise OptionError(
                f"{idle} of {out[known_T].size} recorded picks compute nothing and cannot be replayed",
                hint="replay=False takes the record as a forecast",
            )
        return out
