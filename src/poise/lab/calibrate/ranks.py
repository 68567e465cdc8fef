"""The whole calibration, run by every rank that torchrun or the emulator started, or by a single process."""

from __future__ import annotations

import os
import platform
import socket
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from poise.lab.calibrate.compute import arithmetic_rows, clock_rows, device_memory, expert_kind
from poise.lab.calibrate.fit import ComputeRow, LinkFit, LinkRow, fit_curve, fit_links
from poise.lab.calibrate.links import CalibrationRanks, Effort, measure_links
from poise.lab.calibrate.result import Calibration, MeasuredMachine, assemble
from poise.lab.emulate.clock import ExpertCurve
from poise.lab.emulate.quiet import Meter, why_not
from poise.machine.cluster import Cluster
from poise.util.errors import CommunicationError, NoResultError, OptionError

COMPUTE_SHARE = 0.3
"""Part of the time for the expert's curve; the rest is for links."""
QUICK = 0.25
"""Part of the time that a quick run takes."""


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What to measure.

    Parameters
    ----------
    hidden, inner, matrices : sizes of the expert.
    num_experts : E, numbers that a dispatch exchanges.
    seconds : about how long, links and compute together.
    repeats : of each row.
    quick : fewer rows, no very long exchanges, a quarter of the time.
    clock : curve of the device clock in place of arithmetic, and how much slower it runs.
    find_nic : decide between one network port a device and one a node.
    device : auto, cpu or cuda.
    base : shape (a single process only) and constants of what is not measured.
    """

    hidden: int
    inner: int
    matrices: int = 3
    num_experts: int = 64
    seconds: float = 60.0
    repeats: int = 7
    quick: bool = False
    clock: ExpertCurve | None = None
    dilation: float = 1.0
    find_nic: bool = False
    device: str = "auto"
    base: Cluster | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.seconds) and self.seconds > 0):
            raise OptionError(f"seconds must be finite and above 0, got {self.seconds!r}")
        if self.repeats < 1:
            raise OptionError(f"repeats must be 1 or more, got {self.repeats}")
        if not (np.isfinite(self.dilation) and self.dilation > 0):
            raise OptionError(f"dilation must be finite and above 0, got {self.dilation!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise OptionError(f"unknown device {self.device!r}", hint="auto, cpu or cuda")
        if self.base is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OptionError("a cluster to start from is for a single process", hint="torchrun's shape is measured")


def calibrate(plan: CalibrationPlan, say: Callable[[str], object] = lambda text: None) -> Calibration | None:
    """Measure and fit; the result on rank 0, None on all others.

    Parameters
    ----------
    plan : the same on every rank.
    say : told what is going on, on rank 0.

    Raises
    ------
    OptionError : ranks are not sorted by node, there is no such device, or the expert does not fit.
    CommunicationError : a rank was lost.
    NoResultError : nothing can be fitted, or others kept the machine too busy to tell.
    """
    kind = expert_kind(plan.hidden, plan.inner, plan.matrices)
    device = _device(plan)
    try:
        if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
            return _measure(plan, CalibrationRanks(np.zeros(1, np.int32), device, plan.num_experts), kind, say)
        return _on_ranks(plan, device, kind, say)
    except torch.OutOfMemoryError as error:
        raise NoResultError(f"out of memory: {str(error).splitlines()[0][:200]}", hint="a smaller expert") from error


def _on_ranks(
    plan: CalibrationPlan, device: torch.device, kind: Any, say: Callable[[str], object]
) -> Calibration | None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
        told = _gather((_node(), _machine()))
    except (RuntimeError, ValueError) as error:
        raise CommunicationError(f"{backend} does not start: {str(error).splitlines()[0][:300]}") from error
    node_D = np.array([node for node, _ in told], dtype=np.int32)
    if node_D[0] != 0 or np.any((np.diff(node_D) < 0) | (np.diff(node_D) > 1)):
        raise OptionError(f"ranks are not sorted by node: {node_D[:16].tolist()}", hint="start them with torchrun")
    sharing = sum(machine == told[dist.get_rank()][1] for _, machine in told)
    say(f"{len(node_D)} ranks on {node_D[-1] + 1} nodes, {backend}")
    try:
        out = _measure(plan, CalibrationRanks(node_D, device, plan.num_experts, sharing), kind, say)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CommunicationError(f"a rank was lost: {str(error).splitlines()[0][:300]}") from error
    dist.destroy_process_group()
    return out


def _measure(
    plan: CalibrationPlan, ranks: CalibrationRanks, kind: Any, say: Callable[[str], object]
) -> Calibration | None:
    devices, total = len(ranks.node_D), plan.seconds * (QUICK if plan.quick else 1.0)
    alone = devices == 1
    effort = Effort(total * (1.0 if alone else COMPUTE_SHARE), repeats=plan.repeats)
    weight_bytes, meter = 2.0, Meter()
    if plan.clock is not None:
        say("the device clock")
        mine, cut = clock_rows(plan.clock, plan.dilation, ranks, effort, quick=plan.quick)
    else:
        say(f"experts on {_name(ranks.device)}")
        mine, cut, weight_bytes = arithmetic_rows(kind, ranks, effort, quick=plan.quick)
    compute_rows = _over_ranks([mine] if alone else _gather(mine))
    link_rows: list[LinkRow] = []
    if not alone:
        say("links")
        link_rows = measure_links(
            ranks,
            Effort(total * (1 - COMPUTE_SHARE), repeats=plan.repeats, longer=not plan.quick),
            find_nic=plan.find_nic,
        )
    others = _others(meter, alone)
    if not alone and dist.get_rank() != 0:
        return None
    _judge("experts", why_not([row.steady for row in compute_rows], others))
    compute = fit_curve(compute_rows, parameters=float(kind.numel), weight_bytes=weight_bytes)
    links = None if alone else fit_links(link_rows, nic_shared=None if plan.find_nic else False)
    disturbed = [] if links is None else _judge_links(links, link_rows, others)
    base = plan.base or _shape(ranks)
    memory = None if plan.clock is not None else device_memory(ranks)
    cluster, notes = assemble(base, links, compute, memory)
    notes += [*([cut] if cut else []), *disturbed]
    machine = MeasuredMachine(
        backend="none" if alone else dist.get_backend(),
        device=_name(ranks.device),
        torch=torch.__version__,
        compute=f"device clock, dilation {plan.dilation:g}"
        if plan.clock is not None
        else "arithmetic, all ranks at once",
        expert=f"hidden {plan.hidden}, inner {plan.inner}, {plan.matrices} matrices of {weight_bytes:g}-byte weights",
        others=others,
    )
    return Calibration(cluster, machine, tuple(link_rows), links, tuple(compute_rows), compute, tuple(notes))


def _over_ranks(rows_DR: list[list[ComputeRow]]) -> list[ComputeRow]:
    """Median over ranks of each row; the fastest and the slowest rank."""
    out = []
    for same in zip(*rows_DR, strict=True):
        took = [row.seconds for row in same]
        steady = all(row.steady for row in same)
        out.append(ComputeRow(same[0].tokens, same[0].active, statistics.median(took), min(took), max(took), steady))
    return out


def _others(meter: Meter, alone: bool) -> float | None:
    """Part of the cores that others took on the machine where they took most; None if no machine tells."""
    if alone:
        return meter.others()
    told = _gather((_machine(), meter.used_s()))
    here = _machine()
    found = [one for one in _gather(meter.others(sum(used for name, used in told if name == here))) if one is not None]
    return max(found, default=None)


def _judge(what: str, why: str) -> None:
    if why:
        raise NoResultError(
            f"inconclusive, {what}: {why}",
            hint="measure on a machine that does nothing else; --seconds and --repeats wait for quieter moments",
        )


def _judge_links(links: LinkFit, rows: list[LinkRow], others: float | None) -> list[str]:
    """Rates that others may have made are no result; start-up times that they may have made get a remark."""
    steady_R = np.array([row.steady for row in rows])
    for name, rows_R in links.told.items():  # least deviations follow the larger half
        _judge(name, why_not(steady_R[rows_R], others, spared=0.5))
    why = why_not(steady_R[~links.long_R], others, spared=0.5)
    return [f"start-up times are those of a busy machine: {why}"] if why else []


def _shape(ranks: CalibrationRanks) -> Cluster:
    """The ranks' nodes, with constants that all of a measurement replaces but what it cannot see."""
    reference = Cluster.uniform(1, 1)
    constants = {
        name: getattr(reference, name)
        for name in ("flops_per_s", "memory_bytes_per_s", "memory_bytes", "intra_bytes_per_s", "inter_bytes_per_s")
    }
    return Cluster(ranks.node_D, np.ones(len(ranks.node_D)), **constants)


def _gather(value: Any) -> list[Any]:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def _node() -> int:
    """Node of this rank: torchrun's number, else by the ranks a node has."""
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(os.environ.get("GROUP_RANK", rank // local))


def _machine() -> str:
    """Names the machine this rank runs on: two may have the same host name, and one several of them."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return socket.gethostname()


def _device(plan: CalibrationPlan) -> torch.device:
    if plan.device == "cpu" or plan.clock is not None or (plan.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise OptionError(
            f"local rank {local} has no GPU, there are {torch.cuda.device_count()}",
            hint="as many processes as GPUs, or --device cpu",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()} (CPU)"
