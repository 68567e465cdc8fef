"""How often ``poise watch --metrics`` is right: simulated windows before and after a map, looked at after every window.

Usage: python benchmarks/helped.py [--runs 200]

A window has requests running (mean 200, spread 10 %, optionally drifting), prompt tokens that go with them, and a TPOT that
grows with both, times noise. After the map TPOT is multiplied by what the map does. 120 windows on either side: two hours
of minutes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np

from poise.watch.helped import HelpedSettings, Judgement, MapJudge
from poise.watch.metric_windows import MetricWindow


@dataclass(frozen=True)
class Traffic:
    """``noise`` : of a window's TPOT. ``drift`` : requests that run more, each window. ``sway`` : share of the noise
    that is as it was in the window before.
    """

    noise: float = 0.02
    drift: float = 0.0
    sway: float = 0.0

    def windows(self, rng: np.random.Generator, many: int, effect: float) -> list[MetricWindow]:
        """Windows in order under a map that makes TPOT ``effect`` longer, as a share."""
        out, held = [], 0.0
        for at in range(many):
            running = max(5.0, rng.normal(200.0, 20.0) + self.drift * at)
            prompt = max(100.0, rng.normal(5000.0, 300.0) * running / 200.0)
            held = self.sway * held + (1.0 - self.sway**2) ** 0.5 * rng.normal(0.0, self.noise)
            tpot = 0.02 * (running / 200.0) ** 0.6 * (prompt / 5000.0) ** 0.1 * float(np.exp(held)) * (1.0 + effect)
            out.append(MetricWindow(60.0 * at, 60.0 * at + 60.0, running, prompt, running / tpot, tpot))
        return out


def judged(
    effect: float, seed: int, traffic: Traffic, settings: HelpedSettings | None = None, many: int = 120
) -> Judgement:
    """What is said of a map, asked after every window until it is final."""
    rng = np.random.default_rng([seed, 7])
    before = Traffic(traffic.noise, 0.0, traffic.sway).windows(rng, many, 0.0)
    judge = MapJudge(before, settings)
    for window in traffic.windows(rng, many, effect):
        if judge.add(window).final:
            break
    return judge.judgement


CASES = [(effect, Traffic()) for effect in (0.0, -0.01, -0.02, -0.03, -0.05, -0.1, 0.02, 0.03, 0.05, 0.1)] + [
    (0.0, Traffic(drift=-0.8)), (0.0, Traffic(drift=0.8)), (0.0, Traffic(sway=0.5)), (0.0, Traffic(sway=0.8)),
]  # fmt: skip


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    print("| TPOT | windows | helped | hurt | did not help | cannot tell | windows after it, median where final |")
    print("|---|---|---|---|---|---|---|")
    for effect, traffic in CASES:
        found = [judged(effect, seed, traffic) for seed in range(runs)]
        said = Counter(one.answer for one in found)
        final = [one.after for one in found if one.final]
        how = "as they are" if not traffic.drift else f"load {traffic.drift * 120 / 2:+.0f} % over them"
        if traffic.sway:
            how = f"noise that is {traffic.sway:.0%} that of before"
        cells = [f"{said[word] / runs:.1%}" for word in ("helped", "hurt", "did not help", "cannot tell yet")]
        print(f"| {effect:+.0%} | {how} | {' | '.join(cells)} | {f'{np.median(final):.0f}' if final else '-'} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
