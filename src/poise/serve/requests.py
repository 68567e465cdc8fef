"""Requests and which of their tokens run in a step. Every rank keeps the same book, so nobody has to be told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from poise.serve.batch import Chunk, StepBatch
from poise.util.errors import OptionError


@dataclass(slots=True, eq=False)
class Request:
    """One request.

    Parameters
    ----------
    number : in the order of arrival.
    tokens : of the prompt, then sampled ones.
    prompt : tokens of the prompt.
    room : most tokens it may come to have.
    home : rank where its tokens start, and under ``home`` flows its keys and values lie.
    cached : tokens that have run.
    """

    number: int
    tokens: list[int]
    prompt: int
    room: int
    home: int
    cached: int = 0

    @property
    def sampled(self) -> list[int]:
        """Tokens beyond the prompt."""
        return self.tokens[self.prompt :]


@dataclass(slots=True, eq=False)
class Book:
    """All requests of all ranks.

    Parameters
    ----------
    num_ranks : D.
    budget : most tokens of one rank in a step; a step takes one of each decoding request first, then prompts.
    most_live : most requests of one rank that hold a cache at a time; None: no limit.
    """

    num_ranks: int
    budget: int
    most_live: int | None = None
    requests: dict[int, Request] = field(default_factory=dict)
    live: list[deque[int]] = field(init=False)
    waiting: list[deque[int]] = field(init=False)

    def __post_init__(self) -> None:
        if self.budget < 1 or (self.most_live is not None and self.most_live < 1):
            raise OptionError(f"budget and most_live must be at least 1, got {self.budget}, {self.most_live}")
        self.live = [deque() for _ in range(self.num_ranks)]
        self.waiting = [deque() for _ in range(self.num_ranks)]

    def add(self, tokens: list[int], max_new_tokens: int, home: int | None) -> Request:
        """Take in a request; ``home`` None: in turn."""
        if not tokens or max_new_tokens < 1:
            raise OptionError(f"a request of {len(tokens)} tokens for {max_new_tokens} more: both must be above 0")
        number = len(self.requests)
        rank = number % self.num_ranks if home is None else home
        if not 0 <= rank < self.num_ranks:
            raise OptionError(f"home rank {rank} does not lie in 0..{self.num_ranks - 1}")
        request = Request(number, list(tokens), len(tokens), len(tokens) + max_new_tokens, rank)
        self.requests[number] = request
        self.waiting[rank].append(number)
        return request

    @property
    def busy(self) -> bool:
        """Whether anything is left to run."""
        return any(self.live) or any(self.waiting)

    def admit(self) -> list[Request]:
        """Requests that may take a cache now."""
        came = []
        for live, waiting in zip(self.live, self.waiting, strict=True):
            while waiting and (self.most_live is None or len(live) < self.most_live):
                live.append(waiting.popleft())
                came.append(self.requests[live[-1]])
        return came

    def batch(self) -> StepBatch:
        """The next step's tokens; a decoding request that the budget leaves out goes first in the step after."""
        chunks: list[Chunk] = []
        for live in self.live:
            left, mine = self.budget, []
            order = sorted(live, key=lambda number: self._missing(number) > 1)  # decoding first, else as they came
            for number in order:
                request = self.requests[number]
                count = min(left, self._missing(number))
                if count:
                    part = request.tokens[request.cached : request.cached + count]
                    mine.append(Chunk(number, request.home, request.cached, tuple(part)))
                    left -= count
            ran = {chunk.request for chunk in mine}
            kept = [number for number in live if number not in ran] + [number for number in live if number in ran]
            live.clear()
            live.extend(kept)
            chunks += mine
        return StepBatch(tuple(chunks), self.num_ranks)

    def _missing(self, number: int) -> int:
        request = self.requests[number]
        return len(request.tokens) - request.cached

    def ends(self, batch: StepBatch) -> list[int]:
        """Chunks of a batch after which a request samples: those that reach its last token."""
        return [
            i for i, chunk in enumerate(batch.chunks)
            if chunk.first + len(chunk.tokens) == len(self.requests[chunk.request].tokens)
        ]  # fmt: skip

    def advance(self, batch: StepBatch, sampled: dict[int, int], eos: int | None) -> list[Request]:
        """Book a step: ``sampled`` token by request; the requests that are done."""
        done = []
        for chunk in batch.chunks:
            request = self.requests[chunk.request]
            request.cached += len(chunk.tokens)
            if chunk.request in sampled:
                token = sampled[chunk.request]
                request.tokens.append(token)
                if len(request.tokens) == request.room or token == eos:
                    self.live[request.home].remove(chunk.request)
                    done.append(request)
        return done


def pick(logits_V: Tensor, temperature: float, seed: int, request: int, position: int) -> int:
    """The next token: the likeliest at temperature 0, else drawn by seed, request and position, on whichever rank."""
    if temperature == 0:
        return int(logits_V.argmax())
    draw = np.random.default_rng([seed, request, position]).random()
    weights = (logits_V.double() / temperature).softmax(-1).cumsum(-1).cpu()
    return min(int(torch.searchsorted(weights, draw * float(weights[-1]), right=True)), len(weights) - 1)
