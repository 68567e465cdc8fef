"""Links hold the rates they are set to, each class of ports for itself."""

import json

import pytest
from tests.helpers import few_or
from tests.lab.emulate.needs import shaping

from poise.lab.emulate import selftest
from poise.lab.emulate.quiet import OTHERS
from poise.lab.emulate.spec import EmulatedCluster

MIB = 2**20


@pytest.fixture(scope="module")
def tested():
    """One self-test of two nodes of two devices: 60 MB/s inside, 15 MB/s between, which a node's devices share."""
    probe, rows = selftest._probe, []

    def kept(*words, **more):
        done, found = probe(*words, **more)
        rows.extend(found["bandwidth"])
        return done, found

    spec = EmulatedCluster(2, 2, 60e6, 15e6, nic_shared=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "_probe", kept)
        result = selftest.selftest(spec, sizes=[4 * MIB], find_limit=False, timeout=600)
    assert result.shaped
    return result, {row["mode"]: row for row in rows if row["how"] == "receives_first"}


def rate(row, kind):
    return row[f"{kind}_bytes"] / min(row["seconds"])


@shaping
def test_no_link_is_faster_than_its_rate(tested):
    """A busy machine makes links slower, never faster; how near they come is what the self-test measures."""
    _, measured = tested
    assert measured["intra"]["inter_bytes"] == 0 == measured["inter"]["intra_bytes"]
    assert rate(measured["intra"], "intra") <= 1.1 * 60e6
    assert rate(measured["inter"], "inter") <= 1.1 * 7.5e6, "of 15 MB/s a device has half"
    assert rate(measured["both"], "inter") <= 1.1 * 7.5e6 and rate(measured["both"], "intra") <= 1.1 * 60e6


@shaping
def test_traffic_inside_a_node_is_not_held_by_the_network(tested):
    result, measured = tested
    assert measured["both"]["intra_bytes"] == 8 * measured["both"]["inter_bytes"]
    fast = rate(measured["intra"], "intra") > 1.5 * 15e6
    apart = rate(measured["both"], "intra") > 1.5 * rate(measured["both"], "inter")
    if not (fast and apart) and (result.others or 1.0) > OTHERS:
        pytest.skip(f"inconclusive: others took {result.others:.0%} of the cores")
    assert fast and apart


def told(result):
    """That it was disturbed only where others took a part of the cores; the latencies and the table of ports."""
    assert result.shaped and bool(result.inconclusive) == ((result.others or 0.0) > OTHERS)
    assert ("INCONCLUSIVE: others took" in str(result)) == bool(result.inconclusive)
    assert [row["peers"] for row in result.latency] == [1, 2, 3]
    assert json.loads(result.to_json())["spec"]["nic_shared"] is True


@shaping
def test_the_self_test_says_what_it_found(tested):
    result, _ = tested
    told(result)
    ports = {(row.how, row.mode): row for row in result.ports}
    assert 0 < ports["receives_first", "intra"].intra <= 1.1 and 0 < ports["receives_first", "inter"].inter <= 1.1
    assert "receives_first    intra       4" in str(result)


@shaping
@pytest.mark.skipif(few_or(False, True), reason="POISE_MANY=1 runs it; rates and a shared port: the self-test above")
def test_a_fast_network_does_not_speed_up_the_node_and_a_shared_port_is_shared():
    spec = EmulatedCluster(2, 2, 15e6, 60e6, nic_shared=True)
    result = selftest.selftest(spec, sizes=[2 * MIB], find_limit=False, timeout=600)
    told(result)
    ports = {(row.how, row.mode): row for row in result.ports}
    assert 0 < ports["receives_first", "intra"].intra <= 1.1
    assert 0 < ports["receives_first", "inter"].inter <= 1.1  # of 30 MB/s a device, not 60
    assert "receives_first    intra       2" in str(result)
