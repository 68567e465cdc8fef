"""Sizes of the exchanges that are measured, with a machine that is a formula in place of ranks."""

import numpy as np
import pytest

from poise.lab.calibrate import links
from poise.lab.calibrate.links import Effort, _Case, _grow
from poise.lab.calibrate.patterns import port_bytes

NODE_D = np.zeros(2, np.int32)
EVEN_DD = np.array([[0.0, 1.0], [1.0, 0.0]])


class Formula:
    """Start-up and bytes over a rate; the tries in ``late`` take that much longer."""

    def __init__(self, start_s, bytes_per_s, late=()):
        self.start_s, self.bytes_per_s, self.late, self.tried = start_s, bytes_per_s, dict(late), 0

    def case(self, name, bytes_DD, effort, tries=2):
        seconds = self.start_s + bytes_DD.max() / self.bytes_per_s + self.late.get(self.tried, 0.0)
        self.tried += 1
        return _Case(name, bytes_DD.astype(np.int64), port_bytes(bytes_DD, NODE_D), 1, seconds)


@pytest.mark.parametrize("bytes_per_s", [1e5, 5e6, 3e7, 1e9])
def test_sizes_grow_until_one_is_long_and_end_with_one_longer(bytes_per_s):
    cases = _grow("even", EVEN_DD, Formula(1e-3, bytes_per_s), Effort())
    seconds = [case.seconds for case in cases]
    assert seconds == sorted(seconds) and sum(s < 0.05 for s in seconds) == len(seconds) - 2
    assert cases[-1].rows_DD.max() == pytest.approx(links.LONGER * cases[-2].rows_DD.max(), rel=1e-6)
    quick = _grow("even", EVEN_DD, Formula(1e-3, bytes_per_s), Effort(longer=False))
    assert [case.seconds for case in quick] == seconds[:-1]


def test_links_too_fast_or_too_slow_for_a_long_exchange_end_early():
    fast = _grow("even", EVEN_DD, Formula(1e-5, 1e12), Effort())
    assert max(case.rows_DD.max() for case in fast) <= links.MOST_BYTES and fast[-1].seconds < 0.05
    slow = _grow("even", EVEN_DD, Formula(0.5, 1e9), Effort(long_s=0.4))  # six times as long would be 3 s
    assert len(slow) == 1 and slow[0].seconds * links.LONGER > links.LONGEST_S


def test_one_late_exchange_does_not_end_growth():
    cases = _grow("even", EVEN_DD, Formula(1e-3, 5e6, late=[(0, 0.2)]), Effort())
    assert cases[-1].rows_DD.max() / 5e6 > 0.05 and len(cases) > 3
