"""What tracers hooked into a router write: JSON lines, one a step, layer and rank.

``{"step", "layer", "rank", "num_tokens", "topk", "indices": [[ids of a token], ...]}``; ``rank``, ``num_tokens`` and
``topk`` may be missing. The ranks of a step hold the tokens of one forward pass. Logical ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.engines.dump import EngineDump, ReadOptions
from poise.engines.dumps.mapping import MAX_TABLE, copies, model_layers, names_twice, num_experts
from poise.engines.dumps.parts import Part
from poise.engines.dumps.untrusted import id_table, whole
from poise.routing.profile import load_LE
from poise.routing.ranks import absent, spans, told
from poise.routing.trace import LoadProfile, RoutingTrace
from poise.util.errors import TraceError

StepLayer = tuple[int, int]
"""Step and layer."""


def is_lines(value: Any) -> bool:
    """Lines, or one line, of such a tracer."""
    return any(_is_line(line) for line in (value[:3] if isinstance(value, list) else [value]))


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and {"step", "layer", "indices"} <= line.keys()


def read(parts: Sequence[Part], options: ReadOptions) -> EngineDump:
    """Tokens of all ranks, step by step; loads of each step where a token names an expert twice."""
    ranks, notes = _ranks(parts)
    order = sorted(ranks)
    groups = copies([ranks[rank] for rank in order])
    own = [order[group[0]] for group in groups]
    if len(own) < len(order):
        notes.append(f"{len(order) - len(own)} ranks hold the tokens of another rank and were left out")
    away = absent([{order[i] for i in group} for group in groups])
    if away:
        notes += told(f"ranks {spans(order)} have lines, rank {spans(away)} has none", options.allow_missing_ranks)
    ids = sorted({layer for rank in own for _, layer in ranks[rank]})
    kept, said = model_layers(ids, options.model, parts[0].name)
    if not kept:
        raise TraceError(f"{parts[0].name} has no MoE layer of the model", hint="check --model")
    steps = sorted({step for rank in own for step, _ in ranks[rank]})
    pieces, home, step_T = [], [], []
    for at, step in enumerate(steps):
        for rank in own:
            tokens = _pass(ranks[rank], step, rank, kept)
            if tokens is not None:
                pieces.append(tokens)
                home.append(np.full(len(tokens), rank))
                step_T.append(np.full(len(tokens), at))
    if not sum(map(len, pieces)) or len({piece.shape[2] for piece in pieces}) > 1:
        raise TraceError("no tokens, or different numbers of experts a token")
    tokens = np.concatenate(pieces)
    experts, more = num_experts(options, int(tokens.max()), parts[0].name)
    notes += [*said, *more]
    if options.k not in (None, tokens.shape[2]):
        raise TraceError(f"{tokens.shape[2]} experts a token, the model has top-{options.k}", hint="check --top-k")
    when = np.concatenate(step_T).astype(np.int32)
    if names_twice(tokens):
        notes.append("tokens name an expert twice, which no router chooses: read as loads of each step")
        profile = LoadProfile(_loads(tokens, when, len(steps), experts), np.array(kept, np.int32), tokens.shape[2],
                              parts[0].name)  # fmt: skip
        return EngineDump("plain", "router-lines", profile=profile, notes=tuple(notes))
    trace = RoutingTrace(
        tokens, experts, step=when, home=np.concatenate(home).astype(np.int32) if len(own) > 1 else None,
        layer_ids=np.array(kept, np.int32), name=parts[0].name,
    )  # fmt: skip
    notes.append("such lines know no requests: each token is one of its own, phases are not told")
    return EngineDump("plain", "router-lines", trace=trace, notes=tuple(notes))


def _ranks(parts: Sequence[Part]) -> tuple[dict[int, dict[StepLayer, NDArray[np.int16]]], list[str]]:
    """Ids [tokens, K] by rank, step and layer, and notes."""
    ranks: dict[int, dict[StepLayer, NDArray[np.int16]]] = {}
    others = 0
    for part in parts:
        for line in part.value if isinstance(part.value, list) else [part.value]:
            if not _is_line(line):
                others += 1
                continue
            key = (whole("step", line["step"]), whole("layer", line["layer"], high=65_535))
            held = ranks.setdefault(whole("rank", line.get("rank", 0), high=65_535), {})
            if key in held:
                raise TraceError(f"{part.name}: step {key[0]}, layer {key[1]} is there twice for one rank")
            held[key] = _ids(line, f"{part.name}, step {key[0]}, layer {key[1]}")
    return ranks, [f"{others} other lines were left out"] if others else []


def _ids(line: dict[str, Any], where: str) -> NDArray[np.int16]:
    rows = line["indices"]
    if rows == []:
        return np.zeros((0, whole("topk", line.get("topk", 0), high=1024)), np.int16)
    ids = id_table(where, rows, 2)
    for name, size in (("num_tokens", ids.shape[0]), ("topk", ids.shape[1])):
        if line.get(name, size) != size:
            raise TraceError(f"{where}: {name} is {str(line[name])[:20]}, indices have {size}")
    return ids


def _pass(
    held: dict[StepLayer, NDArray[np.int16]], step: int, rank: int, layers: Sequence[int]
) -> NDArray[np.int16] | None:
    """A rank's tokens in one step, [T, L, K]; None where it had none."""
    columns = [held.get((step, layer)) for layer in layers]
    found = [column for column in columns if column is not None and len(column)]
    if not found:
        return None
    if len(widths := sorted({column.shape[1] for column in found})) > 1:
        raise TraceError(f"step {step} of rank {rank} has {widths[0]} to {widths[-1]} experts a token, layer by layer")
    if len(found) < len(columns) or len({column.shape for column in found}) > 1:
        sizes = [0 if column is None else len(column) for column in columns]
        raise TraceError(
            f"step {step} of rank {rank} has {min(sizes)} to {max(sizes)} tokens, depending on the layer",
            hint="is a line missing?",
        )
    return np.stack(found, axis=1)


def _loads(tokens: NDArray[np.int16], step_T: NDArray[np.int32], steps: int, experts: int) -> NDArray[np.float64]:
    if steps * tokens.shape[1] * experts > MAX_TABLE:
        raise TraceError(f"{steps} steps of {tokens.shape[1]} layers and {experts} experts are too many")
    return np.stack([load_LE(tokens[step_T == step], experts) for step in range(steps)]).astype(np.float64)
