"""SGLang's recorder, mode ``per_token``: which recorded tokens belong to one request.

The record does not say. Extended sequences begin a request or go on where one has stopped; a decoded token goes to the
request whose next position is its own, if exactly as many wait there; else it is a request of its own, and counted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dumps.sglang_records import Tokens
from poise.routing.trace import RoutingTrace, sealed
from poise.util.errors import TraceError

DECODE, MIXED, VERIFY = 2, 3, 5
"""``ForwardMode``: 1 extends sequences, 2 decodes one token of each, 3 does both, 5 verifies drafted tokens."""


@dataclass(slots=True, eq=False)
class Group:
    """Tokens that one or several ranks hold alike."""

    home: int
    tokens: Tokens
    slot_LTK: NDArray[np.int16]
    expert_LTK: NDArray[np.int16]

    def used_L(self) -> NDArray[np.bool_]:
        """Layers in which some token has an expert, bool [L]."""
        return np.asarray((self.expert_LTK >= 0).any(axis=(1, 2)))

    def takes(self, tokens: Tokens, expert_LTK: NDArray[np.int16], slot_LTK: NDArray[np.int16]) -> bool:
        """Merge another rank's record, if it is of the same tokens."""
        mine = self.tokens
        if not (np.array_equal(mine.input_T, tokens.input_T) and np.array_equal(mine.position_T, tokens.position_T)):
            return False
        both = (self.expert_LTK >= 0) & (expert_LTK >= 0)
        if (self.expert_LTK[both] != expert_LTK[both]).any() and (self.slot_LTK[both] != slot_LTK[both]).any():
            return False  # neither to the same experts nor, by a map that a file has lost, to the same slots
        new = (self.expert_LTK < 0) & (expert_LTK >= 0)
        self.expert_LTK = np.where(new, expert_LTK, self.expert_LTK)
        self.slot_LTK = np.where(new, slot_LTK, self.slot_LTK)
        return True


@dataclass(slots=True, eq=False)
class TokenCollector:
    """Collects tokens in order of their passes and finds out which belong to one request."""

    experts: list[NDArray[np.int16]] = field(default_factory=list)
    columns: dict[str, list[NDArray[Any]]] = field(default_factory=lambda: defaultdict(list))
    live: dict[int, list[tuple[int, int, bool]]] = field(default_factory=dict)
    next_request: int = 0
    padding: int = 0
    partial: int = 0
    decoded: int = 0
    unlinked: int = 0
    begun: int = 0

    def add(self, pass_id: int, group: Group, ids: list[int]) -> None:
        """One pass of one home."""
        chosen_TLK = group.expert_LTK[ids].transpose(1, 0, 2)
        some_T = np.asarray((chosen_TLK >= 0).any(axis=(1, 2)))
        all_T = np.asarray((chosen_TLK >= 0).all(axis=(1, 2)))
        self.padding += int((~some_T).sum())
        self.partial += int((some_T & ~all_T).sum())
        request_T, decode_T = self._requests(group, some_T)
        if not all_T.any():
            return
        kept = int(all_T.sum())
        self.experts.append(chosen_TLK[all_T].astype(np.int16))
        for name, column in (("request", request_T[all_T]), ("is_decode", decode_T[all_T]),
                             ("step", np.full(kept, pass_id)), ("home", np.full(kept, group.home))):  # fmt: skip
            self.columns[name].append(column)

    def trace(self, experts: int, layer_ids: NDArray[np.int32], name: str) -> RoutingTrace:
        """All of it."""
        if not self.experts:
            raise TraceError(f"none of {self.partial} tokens has experts in every layer that was recorded")
        columns = {key: np.concatenate(value) for key, value in self.columns.items()}
        chosen = np.empty((sum(map(len, self.experts)), *self.experts[0].shape[1:]), np.int16)
        at = len(chosen)
        while self.experts:  # each is let go once it is copied
            piece = self.experts.pop()
            at -= len(piece)
            chosen[at : at + len(piece)] = piece
        return RoutingTrace(sealed(chosen), experts, layer_ids=layer_ids, name=name, **columns)  # type: ignore[arg-type]

    def notes(self) -> list[str]:
        """What was left out or assumed."""
        out = []
        if self.padding:
            out.append(f"{self.padding} rows without any expert were left out: padding")
        if self.partial:
            out.append(f"{self.partial} tokens lack experts in some layer and were left out")
        if self.begun:
            out.append(
                f"{self.begun} sequences begin behind their prompt's first token (a cached prefix, or a part that "
                "cannot be told from others) and are requests of their own"
            )
        if self.unlinked:
            out.append(
                f"{self.unlinked} of {self.decoded} decoded tokens are requests of their own: the record does not say "
                "which they belong to"
            )
        return out

    def _requests(self, group: Group, real_T: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Request of each row, and whether it was decoded."""
        tokens = group.tokens
        before = self.live.get(group.home, [])
        request_T = np.full(len(real_T), -1, np.int64)
        decode_T = np.zeros(len(real_T), bool)
        extended: list[tuple[int, int, bool]] = []
        if tokens.mode in (DECODE, VERIFY) or tokens.lengths is None:
            decode_T[:] = True
        else:
            ends = np.cumsum(tokens.lengths)
            for start, end in zip((ends - tokens.lengths).tolist(), ends.tolist(), strict=True):
                if end == start:
                    continue
                first, last = int(tokens.position_T[start]), int(tokens.position_T[end - 1])
                if tokens.mode == MIXED and end - start == 1 and first > 0:
                    decode_T[start] = True
                    continue
                same = [request for position, request, decodes in before if position == first - 1 and not decodes]
                known = first > 0 and len(same) == 1
                request = same[0] if known else self._new()
                self.begun += first > 0 and not known
                request_T[start:end] = request
                extended.append((last, request, False))
        going = {request for _, request, _ in extended}
        before = [entry for entry in before if entry[1] not in going]
        if not decode_T.any():
            self.live[group.home] = before + extended
        else:
            decoding = self._decoded(np.flatnonzero(decode_T & real_T), tokens, before, request_T)
            self.live[group.home] = decoding + extended
        for row in np.flatnonzero(request_T < 0).tolist():
            request_T[row] = self._new()
        return request_T, decode_T

    def _decoded(
        self,
        rows: NDArray[np.int64],
        tokens: Tokens,
        before: list[tuple[int, int, bool]],
        request_T: NDArray[np.int64],
    ) -> list[tuple[int, int, bool]]:
        """Give decoded rows the request whose next position theirs is; alike ones in order, if all of them go on."""
        waiting: dict[int, list[int]] = defaultdict(list)
        for position, request, _ in before:
            waiting[position].append(request)
        positions = tokens.position_T[rows]
        counts = zip(*(a.tolist() for a in np.unique(positions, return_counts=True)), strict=True)
        matched = {p for p, rows_there in counts if rows_there == len(waiting[p - 1]) and tokens.mode != VERIFY}
        out = []
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            known = position in matched
            request = waiting[position - 1].pop(0) if known else self._new()
            self.unlinked += not known
            request_T[row] = request
            out.append((position, request, True))
        self.decoded += len(rows)
        return out

    def _new(self) -> int:
        self.next_request += 1
        return self.next_request - 1
