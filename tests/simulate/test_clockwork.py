"""The clockwork of simulated steps: who waits for whom, and what goes on beside."""

import numpy as np

from poise.cost.exchange import ExchangeModel
from poise.simulate.clockwork import AllToAll, Busy, Clockwork, Collective, Mark, Meet, Post, Wait

NODES = np.zeros(2, np.int32)
BOTH = np.array([[0.0, 4.0], [4.0, 0.0]])


def marks(acts, places=2):
    clock = Clockwork(NODES, ExchangeModel(0.5, 0.0, 2.0, 2.0))
    out = np.zeros((2, places))
    clock.run(acts, out)
    return out.tolist(), clock.now_D.tolist()


def test_ranks_go_on_by_themselves_until_they_meet():
    work = Busy(np.array([1.0, 3.0]))
    assert marks([work, Mark((0,)), Meet(0.25), Mark((1,))]) == ([[1.0, 3.25], [3.0, 3.25]], [3.25, 3.25])


def test_an_exchange_holds_up_only_who_hears_from_the_late():
    one_way = np.array([[0.0, 4.0], [0.0, 0.0]])  # rank 0 sends, the late rank 1 hears
    assert marks([Busy(np.array([0.0, 9.0])), AllToAll(one_way)])[1] == [2.5, 9.5]
    assert marks([AllToAll(BOTH, BOTH)])[1] == [4.5, 4.5]


def test_a_post_goes_on_beside_and_is_waited_for_once():
    posted = Post("weights", (Meet(), Collective((BOTH, BOTH))))
    acts = [posted, Busy(1.0), Mark((0,)), Wait(("weights", "never posted")), Mark((1,)), Busy(0.5), Wait(("weights",))]
    assert marks(acts) == ([[1.0, 5.0], [1.0, 5.0]], [5.5, 5.5])
    assert marks([posted, Busy(7.0), Wait(("weights",))])[1] == [7.0, 7.0]
