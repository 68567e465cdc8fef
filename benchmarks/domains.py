"""A plan for traffic of several domains: does it hold in steps that are all of one of them?

python benchmarks/domains.py DATA [--work 150] [--layers 6] [--only TEXT] [--no-report]

Fitted on half of the requests of all domains together, judged on the other half: on steps of each domain alone and of
all. Beside it the same search that is not told which request is of which domain, and plans for one domain alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from choice import judged
from common import DEMO_SIZES, problem, table, write
from static_near import some_layers

from poise.planning.solve.solve import solve
from poise.routing.batching import make_batch
from poise.routing.files import join, read
from poise.routing.trace import RoutingTrace

STEPS = 16
SHIPPED = Path(__file__).parents[1] / "src" / "poise" / "data"
Case = tuple[str, RoutingTrace, str, int, str | None, tuple[int, ...], tuple[str, ...]]


def cases(data: Path, layers: int) -> Iterator[Case]:
    """Name, traffic, machine, redundant slots, model, sizes of a step, splits."""
    paths = sorted((data / "llama4-maverick").glob("*.npz"))
    parts = [
        replace(one, domain=np.full(one.num_tokens, number, np.int16), domain_names=tuple(path.stem for path in paths))
        for number, (path, one) in enumerate((path, read(path)) for path in paths)
    ]
    both = join(parts)
    assert isinstance(both, RoutingTrace)
    for cluster in ("2x8:h200", "4x8:h200"):
        yield ("Llama-4", some_layers(both, layers), cluster, 8 * int(cluster[0]), "llama-4-maverick", (2048, 16384),
               ("near",))  # fmt: skip
    for name in ("demo_skewed", "demo_trace"):
        trace = read(SHIPPED / f"{name}.npz")
        assert isinstance(trace, RoutingTrace)
        yield name, trace, "2x4:h100", 8, None, (1024, 8192), ("even", "near")


def rows(data: Path, layers: int, work: float, only: str) -> Iterator[list[object]]:
    """A row a case and judged domain: ms of a step under the plans for it alone, for all, and for all by domain."""
    for name, trace, cluster, redundant, model, sizes, splits in cases(data, layers):
        fit, held = trace.split_requests()
        for tokens in sizes:
            seen = make_batch(fit, tokens_per_step=tokens, steps=STEPS)
            for split in splits:
                words = f"{name}, {cluster}, N = {tokens}, {split}"
                if only not in words:
                    continue
                asked = problem(seen, cluster, redundant, model=model)
                asked = replace(asked, split=split, model=asked.model if model else DEMO_SIZES)
                mixed = solve(replace(asked, batch=replace(seen, domain_R=None)), work=work).placement
                apart = solve(asked, work=work).placement
                for domain in (*trace.domain_names, "all"):
                    some = None if domain == "all" else [domain]
                    later = make_batch(held.select(domains=some), tokens_per_step=tokens, steps=STEPS)
                    ours = make_batch(fit.select(domains=some), tokens_per_step=tokens, steps=STEPS)
                    alone = mixed if some is None else solve(replace(asked, batch=ours), work=work).placement
                    ms = [1e3 * judged(asked, later, placed)[0] for placed in (alone, mixed, apart)]
                    yield [words, domain, *(f"{one:.3f}" for one in ms), f"{1 - ms[2] / ms[1]:+.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=float, default=150.0)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    found = []
    for row in rows(options.data, options.layers, options.work, options.only):
        found.append(row)
        print(*row, sep=" | ", flush=True)
    words = (f"Modelled ms of a step of the layers that are planned ({options.layers} of Llama-4's, all of the demo's); {STEPS} steps "
             f"fitted, as many judged, other requests; work {options.work:g}, homes equal, one redundant slot a GPU.")  # fmt: skip
    head = [
        "case",
        "judged on",
        "a plan for it alone",
        "for all, domains unknown",
        "for all, by domain",
        "saved by knowing",
    ]
    if not options.no_report and not options.only:
        write("plans for several domains", ["## Plans for several domains", words, table(head, found)])


if __name__ == "__main__":
    main()
