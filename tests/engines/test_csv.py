"""CSV as engines, tracers and people write it: what a row counts is said by its columns, or asked about."""

import gzip
from time import process_time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engines import dumps
from tests.engines.test_plain_formats import counts

from poise.engines.dumps.csv_text import sniff
from poise.engines.readers import ReadOptions, read_dump
from poise.routing.profile import load_LE
from poise.util.errors import TraceError


@given(
    seed=st.integers(0, 2**20),
    head=st.permutations(["layer", "expert", "count"]),
    gz=st.booleans(),
    mark=st.sampled_from(",;\t"),
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_columns_come_in_any_order(tmp_path, seed, head, gz, mark):
    load = counts(seed, shape=(3, 5))
    load[:, 0] = load[:, 4] = 1
    rows = [{"layer": i, "expert": e, "count": load[i, e]} for i in range(3) for e in range(5) if load[i, e]]
    names = {"layer": "Layer Idx", "expert": '"expert_id"', "count": "num_tokens"}
    text = "\n".join([mark.join(names[c] for c in head), *(mark.join(str(row[c]) for c in head) for row in rows)])
    path = tmp_path / "c.csv"
    path.write_bytes(gzip.compress(text.encode()) if gz else text.encode())
    np.testing.assert_array_equal(read_dump(path).profile.load_BLE[0], load)


def csv(tmp_path, text, name="c.csv", **options):
    (tmp_path / name).write_text(text)
    return read_dump(tmp_path / name, options=ReadOptions(**options))


def test_steps_ranks_and_other_columns(tmp_path):
    dump = csv(tmp_path, "step,layer,expert,count\n4,1,0,5\n9,1,1,6\n4,1,1,1\n")
    assert dump.profile.load_BLE.tolist() == [[[5, 1]], [[0, 6]]]
    dump = csv(tmp_path, "rank,layer,expert,count\n0,1,0,5\n1,1,1,6\n0,1,1,1\n")
    assert dump.profile.load_BLE.tolist() == [[[5, 7]]] and "ranks 0, 1 were added up" in dump.notes[-1]
    dump = csv(tmp_path, "phase,layer_id,expert_id,selection_count\nprefill,0,0,3\ndecode,0,0,2\ndecode,0,1,4\n")
    assert dump.profile.load_BLE.tolist() == [[[5, 4]]] and "columns phase were not read" in dump.notes
    for rank, (a, b) in enumerate([(5, 1), (0, 6)]):
        csv(tmp_path, f"layer_id,expert_id,count\n3,0,{a}\n3,1,{b}\n", f"expert_distribution_rank{rank}_timestamp1.csv")
    files = sorted(tmp_path.glob("expert_distribution*"))
    assert read_dump(files).profile.load_BLE.tolist() == [[[5, 7]]]
    files[1].write_bytes(files[0].read_bytes())  # ranks that share their tokens
    assert read_dump(files).profile.load_BLE.tolist() == [[[5, 1]]]


def test_a_column_that_names_the_token_counts_none(tmp_path):
    """A row a choice, with the token's number and the router's weight: a pair each, not as many as its number says."""
    rng = np.random.default_rng(4)
    tokens = dumps.choices(rng, 30)
    for name in ("token", "Token ID", "position"):
        rows = [f"{t},{i},{e},0.5" for t, chosen in enumerate(tokens) for i, ids in enumerate(chosen) for e in ids]
        dump = csv(tmp_path, f"{name},layer,expert,router_weight\n" + "\n".join(rows), num_experts=8)
        np.testing.assert_array_equal(dump.profile.load_BLE[0], load_LE(tokens, 8))


@pytest.mark.parametrize("weight", ["probability", "router_weight", "logit"])
@pytest.mark.parametrize("token", ["token", "token_id", "pos"])
def test_a_router_s_numbers_for_all_experts_are_no_choices(tmp_path, token, weight):
    """A row for each expert of a token, chosen or not, makes loads that are perfectly even."""
    rng = np.random.default_rng(5)
    tokens = dumps.choices(rng, 6)

    def text(weight_of, requests=("",)):
        """Rows of all experts that have a weight; None: no row."""
        rows = [f"{r}{t},{i},{e},{w}" for r in requests for t, i, e in np.ndindex(6, 3, 8)
                if (w := weight_of(t, i, e)) is not None]  # fmt: skip
        return "\n".join([("request," if requests != ("",) else "") + f"{token},layer,expert,{weight}", *rows])

    def of_chosen(t, i, e):
        return 0.4 if e in tokens[t, i] else None

    for weight_of, said in (
        (lambda t, i, e: 0.1 + e, "has 8 rows in a layer, of 8 experts"),
        (lambda t, i, e: 0.4 if e in tokens[t, i] else 0.0, "has 8 rows in a layer, of 8 experts"),
        (lambda t, i, e: 0.2 if (t, i, e) == (3, 1, min({*range(8)} - {*tokens[3, 1]})) else of_chosen(t, i, e),
         "has 2 rows in a layer, another 3|in a layer 2 to 3 rows"),
        (lambda t, i, e: 0.0 if (t, i, e) == (3, 1, tokens[3, 1, 0]) else of_chosen(t, i, e),
         f"{weight} is 0 or none in 1 of 36 rows"),
    ):  # fmt: skip
        with pytest.raises(TraceError, match=said if token != "token" else f"{said}|column 'token' may"):
            csv(tmp_path, text(weight_of))
    for requests in (("a,", "b,"), ("0,", "1,")):  # whose tokens are numbered alike
        dump = csv(tmp_path, text(of_chosen, requests), num_experts=8)
        np.testing.assert_array_equal(dump.profile.load_BLE[0], 2 * load_LE(tokens, 8))
    twice = text(of_chosen).split("\n")
    with pytest.raises(TraceError, match=r"names an expert 2 times|column 'token' may"):
        csv(tmp_path, "\n".join([*twice, *twice[1:]]))


@pytest.mark.parametrize("more", ["", "request", "phase", "index"])
def test_a_column_token_that_may_count_is_refused(tmp_path, more):
    """Appended once a step, its rows repeat; what else stands beside them does not tell what it is."""
    rows = ["0,0,45", "0,1,17", "1,0,10", "1,1,4", "0,0,40", "0,1,12", "1,0,9", "1,1,9"]
    even = [f"{i},{e},10" for i in range(2) for e in range(4)]
    once = ["0,0,0", "0,1,1", "0,2,2", "1,0,2", "1,1,0", "1,2,1"]
    for some in (rows, rows[:4], even, ["0,0,0", "0,1,0", "0,2,1", "0,3,1"], once):
        beside = [f",{n // 4}" if more else "" for n in range(len(some))]
        lines = [f"layer,expert,token{',' * bool(more)}{more}", *map(str.__add__, some, beside)]
        text = "\n".join(lines)
        with pytest.raises(TraceError, match="column 'token' may say how many it has, or which one"):
            csv(tmp_path, text)


@pytest.mark.parametrize(
    "head",
    ["tokens", "num_token", "num_token_count", "total_token_count", "TokenCount", "tokencount", "token_all_topk",
     "ntoken", "token_load", "token counts", "n"],
)  # fmt: skip
def test_a_column_that_counts_is_known_by_its_name(tmp_path, head):
    assert csv(tmp_path, f"layer,expert,{head}\n0,0,45\n0,1,17\n").profile.load_BLE.tolist() == [[[45, 17]]]


def test_a_token_s_number_alone_is_one_choice_a_row(tmp_path):
    """As it comes again in another request that no column names."""
    dump = csv(tmp_path, "token_id,layer,expert\n0,0,3\n0,0,1\n0,0,3\n0,0,2\n1,0,0\n1,0,1\n")
    assert dump.profile.load_BLE.tolist() == [[[1, 2, 1, 2]]]


@pytest.mark.parametrize("head", ["", "Unnamed: 0", "index"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_index_and_remarks_are_passed_over(tmp_path, head, end):
    """As pandas writes a table, and a hand above it."""
    load = counts(shape=(3, 5)) + 1
    rows = [f"{n},{i},{e},{load[i, e]}" for n, (i, e) in enumerate(np.ndindex(3, 5))]
    above = ["# recorded, on Monday, by hand, again", "", "# twice\vover"]
    named, below = f"{head},layer,expert,count", "# tokens, by expert, in one, step"
    lines = [*above, named, below, *rows]
    for mark in ",\t":
        for text in (end.join(lines), end.join(lines) + "\n", "\n".join(lines[:3]) + "\n" + end.join(lines[3:]),
                     end.join([*above, f"# {named}", *rows])):  # fmt: skip
            (tmp_path / "p.csv").write_bytes(text.replace(",", mark).encode())
            dump = read_dump(tmp_path / "p.csv")
            np.testing.assert_array_equal(dump.profile.load_BLE[0], load)
            assert f"columns {head or 'unnamed'} were not read" in dump.notes


@pytest.mark.parametrize(
    "text, said",
    [
        ("0,0,45\n0,1,17\n1,0,10\n1,1,4\n", r"columns may be layer, expert, count, or expert before layer"),
        ("0,3\n1,2\n", "columns may be layer, expert, or"),
        ("layer,expert,prob\n0,0,0.5\n0,1,0.5\n", "column 'prob' may say how many"),
        ("layer,expert,rank\n0,0,0\n0,1,1\n", "where experts lie"),
        ("layer,expert,count,hits\n0,0,1,2\n", "2 columns of count"),
        ("layer,expert,count\n0,0.5,1\n", "expert must be whole numbers"),
        ("layer,expert,count\n0,0,nan\n", "count must lie in"),
        ("layer,expert,count\n0,-1,4\n", "expert must lie in"),
        ("layer,expert,count\n0,1,4\n0,1,4,5\n", "more than 3 columns"),
        ("layer,expert,count\n0,1,4\n0,x,4\n", "no table of numbers"),
        ("expert,node\n0,1\n1,1\n", "no known format"),
    ],
)
def test_csv_that_is_not_certain_is_refused(tmp_path, text, said):
    with pytest.raises(TraceError, match=said):
        csv(tmp_path, text)


def test_csv_without_a_head_in_the_order_that_is_asked_for(tmp_path):
    dump = csv(tmp_path, "0,0,45\n0,1,17\n1,0,10\n1,1,4\n", format="load-csv")
    assert dump.profile.load_BLE.tolist() == [[[45, 17], [10, 4]]]


def test_choices_are_tokens_only_where_that_is_certain(tmp_path):
    rng = np.random.default_rng(2)
    tokens = dumps.choices(rng, 6)

    def text(chosen):
        return "layer,expert\n" + "".join(f"{i},{e}\n" for t in chosen for i, ids in enumerate(t) for e in ids)

    np.testing.assert_array_equal(csv(tmp_path, text(tokens), top_k=2).trace.experts, tokens)
    for chosen, options in (
        (tokens, {}),
        (tokens, {"top_k": 1}),
        (np.concatenate([tokens[:3], tokens[3:]], axis=2), {"top_k": 2}),
    ):
        dump = csv(tmp_path, text(chosen), num_experts=8, **options)  # K unknown, another, two tokens a pass
        assert dump.trace is None and "not certain" in "".join(dump.notes)
        np.testing.assert_array_equal(dump.profile.load_BLE[0], load_LE(tokens, 8))
    twice = tokens.copy()
    twice[4, 1] = 3
    assert csv(tmp_path, text(twice), top_k=2).trace is None
    dump = csv(tmp_path, text(tokens).partition("\n")[2], num_experts=8)  # no head, as the tool writes it
    np.testing.assert_array_equal(dump.profile.load_BLE[0], load_LE(tokens, 8))


@pytest.mark.parametrize("line", [b"#,\n", b"# a,b\n", b"# a\tb;c\n"])
def test_remarks_above_a_table_take_no_longer_than_they_are_long(line):
    """Eight times as many lines: about eight times the processor's time, sixty-four if each looks at all below it."""

    def seconds(lines):
        text, took = line * lines + b"layer,expert,count\n0,0,5\n", []
        for _ in range(3):
            began = process_time()
            head = sniff(text)
            took.append(process_time() - began)
        assert head == (("layer", "expert", "count"), 3, ",")
        return min(took)

    few = 4000
    assert seconds(8 * few) < 24 * seconds(few)
