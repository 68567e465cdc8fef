"""Home tables: signatures, scores as brute force counts them, routing within a band, files that others may have made."""

import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import few_or, random_count, tiny_batch, tiny_cluster, tiny_model

from poise.cost.pricing import Pricing
from poise.planning.homes import HomeTable, _packed, affine, at_ranks, grouped, pair_seconds, route, signatures
from poise.planning.placement import Placement
from poise.routing.synthetic import kinds_trace
from poise.routing.trace import RoutingTrace
from poise.util.errors import PlacementError, TraceError


def small_trace(rng, requests=6, layers=2, experts=5, top_k=2):
    """Requests in any order; some have no prefill, some picks compute nothing."""
    tokens = 40
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k].astype(np.int16)
    ids[:, :, 1][rng.random((tokens, layers)) < 0.2] = -1
    request = rng.choice([7, 300, 5, 12, 90, 41][:requests], size=tokens)
    return RoutingTrace(ids, experts, request=request, is_decode=rng.random(tokens) < 0.7)


@pytest.mark.parametrize("seed", range(5))
def test_signatures_are_shares_of_what_is_known_when_a_rank_is_chosen(seed):
    trace = small_trace(np.random.default_rng(seed))
    got = signatures(trace)
    assert got.request_R.tolist() == trace.requests().tolist()
    for r, request in enumerate(got.request_R.tolist()):
        own = trace.request == request
        known = own & ~trace.is_decode if (own & ~trace.is_decode).any() else own
        assert got.tokens_R[r] == own.sum() and got.known_R[r] == known.sum()
        for layer in range(trace.num_layers):
            picks = [e for token in trace.experts[known, layer].tolist() for e in token if e >= 0]
            want = [picks.count(e) / max(len(picks), 1) for e in range(trace.num_experts)]
            assert got.share_RLE[r, layer] == pytest.approx(want)
    rank_R = np.arange(len(got.request_R)) % 3
    homed = at_ranks(trace, got, rank_R)
    assert homed.home.tolist() == [rank_R[got.request_R.tolist().index(request)] for request in trace.request.tolist()]


def routed_slowly(score_RD, tokens_R, band):
    load = [0.0] * score_RD.shape[1]
    out = []
    for scores, tokens in zip(score_RD.tolist(), tokens_R.tolist(), strict=True):
        mean = (sum(load) + tokens) / len(load)
        room = [d for d in range(len(load)) if load[d] <= (1 + band) * mean]
        best = max(scores[d] for d in room)
        least = min(load[d] for d in room if scores[d] == best)
        out.append(next(d for d in room if scores[d] == best and load[d] == least))
        load[out[-1]] += tokens
    return out


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 1.0]))
@settings(max_examples=few_or(200, 40), deadline=None)
def test_routing_is_the_best_rank_within_the_band(seed, band):
    rng = np.random.default_rng(seed)
    requests, devices = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    score_RD, tokens_R = rng.integers(0, 4, (requests, devices)), rng.integers(1, 20, requests)
    got = route(score_RD, tokens_R, band)
    assert got.tolist() == routed_slowly(score_RD, tokens_R, band)
    load_D, sums = np.zeros(devices), np.cumsum(tokens_R)
    for r, rank in enumerate(got):
        load_D[rank] += tokens_R[r]
        assert load_D[rank] <= (1 + band) * sums[r] / devices + tokens_R[r] + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_a_router_does_not_know_how_long_a_request_will_be(seed):
    """Only what its signature is made of counts, in order of appearance."""
    rng = np.random.default_rng(seed)
    trace = small_trace(rng)
    known = signatures(trace)
    assert known.known_R.tolist() != known.tokens_R.tolist()
    table = HomeTable(rng.normal(size=(2, 2, 5)).astype(np.float32), trace.layer_ids, "affine", 0.0)
    rank_R = routed_slowly(table.scores(known.share_RLE), known.known_R, 0.0)
    want = dict(zip(known.request_R.tolist(), rank_R, strict=True))
    assert table.home(trace).home.tolist() == [want[request] for request in trace.request.tolist()]


def test_an_endless_band_gives_every_request_its_best_rank():
    score_RD = np.random.default_rng(0).random((50, 4))
    assert route(score_RD, np.ones(50, int), 100.0).tolist() == score_RD.argmax(axis=1).tolist()


def pair_cost(pricing, source, target):
    cluster, model = pricing.cluster, pricing.model
    if source == target:
        return 0.0
    inside = cluster.node_D[source] == cluster.node_D[target]
    ways = (
        (model.dispatch_bytes_per_token, cluster.dispatch_wire),
        (
            model.combine_bytes_per_token,
            cluster.combine_wire,
        ),
    )
    return sum(size / (wire.intra_bytes_per_s if inside else wire.inter_bytes_per_s) for size, wire in ways)


def expected_cost(pricing, slots, source):
    """Of a pick whose expert has these slots (devices, one an entry), slot by slot."""
    node_D = pricing.cluster.node_D
    if pricing.split == "near":
        own = [d for d in slots if d == source]
        mates = [d for d in slots if node_D[d] == node_D[source]]
        slots = own or mates or slots
    return sum(pair_cost(pricing, source, d) for d in slots) / len(slots)


@pytest.mark.parametrize("split", ["even", "near"])
@pytest.mark.parametrize("seed", range(4))
def test_affine_scores_are_the_expected_cost_of_a_pick(seed, split):
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(rng, (2, 3, 1), measured=bool(seed % 2))
    count = random_count(rng, 2, 5, 6)
    count[rng.random(count.shape) < 0.1] *= 2  # an expert twice on a device, as published EPLB has it
    batch = tiny_batch(rng, devices=6, experts=5, layers=2)
    pricing = Pricing(cluster, tiny_model(batch), "home", split)
    placement = Placement.from_counts(count, layer_ids_L=np.array([3, 8], np.int32))
    table = affine(placement, pricing, 0.5)
    assert (table.policy, table.band, table.layer_ids_L.tolist()) == ("affine", 0.5, [3, 8])
    for device in range(6):
        for layer in range(2):
            for expert in range(5):
                slots = np.repeat(np.arange(6), count[layer, expert]).tolist()
                assert -table.score_DLE[device, layer, expert] == pytest.approx(expected_cost(pricing, slots, device))
    want = [[pair_cost(pricing, a, b) for b in range(6)] for a in range(6)]
    np.testing.assert_allclose(pair_seconds(pricing), want)
    share_RLE = signatures(small_trace(rng)).share_RLE
    want_RD = np.einsum("rle,dle->rd", share_RLE, table.score_DLE)
    np.testing.assert_allclose(table.scores(share_RLE), want_RD, rtol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_the_planted_kinds(seed):
    """Also where one start of the grouping would put two kinds into one group."""
    trace = kinds_trace(kinds=6, num_requests=120, num_layers=3, num_experts=24, top_k=2, purity=0.8, seed=seed)
    seen, later = trace.split_requests()
    table = grouped(signatures(seen), seen.layer_ids, 6, band=0.2)
    known = signatures(later)
    best_R = table.scores(known.share_RLE).argmax(axis=1)
    kind_R = np.array([later.domain[later.request == request][0] for request in known.request_R])
    kinds = {rank: set(kind_R[best_R == rank].tolist()) for rank in range(6)}
    assert sorted(kinds.values(), key=min) == [{kind} for kind in range(6)]


def test_one_unlucky_start_of_the_grouping_splits_no_kind():
    trace = kinds_trace(kinds=16, num_requests=64, num_layers=1, num_experts=64, top_k=2, purity=0.8)
    known = signatures(trace)
    best_R = grouped(known, trace.layer_ids, 16, band=0.2).scores(known.share_RLE).argmax(axis=1)
    kind_R = np.array([trace.domain[trace.request == request][0] for request in known.request_R])
    assert len({*zip(kind_R.tolist(), best_R.tolist(), strict=True)}) == 16


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=few_or(200, 40), deadline=None)
def test_groups_take_what_they_have_room_for_those_first_that_lose_most(seed):
    rng = np.random.default_rng(seed)
    requests, groups = int(rng.integers(1, 30)), int(rng.integers(1, 5))
    score_RG, tokens_R = rng.random((requests, groups)), rng.integers(1, 9, requests)
    most = float(rng.uniform(1.0, 2.0)) * tokens_R.sum() / groups
    got = _packed(score_RG, tokens_R, most)
    load = [0] * groups
    best = [sorted(row) for row in score_RG.tolist()]
    regret = [row[-1] - (row[-2] if groups > 1 else row[-1]) for row in best]
    for r in sorted(range(requests), key=lambda r: -regret[r]):
        room = [g for g in range(groups) if load[g] + tokens_R[r] <= most]
        want = max(room, key=lambda g: score_RG[r, g]) if room else load.index(min(load))
        assert got[r] == want
        load[want] += tokens_R[r]


def test_one_rank_and_fewer_requests_than_ranks():
    trace = kinds_trace(kinds=2, num_requests=3, num_layers=2, num_experts=4)
    known = signatures(trace)
    assert grouped(known, trace.layer_ids, 1).home(trace).home.max() == 0
    assert 0 <= grouped(known, trace.layer_ids, 8).home(trace).home.max() < 8


def test_a_table_is_of_its_layers_and_experts():
    trace = kinds_trace(kinds=2, num_requests=8, num_layers=2, num_experts=4)
    with pytest.raises(TraceError, match=r"decoder layers \[3, 8\].*\[0, 1\]"):
        HomeTable(np.zeros((2, 2, 4), np.float32), np.array([3, 8], np.int32), "affine").home(trace)
    with pytest.raises(TraceError, match=r"\(2, 4\) layers, experts, the table of \(2, 5\)"):
        HomeTable(np.zeros((2, 2, 5), np.float32), np.array([0, 1], np.int32), "affine").home(trace)


def test_a_table_goes_round_through_its_file(tmp_path):
    rng = np.random.default_rng(0)
    table = HomeTable(rng.normal(size=(3, 2, 4)).astype(np.float32), np.array([1, 5], np.int32), "grouped", 0.25)
    table.save(tmp_path / "h.npz")
    got = HomeTable.load(tmp_path / "h.npz")
    np.testing.assert_array_equal(got.score_DLE, table.score_DLE)
    assert (got.policy, got.band, got.layer_ids_L.tolist(), got.num_devices) == ("grouped", 0.25, [1, 5], 3)
    with pytest.raises(ValueError, match="read-only"):
        got.score_DLE[0, 0, 0] = 1.0


GOOD = {"format": np.int32(1), "score": np.zeros((2, 2, 3), np.float32), "layer_ids": np.arange(2), "policy": np.array("affine"),
        "band": np.float64(0.1)}  # fmt: skip
BAD = [
    ({"format": np.int32(2)}, "has format 2, this version reads 1"), ({"format": None}, "'format' is missing"),
    ({"score": np.zeros((2, 3), np.float32)}, r"score must have shape \[any, any, any\]"),
    ({"score": np.zeros((2, 2, 3), int)}, "score must hold floats"), ({"score": np.zeros((0, 2, 3))}, "scores must be"),
    ({"score": np.full((2, 2, 3), np.nan)}, "finite floats"), ({"score": np.zeros((2, 3, 3))}, "for 2 layers"),
    ({"score": np.full((2, 2, 3), 1e300)}, "finite floats"),
    ({"score": np.array([[[None]]])}, "pickled"), ({"layer_ids": np.array([1, 1])}, "ascend"),
    ({"layer_ids": np.array([-1, 1])}, "ascend"), ({"layer_ids": np.arange(2.0)}, "layer_ids must hold integers"),
    ({"policy": np.array("x" * 201)}, "at most 200"), ({"policy": np.array("a\x1b[31m")}, "printable"),
    ({"policy": np.array(["a"])}, r"policy must have shape \[\]"), ({"band": np.float64(-1)}, "band must be at least 0"),
    ({"band": np.float64(np.inf)}, "band must be at least 0"), ({"band": np.float64(np.nan)}, "band must be at least 0"),
    ({"layer_ids": np.array([1, 2**40])}, "within 0..65535"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD)
def test_files_that_are_no_tables_are_refused(tmp_path, change, said):
    arrays = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    np.savez_compressed(tmp_path / "h.npz", **arrays)
    with pytest.raises(PlacementError, match=said):
        HomeTable.load(tmp_path / "h.npz")


def test_files_that_claim_too_much_or_are_cut_are_refused(tmp_path):
    path = tmp_path / "h.npz"
    np.savez_compressed(path, **GOOD)
    assert HomeTable.load(path).num_devices == 2
    whole = path.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(PlacementError):
            HomeTable.load(path)
    np.savez_compressed(path, **{**GOOD, "score": np.zeros((2, 2, 3), np.float32)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["score.npy"] = members["score.npy"].replace(b"(2, 2, 3)", b"(9999, 9999, 9999)")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(PlacementError):
        HomeTable.load(path)
    with pytest.raises(PlacementError):
        HomeTable.load(tmp_path / "none.npz")
