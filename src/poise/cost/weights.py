"""What a fast loop costs beside dispatch and compute: weights that move in a step, the window that hides them, control.

Exposed weights (DESIGN 3.1) = max(0, seconds of what is fetched before the gate - window) + seconds of what is fetched
after it. Control = exchange of counts + planning + synchronisation, paid whenever a plan needs the exact loads.

Training (FSSDP, arXiv 2502.02581, section 3) has three compute passes and four all-to-alls a layer. The optimizer
changes every weight, so nothing that was kept is free: each replica is gathered and its gradient reduced in every step.
Attention of the forward pass hides the gather, attention of the backward pass (twice as long) the reduce and, where
replicas are freed after the forward pass and gathered again (re-materialisation), that gather too:

    exposed = max(0, gather before the gate - window) + gather after the gate
              + max(0, reduce [+ second gather] - (2 * window - gradients of the dense rest))
              + a share of what hides
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from poise.cost.machine import Machine, book, fullest_ports, make_machine, weight_seconds
from poise.machine.cluster import Cluster
from poise.machine.model import ModelSpec
from poise.machine.settle import settle
from poise.util.compiled import compiled
from poise.util.errors import OptionError

PLAN_SECONDS_BASE, PLAN_SECONDS_PER_PAIR = 10e-6, 14e-9
"""Three splits and one rank's row: seconds, and seconds per (expert, device), after benchmarks/fast_loop.py."""
SYNC_SECONDS = 5e-6
"""Handing counts to the planner and its plan to the kernels, once a layer."""


COMPUTE_PASSES, EXCHANGE_PASSES = 3.0, 2.0
"""Training: forward, gradient of the inputs, gradient of the weights; dispatch and combine forward and backward."""
HIDDEN_SHARE = 0.25
"""Of weights that hide, the share of seconds that a run sees all the same: its ranks are not at one place, and tokens
and counts of some wait behind the weights of others. Chosen after one comparison on emulated devices (docs/log.md), not
fitted."""
STATE_RATIO = 7.0
"""Bytes that move with an owner over bytes of its 16-bit parameters: they and 12 bytes of Adam in mixed precision."""


@compiled
def _shown(seconds: float, window_s: float, share: float) -> float:
    """What a run sees of weights of so many seconds beside a window: what does not fit, and a share of the rest."""
    beyond = max(0.0, seconds - max(0.0, window_s))
    return beyond + share * (seconds - beyond)


@dataclass(frozen=True, slots=True)
class StepPrice:
    """Machine, model and the constants that only a fast loop pays. Seconds.

    A policy that asks the price, not who runs it, weighs rightly in serving and in training.

    Parameters
    ----------
    cluster, model : the machine and the model's sizes.
    window_s : time before the gate of each MoE layer in which weights can move hidden (training: forward pass).
    control_s : exchange of counts, planning and synchronisation of one layer.
    compute_passes : times that the forward pass's compute is done in a step.
    exchange_passes : times that dispatch and combine are done in a step.
    training : the optimizer changes the weights after every step.
    rematerialise : training: replicas are freed after the forward pass and gathered again.
    gradient_ratio : training: bytes of an expert's gradient over bytes of its weights as they are sent.
    gather_ratio : bytes of an expert's weights as they are sent over those they are computed with.
    fan_out : weights cross the network once per node and are passed on inside it (topology-aware gather).
    hidden_share : of the seconds of weights that hide, the share that a run sees all the same.
    dense_s : training: seconds for which gradients of the dense rest take the ports in a layer's backward window.
    """

    cluster: Cluster
    model: ModelSpec
    window_s: float
    control_s: float
    compute_passes: float = 1.0
    exchange_passes: float = 1.0
    _: KW_ONLY
    training: bool = False
    rematerialise: bool = False
    gradient_ratio: float = 1.0
    fan_out: bool = False
    gather_ratio: float = 1.0
    hidden_share: float = 0.0
    dense_s: float = 0.0

    @property
    def gathered_bytes(self) -> float:
        """Bytes of one expert's weights on the wire."""
        return self.model.expert_bytes * self.gather_ratio

    def exposed_seconds(self, early_s: float, late_s: float) -> float:
        """Seconds that weights add to a layer.

        ``early_s``: gather of what is fetched before the gate; ``late_s``: gather of what is fetched after it. In
        training the way back of both (reduce, second gather) is in.
        """
        back_s = 0.0
        if self.training:
            back_s = (early_s + late_s) * (self.gradient_ratio + (1.0 if self.rematerialise else 0.0))
        return self.shown_seconds(early_s, late_s, back_s)

    def shown_seconds(self, early_s: float, late_s: float, back_s: float) -> float:
        """The same where the way back is known: the one rule of what hides, for plans and for what is decided on."""
        back = _shown(back_s, 2.0 * self.window_s - self.dense_s, self.hidden_share)
        return float(_shown(early_s, self.window_s, self.hidden_share) + late_s + back)

    def check_devices(self, devices: int) -> None:
        """Raise OptionError unless the machine has so many devices."""
        if self.cluster.num_devices != devices:
            raise OptionError(
                f"a price of {self.cluster.num_devices} devices where {devices} run",
                hint="step_price() with the cluster that runs",
            )

    def without(self, lost: Collection[int]) -> StepPrice:
        """On the devices that are left when some are lost.

        Window and control stay: a device may have as many tokens in a step as before, and fewer need no more control.
        """
        return replace(self, cluster=self.cluster.without(lost))

    def hidden_experts(self) -> int:
        """Hecate's overlap degree t: whole experts that the window can bring over the slowest link."""
        return int(self.window_s * self.cluster.slowest_bytes_per_s / self.gathered_bytes)


class CompiledPrice(NamedTuple):
    """A :class:`StepPrice` as compiled code reads it.

    Parameters
    ----------
    machine : with all passes of a step in its seconds and bytes of a token.
    window_s, fan_out : of the price.
    back_passes : gathers and reduces that the backward pass makes of what was fetched, in gathers; 0 in serving.
    back_window_s, hidden_share : seconds in which these hide, and the share of what hides that shows all the same.
    """

    machine: Machine
    window_s: float
    fan_out: bool
    back_passes: float
    back_window_s: float
    hidden_share: float


@lru_cache(maxsize=64)
def compiled_price(price: StepPrice) -> CompiledPrice:
    """The numbers of a price; made once."""
    machine = make_machine(
        price.cluster, price.model, compute_passes=price.compute_passes, exchange_passes=price.exchange_passes
    )
    machine = machine._replace(expert_bytes=float(price.gathered_bytes))
    back = price.gradient_ratio + (1.0 if price.rematerialise else 0.0) if price.training else 0.0
    return CompiledPrice(
        machine, float(price.window_s), bool(price.fan_out), float(back), float(2.0 * price.window_s - price.dense_s),
        float(price.hidden_share),
    )  # fmt: skip


def attention_parameters(model: ModelSpec) -> float:
    """Query and output maps of the hidden size, key and value maps of the cache's width (16-bit entries)."""
    return model.hidden_size * (2.0 * model.hidden_size + model.kv_bytes_per_token_layer / 2.0)


def window_seconds(tokens: float, cluster: Cluster, model: ModelSpec) -> float:
    """Attention of all decoder layers since the last MoE layer: projections only, a roofline; float seconds.

    ``tokens`` are those of a step, spread evenly over the devices (data-parallel attention). Scores, norms and dense
    layers are left out, so it is the least that can be hidden.
    """
    parameters = attention_parameters(model) * model.num_hidden_layers / model.num_moe_layers
    compute = 2.0 * parameters * tokens / cluster.num_devices / cluster.flops_per_s
    return max(compute, 2.0 * parameters / cluster.memory_bytes_per_s)


def control_seconds(num_experts: int, cluster: Cluster) -> float:
    """One all-gather of E counts from every rank, the exact split, and a synchronisation."""
    devices = cluster.num_devices
    exchange = cluster.plain_wire.start_s + 4.0 * num_experts * (devices - 1) / cluster.slowest_bytes_per_s
    return exchange + SYNC_SECONDS + PLAN_SECONDS_BASE + PLAN_SECONDS_PER_PAIR * num_experts * devices


def step_price(
    tokens: float,
    num_experts: int,
    cluster: Cluster,
    model: ModelSpec,
    *,
    window_s: float | None = None,
    control_s: float | None = None,
) -> StepPrice:
    """The price of a fast loop at N tokens a step; a measured window or control time replaces the modelled one.

    Constants that the cluster leaves open are settled.
    """
    cluster = settle(cluster, model, tokens)
    return StepPrice(
        cluster,
        model,
        window_seconds(tokens, cluster, model) if window_s is None else window_s,
        control_seconds(num_experts, cluster) if control_s is None else control_s,
    )


def training_price(
    tokens: float,
    num_experts: int,
    cluster: Cluster,
    model: ModelSpec,
    *,
    rematerialise: bool = False,
    window_s: float | None = None,
    control_s: float | None = None,
    sequence_length: int = 0,
    causal: bool = True,
    gradient_ratio: float = 1.0,
    fan_out: bool = True,
    gather_ratio: float = 1.0,
    hidden_share: float = 0.0,
    dense_s: float = 0.0,
) -> StepPrice:
    """The price of a training step of ``tokens`` tokens over all devices, spread evenly.

    Parameters
    ----------
    tokens, num_experts, cluster, model : what runs, and where.
    rematerialise, gradient_ratio, fan_out, gather_ratio, hidden_share, dense_s : see :class:`StepPrice`.
    window_s, control_s : measured seconds in place of the modelled ones.
    sequence_length, causal : for the attention scores in the window; 0 leaves them out.
    """
    cluster = settle(cluster, model, tokens)
    window = attention_seconds(tokens, cluster, model, sequence_length=sequence_length, causal=causal)
    control = control_seconds(num_experts, cluster)
    return StepPrice(
        cluster, model, window if window_s is None else window_s, control if control_s is None else control_s,
        COMPUTE_PASSES, EXCHANGE_PASSES, training=True, rematerialise=rematerialise, gradient_ratio=gradient_ratio,
        fan_out=fan_out, gather_ratio=gather_ratio, hidden_share=hidden_share, dense_s=dense_s,
    )  # fmt: skip


def dense_gradient_seconds(cluster: Cluster, model: ModelSpec, bytes_each: float) -> float:
    """Seconds that gradients of a layer's attention, of ``bytes_each``, take of a port: a ring over all devices."""
    parameters = attention_parameters(model) * model.num_hidden_layers / model.num_moe_layers
    passes = 2.0 * (cluster.num_devices - 1) / cluster.num_devices
    return passes * parameters * bytes_each / cluster.slowest_bytes_per_s


def attention_seconds(
    tokens: float, cluster: Cluster, model: ModelSpec, *, sequence_length: int = 0, causal: bool = True
) -> float:
    """Forward attention before one MoE layer: :func:`window_seconds` and the scores of sequences of that length."""
    per_token = (2.0 if causal else 4.0) * sequence_length * model.hidden_size
    per_token *= model.num_hidden_layers / model.num_moe_layers
    return window_seconds(tokens, cluster, model) + per_token * tokens / cluster.num_devices / cluster.flops_per_s


@compiled
def _fetch_ports(held_ED, fetched_ED, node_D, fan_out):  # type: ignore[no-untyped-def]
    """Experts through every port, float64 [4, D] (out and in inside a node, out and in between nodes)."""
    experts, devices = held_ED.shape
    port = np.zeros((4, devices))
    sent = np.zeros(devices)
    for e in range(experts):
        for d in range(devices):
            if not fetched_ED[e, d]:
                continue
            best = -1
            for s in range(devices):
                landed = fan_out and s < d and fetched_ED[e, s] and node_D[s] == node_D[d]
                if (held_ED[e, s] or landed) and s != d:
                    near, best_near = node_D[s] == node_D[d], best >= 0 and node_D[best] == node_D[d]
                    if best < 0 or (near and not best_near) or (near == best_near and sent[s] < sent[best]):
                        best = s
            if best < 0:
                continue
            sent[best] += 1.0
            book(port, best, d, 1.0, node_D)
    return port


@compiled
def gather_seconds(held_ED: NDArray[np.bool_], fetched_ED: NDArray[np.bool_], price: CompiledPrice) -> float:
    """:func:`fetch_seconds` of a :class:`CompiledPrice`."""
    if not fetched_ED.any():
        return 0.0
    machine = price.machine
    port_PD = _fetch_ports(held_ED, fetched_ED, machine.node_D, price.fan_out)
    return weight_seconds(fullest_ports(port_PD, machine), machine) * machine.expert_bytes + machine.latency_s


@compiled
def exposed_seconds(early_s: float, late_s: float, price: CompiledPrice) -> float:
    """:meth:`StepPrice.exposed_seconds` of a :class:`CompiledPrice`."""
    share, back = price.hidden_share, (early_s + late_s) * price.back_passes
    return _shown(early_s, price.window_s, share) + late_s + _shown(back, price.back_window_s, share)


def fetch_seconds(held_ED: NDArray[np.bool_], fetched_ED: NDArray[np.bool_], price: StepPrice) -> float:
    """Seconds to bring experts to the devices that fetch them, all at once; 0 if none moves.

    Each copy comes from the holder that has sent least, of the same node where there is one; under ``fan_out`` what
    has landed in a node is passed on there. No relays between nodes. The fullest port decides. A reduce is the mirror
    image of its gather and takes as long.
    """
    return gather_seconds(held_ED, fetched_ED, compiled_price(price))
