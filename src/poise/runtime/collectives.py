"""Exchanges over one communicator, without copies: rows go straight from where they lie.

Every exchange whose sizes a rank is told has a tag of its own (:func:`next_tag`), so that a message that one exchange
left behind is never taken for one of another exchange; where it goes by a collective of the backend, which has no tag,
the tag counts it (:func:`exchanges`). Ranks that have left different exchanges behind begin no other one
(:func:`refuse`). Sparse collectives of weights: :mod:`poise.runtime.sparse`.
"""

from __future__ import annotations

import itertools
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from poise.util.errors import CommunicationError

SHORT = 64 * 1024
"""Bytes between two ranks up to which rows go by gloo's all-to-all: the host's own work on messages one by one is
longer (docs/emulation.md)."""
TAGS = 2**20
"""Tags are used again after so many, and those of exchanges with a number of their own lie above; gloo's own
collectives have theirs above 2**24, and plain sends 0."""


@dataclass(slots=True)
class _InFlight:
    """What one process group has on its way.

    Parameters
    ----------
    drawn : tags drawn by exchanges in their order, the same on all ranks.
    held : works, and the tensors that they read and fill, of every batch that nobody has waited for.
    forgotten : batches among these that nobody can wait for any more.
    thread : what runs sparse collectives of the group; None: who waits for them does.
    refused : why no exchange begins any more; "": they do.
    left : what then was on its way.
    turns, gloo : see :func:`_turns` and :func:`on_gloo`; () and None until they are asked for.
    """

    drawn: int = 0
    held: dict[int, tuple[list[Any], list[Tensor]]] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)
    thread: ThreadPoolExecutor | None = None
    refused: str = ""
    left: list[Any] = field(default_factory=list)
    turns: tuple[int, list[int]] | tuple[()] = ()
    gloo: bool | None = None

    @classmethod
    def of(cls, group: Any) -> _InFlight:
        """That of a group."""
        line = _lines.get(group)
        if line is None:
            line = _lines[group] = cls()
        return line


_lines: weakref.WeakKeyDictionary[Any, _InFlight] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def next_tag(group: Any) -> int:
    """The tag of a new exchange: every rank of the group calls it for each, also where it sends nothing itself.

    Raises
    ------
    CommunicationError : as :func:`not_refused`.
    """
    not_refused(group)
    line = _InFlight.of(group)
    line.drawn += 1
    return (line.drawn - 1) % (TAGS - 1) + 1


def exchanges(group: Any) -> int:
    """How many exchanges of a group have begun: the same on all ranks, unless one has left an exchange out.

    Those of rows with sizes that ranks are told, and of weights. Collectives in which all sizes are equal
    (:func:`gather`, :func:`exchange_equal`) are not among them.
    """
    line = _lines.get(group)
    return 0 if line is None else line.drawn


def refuse(group: Any, why: str, left: Any = None) -> None:
    """Begin no exchange of a group any more, as its ranks have begun different ones; all ranks call it.

    What one rank has begun and another has not would be taken for the other's next one. ``left`` is what this rank has
    on its way: it is kept, as nobody may wait for it.
    """
    line = _InFlight.of(group)
    line.refused = line.refused or why
    line.left.append(left)


def not_refused(group: Any) -> None:
    """Nothing, where exchanges of the group may begin.

    Raises
    ------
    CommunicationError : :func:`refuse` was called.
    """
    line = _lines.get(group)
    if line is not None and line.refused:
        raise CommunicationError(
            f"these ranks exchange nothing any more: {line.refused}",
            hint="start the processes again, from the last checkpoint",
        )


def run_on_thread(group: Any) -> None:
    """Let sparse collectives of a group on CPUs run on a thread of their own, one after the other as they began.

    So their later rounds do not wait for :meth:`~poise.runtime.sparse.Pending.wait`, as on a CUDA stream. An error is
    raised where it is
    waited for. All ranks of the group should do the same; from the next collective on.
    """
    line = _InFlight.of(group)
    line.thread = line.thread or ThreadPoolExecutor(1, "poise-weights")


def thread_of(group: Any) -> ThreadPoolExecutor | None:
    """What runs sparse collectives of a group; None: who waits for them does."""
    return _lines[group].thread if group in _lines else None


class Operation(NamedTuple):
    """A send to, or a receive from, a rank of a group.

    Parameters
    ----------
    sends : whether it is a send.
    tensor : what is sent or filled.
    peer : rank in the group.
    tag : of the exchange.
    """

    sends: bool
    tensor: Tensor
    peer: int
    tag: int


class Batch:
    """Operations of one group on their way, until they are waited for.

    When a message comes for a work that nobody holds any more, gloo stops to read its connection: for good, and without
    an error. So works stay here until they are done, also when the pass that posted them was given up and collected;
    before the next operations of the group are posted, works that nobody can wait for any more are waited for here:
    every rank has posted its part of them.
    """

    def __init__(self, operations: list[Operation], group: Any) -> None:
        self._line = line = _InFlight.of(group)
        while line.forgotten:
            _wait(line.held.pop(line.forgotten.pop(0), ([], []))[0])
        self._number = next(_numbers)
        try:
            works = _post(operations, group) if operations else []
        except RuntimeError as error:
            raise CommunicationError(*lost(error)) from error
        if works:
            line.held[self._number] = works, [one.tensor for one in operations]
        # called during garbage collection, on any thread: it only notes the number
        self._forget = weakref.finalize(self, line.forgotten.append, self._number)
        self._forget.atexit = False

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for."""
        return self._number not in self._line.held

    def wait(self) -> None:
        """Until all are done; may be called again. A lost rank becomes a typed error."""
        if not self.done:
            self._forget.detach()  # after an error all stay held: nothing on this group is right any more
            _wait(self._line.held[self._number][0])
            del self._line.held[self._number]


def _post(operations: list[Operation], group: Any) -> list[Any]:
    """Works of all operations.

    On gloo by the process group itself: the functions around it take a third of the host's time for short messages.
    """
    if not on_gloo(group):
        return list(dist.batch_isend_irecv([
            dist.P2POp(dist.isend if one.sends else dist.irecv, one.tensor, dist.get_global_rank(group, one.peer),
                       group, one.tag) for one in operations
        ]))  # fmt: skip
    send, receive = group.send, group.recv
    return [(send if one.sends else receive)([one.tensor], one.peer, one.tag) for one in operations]


def _wait(works: Sequence[Any], hint: str = "") -> None:
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise CommunicationError(*lost(error), hint=hint) from error


def exchange(x_nd: Tensor, sent_D: Sequence[int], got_D: Sequence[int], group: Any) -> Tensor:
    """All-to-all of rows: the first ``sent_D[0]`` go to rank 0 and so on; what came, by rank.

    On gloo by a message a pair of ranks (:class:`PairMessages`), as nothing is known of others' rows.
    """
    return Arriving(x_nd, got_D, group).send(x_nd, sent_D).wait()


class PairMessages:
    """Parts that all ranks are about to send one another, a message a pair of ranks; empty parts are not sent.

    gloo announces a receive to its sender over the connection that carries data the other way, and sends nothing
    before. In ``all_to_all_single`` that announcement may queue behind megabytes of data, and the two directions then
    run one after the other: half of what limited links carry, against 0.95 to 0.99 with all receives posted first
    (docs/emulation.md); so on gloo they are posted here. On NCCL operations that wait for one another must be in one
    batch: there :meth:`send` posts all. Peers are posted in the order of own XOR peer: at every turn ranks pair off,
    and, ranks of a node being numbered one after the other, those of one node begin with different ranks of another.
    (In the order own + 1, own + 2, ... all of a node are done with their neighbours at once and meet at the next node's
    first rank.)

    Parameters
    ----------
    into : what comes, by rank.
    group : the ranks; every one that has made these calls :meth:`send` and :meth:`wait`.
    number : as of :class:`Arriving`.
    """

    def __init__(self, into: Sequence[Tensor], group: Any, number: int | None = None) -> None:
        self._into, self._group = into, group
        self._own, self._peers, self._tag = *_turns(group), next_tag(group)
        if number is not None:
            self._tag = TAGS + number % TAGS
        self._later, self._batches = self._operations(False, into), list[Batch]()
        if on_gloo(group):
            self._batches.append(Batch(self._later, group))
            self._later = []

    def _operations(self, sends: bool, of: Sequence[Tensor]) -> list[Operation]:
        return [Operation(sends, of[p], p, self._tag) for p in self._peers if of[p].shape[0]]

    def send(self, of: Sequence[Tensor]) -> None:
        """Part ``of[d]`` to every rank d; they may not change before :meth:`wait` returns."""
        self._batches.append(Batch(self._later + self._operations(True, of), self._group))
        self._into[self._own].copy_(of[self._own])

    def wait(self) -> None:
        """Until all has come and left; may be called again."""
        for batch in self._batches:
            batch.wait()


class SentRows(ABC):
    """Rows on their way."""

    @abstractmethod
    def wait(self) -> Tensor:
        """What came, by rank, [n, d]; may be called again."""


class Arriving(SentRows):
    """Rows that all ranks are about to send one another, as in :func:`exchange`, whose receives are posted first.

    gloo sends nothing before the receiver has asked for it, so that asking while experts still compute saves each
    exchange a way. Every rank that has made one calls :meth:`send` and :meth:`wait`.

    Parameters
    ----------
    like : of their type, device and width; [.., d].
    got_D : rows that come from each rank.
    group : the ranks.
    most : most rows from one rank to another, the same on all ranks; None: not known.
    number : which exchange this is, where ranks may be in different ones: on gloo those with other numbers do not meet.
        (A message that is longer than who receives it expects ends the process.)
    """

    def __init__(
        self, like: Tensor, got_D: Sequence[int], group: Any, most: int | None = None, number: int | None = None
    ) -> None:
        self._got_D, self._group = list(got_D), group
        self._width = like.shape[1:]
        self._messages: PairMessages | None = None
        self._work: Any = None
        if on_gloo(group) and (number is not None or not is_short(like, most)):
            self._out = like.new_empty((sum(self._got_D), *self._width))
            self._messages = PairMessages(self._out.split(self._got_D), group, number)
        else:
            next_tag(group)  # for :func:`exchanges`

    def send(self, x_nd: Tensor, sent_D: Sequence[int]) -> Arriving:
        """Send rows, by the rank they go to; they may not change before :meth:`wait` returns."""
        self._sent = x_nd = x_nd.contiguous()
        if self._messages is not None:
            self._messages.send(x_nd.split(list(sent_D)))
            return self
        self._out = x_nd.new_empty((sum(self._got_D), *self._width))
        try:
            self._work = dist.all_to_all_single(
                self._out, x_nd, self._got_D, list(sent_D), group=self._group, async_op=True
            )
        except RuntimeError as error:
            raise CommunicationError(*lost(error)) from error
        return self

    def wait(self) -> Tensor:
        """What came, by rank, [n, d]."""
        if self._messages is not None:
            self._messages.wait()
        else:
            _wait([self._work])
        return self._out


def is_short(like: Tensor, most: int | None) -> bool:
    """Whether at most so many rows like these from one rank to another are few enough bytes for one all-to-all."""
    return most is not None and most * like.element_size() * like.shape[1:].numel() <= SHORT


def _turns(group: Any) -> tuple[int, list[int]]:
    """Own rank, and the others in the order in which messages to and from them are posted."""
    line = _InFlight.of(group)
    if not line.turns:
        own, world = dist.get_rank(group), dist.get_world_size(group)
        line.turns = own, sorted(set(range(world)) - {own}, key=lambda peer: own ^ peer)
    return line.turns


def on_gloo(group: Any) -> bool:
    """Whether a group's backend is gloo; found once, as every message asks for it."""
    line = _InFlight.of(group)
    if line.gloo is None:
        line.gloo = dist.get_backend(group) == "gloo"
    return line.gloo


def exchange_equal(x_nd: Tensor, group: Any) -> Tensor:
    """All-to-all of equal parts: n / D rows to every rank, and as many from each, by rank; no size is told."""
    out = torch.empty_like(x_nd, memory_format=torch.contiguous_format)
    try:
        dist.all_to_all_single(out, x_nd.contiguous(), group=group)
    except RuntimeError as error:
        raise CommunicationError(*lost(error)) from error
    return out


def gather_rows(mine_nd: Tensor, count_D: Sequence[int], group: Any) -> Tensor:
    """Rows of all ranks in their order, [sum, d]: everyone's own to every other, as in :func:`exchange`."""
    out = mine_nd.new_empty((sum(count_D), *mine_nd.shape[1:]))
    point_to_point(out.split(list(count_D)), [mine_nd.contiguous()] * len(count_D), group)
    return out


def gather(mine_X: Tensor, group: Any) -> Tensor:
    """The same few numbers of every rank, [D, X]."""
    return begin_gather(mine_X, group)()


def begin_gather(mine_X: Tensor, group: Any, hint: str = "") -> Callable[[], Tensor]:
    """Begin :func:`gather`; what is returned waits for it. ``hint``: why a rank may not take part.

    On gloo by an all-to-all of the same numbers for everyone: its own gather goes round a ring in 2 (D - 1) messages a
    rank, each after the one before, and takes three times as long. Called on the process group itself: the functions of
    torch.distributed around it take half as long again, and every layer waits for it.
    """
    world = dist.get_world_size(group)
    out = mine_X.new_empty(world * len(mine_X))
    try:
        work = group.alltoall_base(out, mine_X.repeat(world), [], []) if on_gloo(group) else (
            group._allgather_base(out, mine_X))  # fmt: skip
    except RuntimeError as error:
        raise CommunicationError(*lost(error), hint=hint) from error

    def wait() -> Tensor:
        _wait([work], hint)
        return out.view(-1, len(mine_X))

    return wait


def reduce_over(x_X: Tensor, op: Any, group: Any, hint: str = "") -> None:
    """In place, over all ranks.

    Raises
    ------
    CommunicationError : a rank does not take part; ``hint`` says why that may be. RuntimeError : PyTorch's own, of
        numbers that its backend does not add up.
    """
    try:
        dist.all_reduce(x_X, op=op, group=group)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not GONE.search(str(error)):
            raise
        raise CommunicationError(*lost(error), hint=hint) from error


def point_to_point(into: Sequence[Tensor], of: Sequence[Tensor], group: Any) -> None:
    """Part ``of[d]`` to every rank d, what comes from it into ``into[d]``, by :class:`PairMessages`."""
    messages = PairMessages(into, group)
    messages.send(of)
    messages.wait()


def twin(group: Any) -> Any:
    """A process group of the same ranks with connections of its own; all of them call it.

    For weights that travel while steps go on: on one connection tokens wait behind them (measured with gloo: a barrier
    waited 0.3 s for an expert), operations of one NCCL communicator run one after the other. Where the group has only a
    part of the world's ranks, these must be members of equally many groups, as PyTorch names the new one by that
    number. The new group has the time-out of the old one; PyTorch's default is half an hour.

    Raises
    ------
    CommunicationError : the group does not have its ranks in order: the new one would number them otherwise.
    """
    ranks = dist.get_process_group_ranks(group)
    if ranks != sorted(ranks):
        raise CommunicationError(f"the process group has its ranks in the order {ranks[:8]}, not ascending")
    part = len(ranks) < dist.get_world_size()
    own = dist.new_group(
        ranks, timeout=timeout_of(group), backend=dist.get_backend(group), use_local_synchronization=part
    )
    dist.barrier(group=own)  # the first operation on a communicator must be everyone's
    return own


def timeout_of(group: Any) -> timedelta | None:
    """How long operations of a group wait; None where its backend does not say."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None)


GONE = re.compile("timed out|timeout|connect|closed|peer|abort", re.IGNORECASE)
"""In gloo's words for a rank that does not come, or is gone; other backends have types of errors for it."""


def lost(error: RuntimeError) -> tuple[str]:
    """What to say of an error of a collective."""
    return (f"a collective failed on rank {dist.get_rank()}: {str(error).splitlines()[0][:300]}",)
