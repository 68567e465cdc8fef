"""Rows of a comparison whose placement was made for another number of devices."""

from __future__ import annotations

from collections.abc import Sequence

from poise.machine.model import ModelSpec
from poise.planning.methods.carry import carried
from poise.planning.placement import Placement
from poise.planning.problem import PlacementProblem
from poise.planning.solve.complete import as_held
from poise.replay.compare import Entry
from poise.replay.rows import free_name
from poise.routing.fingerprint import Fingerprint


def carried_row(
    name: str, old: Placement, problem: PlacementProblem, fitted: Fingerprint, entries: Sequence[Entry], said: list[str]
) -> Entry:  # fmt: skip
    """The row of a placement for another number of devices: carried over to the problem's, as the engine holds it.

    Parameters
    ----------
    name : the placement's; the row's says that it is mapped.
    fitted : fingerprint of the problem's traffic, whose loads decide where experts go.
    entries, said : rows and notes so far; a note is added where it is not known what the placement was fitted on.

    Raises
    ------
    OptionError : its layers or experts differ from the traffic's.
    """
    name = free_name(f"{name} mapped to {problem.num_devices}", entries)
    placement = as_held(problem, carried(old, problem))
    if old.fitted is None:
        said.append(f"{name} does not say what it was fitted on: whether this traffic is held out for it is not known")
    before = fitted if old.fitted is None else old.fitted.traffic.joined(fitted)
    return Entry(name, placement, fitted=before, made_for=old)


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
