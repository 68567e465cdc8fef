"""Rows of a comparison whose placement was made for another number of devices."""

from __future__ import annotations

from collections.abc import Sequence

from poise.evaluate.compare import Entry
from poise.modelspec import ModelSpec
from poise.planning.methods.carry import carried
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem


def carried_entry(name: str, placement: Placement, problem: PlacementProblem) -> Entry:
    """A row for a placement; one for another number of devices is carried over, and its row says so.

    Raises
    ------
    OptionError : it is to be carried over and its layers or experts differ from the traffic's.
    """
    have, want = placement.num_devices, problem.num_devices
    if have == want:
        return Entry(name, placement)
    return Entry(f"{name} mapped to {want}", carried(placement, problem), made_for=placement)


def elastic_notes(entries: Sequence[Entry], model: ModelSpec | None) -> list[str]:
    """For each placement that was carried over: what it was made for, and what going to each row fetches."""
    out = []
    for entry in entries:
        old = entry.made_for
        if old is None:
            continue
        have, want = old.num_devices, entry.placement.num_devices
        moves = "; ".join(f"{other.name}: {_fetches(old, other.placement, model)}" for other in entries)
        out.append(
            f"{entry.name}: a placement for {have} devices cannot be replayed on {want}; the row is what it becomes "
            "with few fetches, fitted like the methods, ranks keeping their numbers. Experts to fetch on the way from "
            f"the {have} devices to each row: {moves}."
        )
    return out


def _fetches(old: Placement, new: Placement, model: ModelSpec | None) -> str:
    """Experts to fetch, bytes where the model is named, and those that no device holds that stays."""
    diff = old.diff(new)
    text = f"{diff.fetched}"
    if model is not None:
        text += f" ({diff.moved_bytes(model.expert_bytes) / 2**30:.2f} GiB)"
    if len(diff.leaving_O2):
        text += f" and {len(diff.leaving_O2)} experts on no rank that stays"
    return text
