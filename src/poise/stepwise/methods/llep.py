"""LLEP, least-loaded expert parallelism (Salesforce, arXiv 2601.17111; code SalesforceAIResearch/LeastLoadedEP).

After the gate, from exact loads; weights are sent in full sight and freed after the step:

    Step 1  Counts of all experts are summed over the ranks. If max / mean over the devices lies below ``threshold``
            (lambda), plain expert parallelism runs.
    Step 2  A device may take ``alpha`` times the mean. Its effective load = tokens given to it so far + tokens of its
            native experts that are still to come.
    Step 3  Longest processing time first: experts by tokens, most first. The native device takes what it has room for.
    Step 4  The rest goes in chunks to the least effectively loaded helper that has room; a chunk below ``min_tokens``
            is skipped unless it is all that is left. The helper gets the expert's weights.
    Step 5  If no helper will do, all that is left goes to the least effectively loaded helper, beyond its limit.

Left open by the source, and chosen here. A helper needs a free slot (the source's memory is not limited); once some
helper lacks one, the native devices stand beside the helpers in step 5. Where the static placement holds replicas, each
holder is native: an expert still to come counts evenly on all of them, and they take its tokens least effectively
loaded first. Helpers are sorted anew after every chunk (the code does so only when the native device took some).
Plain expert parallelism is the engine's even split; without static replicas it is passed as ``passive``, although the
code exchanges counts to find out: that favours LLEP by the control time. The paper's lambda is 1.3; the code's switch
for it is off by default (``threshold=0``). Sources are matched to the nearest holder as for every policy here; the code
gives the first tokens in source order to the native device. Device speeds are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from poise.stepwise.methods.split import even_quota
from poise.stepwise.protocol import LayerView, StepPlan, StepPolicy
from poise.util.compiled import compiled
from poise.util.errors import OptionError


@compiled
def _least(load_D, allowed_D, room_D, least_tokens, remaining):  # type: ignore[no-untyped-def]
    """The least loaded allowed device whose chunk is large enough, or -1."""
    best = -1
    for d in range(load_D.size):
        if not allowed_D[d] or room_D[d] - load_D[d] <= 0:
            continue
        if min(remaining, room_D[d] - load_D[d]) < min(least_tokens, remaining):
            continue
        if best < 0 or load_D[d] < load_D[best]:
            best = d
    return best


@compiled
def spill(
    load_E: NDArray[np.int64],
    native_ED: NDArray[np.bool_],
    pending_ED: NDArray[np.int64],
    free_D: NDArray[np.int64],
    limit: int,
    min_tokens: int,
) -> NDArray[np.int64]:
    """Steps 2 to 5: quotas int64 [E, D]. ``pending_ED`` tokens of each expert on its natives while it is to come."""
    experts, devices = native_ED.shape
    quota_ED = np.zeros((experts, devices), np.int64)
    load_D = np.zeros(devices, np.int64)
    for e in range(experts):
        for d in range(devices):
            load_D[d] += pending_ED[e, d]
    limit_D = np.full(devices, limit)
    slots_D = free_D.copy()
    allowed_D = np.zeros(devices, np.bool_)
    for e in np.argsort(-load_E, kind="mergesort"):
        left = load_E[e]
        if left == 0:
            break
        for d in range(devices):
            load_D[d] -= pending_ED[e, d]
        while left > 0:
            d = _least(load_D, native_ED[e], limit_D, 1, left)
            if d < 0:
                break
            chunk = min(left, limit - load_D[d])
            quota_ED[e, d] += chunk
            load_D[d] += chunk
            left -= chunk
        while left > 0:
            short = False
            for d in range(devices):
                allowed_D[d] = not native_ED[e, d] and (slots_D[d] > 0 or quota_ED[e, d] > 0)
                short = short or not (allowed_D[d] or native_ED[e, d])
            d = _least(load_D, allowed_D, limit_D, min_tokens, left)
            if d >= 0:
                chunk = min(left, limit - load_D[d])
            else:
                chunk = left
                for i in range(devices):
                    if allowed_D[i] and (d < 0 or load_D[i] < load_D[d]):
                        d = i
                if short or d < 0:
                    for i in range(devices):
                        if native_ED[e, i] and (d < 0 or load_D[i] < load_D[d]):
                            d = i
            if not native_ED[e, d] and quota_ED[e, d] == 0:
                slots_D[d] -= 1
            quota_ED[e, d] += chunk
            load_D[d] += chunk
            left -= chunk
    return quota_ED


@dataclass(frozen=True, slots=True)
class Llep(StepPolicy):
    """See the module docstring.

    Parameters
    ----------
    alpha : a device may take this many times the mean.
    min_tokens : least tokens of a chunk that is spilled.
    threshold : lambda, the max / mean below which plain expert parallelism runs; 0: never.
    """

    name: ClassVar[str] = "llep"
    summary: ClassVar[str] = "exact loads: overflow spills to the least loaded device, weights sent after the gate"
    exact: ClassVar[bool] = True
    alpha: float = 1.1
    min_tokens: int = 1024
    threshold: float = 1.3

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and self.min_tokens >= 1 and self.threshold >= 0):
            raise OptionError(
                f"llep needs alpha > 0, min_tokens >= 1 and threshold >= 0, got {self.alpha}, {self.min_tokens} and"
                f" {self.threshold}"
            )

    def after_gate(self, view: LayerView, holders_ED: NDArray[np.bool_], load_SE: NDArray[np.int64]) -> StepPlan:
        """All steps."""
        load_E = load_SE.sum(axis=0)
        even_ED = even_quota(load_E, view.static_ED)
        devices = view.static_ED.shape[1]
        total = int(load_E.sum())
        plain = not (view.static_ED.sum(axis=1) > 1).any()
        if (plain and view.step_slots == 0) or even_ED.sum(axis=0).max() * devices < self.threshold * total:
            return StepPlan(view.static_ED, even_ED, passive=plain)
        mean = total // devices
        limit = max(1, int(self.alpha * mean) if mean else total)
        free_D = np.full(devices, view.step_slots, np.int64)
        static_ED = view.static_ED.copy()  # to numba an array that may not be written is another type
        quota_ED = spill(load_E, static_ED, even_ED, free_D, limit, self.min_tokens)
        return StepPlan(view.static_ED | (quota_ED > 0), quota_ED)
