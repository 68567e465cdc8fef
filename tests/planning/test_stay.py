"""poise-stay's graph: a token's next stops, weighed, by going along each token's way."""

import numpy as np
import pytest
from tests.helpers import token_batch

from poise.planning.solve.stay import REACH, _graph


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_the_stops_that_tokens_make(seed):
    """Fails if a hot expert or an idle layer counts as a stop, a later stop weighs as much as the next, or one way is lost."""
    rng, (layers, experts) = np.random.default_rng(seed), (6, 5)
    ids = rng.integers(-1, experts, (40, layers, 1)).astype(np.int16)
    everywhere = rng.random((layers, experts)) < 0.2
    want = {}
    for way in ids[:, :, 0].tolist():
        stops = [layer * experts + e for layer, e in enumerate(way) if e >= 0 and not everywhere[layer, e]]
        for at, node in enumerate(stops):
            for share, after in zip(REACH, stops[at + 1 :], strict=False):
                for edge in ((node, after), (after, node)):
                    want[edge] = want.get(edge, 0.0) + share
    ptr, neighbour, weight = _graph(token_batch(ids, [40], experts), everywhere)
    source = np.repeat(np.arange(layers * experts), np.diff(ptr))
    got = dict(zip(zip(source.tolist(), neighbour.tolist(), strict=True), weight.tolist(), strict=True))
    assert len(got) == neighbour.size and got == pytest.approx(want)
    assert sum(REACH) == pytest.approx(1) and list(REACH) == sorted(REACH, reverse=True)
