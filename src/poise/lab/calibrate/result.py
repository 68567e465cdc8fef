"""A calibration: what was measured, what was fitted, and the cluster file made of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from poise.lab.calibrate.exchange import fit_exchange
from poise.lab.calibrate.fit import LONG, ComputeRow, CurveFit, LinkFit, LinkRow
from poise.machine.cluster import Cluster


@dataclass(frozen=True, slots=True)
class MeasuredMachine:
    """What it was measured on.

    Parameters
    ----------
    backend : gloo, nccl, or none in a single process.
    device : name of the device.
    torch : version of PyTorch.
    compute : ``arithmetic`` or ``device clock``.
    expert : sizes of the expert that was measured.
    others : part of the cores that others took meanwhile; None if the system does not tell.
    date : UTC.
    """

    backend: str
    device: str
    torch: str
    compute: str
    expert: str
    others: float | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Measured rows, fits, and the cluster they make. ``links`` is None if only compute was measured."""

    cluster: Cluster
    machine: MeasuredMachine
    link_rows: tuple[LinkRow, ...]
    links: LinkFit | None
    compute_rows: tuple[ComputeRow, ...]
    compute: CurveFit
    notes: tuple[str, ...]

    def to_yaml(self) -> str:
        """The cluster file, with a header that says where it comes from and how good it is."""
        m = self.machine
        lines = [
            f"poise calibrate, {m.date}: {self.cluster.num_devices} ranks, backend {m.backend}, torch {m.torch}",
            f"device: {m.device}",
            f"expert: {m.expert}, {m.compute}, worst residual {self.compute.worst:.1%}",
        ]
        if m.others is not None:
            lines.append(f"others took {m.others:.0%} of the cores meanwhile")
        if self.links is not None:
            lines.append(
                f"links: worst residual {self.links.worst:.1%} (of long exchanges {self.links.worst_long:.1%}), "
                f"median {self.links.typical:.1%}, {len(self.link_rows)} rows"
            )
        return "".join(f"# {line}\n" for line in [*lines, *self.notes]) + self.cluster.to_yaml()

    def to_json(self) -> dict[str, Any]:
        """Everything: constants, and every row with what the fit says of it."""
        cluster, links = self.cluster, self.links
        assert cluster.expert_curve is not None
        return {
            "cluster": {
                "devices_per_node": cluster.devices_per_node_N.tolist(),
                "nic_shared": cluster.nic_shared,
                **{
                    name: getattr(cluster, name)
                    for name in (
                        "intra_bytes_per_s", "inter_bytes_per_s", "intra_latency_s", "inter_latency_s",
                        "peer_latency_s", "flops_per_s", "memory_bytes_per_s", "memory_bytes",
                    )
                },
                "expert_curve": cluster.expert_curve.to_dict(),
            },
            "machine": dataclasses.asdict(self.machine),
            "links": None if links is None else _rows(self.link_rows, links.residual_R, links.worst),
            "exchange": self._exchange(),
            "compute": _rows(self.compute_rows, self.compute.residual_R, self.compute.worst),
            "notes": list(self.notes),
        }  # fmt: skip

    def _exchange(self) -> dict[str, Any] | None:
        """Constants of the finer model; there is none where a node's devices share a port."""
        if self.links is None or self.links.nic_shared:
            return None
        found = fit_exchange(self.link_rows)
        return {
            **dataclasses.asdict(found.model),
            "counts_s": found.counts_s,
            "worst_residual": float(np.abs(found.residual_R).max()),
            "median_residual": float(np.median(np.abs(found.residual_R))),
        }


def _rows(rows: Any, residual_R: Any, worst: float) -> dict[str, Any]:
    return {
        "worst_residual": worst,
        "median_residual": float(np.median(np.abs(residual_R))),
        "rows": [
            {**dataclasses.asdict(row), "modelled_s": row.seconds * (1 + float(off)), "residual": float(off)}
            for row, off in zip(rows, residual_R, strict=True)
        ],
    }


def assemble(
    base: Cluster, links: LinkFit | None, compute: CurveFit, memory_bytes: float | None
) -> tuple[Cluster, list[str]]:
    """The cluster with what was measured in place of the base's constants, and remarks on what was not.

    Parameters
    ----------
    base : the shape, and the constants of whatever was not measured.
    links, compute : fits.
    memory_bytes : of a device; None keeps the base's.
    """
    curve, notes = compute.curve, list(compute.notes)
    changed: dict[str, Any] = {"name": "calibrated", "expert_curve": curve}
    if memory_bytes is not None:
        changed["memory_bytes"] = memory_bytes
    # the roofline that a cluster without the curve would have: what was reached at most, and at one token
    changed["flops_per_s"] = 2.0 * curve.parameters / float((curve.seconds_X / curve.tokens_X).min())
    changed["memory_bytes_per_s"] = curve.parameters * curve.weight_bytes / curve.per_expert
    if links is None:
        notes.append("links were not measured (one process): they are those of the base cluster")
    else:
        rates = {name: value for name, value in links.constants.items() if name.endswith("_per_s")}
        for name, other in (("intra_bytes_per_s", "network"), ("inter_bytes_per_s", "node")):
            if name not in rates:
                notes.append(f"{name} was not measured, no such links: it repeats the rate of the {other}")
        notes += [
            f"{name} is a guess: in no exchange it decides bytes took {LONG:g} times as long as the start-up; measure "
            "on a machine that does nothing else"
            for name in links.unsure
        ]
        changed.update({name: 0.0 for name in ("intra_latency_s", "inter_latency_s", "peer_latency_s")})
        only = next(iter(rates.values()))
        changed.update(intra_bytes_per_s=only, inter_bytes_per_s=only, nic_shared=links.nic_shared)
        changed.update(links.constants)
    return dataclasses.replace(base, **changed), notes
