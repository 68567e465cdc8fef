"""The kernels in Triton's interpreter against their mirrors, bit for bit; in a process of its own.

    TRITON_INTERPRET=1 python -m tests.runtime.device.interpreted CASES [--seed N] [--large N] [--mutants]

Triton reads the variable when it is imported, and the rest of the tests wants it without. Every case runs twice, the
second time with the programs of each grid in a random order and with other blocks; ``--large`` of them have up to 256
experts. Prints one line, and ends with 1 where a number differs.
"""

import argparse
import sys

import numpy as np
import torch
from tests.runtime.device import mirror
from tests.runtime.device.cases import Case, random_case
from triton.runtime import interpreter

from poise.runtime.device import gemm
from poise.runtime.device.planner import DeviceKernels
from poise.stepwise.kernels import PRICES, prices

MUTANTS = {"capped": lambda bound, slack: bound + bound * slack // 1000 + 1}
"""Of the mirror: what a kernel with another cap would be."""
NAMES = ("fill", "leave", "seconds", "split", "status", "rows", "left")
PLAIN = interpreter.interpreter_builder.set_grid_idx, interpreter.interpreter_builder.set_grid_dim
WIDE = ((64, (8,)), (96, (4, 4, 3)), (128, (8, 8)), (256, (8, 8, 8, 8)), (256, (4, 4)))


def tensor(array, where="cpu") -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.int32, order="C")).to(where)


def shuffled(rng):
    """Programs of a grid of one dimension in a random order: what the interpreter is told is not what it does next."""
    (real, dim), orders = PLAIN, {}

    def set_dim(x, y, z):
        orders["now"] = rng.permutation(x)
        dim(x, y, z)

    def set_idx(x, y, z):
        real(int(orders["now"][x]), y, z)

    interpreter.interpreter_builder.set_grid_dim, interpreter.interpreter_builder.set_grid_idx = set_dim, set_idx


def run(case: Case, source: int, blocks: tuple[int, int], where="cpu"):
    """All kernels in the order of a step; what each returned, as numpy."""
    kernels = DeviceKernels(
        case.table,
        case.price,
        max(1, case.pairs),
        where,
        expert_block=blocks[0],
        row_block=blocks[1],
        slack=case.pairs % 2 * 10,
    )
    for poisoned in ("_split_room", "_fill_room", "_dense", "_row", "_filled", "_leave"):
        getattr(kernels, poisoned).fill_(-77)
    load, given = tensor(case.load_SE, where), tensor(case.expert_DS, where)
    filled, leave = (each.clone() for each in kernels.prepare(tensor(case.load_E, where), given))
    plan = kernels.split(load, filled, kernels.none).clone()
    status = kernels.status.clone()
    row = kernels.rows(load, plan, source).clone()
    left = kernels.split(load, filled, leave + 1 - leave).clone()
    out = (filled, leave, kernels.seconds_ps, plan, status[:3], row, left, kernels.fill_status)
    return [np.array(each.cpu().numpy(), np.int64) for each in out]


def expected(case: Case, source: int):
    """The same of the mirrors."""
    table, experts = case.table, case.table.num_experts
    fill = mirror.fill(case.load_E, case.expert_DS, table.turn_DS, most_turns=32)
    split = mirror.split(case.load_SE, fill.expert_DS, table.turn_DS, table.node_D, slack=case.pairs % 2 * 10)
    plan = mirror.dense(split.quota_DS, fill.expert_DS, experts)
    price = dict(zip(PRICES, prices(case.price, 0.03).tolist(), strict=True))
    decision = mirror.decide(case.load_E, fill.expert_DS, table.turn_DS, fill.quota_DS, table.node_D, price)
    left = mirror.split(case.load_SE, fill.expert_DS, table.turn_DS, table.node_D, leave=True)
    return [
        fill.expert_DS, [decision.leave], [decision.planned_ps, decision.passive_ps], plan,
        [plan.sum(axis=0).max(), split.bound, split.rounds], mirror.rows(case.load_SE, plan, table.node_D, source),
        mirror.dense(left.quota_DS, fill.expert_DS, experts),
    ]  # fmt: skip


def difference(case: Case, source: int, rng, wide: bool) -> str | None:
    """What differs between the mirror, the kernels, and the kernels in another order; None: nothing."""
    want = expected(case, source)
    interpreter.interpreter_builder.set_grid_idx, interpreter.interpreter_builder.set_grid_dim = PLAIN
    runs = [run(case, source, (64, 64))]
    shuffled(rng)
    runs.append(run(case, source, (16, 32) if wide else (1, 2)))
    for got in runs:
        for name, one, other in zip(NAMES, got, want, strict=False):
            if not np.array_equal(one, other):
                return f"{name} differs: {one.tolist()} and {np.asarray(other).tolist()}"[:2000]
    return None if np.array_equal(runs[0][-1], runs[1][-1]) else "the order of programs is seen"


def product_difference(rng) -> str | None:
    """What differs between the grouped products and numpy, in any order of programs; None: nothing.

    Rows after the last end are not numbers; some slots, or all, have no row.
    """
    slots, inner, out = int(rng.integers(1, 6)), int(rng.integers(1, 80)), int(rng.integers(1, 80))
    count = rng.integers(0, 90, slots) * (rng.random(slots) < rng.choice([0.0, 0.6, 1.0]))
    ends, rows = np.cumsum(count), int(count.sum() + rng.integers(0, 70))
    if not rows:
        return None
    x, dy = rng.standard_normal((rows, inner)), rng.standard_normal((rows, out))
    weight = rng.standard_normal((slots, inner, out))
    x[ends[-1] :] = dy[ends[-1] :] = np.nan
    want, want_w = np.zeros((rows, out)), np.zeros_like(weight)
    for slot in range(slots):
        at = slice(ends[slot] - count[slot], ends[slot])
        want[at], want_w[slot] = x[at] @ weight[slot], x[at].T @ dy[at]
    shuffled(rng)
    turned = torch.from_numpy(weight.transpose(0, 2, 1).copy()).transpose(1, 2)
    given = torch.from_numpy(x), tensor(ends)
    for matrices in (torch.from_numpy(weight), turned):
        if not np.allclose(gemm.product(given[0], matrices, given[1]).numpy(), want, rtol=0, atol=1e-11):
            return f"rows of {count.tolist()} in {rows}, {inner} x {out}: another product"
    if not np.allclose(gemm.outer(given[0], torch.from_numpy(dy), given[1]).numpy(), want_w, rtol=0, atol=1e-11):
        return f"rows of {count.tolist()} in {rows}, {inner} x {out}: another gradient"
    return None


def drawn(rng, number: int, large: int) -> tuple[Case, int, bool]:
    experts, nodes = WIDE[number % len(WIDE)] if number < large else (None, ())
    case = random_case(rng, experts=experts, nodes=list(nodes), step_slots=2 if experts else None, most=2000)
    return case, int(rng.integers(len(case.load_SE))), bool(experts)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", type=int, default=0)
    parser.add_argument("--mutants", action="store_true", help="then see that each of them is seen")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    for number in range(options.cases):
        case, source, wide = drawn(rng, number, options.large)
        if found := difference(case, source, rng, wide):
            print(f"case {number}: {found}")
            return 1
        if found := product_difference(rng):
            print(f"products {number}: {found}")
            return 1
    print(f"{options.cases} cases, {min(options.large, options.cases)} of them large: all bits equal")
    for name, value in MUTANTS.items() if options.mutants else ():
        whole = getattr(mirror, name)
        setattr(mirror, name, value)
        if not any(difference(*drawn(rng, number, 0)[:2], rng, False) for number in range(20)):
            print(f"another {name} is not seen")
            return 1
        setattr(mirror, name, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
