"""What was assumed."""

from __future__ import annotations

from html import escape

from poise.machine.settle import ground
from poise.report.view import View


def section(view: View) -> str:
    """One sentence a fact."""
    comparison = view.comparison
    c, m, slots = comparison.cluster, comparison.model, comparison.slots_D
    facts = [
        f"{c!r}: {c.flops_per_s / 1e12:.0f} TFLOP/s, {c.memory_bytes_per_s / 1e9:.0f} GB/s memory, "
        f"{c.intra_bytes_per_s / 1e9:.0f} GB/s inside a node, {c.inter_bytes_per_s / 1e9:.1f} GB/s network a "
        f"{'node' if c.nic_shared else 'device'}. Constants: {ground(c)}.",
        f"Model {m.name}: {m.num_experts} experts, top-{m.top_k}, hidden {m.hidden_size}, "
        f"expert {m.expert_bytes / 1e6:.2f} MB, {m.flops_per_token / 1e6:.2f} MFLOP a token.",
        f"Traffic model {comparison.traffic}; token split {comparison.split}; {int(slots.sum())} slots a layer, "
        f"{int(slots.min())} to {int(slots.max())} a device, held as engine '{comparison.engine}' holds them.",
        "Step time is modelled, not measured: dispatch + slowest device's compute + combine, all layers.",
        "Bound: no placement with these slots and no token split can need less on the same routing.",
    ]
    if view.fixed is not view.best:
        facts.append(
            f"{view.best.name} plans every step anew. Pictures of links, flow, lanes and moves show {view.fixed.name}, "
            "the best placement that stays."
        )
    if not view.batch.has_tokens:
        facts.append("Flow from layer to layer is not shown: loads alone do not tell where tokens go.")
    items = "".join(f"<li>{escape(fact)}</li>" for fact in (*facts, *comparison.notes))
    return f'<section id="facts"><h2>What was assumed</h2><ul>{items}</ul></section>'
