"""Tables with a line of names, a column an expert or a layer; and rows of JSON: one set of loads, written in many ways."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.engines.readers import ReadOptions, read_dump
from poise.machine.model import ModelSpec
from poise.util.errors import TraceError

LAYERS, EXPERTS = 4, 8


def loads(seed=0, steps=1, most=900):
    """[steps, L, E]; every layer of a step has as many tokens."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [rng.multinomial(most * EXPERTS // 2 + b, rng.dirichlet(np.ones(EXPERTS)), LAYERS) for b in range(steps)]
    )


def table(head, rows, mark=","):
    out = io.StringIO()
    csv.writer(out, delimiter=mark).writerows([head, *rows])
    return out.getvalue()


def records(load_BLE, *, steps):
    return [{"step": b, "layer": i, "expert": e, "count": int(load_BLE[b, i, e])}
            for b, i, e in np.ndindex(load_BLE.shape)] if steps else [
           {"layer": i, "expert": e, "count": int(load_BLE[0, i, e])} for i, e in np.ndindex(load_BLE.shape[1:])]  # fmt: skip


def of_experts(load_BLE, name="expert_{}", mark=","):
    return table(["layer", *map(name.format, range(EXPERTS))], [[i, *row] for i, row in enumerate(load_BLE[0])], mark)


WAYS = {  # loads [1, L, E] -> text
    **{name: lambda load, name=name: of_experts(load, name) for name in ("expert_{}", "{}", "E{}", "Expert {}", "e{}_count")},
    "columns in another order": lambda load: table(["expert_7", "layer", *(f"expert_{e}" for e in range(7))],
                                                   [[row[7], i, *row[:7]] for i, row in enumerate(load[0])]),
    "rows named": lambda load: table(["layer", *map("expert_{}".format, range(EXPERTS))],
                                     [[f"model.layers.{i}.mlp", *row] for i, row in enumerate(load[0])]),
    "a total": lambda load: table(["layer", *map("expert_{}".format, range(EXPERTS)), "total_tokens"],
                                  [[i, *row, row.sum()] for i, row in enumerate(load[0])]),
    "columns of layers": lambda load: table(["expert", *map("layer_{}".format, range(LAYERS))],
                                            [[e, *row] for e, row in enumerate(load[0].T)]),
    "columns of layers, numbers": lambda load: table(["expert_id", *range(LAYERS)],
                                                     [[f"expert_{e}", *row] for e, row in enumerate(load[0].T)]),
    "no column of layers": lambda load: table(map("expert_{}".format, range(EXPERTS)), load[0]),
    "an index": lambda load: table(["", *map("expert_{}".format, range(EXPERTS))], [[i, *r] for i, r in enumerate(load[0])]),
    "cells with words": lambda load: table(["layer", "expert", "count"],
                                           [[f"layer_{r['layer']}", f"Expert {r['expert']}", r["count"]] for r in records(load, steps=False)]),
    "rows": lambda load: json.dumps(records(load, steps=False)),
    "rows under a key": lambda load: json.dumps({"rows": records(load, steps=False)}),
    "lines": lambda load: "\n".join(map(json.dumps, records(load, steps=False))),
    "text for numbers": lambda load: json.dumps([{k: str(v) for k, v in r.items()} for r in records(load, steps=False)]),
    "lists": lambda load: json.dumps({k: [r[k] for r in records(load, steps=False)] for k in ("expert", "count", "layer")}),
    "objects": lambda load: json.dumps({k: {str(i): r[k] for i, r in enumerate(records(load, steps=False))}
                                        for k in ("layer", "expert", "count")}),
    "split": lambda load: json.dumps({"columns": ["layer", "expert", "count"],
                                      "data": [list(r.values()) for r in records(load, steps=False)]}),
    "rows of layers": lambda load: json.dumps([{"layer": i, **{f"expert_{e}": int(n) for e, n in enumerate(row)}}
                                               for i, row in enumerate(load[0])]),
    "rows of lists": lambda load: json.dumps([{"layer": i, "tokens_per_expert": row.tolist()} for i, row in enumerate(load[0])]),
    "lines of lists": lambda load: "\n".join(json.dumps({"counts": row.tolist(), "layer": f"layer_{i}"})
                                             for i, row in enumerate(load[0])),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@given(seed=st.integers(0, 2**20), gz=st.booleans(), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_one_set_of_loads_in_many_ways(tmp_path, way, seed, gz, end, bom):
    load = loads(seed) + 1  # might be ids, but for their names
    text = ("\ufeff" * bom + end.join(WAYS[way](load).splitlines())).encode()
    path = tmp_path / "t"
    path.write_bytes(gzip.compress(text) if gz else text)
    np.testing.assert_array_equal(read_dump(path).profile.load_BLE, load)


@given(seed=st.integers(0, 2**20), ids=st.sets(st.integers(0, 60), min_size=2, max_size=6), data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_columns_of_layers_have_the_numbers_of_the_model_s_layers(tmp_path, seed, ids, data):
    """Whose first layers may be dense; in any order. Fails if they are taken by place, or gaps are refused."""
    order = data.draw(st.permutations(sorted(ids)))
    rng = np.random.default_rng(seed)
    load = {i: rng.multinomial(50_000, rng.dirichlet(np.ones(EXPERTS))) for i in ids}
    named = {name: table(["expert", *map(name.format, order)], [[e, *(load[i][e] for i in order)] for e in range(EXPERTS)])
             for name in ("layer_{}", "{}")}  # fmt: skip
    rows = json.dumps([{"expert": e, **{f"layer_{i}": int(load[i][e]) for i in order}} for e in range(EXPERTS)])
    for text in (*named.values(), rows):
        (tmp_path / "t").write_text(text)
        found = read_dump(tmp_path / "t").profile
        assert found.layer_ids.tolist() == sorted(ids)
        np.testing.assert_array_equal(found.load_BLE[0], [load[i] for i in sorted(ids)])


def test_columns_of_layers_are_those_of_the_model_that_is_named(tmp_path):
    model = ModelSpec.parse("deepseek-v3")
    load = np.random.default_rng(0).integers(5000, 9000, (model.num_experts, len(model.moe_layer_ids)))
    for first, said in ((3, None), (0, "a dense layer of")):
        head = ["expert", *(f"layer_{first + i}" for i in range(load.shape[1]))]
        (tmp_path / "t").write_text(table(head, [[e, *row] for e, row in enumerate(load)]))
        if said is None:
            found = read_dump(tmp_path / "t", options=ReadOptions(model)).profile
            assert tuple(found.layer_ids) == model.moe_layer_ids
            np.testing.assert_array_equal(found.load_BLE[0], load.T)
        else:
            with pytest.raises(TraceError, match=said):
                read_dump(tmp_path / "t", options=ReadOptions(model))


@pytest.mark.parametrize("mark", ["\t", ";"])
def test_other_marks(tmp_path, mark):
    (tmp_path / "t.csv").write_text(of_experts(loads(), mark=mark))
    np.testing.assert_array_equal(read_dump(tmp_path / "t.csv").profile.load_BLE, loads())


def test_steps_and_ranks_beside_columns_of_experts(tmp_path):
    load = loads(3, steps=5, most=9000)
    rows = [[f"{b}", i, *load[b, i]] for b in range(5) for i in range(LAYERS)]
    for text in (
        table(["step", "layer", *map("expert_{}".format, range(EXPERTS))], rows),
        "\n".join(json.dumps({"iteration": int(r[0]), "layer_id": r[1], "expert_counts": [int(n) for n in r[2:]]}) for r in rows),
        "\n".join(map(json.dumps, records(load, steps=True))),
    ):  # fmt: skip
        (tmp_path / "t").write_text(text)
        np.testing.assert_array_equal(read_dump(tmp_path / "t").profile.load_BLE, load)
    ranks = table(["ep_rank", "layer", *range(EXPERTS)], [[r, i, *load[r, i]] for r in range(2) for i in range(LAYERS)])
    (tmp_path / "t").write_text(ranks)
    np.testing.assert_array_equal(read_dump(tmp_path / "t").profile.load_BLE, load[:2].sum(axis=0, keepdims=True))


def test_a_line_of_thousands_of_names(tmp_path):
    load = np.random.default_rng(1).integers(0, 10**8, (3, 4000))
    text = table(["layer", *map("logical_expert_{}".format, range(4000))], [[i, *row] for i, row in enumerate(load)])
    for some in (text, "\n".join(text.splitlines()[1:]).replace("\n1,", "\n4,").replace("\n2,", "\n7,")):
        (tmp_path / "t.csv").write_text(some)
        found = read_dump(tmp_path / "t.csv").profile.load_BLE[0]
        np.testing.assert_array_equal(found[:, -4000:], load)


def picks(rows=24):
    rng = np.random.default_rng(2)
    return [rng.permutation(EXPERTS)[:3] for _ in range(rows)]


WIDE = [f"expert_{e}" for e in range(EXPERTS)]
SKEW = np.random.default_rng(0).multinomial(4000, np.random.default_rng(1).dirichlet(np.ones(EXPERTS)), LAYERS)


@pytest.mark.parametrize(
    "text, said",
    [
        (table(["layer", *(f"expert_{e}" for e in range(1, 9))], [[i, *row] for i, row in enumerate(loads()[0])]),
         "8 columns of experts, numbered 1 to 8; they seem to be counted from 1"),
        (table(["layer", *WIDE[:5], *WIDE[6:]], [[i, *row[:7]] for i, row in enumerate(loads()[0])]),
         "7 columns of experts, numbered 0 to 7"),
        (table(["layer", *WIDE, "expert_3"], [[i, *row, 1] for i, row in enumerate(loads()[0])]), "two columns of one expert"),
        (table(["expert", "layer_3", "layer_5", "layer_3"], [[e, 1, 2, 3] for e in range(4)]), "two columns of one layer"),
        (table(["layer", "expert_0", "expert_1", "expert_2"], [[i, *row] for i, row in enumerate(picks())]),
         "3 different numbers up to 7 in every row may be loads of 3 experts, or the 3 experts that a token chose"),
        (table(["expert_0", "expert_1", "expert_2"], picks(300)),
         "3 different numbers up to 7 in every row may be loads of 3 experts, or the 3 experts that a token chose"),
        (table(["", "expert_0", "expert_1", "expert_2"], [[i, *row] for i, row in enumerate(picks())]),
         "3 different numbers up to 7 in every row may be loads of 3 experts, or the 3 experts that a token chose"),
        (table(["layer", "expert_0", "expert_1", "expert_2"], [[i % 4, *row] for i, row in enumerate(picks())]),
         "6 rows of one layer, loads have one"),
        (table(["step", "layer", "expert_0", "expert_1", "expert_2"], [[i // 4, i % 4, *row] for i, row in enumerate(picks())]),
         "3 different numbers up to 7 in every row may be loads of 3 experts, or the 3 experts that a token chose"),
        (table(["token_id", "layer", "expert_0", "expert_1", "expert_2"], [[i // 4, i % 4, *row] for i, row in enumerate(picks())]),
         "column 'token_id' and 3 of experts"),
        (table(["expert", *map("layer_{}".format, range(EXPERTS))], [[i, *row] for i, row in enumerate(SKEW)]),
         "every expert has 4000 tokens, and layers from"),
        (table(["layer", *map("expert_{}".format, range(LAYERS))], [[i, *row] for i, row in enumerate(SKEW.T)]),
         "seems that layers and experts are exchanged"),
        (table(["", *WIDE], [[i + 3, *row] for i, row in enumerate(loads()[0])]), "column without a name goes from 3 to 6 in 4 rows"),
        (table(["layer", *WIDE], [[i, *row[:7], "x"] for i, row in enumerate(loads()[0])]), "no table of numbers"),
        (table(["layer", *WIDE], [[i, *row[:7], -1] for i, row in enumerate(loads()[0])]), "count must lie in"),
        (table(["step", *WIDE], [[i, *row] for i, row in enumerate(loads()[0])]), "no known format"),
        (json.dumps([{"layer": 0, "expert": 0, "count": 5}, {"layer": 0, "expert": 1}]), r"row 1 has \['expert', 'layer'\], row 0"),
        (json.dumps([{"layer": 0, "expert": 0, "count": 5}, {"layer": 0, "expert": 1, "count": None}]), "'count' of row 1 is 'None', no number"),
        (json.dumps([{"layer": 0, "expert": 0, "count": 5}, {"layer": 0, "expert": 1, "count": True}]), "'count' of row 1 is 'True', no number"),
        (json.dumps([{"layer": 0, "expert": 0, "count": 5}, {"layer": 0, "expert": 1.5, "count": 3}]), "expert must be whole numbers"),
        (json.dumps([{"layer": 0, "counts": [1, 2]}, {"layer": 1, "counts": [1]}]), "1 to 2 numbers in a row"),
        (json.dumps({"layer": [0, 0], "expert": [0], "count": [1, 2]}), "columns have 1 to 2 rows"),
        (json.dumps({"layer": {"0": 0}, "expert": {"1": 0}, "count": {"0": 1}}), "has other rows than the first one"),
        (json.dumps([{"layer": 0, "experts": [3, 5]}, {"layer": 1, "experts": [2, 6]}]), "no number"),
        (json.dumps([{"layer": 0, "expert": 0, "prob": 0.5}]), "column 'prob' may say how many"),
    ],
)  # fmt: skip
def test_tables_that_are_not_certain_or_not_whole_are_refused(tmp_path, text, said):
    (tmp_path / "t").write_text(text)
    with pytest.raises(TraceError, match=said):
        read_dump(tmp_path / "t")


def test_what_is_asked_can_be_answered(tmp_path):
    """Loads that look like choices, and names that are right though sums say otherwise."""
    chosen = table(
        ["step", "layer", "expert_0", "expert_1", "expert_2"], [[i // 4, i % 4, *r] for i, r in enumerate(picks())]
    )
    right = table(["layer", *map("expert_{}".format, range(LAYERS))], [[i, *row] for i, row in enumerate(SKEW.T)])
    alone = table(["expert_0", "expert_1", "expert_2"], picks())
    for text, options in ((alone, ReadOptions(format="load-table")), (alone, ReadOptions(num_experts=3))):
        (tmp_path / "t").write_text(text)
        np.testing.assert_array_equal(read_dump(tmp_path / "t", options=options).profile.load_BLE[0], picks())
    for text, options in ((chosen, ReadOptions(format="load-csv")), (chosen, ReadOptions(num_experts=3)),
                          (right, ReadOptions(format="load-csv"))):  # fmt: skip
        (tmp_path / "t").write_text(text)
        assert read_dump(tmp_path / "t", options=options).profile.num_experts in (3, LAYERS)


def test_as_many_columns_as_the_model_has_experts(tmp_path):
    (tmp_path / "t").write_text(of_experts(loads()))
    assert read_dump(tmp_path / "t", options=ReadOptions(num_experts=EXPERTS)).profile.num_experts == EXPERTS
    with pytest.raises(TraceError, match="8 columns of experts, the model 16"):
        read_dump(tmp_path / "t", options=ReadOptions(num_experts=16))


@pytest.mark.parametrize(
    "packed, said",
    [
        (bz2.compress, "packed by bzip2"), (lzma.compress, "packed by xz"), (lambda data: b"\x28\xb5\x2f\xfd" + data, "packed by zstd"),
        (lambda data: data.decode().encode("utf-16"), "text in UTF-16"), (lambda data: b"PAR1" + data, "Parquet"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", [WAYS["rows"], WAYS["expert_{}"]])
def test_what_has_to_be_unpacked_first_is_named(tmp_path, packed, said, text):
    (tmp_path / "t").write_bytes(packed(text(loads()).encode()))
    with pytest.raises(TraceError, match=rf"{said}, which is not read\nhint: unpack it"):
        read_dump(tmp_path / "t")


def test_a_zip_archive_of_other_files_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("counts.json", WAYS["rows"](loads()))
    with pytest.raises(TraceError, match=r"a zip archive of 'counts\.json' and 0 more"):
        read_dump(tmp_path / "t.zip")
