"""One call of vLLM's load balancer, whatever form it comes in, and the map that all ranks answer it with.

Two doors lead here: the policy class of releases (:mod:`poise.engines.plugins.vllm_policy`), and the planning hook of
an open proposal (:mod:`poise.engines.plugins.vllm_hooks`). What needs a planner is planned aside where ranks can talk
to each other (:mod:`poise.engines.plugins.turns`), else by every rank for itself.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.plugins.aside import Aside
from poise.engines.plugins.policy import Asked, asked, content, say_once, usable_map, warm_up
from poise.engines.plugins.settings import PolicySettings
from poise.engines.plugins.turns import GIVEN_UP, WORDS, TurnRanks, Turns
from poise.engines.plugins.vllm_caller import caller
from poise.util.errors import InputError

LOG = logging.getLogger("vllm.poise")
PARALLEL = "vllm.distributed.parallel_state"
GROUPS = ("get_eplb_group", "get_ep_group")
"""Where vLLM keeps the ranks that share experts; the first, of newer releases, is for its load balancer alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What vLLM asks.

    Parameters
    ----------
    load_LE : [L, E], tokens of each expert.
    replicas, groups, nodes, ranks : as vLLM names them.
    old_LS : the map in use, [L, S], or None.
    single : loads are of single precision.
    active_D : which ranks are there; None: all.
    group : the ranks' process group on CPUs, if the call names it.
    state : what vLLM keeps for this model's policy, if the call names it.
    """

    load_LE: NDArray[Any]
    replicas: int
    groups: int
    nodes: int
    ranks: int
    old_LS: NDArray[Any] | None
    single: bool
    active_D: NDArray[Any] | None = None
    group: Any = None
    state: Any = None


class Planning:
    """The planner of a process.

    Parameters
    ----------
    settings : of the plugin.
    aside : the planner's own process; it is started by the first rank alone, at its first call.
    """

    def __init__(self, settings: PolicySettings, aside: Aside | None = None) -> None:
        self.settings, self._aside = settings, Aside() if aside is None else aside
        self._turns: dict[tuple[int, ...], Turns] = {}

    def table(self, call: Call) -> NDArray[np.int64] | None:
        """The map, int64 [L, S]; None: vLLM's own algorithm shall answer, on all ranks.

        Raises
        ------
        Exception : what one rank alone may have, where ranks cannot talk to each other.
        """
        # 0.32 shows no line of a plugin's start: it sets up its log later
        say_once(LOG, f"poise plans expert placement: {self.settings}", level=logging.INFO)
        made: Asked | Exception
        try:
            made = self._asked(call)
        except InputError as error:
            return self._refused(call, error)
        except Exception as error:
            made = error
        ranks = self._ranks(call)
        if ranks is None or call.old_LS is None:
            if not isinstance(made, Asked):
                raise made
            if made.given_LS is None:
                warm_up()
            table, said = made.plan()
            self._say(call, table, said)
            return table
        asks = caller()
        model = asks.model if call.state is None else id(call.state)
        turns = self._turns.setdefault((model, *np.shape(call.load_LE), call.replicas, call.ranks), Turns(self._aside))
        taken = turns.take(made, np.asarray(call.old_LS), ranks, waits=asks.beside, settles=asks.settles)
        said = WORDS[taken.word] + (f" ({taken.said})" if taken.said else "")
        if taken.word == GIVEN_UP:
            say_once(LOG, f"poise: {said}")
        self._say(call, taken.table_LS, "" if taken.word == GIVEN_UP else said)
        return taken.table_LS

    def _asked(self, call: Call) -> Asked:
        return asked(
            call.load_LE, call.replicas, call.groups, call.nodes, call.ranks, call.old_LS, settings=self.settings,
            single=call.single, active_D=call.active_D,
        )  # fmt: skip

    def _refused(self, call: Call, error: InputError) -> NDArray[np.int64] | None:
        """Numbers that poise does not take: the same on all ranks, so all may go on alike without it."""
        load, static = call.load_LE, self.settings.static_map is not None
        there = call.active_D is None or bool(np.all(call.active_D))  # else the map in use counts on lost ranks
        kept = usable_map(call.old_LS, len(load), load.shape[1], call.replicas) if static and there else None
        answer = "vLLM's own algorithm answers" if kept is None else "the map in use stays"
        say_once(LOG, f"poise: {error}; {answer}")
        return kept

    def _ranks(self, call: Call) -> TurnRanks | None:
        """The ranks that plan together; None, on all of them, where each plans for itself."""
        if not self.settings.apart or self.settings.static_map is not None or call.ranks < 2:
            return None
        layers, experts = np.shape(call.load_LE)
        known = (
            usable_map(call.old_LS, layers, experts, call.replicas) is not None
            if call.active_D is None
            else call.old_LS is not None and np.shape(call.old_LS) == (layers, call.replicas)
        )
        if not known:
            return None
        group = cpu_group() if call.group is None else call.group
        return None if group is None or group.size() < 2 else ranks_of(group)

    @staticmethod
    def _say(call: Call, table_LS: NDArray[np.int64], said: str) -> None:
        LOG.info("poise: map %s for loads %s; all ranks must say the same", content(table_LS), content(call.load_LE))
        if said:
            LOG.info("poise: %s", said)


def ranks_of(group: Any) -> TurnRanks:
    """The ranks of a process group of torch.distributed on CPUs."""
    torch = importlib.import_module("torch")

    def total(mine_X: NDArray[np.int64]) -> NDArray[np.int64]:
        shared = torch.from_numpy(mine_X.copy())
        torch.distributed.all_reduce(shared, group=group)
        out: NDArray[np.int64] = shared.numpy()
        return out

    return TurnRanks(group.rank(), group.size(), total)


def cpu_group() -> Any:
    """The process group that vLLM's own load balancer talks over, or None."""
    try:
        parallel = importlib.import_module(PARALLEL)
    except ImportError:
        return None
    for name in GROUPS:
        try:
            return getattr(parallel, name)().cpu_group
        except (AttributeError, AssertionError):  # not of this release, or there is no such group
            continue
    return None
