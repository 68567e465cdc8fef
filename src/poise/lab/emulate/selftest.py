"""Does this machine hold what it is set to? Rates, latency, sleep, and how much it can carry in all."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poise.lab.emulate.launch import EmulatedRun, run
from poise.lab.emulate.quiet import OTHERS, Meter
from poise.lab.emulate.spec import MIN_BYTES_PER_S, EmulatedCluster
from poise.util.errors import NoResultError

PROBE = Path(__file__).with_name("probe.py")
MIB = 2**20
SIZES = (1 * MIB, 4 * MIB, 16 * MIB, 32 * MIB)
HOLDS, FACTOR, TRIES = 0.95, 1.5, 8
"""A machine carries a total rate if ports that are all busy reach this part of their set rates; each try of the limit
search sets rates this much faster or slower."""
LIMIT_SECONDS = 0.25
"""The limit search takes the rate between messages that last this long and three times as long: what an exchange costs
whatever its size is no matter of capacity."""


@dataclass(frozen=True, slots=True)
class PortResult:
    """Achieved over set rate of the two port classes in one all-to-all; None where a class was idle or unlimited.

    ``how``: receives_first (point-to-point, all receives posted before the first send) or all_to_all_single.
    """

    how: str
    mode: str
    size_bytes: int
    seconds: float
    intra: float | None
    inter: float | None

    @property
    def worst(self) -> float:
        """The share of the port class that reaches less of its set rate."""
        return min(value for value in (self.intra, self.inter) if value is not None)


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was measured, and on what."""

    spec: EmulatedCluster
    shaped: bool
    ports: tuple[PortResult, ...]
    latency: tuple[dict[str, float], ...]
    """peers, p50_s, p95_s of an all-to-all of 4 bytes to that many peers."""
    late_p50_s: float
    late_p99_s: float
    """Error of slept computations of 5 ms, all devices at once."""
    limit: tuple[dict[str, float], ...]
    """total_bytes_per_s and the share of it achieved between two message lengths, of every rate tried."""
    limit_bytes_per_s: float | None
    """Largest total tried that the machine held at 95 %; 0 if none, None if not looked for."""
    limit_is_bound: bool
    """False: a larger total failed. True: the search stopped before one did."""
    machine: dict[str, Any]
    others: float | None = None
    """Part of the cores that others took meanwhile; None if the system does not tell."""

    @property
    def inconclusive(self) -> str:
        """Why this may be what others left of the machine, and not what it holds; empty if it was left alone."""
        if self.others is None or self.others <= OTHERS:
            return ""
        return f"others took {self.others:.0%} of the cores meanwhile"

    def to_json(self) -> str:
        """All of it."""
        return json.dumps({**dataclasses.asdict(self), "inconclusive": self.inconclusive}, indent=1)

    def __str__(self) -> str:
        spec = self.spec
        lines = [
            f"{spec.nodes}x{spec.devices_per_node}, {'shaped' if self.shaped else 'NOT SHAPED: rates mean nothing'}; "
            f"set a device: intra {_mb(spec.intra_bytes_per_s)}, "
            f"inter {_mb(device_inter(spec))}; load {self.machine['load']:.1f} on {self.machine['cores']} cores",
            f"{'exchange':<18}{'ports':<7}{'MiB':>6}{'seconds':>10}{'intra':>8}{'inter':>8}   achieved / set",
        ]
        for row in self.ports:
            achieved = "".join("       -" if v is None else f"{v:>8.3f}" for v in (row.intra, row.inter))
            lines.append(f"{row.how:<18}{row.mode:<7}{row.size_bytes / MIB:>6.3g}{row.seconds:>10.4f}{achieved}")
        lines += [
            f"4 bytes to {row['peers']:.0f} peers: p50 {row['p50_s'] * 1e3:.2f} ms, p95 {row['p95_s'] * 1e3:.2f} ms"
            for row in self.latency
        ]
        lines.append(f"sleep of 5 ms: late by p50 {self.late_p50_s * 1e6:.0f} us, p99 {self.late_p99_s * 1e6:.0f} us")
        lines += [f"all ports {_mb(row['total_bytes_per_s'])}: achieved {row['achieved']:.3f}" for row in self.limit]
        if self.limit_bytes_per_s is not None:
            least = "at least " if self.limit_is_bound else ""
            lines.append(f"limit (>= {HOLDS:.0%} achieved): {least}{_mb(self.limit_bytes_per_s)}")
        if self.inconclusive:
            lines.append(f"INCONCLUSIVE: {self.inconclusive}; measure on a machine that does nothing else")
        return "\n".join(lines)


def selftest(
    spec: EmulatedCluster, *, sizes: Sequence[int] = SIZES, find_limit: bool = True, timeout: float = 600.0
) -> SelfTest:
    """Measure. Takes about a minute at 100 MB/s a port, and both cores.

    Parameters
    ----------
    spec : the cluster; each class of links with peers should have a rate.
    sizes : bytes every device sends through its busiest port in one all-to-all.
    find_limit : change all rates together, by factors of 1.5, until the largest that ports hold to 95 % is found.
    timeout : seconds for each of the runs this makes.

    Raises
    ------
    NoResultError : there is one device only.
    RankError : a run failed or took too long.
    """
    if spec.num_devices < 2:
        raise NoResultError("one device has no links to test", hint="--cluster 2x2")
    single, meter = (sizes[-2:-1] or sizes)[0], Meter()
    done, found = _probe(spec, sizes, timeout=timeout, extra=["--single", str(single), "--latency", "--sleep"])
    ports = [_port(spec, row) for row in found["bandwidth"]]
    tried: list[dict[str, float]] = []
    if find_limit and done.shaped and spec.total_bytes_per_s:
        tried = _limit(spec, timeout)
    held = [row["total_bytes_per_s"] for row in tried if row["achieved"] >= HOLDS]
    late = np.array(found["late_s"])
    return SelfTest(
        spec=spec,
        shaped=done.shaped,
        ports=tuple(ports),
        latency=tuple(found["latency"]),
        late_p50_s=float(np.percentile(late, 50)),
        late_p99_s=float(np.percentile(late, 99)),
        limit=tuple(tried),
        limit_bytes_per_s=max(held, default=0.0) if tried else None,
        limit_is_bound=bool(held) and len(held) == len(tried),
        machine={
            "kernel": platform.release(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        others=meter.others(),
    )


def modes(spec: EmulatedCluster) -> list[str]:
    """Which traffic this shape has: intra, inter, both."""
    near, far = spec.devices_per_node > 1, spec.nodes > 1
    return [name for name, there in (("intra", near), ("inter", far), ("both", near and far)) if there]


def device_inter(spec: EmulatedCluster) -> float | None:
    """One device's share of the network rate, bytes/s."""
    if spec.inter_bytes_per_s is None:
        return None
    return spec.inter_bytes_per_s / (spec.devices_per_node if spec.nic_shared else 1)


def _probe(
    spec: EmulatedCluster,
    sizes: Sequence[int],
    *,
    timeout: float,
    only: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> tuple[EmulatedRun, dict[str, Any]]:
    args = [
        *("--sizes", ",".join(str(size) for size in sizes)),
        *("--modes", ",".join(only or modes(spec))),
        *("--intra", str(spec.intra_bytes_per_s or 0.0)),
        *("--inter", str(device_inter(spec) or 0.0)),
        *extra,
    ]
    done = run(spec, PROBE, args, timeout=timeout, out=io.StringIO(), err=io.StringIO())
    return done, json.loads(done.ranks[0].stdout.splitlines()[-1])


def _port(spec: EmulatedCluster, row: dict[str, Any]) -> PortResult:
    def achieved(bytes_: int, rate: float | None) -> float | None:
        return bytes_ / row["median_s"] / rate if bytes_ and rate else None

    return PortResult(
        how=row["how"],
        mode=row["mode"],
        size_bytes=row["size_bytes"],
        seconds=row["median_s"],
        intra=achieved(row["intra_bytes"], spec.intra_bytes_per_s),
        inter=achieved(row["inter_bytes"], device_inter(spec)),
    )


def _limit(spec: EmulatedCluster, timeout: float) -> list[dict[str, float]]:
    """All ports busy: upwards from the set rates until they miss 95 %, or downwards until they hold; every try."""
    tried: list[dict[str, float]] = []
    held: set[bool] = set()
    scale = 1.0
    while len(held) < 2 and len(tried) < TRIES and scale > 0.1:
        faster = dataclasses.replace(
            spec,
            intra_bytes_per_s=spec.intra_bytes_per_s and max(spec.intra_bytes_per_s * scale, MIN_BYTES_PER_S),
            inter_bytes_per_s=spec.inter_bytes_per_s and max(spec.inter_bytes_per_s * scale, MIN_BYTES_PER_S),
            limit_bytes_per_s=1e15,
        )
        size = int(LIMIT_SECONDS * max(faster.intra_bytes_per_s or 0.0, device_inter(faster) or 0.0))
        _, found = _probe(faster, [size, 3 * size], timeout=timeout, only=modes(spec)[-1:])
        short, long = found["bandwidth"]
        between = {name: long[name] - short[name] for name in ("intra_bytes", "inter_bytes", "median_s")}
        worst = _port(faster, {**long, **between}).worst if between["median_s"] > 0 else 0.0
        tried.append({"total_bytes_per_s": faster.total_bytes_per_s, "achieved": worst})
        held.add(worst >= HOLDS)
        scale *= FACTOR if worst >= HOLDS else 1 / FACTOR
    return tried


def _mb(bytes_per_s: float | None) -> str:
    return "no limit" if bytes_per_s is None else f"{bytes_per_s / 1e6:.4g} MB/s"
