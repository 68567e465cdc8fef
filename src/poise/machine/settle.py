"""A cluster that names no constants gets them once its model and batch are known.

The type of the model's weights chooses the kernel, the tokens a rank the library of the all-to-alls; what was measured
on no such machine is the datasheet, derated (:mod:`poise.machine.constants`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from poise.machine.cluster import Cluster
from poise.machine.constants import choose_kernel, gpu_of, libraries, links_of
from poise.machine.model import ModelSpec
from poise.machine.presets import DEVICES

LOW_LATENCY_TOKENS = 128
"""Tokens a rank up to which engines take DeepEP's low-latency kernels: their default bound of a buffer."""
BOARD, BOARDS = 8, {"gb200": 4}
"""GPUs of a node whose exchange DeepEP's tables cover. A larger node is an NVLink domain of several boards: 1xN."""


def choose_library(cluster: Cluster, preset: str, tokens_per_rank: float) -> str:
    """DeepEP's low-latency kernels for few tokens a rank and its normal ones beyond; over an NVLink domain of more than
    a board, one-sided copies where those were measured.
    """
    gpu = gpu_of(preset)
    if "one-sided" in libraries(gpu) and (
        int(cluster.devices_per_node_N.max()) * cluster.tensor_parallel > BOARDS.get(gpu, BOARD)
    ):
        return "one-sided"
    return "deepep-ll" if tokens_per_rank <= LOW_LATENCY_TOKENS else "deepep-normal"


def settle(cluster: Cluster, model: ModelSpec, tokens: float, *, engine: str | None = None) -> Cluster:
    """The cluster with every constant that it leaves open, for a model and N ``tokens`` a step.

    Parameters
    ----------
    cluster : one with nothing ``open`` is returned as it is.
    engine : whose kernels to take, one of :data:`poise.machine.constants.ENGINES`, where the cluster names none.
    """
    if not cluster.open:
        return cluster
    preset, group, changed, name = cluster.preset, cluster.tensor_parallel, dict[str, Any](open=()), [cluster.name]
    if "kernel" in cluster.open:
        kernel = choose_kernel(preset, model.weight_bytes, engine).times(group)
        changed["kernel"] = kernel
        name.append(kernel.name.removeprefix(f"{preset}+"))
    if "links" in cluster.open:
        library = choose_library(cluster, preset, tokens / cluster.num_devices)
        links = links_of(preset, library, many_nodes=cluster.num_nodes > 1).times(group, shared=cluster.nic_shared)
        port = DEVICES[preset]["inter_bytes_per_s"] * (1 if cluster.nic_shared else group)
        changed["links"] = links if cluster.inter_bytes_per_s == port else links.inside_nodes()
        name.append(library)
    return replace(cluster, name="+".join(name), **changed)


def flow_of(cluster: Cluster) -> str:
    """Data flow of the cluster's library; for a datasheet's ports that of DeepEP's normal kernels."""
    return "home_node_dedup" if cluster.links is None else cluster.links.flow


def ground(cluster: Cluster) -> str:
    """What a cluster's times rest on, in a sentence."""
    if cluster.open:
        return "constants are chosen when model and batch are known"
    if cluster.expert_curve is not None:
        kernel = "expert compute as measured here"
    elif cluster.kernel is None:
        kernel = "expert compute by the datasheet's roofline, which is far too fast (docs/accuracy.md)"
    elif cluster.kernel.type == "datasheet":
        kernel = "expert compute by the datasheet, derated by what other machines reach of theirs"
    else:
        kernel = f"expert compute as measured for {cluster.kernel.name}, held-out error {cluster.kernel.error:.0%}"
    links = "all-to-all by ports of the datasheet"
    if cluster.links is not None:
        error = max(cluster.links.dispatch.error, cluster.links.combine.error)
        links = f"all-to-all of {cluster.links.name}, error {error:.0%}"
        if cluster.num_nodes > 1 and cluster.links.dispatch.inter_bytes_per_s is None:
            links += ", between nodes by ports of the datasheet"
    return f"{kernel}; {links}"
