"""Compiled functions: the cache on disk is a help, never a reason to fail or to run old code."""

import importlib.util
import os
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from poise.cost.route import locality_rows
from poise.planning.solve.complete import fill_layer
from poise.util.compilation import COMPILATION
from poise.util.compiled import plain

INNER = "from poise.util.compiled import compiled\nFACTOR = {factor}\n@compiled\ndef inner(x):\n    return x + {add}\n"
OUTER = (
    "from poise.util.compiled import compiled\nfrom inner_of_cache_test import FACTOR, inner\n"
    "@compiled(nogil=True)\ndef outer(x):\n    return FACTOR * inner(x)\n"
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A module of a name and a text, read afresh; the cache is an empty folder at first."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))

    def load(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run(load):
    """Value of outer(10) in modules read afresh, and how many functions were compiled for it."""

    def once(factor=3, add=1):
        before = COMPILATION.count
        load("inner_of_cache_test", INNER.format(factor=factor, add=add))
        return load("outer_of_cache_test", OUTER).outer(10), COMPILATION.count - before

    return once


def test_a_constant_or_a_narrow_int_compiles_nothing_anew(load):
    before = COMPILATION.count
    load("inner_of_cache_test", INNER.format(factor=3, add=1))
    outer = load(
        "outer_of_cache_test",
        "from poise.util.compiled import compiled\nfrom inner_of_cache_test import inner\n"
        "@compiled\ndef outer(narrow, wide):\n    return inner(narrow[0]) + inner(wide[0]) + inner(2) + inner(x=4)\n",
    ).outer
    assert outer(np.array([10], np.int16), np.array([20])) == 11 + 21 + 3 + 5
    assert COMPILATION.count - before == 2


def files(tmp_path, suffix):
    found = list((tmp_path / "cache").rglob(f"*{suffix}"))
    assert found
    return found


def test_compiled_once(run):
    assert run() == (33, 2)
    assert run() == (33, 0)


def test_a_changed_callee_or_constant_is_seen(run):
    run()
    assert run(add=2) == (36, 2)
    assert run(factor=5, add=2)[0] == 60
    assert run(factor=5, add=2) == (60, 0)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [b"", b"\x80garbage", b"\x00" * 4096, b"cos\nno_such_name\n."])
def test_a_damaged_cache_is_rebuilt(run, tmp_path, suffix, damage):
    run()
    for path in files(tmp_path, suffix):
        path.write_bytes(damage)
    assert run() == (33, 2)
    assert run() == (33, 0)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_cache_cut_short_is_rebuilt(run, tmp_path, keep):
    run()
    for path in [*files(tmp_path, ".nbi"), *files(tmp_path, ".nbc")]:
        os.truncate(path, int(path.stat().st_size * keep))
    assert run() == (33, 2)
    assert run() == (33, 0)


def test_a_flipped_bit_is_noticed(run, tmp_path):
    """In machine code it would be run; in an index it may name another file."""
    want = run()
    size = {path: path.stat().st_size for path in [*files(tmp_path, ".nbi"), *files(tmp_path, ".nbc")]}
    for path in size:
        for at in np.linspace(0, size[path] - 1, 9).astype(int):
            data = bytearray(path.read_bytes())
            data[at % len(data)] ^= 4
            path.write_bytes(data)
            assert run()[0] == want[0]
            assert run() == (want[0], 0)


def test_a_file_under_another_name_is_noticed(run, tmp_path):
    """As where two versions of a module write the files of one another."""
    run()
    inner, outer = sorted(files(tmp_path, ".nbc"))
    outer.write_bytes(inner.read_bytes())
    assert run() == (33, 1)
    assert run() == (33, 0)


def test_a_changed_table_is_seen(run, monkeypatch):
    monkeypatch.setitem(
        globals(),
        "INNER",
        INNER.replace("FACTOR = {factor}", "FACTOR = {factor}\nimport numpy as np\nTABLE = np.array([{add}])").replace(
            "+ {add}", "+ TABLE[0]"
        ),
    )
    assert run(add=1)[0] == 33
    assert run(add=2) == (36, 2)
    assert run(add=2) == (36, 0)


def test_a_record_whose_fields_change_places_is_seen(load):
    """Its type has the same length and the same parts; it may lie within another one, and come from any module."""
    for fields, times in (("x y", 1), ("x y", 0), ("y x", 1), ("y x", 0)):
        before = COMPILATION.count
        record = load(
            "record_of_cache_test", f"from collections import namedtuple\nRecord = namedtuple('Record', '{fields}')\n"
        )
        first = load(
            "first_of_cache_test",
            "from poise.util.compiled import compiled\n@compiled\ndef first(pair):\n    return pair[1].x\n",
        )
        assert first.first((0, record.Record(x=1.0, y=2.0))) == 1.0
        assert COMPILATION.count - before == times


def test_no_folder_for_a_cache(run, tmp_path, monkeypatch):
    for name in ("UserProvidedCacheLocator", "InTreeCacheLocator", "UserWideCacheLocator"):
        monkeypatch.setattr(getattr(numba.core.caching, name), "from_function", lambda *_: None)
    assert run() == (33, 2)
    assert run() == (33, 2)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_open_for_write", full)
    assert run() == (33, 2)
    assert run() == (33, 2)


def test_no_machine_code_tells_of_shapes():
    """An array that is assigned to a slice brings the text of its error along, strings and all, into each function that calls the one
    with it: seconds of compiling. Loops do the same.
    """
    fill_layer(np.eye(2, dtype=np.bool_), np.ones(2, np.int64), np.ones(2), True, np.zeros(2, np.int64))
    named = []
    for module in [module for name, module in sys.modules.items() if name.startswith("poise.")]:
        for name, value in vars(module).items():
            file = getattr(getattr(value, "_cache", None), "_cache_file", None)
            for path in file._load_index().values() if file is not None else ():
                found = Path(file._data_path(path))
                named.append((name, found.exists() and b"raise_with_shape" in found.read_bytes()))
    assert len(named) > 0 and not [name for name, told in named if told]


def test_fractions_are_not_cut_where_whole_numbers_are_asked_for():
    """Narrower whole numbers are widened; fractions, whose tokens would vanish, are refused."""
    assert plain(np.arange(3, dtype=np.int16), np.int64).tolist() == [0, 1, 2]
    assert plain(np.arange(3), np.float64).dtype == np.float64
    with pytest.raises(TypeError, match="float64 where int64 is asked for"):
        plain(np.array([1.5, 2.0]), np.int64)
    with pytest.raises(TypeError, match="float64 where int64"):
        locality_rows(np.ones((2, 1), np.int64), np.array([[0.5, 1.5]]), np.zeros(2, np.int64))
