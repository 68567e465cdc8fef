"""Pictures as inline SVG. Colours come from the style sheet's variables, so they follow light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 640


def _svg(height: float, title: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x: float, top: float, bottom: float) -> str:
    return f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values."""
    raw = max(high - low, 1e-12) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = np.ceil(low / step) * step
    return [float(x) for x in np.arange(first, high + step * 1e-6, step)]


def heat_map(name: str, relative_LD: NDArray[np.float64], layer_ids: Sequence[int], top: float) -> str:
    """Layers down, devices across; colour is load relative to the layer's mean, 1 is neutral.

    Parameters
    ----------
    relative_LD : float64 [L, D].
    top : the largest value over all maps drawn with one scale.
    """
    layers, devices = relative_LD.shape
    left, up, right = 34.0, 30.0, 6.0
    wide = (WIDTH - left - right) / devices
    high = min(24.0, max(6.0, 330.0 / layers))
    cells = []
    for layer in range(layers):
        for device in range(devices):
            value = float(relative_LD[layer, device])
            share = 0.0 if value == 1 else (value - 1) / max(top - 1, 1e-9) if value > 1 else 1 - value
            kind = "hot" if value >= 1 else "cold"
            cells.append(
                f'<rect class="{kind}" x="{left + device * wide:.2f}" y="{up + layer * high:.2f}" '
                f'width="{max(0.5, wide - 1):.2f}" height="{high - 1:.2f}" fill-opacity="{min(1.0, share):.3f}">'
                f"<title>layer {layer_ids[layer]}, device {device}: {value:.2f} x mean</title></rect>"
            )
    every = max(1, int(np.ceil(11 / high)))
    labels = [
        _text(left - 6, up + layer * high + high / 2 + 4, str(layer_ids[layer]), "small", "end")
        for layer in range(0, layers, every)
    ]
    skip = max(1, int(np.ceil(devices * 26 / WIDTH)))
    labels += [
        _text(left + (device + 0.5) * wide, up - 5, str(device), "small", "middle")
        for device in range(0, devices, skip)
    ]
    worst = float(relative_LD.max(axis=1).mean())
    title = f"{name}: fullest device {worst:.2f} x mean, over all steps together"
    body = _text(0, 12, title, "strong") + f'<g class="cells">{"".join(cells)}</g>' + "".join(labels)
    return f'<figure class="heat">{_svg(up + layers * high + 4, title, body)}</figure>'


def steps_chart(samples: Sequence[tuple[str, Sequence[float]]]) -> str:
    """One row a placement: every step a dot, the mean a bar. Values are milliseconds."""
    low = min(min(values) for _, values in samples)
    high = max(max(values) for _, values in samples)
    pad = max((high - low) * 0.05, high * 1e-3)
    low, high = max(0.0, low - pad), high + pad
    left, row, up = 130.0, 26.0, 8.0
    scale = (WIDTH - left - 14) / (high - low)
    bottom = up + row * len(samples)
    body = [
        _rule(left + (x - low) * scale, up, bottom)
        + _text(left + (x - low) * scale, bottom + 15, f"{x:g}", "small", "middle")
        for x in _ticks(low, high)
    ]
    for index, (name, values) in enumerate(samples):
        y = up + row * (index + 0.5)
        kind = "mark ref" if name == "bound" else "mark"
        body.append(_text(left - 10, y + 4, name, "", "end"))
        shown = np.sort(values)[:: max(1, len(values) // 200)]
        body += [f'<circle class="{kind}" cx="{left + (v - low) * scale:.1f}" cy="{y:.1f}" r="3"/>' for v in shown]
        mean = left + (float(np.mean(values)) - low) * scale
        body.append(
            f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 9:.1f}" y2="{y + 9:.1f}">'
            f"<title>{escape(name)}: mean {np.mean(values):.3f} ms</title></line>"
        )
    body.append(_text(WIDTH - 14, bottom + 30, "modelled ms a step", "small", "end"))
    return _svg(bottom + 36, "Modelled milliseconds of each step, by placement", "".join(body))


def shift_chart(entries: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """One row a placement: imbalance on each part of the traffic, from in-sample outwards."""
    parts = [part for part, _ in entries[0][1]]
    high = max(value for _, values in entries for _, value in values)
    left, row, up = 130.0, 26.0, 26.0
    scale = (WIDTH - left - 40) / max(high - 1.0, 1e-6)
    bottom = up + row * len(entries)
    body = [_legend(parts, left)]
    for x in _ticks(1.0, high):
        at = left + (x - 1) * scale
        body.append(_rule(at, up, bottom))
        body.append(_text(at, bottom + 15, f"{x:g}", "small", "middle"))
    for index, (name, values) in enumerate(entries):
        y = up + row * (index + 0.5)
        body.append(_text(left - 10, y + 4, name, "", "end"))
        spots = [left + (value - 1) * scale for _, value in values]
        body.append(f'<line class="link" x1="{min(spots):.1f}" x2="{max(spots):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for order, (x, (part, value)) in enumerate(zip(spots, values, strict=True)):
            title = f"<title>{escape(name)}, {escape(part)}: {value:.3f}</title>"
            body.append(f'<circle class="part{order % 4}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>')
    body.append(_text(WIDTH - 14, bottom + 30, "imbalance, max / mean tokens (1 is even)", "small", "end"))
    return _svg(bottom + 36, "Imbalance in-sample and on traffic that was held out", "".join(body))


def _legend(parts: Sequence[Any], left: float) -> str:
    out, x = [], left
    for order, part in enumerate(parts):
        out.append(
            f'<circle class="part{order % 4}" cx="{x + 5:.1f}" cy="9" r="5"/>' + _text(x + 15, 13, str(part), "small")
        )
        x += 28 + 6.6 * len(str(part))
    return "".join(out)
