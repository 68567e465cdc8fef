"""Replicas by way of all ranks: every step slot gets its owner's weights bit for bit, whatever the table and the room."""

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from tests.runtime.device.cases import random_case  # noqa: E402

from poise.runtime.device.stripes import Stripes  # noqa: E402
from poise.stepwise.kernels import STEP, LayerSlots  # noqa: E402
from poise.util.errors import OptionError  # noqa: E402

CPU = torch.device("cpu")


class Ranks:
    """All-to-all of equal parts between threads; ``sent``: elements of each rank in all, its own part included."""

    def __init__(self, world):
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.posted, self.sent = [None] * world, [0] * world

    def exchange(self, rank):
        def all_to_all(x):
            self.posted[rank] = x.clone()
            self.sent[rank] += x.numel()
            self.barrier.wait()
            parts = [each.chunk(self.world)[rank] for each in self.posted]
            self.barrier.wait()
            return torch.cat(parts)

        return all_to_all

    def run(self, call):
        """What ``call(rank)`` returns on every rank; the error of one ends the others' waiting and is raised."""
        out, errors = [None] * self.world, []

        def one(rank):
            try:
                out[rank] = call(rank)
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if errors:
            raise next((each for each in errors if not isinstance(each, threading.BrokenBarrierError)), errors[0])
        return out


class Drawn:
    """A random layer with its step slots partly filled, the room of its owners, and weights that do not divide by ranks."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        case = random_case(
            rng, nodes=[int(n) for n in rng.integers(1, 3, rng.integers(1, 4))], step_slots=int(rng.integers(1, 4))
        )
        self.table, self.load_E = case.table, case.load_E
        self.step = self.table.turn_DS == STEP
        self.expert_DM = case.expert_DS[self.step].reshape(len(case.expert_DS), -1)
        self.room = int(rng.integers(1, 4)) if rng.random() < 0.7 else Stripes.enough(self.table)
        self.world, self.experts = len(self.table.expert_DS), self.table.num_experts
        self.weight_E = torch.from_numpy(
            rng.standard_normal((self.experts, int(rng.integers(1, 4)), int(rng.integers(1, 6))))
        )
        self.grad_DM = torch.from_numpy(rng.standard_normal((*self.expert_DM.shape, *self.weight_E.shape[1:])))
        self.owner_E = np.array(
            [np.nonzero((self.table.expert_DS == e) & (self.table.turn_DS == 0))[0][0] for e in range(self.experts)]
        )
        self.ranks = Ranks(self.world)

    def stripes(self, rank):
        return Stripes(self.table, rank, CPU, self.room, self.ranks.exchange(rank))

    def given(self, expert_DM):
        """As the layer gives it: E where a slot is empty."""
        return torch.from_numpy(np.where(expert_DM >= 0, expert_DM, self.experts).astype(np.int64))

    def kept(self):
        """The table without what has no room, in plain words."""
        out = self.expert_DM.copy()
        for owner in range(self.world):
            wanted = {int(e) for e in out.ravel() if e >= 0 and self.owner_E[e] == owner}
            hottest = sorted(wanted, key=lambda e: (-self.load_E[e], e))
            out[np.isin(out, hottest[self.room :])] = -1
        return out

    def held(self, rank):
        """Weights of a rank's slots; step slots hold something else."""
        rows = self.weight_E[np.maximum(self.table.expert_DS[rank], 0)].clone()
        rows[torch.from_numpy(self.table.turn_DS[rank] < 0)] = -7.0
        return rows


@pytest.mark.parametrize("seed", range(40))
def test_every_slot_gets_its_owners_weights_and_owners_all_gradients(seed):
    case = Drawn(seed)
    kept_DM = case.kept()
    for rank in range(case.world):
        fits = case.stripes(rank).fitting(case.given(case.expert_DM), torch.from_numpy(case.load_E))
        np.testing.assert_array_equal(fits.numpy(), kept_DM >= 0)

    def one(rank):
        stripes = case.stripes(rank)
        route = stripes.route(case.given(kept_DM))
        return route.row_O, stripes.fetched(route, case.held(rank)), stripes.summed(route, case.grad_DM[rank])

    for rank, (row_O, came_M, sums_O) in enumerate(case.ranks.run(one)):
        for turn in np.flatnonzero(kept_DM[rank] >= 0):
            assert torch.equal(came_M[turn], case.weight_E[kept_DM[rank][turn]])
        mine = {
            int(row): sums_O[place]
            for place, row in enumerate(row_O.tolist())
            if row < (case.table.turn_DS[rank] >= 0).sum()
        }
        wanted = {int(e) for e in kept_DM[kept_DM >= 0] if case.owner_E[e] == rank}
        assert {int(case.table.expert_DS[rank][row]) for row in mine} == wanted
        for row, got in mine.items():
            want = case.grad_DM[torch.from_numpy(kept_DM == case.table.expert_DS[rank][row])].sum(0)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    size, slots = case.weight_E[0].numel(), case.expert_DM.shape[1]
    wide = -(-size // case.world) * case.world
    assert case.ranks.sent == [2 * (case.room + slots) * wide] * case.world, (
        "weights and gradients of O + M experts each way"
    )


def test_room_for_every_table_drops_nothing():
    for seed in range(30):
        case = Drawn(seed)
        case.room = Stripes.enough(case.table)
        assert 1 <= Stripes.usual(case.table) <= min(case.room, 2 * case.expert_DM.shape[1])
        np.testing.assert_array_equal(case.kept(), case.expert_DM)


def test_no_room_and_devices_with_other_slots_are_refused():
    table = LayerSlots.of(np.eye(3, dtype=bool), 2, np.zeros(3))
    with pytest.raises(OptionError, match="0 experts, at least 1"):
        Stripes(table, 0, CPU, 0, lambda x: x)
    turn_DS = table.turn_DS.copy()
    turn_DS[1, -1] = -2
    with pytest.raises(OptionError, match="1 to 2 step slots a device"):
        Stripes(LayerSlots(table.expert_DS, turn_DS, 3, table.node_D), 0, CPU, 1, lambda x: x)
