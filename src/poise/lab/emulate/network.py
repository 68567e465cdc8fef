"""The network of an emulated cluster as lists of ``ip`` and ``tc`` commands. Pure: nothing is run here but a check.

Every device is a network namespace with two interfaces, and an interface is a port of the cost model (DESIGN 3.1):

- ``fab0`` into the bridge of its node (the node's fabric),
- ``net0`` into the bridge all nodes share (the network); with a shared port, into a bridge of its node first, which is
  joined to the network by one pair of ``up`` interfaces.

An interface's egress is limited where the device sends, its ingress where the bridge sends to it, both by htb. So the
two kinds of traffic never share a queue. A device has *one* address; its routing table sends its own node's
addresses to ``fab0`` and all others to ``net0``, which is all that gloo (one address a rank) needs to know.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from dataclasses import dataclass

from poise.lab.emulate.spec import EmulatedCluster

ROOT = -1
"""The namespace that holds the bridges."""
MTU = 8_000
"""Headers cost 1 %."""
TURN_SECONDS = 4e-4
"""A segment may be several packets long if its port sends it in this time. A port serves its peers a segment at a time
and lets the last one go before it is paid for: long turns leave other ports idle and make short messages too fast. Of
5.4 MB/s, 65 kB a port took 7.7 ms in segments of 64 kB, 14.5 in packets of 8, where bytes over rate are 12."""
MOST_SEGMENTS = 65_535
QUEUE_PACKETS = 100_000
"""No port ever drops: the fabric is lossless, TCP's window is what holds a sender back."""
MIN_BURST_BYTES = 8_192
BURST_SECONDS = 1e-3
"""A port that woke late may catch up on this much time. More is kinder to a busy machine and less true for short
messages, which pass at full speed while the credit lasts."""
SYSCTLS = {
    "net/ipv4/tcp_congestion_control": "reno",  # without loss the window only grows; bbr would pace on its own
    "net/ipv4/tcp_limit_output_bytes": "32768",  # a connection may not fill its port's queue and starve the others
    "net/ipv4/tcp_wmem": "4096 262144 4194304",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
}
WINDOW_SECONDS = 8e-3
"""A connection may have this much of its share of a port on its way. Less, and a process that waits for a core leaves
its port idle; more, and a port serves its senders unevenly, some end early and the port is idle at the end."""
MIN_WINDOW_BYTES = 32_768
MAX_WINDOW_BYTES = 2**21
ISOLATE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


@dataclass(frozen=True, slots=True)
class CommandBatch:
    """Lines for one ``ip -batch`` or ``tc -batch`` in one namespace (a device's number, or ROOT)."""

    namespace: int
    tool: str
    lines: tuple[str, ...]


def address(spec: EmulatedCluster, rank: int) -> str:
    """A device's one address."""
    return f"10.77.{spec.node_of(rank)}.{rank % spec.devices_per_node + 1}"


def batches(spec: EmulatedCluster) -> list[CommandBatch]:
    """All commands, in order. Interfaces are created in the root and moved into ``{ns<rank>}``, filled in later."""
    root_ip = [*_bridges(spec)]
    root_tc: list[str] = []
    devices: list[CommandBatch] = []
    for rank in range(spec.num_devices):
        node = spec.node_of(rank)
        network = f"net{node}" if spec.nic_shared else "core"
        root_ip += [*_pair(f"f{rank}", "fab0", rank, f"fab{node}"), *_pair(f"n{rank}", "net0", rank, network)]
        limit_net = None if spec.nic_shared else spec.inter_bytes_per_s
        root_tc += [*limited(f"f{rank}", spec.intra_bytes_per_s), *limited(f"n{rank}", limit_net)]
        devices += [
            CommandBatch(rank, "ip", _device(spec, rank)),
            CommandBatch(rank, "tc", (*limited("fab0", spec.intra_bytes_per_s), *limited("net0", limit_net))),
        ]
    if spec.nic_shared:
        for node in range(spec.nodes):
            root_tc += [*limited(f"up{node}", spec.inter_bytes_per_s), *limited(f"down{node}", spec.inter_bytes_per_s)]
    return [CommandBatch(ROOT, "ip", tuple(root_ip)), CommandBatch(ROOT, "tc", tuple(root_tc)), *devices]


def sysctls(spec: EmulatedCluster) -> dict[str, str]:
    """Kernel settings of every namespace; the window is that of the faster kind of port."""
    near, far = spec.devices_per_node - 1, spec.num_devices - spec.devices_per_node
    shared = spec.devices_per_node if spec.nic_shared else 1
    shares = [
        rate / peers
        for rate, peers in ((spec.intra_bytes_per_s, near), (spec.inter_bytes_per_s, far * shared))
        if rate and peers
    ]
    window = int(min(max(max(shares, default=math.inf) * WINDOW_SECONDS, MIN_WINDOW_BYTES), MAX_WINDOW_BYTES))
    buffer = 2 * window  # the kernel offers half of a receive buffer
    return {**SYSCTLS, "net/ipv4/tcp_rmem": f"4096 {buffer} {buffer}"}


def limited(interface: str, bytes_per_s: float | None) -> list[str]:
    """``tc`` lines that limit what an interface sends; none without a rate."""
    if bytes_per_s is None:
        return []
    burst = int(max(MIN_BURST_BYTES, bytes_per_s * BURST_SECONDS))
    return [
        f"qdisc add dev {interface} root handle 1: htb default 1",
        f"class add dev {interface} parent 1: classid 1:1 htb rate {round(bytes_per_s * 8)}bit "
        f"burst {burst}b cburst {burst}b quantum {MTU}",
        f"qdisc add dev {interface} parent 1:1 pfifo limit {QUEUE_PACKETS}",
    ]


def why_not() -> str:
    """Why this machine cannot shape links, or ``""`` if it can: tools, rights, and the kernel's veth and htb."""
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"not found: {', '.join(missing)} (packages util-linux and iproute2)"
    if os.geteuid() != 0:
        return "not root"
    trial = (
        "ip link add try0 type veth peer name try1 && ip link set try0 gso_max_segs 1 &&"
        " tc qdisc add dev try0 root handle 1: htb"
    )
    done = subprocess.run([*ISOLATE, "sh", "-c", trial], capture_output=True, text=True, timeout=30)
    return "" if done.returncode == 0 else f"namespaces, veth or htb are refused: {done.stderr.strip()[:200]}"


def _bridges(spec: EmulatedCluster) -> list[str]:
    names = ["core", *(f"fab{node}" for node in range(spec.nodes))]
    lines = []
    if spec.nic_shared:
        names += [f"net{node}" for node in range(spec.nodes)]
    for name in names:
        lines += [f"link add {name} type bridge", f"link set {name} mtu {MTU} up"]
    if spec.nic_shared:
        for node in range(spec.nodes):
            lines += [
                f"link add up{node} mtu {MTU} type veth peer name down{node} mtu {MTU}",
                f"link set up{node} master net{node} up",
                f"link set down{node} master core up",
            ]
    return lines


def _pair(outside: str, inside: str, rank: int, bridge: str) -> list[str]:
    return [
        f"link add {outside} mtu {MTU} type veth peer name {inside} mtu {MTU} netns {{ns{rank}}}",
        f"link set {outside} master {bridge} up",
    ]


def _device(spec: EmulatedCluster, rank: int) -> tuple[str, ...]:
    own = address(spec, rank)
    return (
        "link set lo up",
        f"link set fab0{_segments(spec.intra_bytes_per_s)} up",
        f"link set net0{_segments(spec.inter_bytes_per_s)} up",
        f"addr add {own}/24 dev fab0",
        f"route add 10.77.0.0/16 dev net0 src {own}",
    )


def _segments(bytes_per_s: float | None) -> str:
    """Packets a segment may have."""
    return (
        ""
        if bytes_per_s is None
        else f" gso_max_segs {int(min(max(bytes_per_s * TURN_SECONDS / MTU, 1), MOST_SEGMENTS))}"
    )
