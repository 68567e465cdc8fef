"""Links hold the rates they are set to, each class of ports for itself."""

import io
import json

import pytest
from tests.lab.emulate.needs import shaping

from poise.lab.emulate import selftest
from poise.lab.emulate.launch import run
from poise.lab.emulate.quiet import OTHERS, Meter
from poise.lab.emulate.spec import EmulatedCluster

MIB = 2**20


@pytest.fixture(scope="module")
def measured():
    """One run of the probe on two nodes of two devices: 60 MB/s inside, 15 MB/s between."""
    spec = EmulatedCluster(2, 2, 60e6, 15e6)
    args = ["--sizes", f"{4 * MIB}", "--intra", "60e6", "--inter", "15e6", "--rounds", "2"]
    meter = Meter()
    done = run(spec, selftest.PROBE, args, timeout=600, out=io.StringIO(), err=io.StringIO())
    assert done.shaped
    rows = json.loads(done.ranks[0].stdout.splitlines()[-1])["bandwidth"]
    return {**{row["mode"]: row for row in rows}, "others": meter.others()}


def rate(row, kind):
    return row[f"{kind}_bytes"] / min(row["seconds"])


@shaping
def test_no_link_is_faster_than_its_rate(measured):
    """A busy machine makes links slower, never faster; how near they come is what the self-test measures."""
    assert measured["intra"]["inter_bytes"] == 0 == measured["inter"]["intra_bytes"]
    assert rate(measured["intra"], "intra") <= 1.1 * 60e6
    assert rate(measured["inter"], "inter") <= 1.1 * 15e6
    assert rate(measured["both"], "inter") <= 1.1 * 15e6 and rate(measured["both"], "intra") <= 1.1 * 60e6


@shaping
def test_traffic_inside_a_node_is_not_held_by_the_network(measured):
    assert measured["both"]["intra_bytes"] == 4 * measured["both"]["inter_bytes"]
    fast = rate(measured["intra"], "intra") > 1.5 * 15e6
    apart = rate(measured["both"], "intra") > 1.5 * rate(measured["both"], "inter")
    if not (fast and apart) and (measured["others"] or 1.0) > OTHERS:
        pytest.skip(f"inconclusive: others took {measured['others']:.0%} of the cores")
    assert fast and apart


@shaping
def test_a_fast_network_does_not_speed_up_the_node_and_a_shared_port_is_shared():
    spec = EmulatedCluster(2, 2, 15e6, 60e6, nic_shared=True)
    result = selftest.selftest(spec, sizes=[2 * MIB], find_limit=False, timeout=600)
    ports = {(row.how, row.mode): row for row in result.ports}
    assert 0 < ports["receives_first", "intra"].intra <= 1.1
    assert 0 < ports["receives_first", "inter"].inter <= 1.1  # of 30 MB/s a device, not 60
    assert result.shaped and bool(result.inconclusive) == ((result.others or 0.0) > OTHERS)
    assert ("INCONCLUSIVE: others took" in str(result)) == bool(result.inconclusive)
    assert [row["peers"] for row in result.latency] == [1, 2, 3]
    assert json.loads(result.to_json())["spec"]["nic_shared"] is True
    assert "receives_first    intra       2" in str(result)
