"""Flow of tokens from the experts of a layer to those of the next."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from poise.cost.traffic import DataFlow
from poise.replay.affinity import LayerAffinity, layer_affinities, sample_every
from poise.report import charts
from poise.report.view import View

MOST_FLOWS = 40
HIGH = 150.0
"""Of the chart over all layers."""

PURPOSE: dict[DataFlow, str] = {
    "stay": "Tokens stay where they are until the next layer needs them elsewhere, so a flow that stays costs no link.",
    "home": "Tokens go home between layers here, so that a local flow alone saves nothing; under <code>stay</code> "
    "traffic it does.",
}


def section(view: View) -> str:
    """Shares over all layers, then one pair of layers, chosen by a slider; nothing for loads or a single layer."""
    batch, comparison = view.batch, view.comparison
    if batch.experts_TLK is None or batch.num_layers < 2:
        return ""
    counts = [entry.placement.count_LED() for entry in view.pictured]
    pairs = layer_affinities(batch.experts_TLK, batch.num_experts, counts, comparison.cluster, most=MOST_FLOWS)
    first = max(pairs, key=lambda pair: (pair.local[-1].device - pair.local[0].device, -pair.layer)).layer
    names = [entry.name for entry in view.pictured]
    charted = charts.panel("", _shares(view, pairs, names)) + f"<p>{_how(view, len(pairs))}</p>"
    slider = (
        '<div class="needs-js flow-pick"><label>Layers <input type="range" id="flow-pair" min="0" '
        f'max="{len(pairs) - 1}" value="{first}" aria-describedby="flow-name"></label> '
        '<output id="flow-name"></output></div>'
    )
    panels = "".join(
        f'<figure class="panel picked sankey"><figcaption>{escape(name)}<span class="figures"></span></figcaption>'
        f'<div class="sideways"><svg class="half" viewBox="0 0 {charts.HALF} 430" role="img" '
        f'aria-label="Largest flows under {escape(name)}"></svg></div>'
        "<output>Point at a flow, or use the arrow keys.</output></figure>"
        for name in names
    )
    data = {
        "nodes": comparison.cluster.num_nodes,
        "devices": comparison.cluster.num_devices,
        "pairs": [_data(pair, view.layer_names) for pair in pairs],
    }
    return charts.section(
        "flow", "Where tokens go next", _lead(view),
        f'{charted}{slider}<div class="pair needs-js">{panels}</div>'
        "<noscript><p>The picture of single layers needs JavaScript.</p></noscript>"
        + charts.as_script(data, "flow-data"),
    )  # fmt: skip


def _how(view: View, pairs: int) -> str:
    several = view.comparison.cluster.num_nodes > 1
    kinds = [("stay", "same device"), ("near", "same node"), ("far", "another node")]
    return (
        f"The {MOST_FLOWS} largest flows between two layers: experts of the earlier one at the left, grouped by device "
        "(the numbers at the sides). "
        + ("Choose the layers with the slider. " if pairs > 1 else "")
        + "Level and broad is good. "
        + charts.legend(kinds if several else [kinds[0], ("near", "another device")])
    )


def _lead(view: View) -> str:
    batch = view.batch
    assert batch.experts_TLK is not None
    every = sample_every(len(batch.experts_TLK), batch.num_layers, batch.top_k)
    words = [
        "Of all moves of a token from an expert to an expert of the next layer, the share whose two experts lie on one "
        "device, or on one node.",
        PURPOSE.get(view.comparison.traffic, PURPOSE["home"]),
    ]
    if batch.top_k > 1:
        words.append(f"A token counts once for each of its {batch.top_k} × {batch.top_k} pairs of experts.")
    if every > 1:
        words.append(f"Every {every}th token is counted.")
    return " ".join(words)


def _shares(view: View, pairs: tuple[LayerAffinity, ...], names: list[str]) -> str:
    """Lines over pairs of layers, a placement each: same device drawn through, same node dashed."""
    several = view.comparison.cluster.num_nodes > 1
    left, right, up = 44.0, 20.0, 40.0
    values = [[x.device for x in pair.local] + [x.node for x in pair.local if several] for pair in pairs]
    high = max(max(row) for row in values) * 1.05 or 1.0
    wide = (charts.FULL - left - right) / max(1, len(pairs) - 1)
    scale, bottom = HIGH / high, up + HIGH
    body = []
    for value in charts.ticks(0, high, 4):
        y = bottom - value * scale
        body.append(f'<line class="grid" x1="{left}" x2="{charts.FULL - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(charts.text(left - 6, y + 4, f"{value:.0%}" if high >= 0.05 else f"{value:.1%}", "small", "end"))
    for index in range(0, len(pairs), max(1, int(np.ceil(30 / wide)))):
        body.append(
            charts.text(left + index * wide, bottom + 15, view.layer_names[pairs[index].layer], "small", "middle")
        )
    x = left
    for order, name in enumerate(names):
        total = sum(pair.total for pair in pairs)
        mean = [sum(getattr(p.local[order], key) * p.total for p in pairs) / total for key in ("device", "node")]
        for dashed, key in enumerate(("device", "node")[: 1 + several]):
            spots = [(left + i * wide, bottom - getattr(p.local[order], key) * scale) for i, p in enumerate(pairs)]
            kind = f"line{order} {'dashed' if dashed else ''}"
            body.append(f'<path class="{kind}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in spots)}"/>')
            if len(spots) == 1:
                body.append(f'<circle class="dot{order}" cx="{spots[0][0]:.1f}" cy="{spots[0][1]:.1f}" r="4"/>')
            words = f"{charts.shorten(name)}, same {key}: {mean[dashed]:.1%}"
            y = 12 + 16 * dashed
            body.append(f'<path class="{kind}" d="M{x:.1f} {y - 4:.1f}h22"/>')
            body.append(charts.text(x + 28, y, words, "small"))
        x += 60 + 6.6 * max(len(f"{charts.shorten(name)}, same device: 100.0%"), 10)
    body.append(charts.text(charts.FULL - right, bottom + 32, "earlier layer of the pair", "small", "end"))
    return charts.svg(charts.FULL, bottom + 38, "Share of moves that stay local, by layer", "".join(body))


def _data(pair: LayerAffinity, layers: list[str]) -> dict[str, Any]:
    """What the script draws: experts, pairs, and for each placement holders and locality in percent."""
    flows = []
    for index, (experts, pairs) in enumerate(zip(pair.expert_F2.tolist(), pair.pairs_F.tolist(), strict=True)):
        row = [*experts, pairs]
        for local in pair.local:
            shares = (local.device_F[index], local.node_F[index])
            row += [*local.holder_F2[index].tolist(), *(round(100 * float(share)) for share in shares)]
        flows.append(row)
    return {
        "layers": layers[pair.layer : pair.layer + 2], "total": pair.total,
        "local": [[round(local.device, 4), round(local.node, 4)] for local in pair.local], "flows": flows,
    }  # fmt: skip
