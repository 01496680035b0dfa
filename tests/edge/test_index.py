"""`EmbeddingIndex`: what it finds beside brute force, what it refuses, what damage does to it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pocketvlm.edge.index as module
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError, VersionError
from pocketvlm.edge.index import DTYPES, EmbeddingIndex
from pocketvlm.edge.index_binary import hamming_nearest
from pocketvlm.edge.index_filter import parse_where
from pocketvlm.edge.index_store import to_int8

ROWS, DIM = 1500, 32
TOLERANCE = {"f32": 1e-6, "f16": 2e-3, "int8": 1.5e-2, "binary": 1.5e-2}


def clustered(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Unit rows around 40 centres, which share a direction as the embeddings of one model do."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, dim)) + 0.7
    rows = centres[generator.integers(40, size=count)] + 0.6 * generator.normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def facts_of(number: int) -> dict[str, Any]:
    return {"n": number, "tens": number % 10, "kind": ["cat", "dog", "boat"][number % 3], "half": number / 2}


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph and codes from 200 rows on, so that tests are quick."""
    monkeypatch.setattr(module, "CACHE_FROM", 200)
    monkeypatch.setattr(module, "TAIL", 20)


@pytest.fixture(scope="module", params=DTYPES)
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingIndex]:
    """1,500 rows with a cache, 100 after it, 60 removed from both. Tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CACHE_FROM", 200)
        index = EmbeddingIndex.create(tmp_path_factory.mktemp("filled") / "x", "s", DIM, dtype=request.param)
        rows = clustered(ROWS + 100)
        index.add([f"k{n}" for n in range(ROWS)], rows[:ROWS] * 3, [facts_of(n) for n in range(ROWS)], space="s")
        index.save(threads=1)
        later = range(ROWS, ROWS + 100)
        index.add([f"k{n}" for n in later], rows[ROWS:], [facts_of(n) for n in later], space="s")
        index.remove([f"k{n}" for n in range(5, ROWS + 100, 27)])
        yield index
        index.close()


ALIVE = np.array([n for n in range(ROWS + 100) if n not in range(5, ROWS + 100, 27)])


def brute(query: np.ndarray, k: int, passing: Any = lambda facts: True) -> list[str]:
    rows = clustered(ROWS + 100)
    alive = [n for n in ALIVE if passing(facts_of(n))]
    scores = rows[alive].astype(np.float64) @ query if alive else np.zeros(0)
    return [f"k{alive[place]}" for place in np.argsort(-scores, kind="stable")[:k]]


# --- finding ------------------------------------------------------------------------------------------------


def test_exact_search_is_brute_force(filled: EmbeddingIndex) -> None:
    queries = clustered(12, seed=1)
    found = filled.search(queries, 20, space="s", exact=True)
    rows = clustered(ROWS + 100)
    for query, hits in zip(queries, found):
        assert len(hits) == 20
        for hit in hits:
            assert hit.score == pytest.approx(float(rows[int(hit.key[1:])] @ query), abs=TOLERANCE[filled.dtype])
            assert hit.metadata == facts_of(int(hit.key[1:]))
        wanted = brute(query, 20)
        assert len(set(wanted) & {hit.key for hit in hits}) >= (20 if filled.dtype == "f32" else 17)
        if filled.dtype == "f32":
            assert [hit.key for hit in hits] == wanted


def test_the_cache_finds_what_exact_search_finds(filled: EmbeddingIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_FROM", 200)
    monkeypatch.setattr(EmbeddingIndex, "_exact", None)  # the graph or the codes answer
    queries = clustered(100, seed=2)
    found = filled.search(queries, 10, space="s", candidates=200)
    monkeypatch.undo()
    exact = filled.search(queries, 10, space="s", exact=True)
    same = [len({hit.key for hit in a} & {hit.key for hit in b}) for a, b in zip(found, exact)]
    assert np.mean(same) > 9.5
    assert any(int(hit.key[1:]) >= ROWS for hits in found for hit in hits), "rows after the cache are found too"
    assert {hit.score for hits in found for hit in hits} <= {hit.score for hits in exact for hit in hits} | {
        hit.score for hits in found for hit in hits
    }


def test_what_was_removed_is_not_found(filled: EmbeddingIndex) -> None:
    rows = clustered(ROWS + 100)
    for exact in (True, False):
        hits = filled.search(rows[5:500:27], 3, space="s", exact=exact)
        assert {hit.key for some in hits for hit in some} <= {f"k{n}" for n in ALIVE}
    assert "k5" not in filled
    assert "k6" in filled
    assert len(filled) == len(ALIVE) == len(list(filled.keys()))


def test_k_beyond_the_rows_gives_all_of_them(filled: EmbeddingIndex) -> None:
    query = clustered(1, seed=3)
    assert len(filled.search(query, 5000, space="s")[0]) == len(ALIVE)
    assert filled.search(query, 50, space="s", where={"n": -1}) == [[]]


def test_a_duplicated_row_a_thousand_times(tmp_path: Path, small_caches: None) -> None:
    """Graphs of equal rows fall apart, and equal codes have no nearest."""
    for dtype in ("f16", "binary"):
        with EmbeddingIndex.create(tmp_path / dtype, "s", DIM, dtype=dtype) as index:  # type: ignore[arg-type]
            row = clustered(1)
            index.add(
                [str(n) for n in range(1000)], np.repeat(row, 1000, 0), [{"n": n} for n in range(1000)], space="s"
            )
            index.save(threads=1)
            assert len(index.search(row, 300, space="s")[0]) == 300
            assert len(index.search(row, 1000, space="s")[0]) == 1000
            assert [hit.key for hit in index.search(-row, 1, space="s", where={"n": 7})[0]] == ["7"]


@pytest.mark.parametrize("dim", [1, 7, 64, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_width(tmp_path: Path, dtype: Any, dim: int, small_caches: None) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", dim, dtype=dtype) as index:
        rows = clustered(300, dim=dim)
        index.add([str(n) for n in range(300)], rows, space="s")
        index.save(threads=1)
        assert index.search(rows[:1], 1, space="s", candidates=300)[0][0].score == pytest.approx(1, abs=0.01)


def test_int8_rows_keep_seven_bits_however_small_their_numbers_are() -> None:
    rows = clustered(50, dim=1024)
    scale, codes = to_int8(rows)
    assert np.abs(codes).max(axis=1).min() == 127
    assert np.abs(codes * scale[:, None] - rows).max() <= scale.max() / 2 * 1.001


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_hamming_search_is_a_sort(data: st.DataObject) -> None:
    count, width = data.draw(st.integers(0, 60)), data.draw(st.sampled_from([1, 2, 8, 12, 24]))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = generator.integers(0, 4, (count, width)).astype(np.uint8)
    query = generator.integers(0, 4, width).astype(np.uint8)
    mask = generator.random(count) < 0.7
    wanted = data.draw(st.integers(1, 70))
    distances = [bin(int.from_bytes((row ^ query).tobytes(), "big")).count("1") for row in codes]
    best = sorted((distance, n) for n, distance in enumerate(distances) if mask[n])[:wanted]
    assert set(hamming_nearest(codes, query, mask, wanted).tolist()) == {n for _, n in best}


# --- filters ------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.sampled_from([0.1, 0.5, -1.0, 1.0, 1e300, 5e-324]),
    st.sampled_from(["", "a", "b", "1", "é", "\U0001f6f6", "a\0b", "'; --", '"']),
)
NAMES = st.sampled_from(["x", "y", 'q"uote', "", "$.x"])
OPERATORS = st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "in"])


def passes(facts: dict[str, Any], where: dict[str, Any]) -> bool:
    """The meaning of a filter, in Python."""
    for name, wanted in where.items():
        value = facts.get(name)
        conditions = wanted if isinstance(wanted, dict) else {"in" if isinstance(wanted, list) else "==": wanted}
        for sign, bound in conditions.items():
            if sign == "==":
                fine = value == bound
            elif sign == "!=":
                fine = value != bound
            elif sign == "in":
                fine = value in bound
            elif value is None or isinstance(value, str) != isinstance(bound, str):
                fine = False
            else:
                fine = {"<": value < bound, "<=": value <= bound, ">": value > bound, ">=": value >= bound}[sign]
            if not fine:
                return False
    return True


@st.composite
def filters(draw: Any) -> dict[str, Any]:
    where: dict[str, Any] = {}
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        if draw(st.booleans()):
            where[name] = draw(st.one_of(VALUES, st.lists(VALUES, max_size=3)))
            continue
        where[name] = {}
        for sign in draw(st.lists(OPERATORS, max_size=2, unique=True)):
            ordered = sign[0] in "<>"
            value = draw(VALUES.filter(lambda value: value is not None) if ordered else VALUES)
            where[name][sign] = draw(st.lists(VALUES, max_size=3)) if sign == "in" else value
    return where


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.dictionaries(NAMES, VALUES, max_size=3), min_size=1, max_size=12),
    st.lists(filters(), min_size=5, max_size=20),
)
def test_filters_mean_what_they_mean_in_python(
    tmp_path_factory: pytest.TempPathFactory, metadata: list[dict[str, Any]], wheres: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("filters")
    with EmbeddingIndex.create(folder / "x", "s", 4) as index:
        rows = clustered(len(metadata), dim=4)
        index.add([str(n) for n in range(len(metadata))], rows, metadata, space="s")
        index.remove("0")
        index.add("again", rows[:1], metadata[:1], space="s")
        for where in wheres:
            found = {hit.key for hit in index.search(rows[0], 99, space="s", where=where)[0]}
            wanted = {str(n) for n, facts in enumerate(metadata) if n and passes(facts, where)}
            assert found == wanted | ({"again"} if passes(metadata[0], where) else set())
        for hit in index.search(rows[0], 99, space="s")[0]:
            assert hit.metadata == metadata[0 if hit.key == "again" else int(hit.key)]
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("where", "passing"),
    [
        ({"tens": 3}, lambda f: f["tens"] == 3),
        ({"kind": ["cat", "boat"]}, lambda f: f["kind"] != "dog"),
        ({"half": {">=": 100, "<": 700.5}}, lambda f: 100 <= f["half"] < 700.5),
        ({"n": {">": 1400}}, lambda f: f["n"] > 1400),
        ({"n": {"<": 3}}, lambda f: f["n"] < 3),
    ],
)
def test_as_many_as_asked_for_are_found_behind_a_filter(
    filled: EmbeddingIndex, where: Any, passing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_FROM", 200)
    for query in clustered(10, seed=4):
        hits = filled.search(query, 25, space="s", where=where)[0]
        wanted = brute(query, 25, passing)
        assert len(hits) == len(wanted)
        assert all(passing(hit.metadata) for hit in hits)
        assert len({hit.key for hit in hits} & set(wanted)) >= 0.7 * len(wanted)


def test_a_filter_against_the_query_still_gives_k(tmp_path: Path, small_caches: None) -> None:
    """What passes lies at the far end: the graph is asked for more and more, and then every row."""
    with EmbeddingIndex.create(tmp_path / "x", "s", DIM) as index:
        rows = clustered(3000)
        order = np.argsort(rows @ rows[0])
        far = set(order[:400].tolist())
        index.add([str(n) for n in range(3000)], rows, [{"far": n in far} for n in range(3000)], space="s")
        index.save(threads=1)
        hits = index.search(rows[0], 10, space="s", where={"far": True})[0]
        assert len(hits) == 10
        assert len({hit.key for hit in hits} & {str(n) for n in order[390:400]}) >= 8


def test_filters_of_the_command_line() -> None:
    assert parse_where(["year>=2020", "year<2024", "folder=a=b", "name != x", "tag=[1, 2]", "seen=null"]) == {
        "year": {">=": 2020, "<": 2024},
        "folder": {"==": "a=b"},
        "name": {"!=": "x"},
        "tag": {"in": [1, 2]},
        "seen": {"==": None},
    }
    for wrong in ("year", "=3", ""):
        with pytest.raises(UsageError, match="has no operator"):
            parse_where([wrong])


# --- changing -----------------------------------------------------------------------------------------------


def test_an_empty_index(tmp_path: Path) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", 3) as index:
        assert index.search([1, 2, 3], space="s") == [[]]
        assert index.search(np.zeros((0, 3)), space="s") == []
        index.add([], np.zeros((0, 3)), space="s")
        index.save(compact=True)
        index.verify()
        assert (len(index), list(index.keys()), index.remove([])) == (0, [], 0)
        index.add("one", [0, 0, 2.0], space="s")
        assert [(hit.key, hit.score) for hit in index.search([0, 0, 1], space="s")[0]] == [("one", 1.0)]
        index.remove("one")
        index.save(compact=True)
        assert index.search([0, 0, 1], space="s") == [[]]


def test_replacing_and_removing(tmp_path: Path) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", 2) as index:
        index.add(["a", "b"], [[1, 0], [0, 1]], [{"v": 1}, {"v": 1}], space="s")
        with pytest.raises(UsageError, match=r"key 'b' .* is in the index already"):
            index.add(["c", "b"], [[1, 0], [1, 1]], space="s")
        assert "c" not in index
        index.add(["c", "b"], [[1, 0], [1, 1]], [{"v": 2}, {"v": 2}], space="s", replace=True)
        assert sorted(index.keys()) == ["a", "b", "c"]
        assert {hit.key for hit in index.search([1, 0], space="s", where={"v": 1})[0]} == {"a"}
        with pytest.raises(UsageError, match=r"key 'nobody' .* is not in index"):
            index.remove(["a", "nobody"])
        assert "a" in index
        assert index.remove(["a", "nobody", "a"], missing_ok=True) == 1
        with pytest.raises(UsageError, match="is not in index"):
            index.get(["a"])


def test_compacting_wipes_what_was_removed(tmp_path: Path) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", 8, dtype="f32") as index:
        rows = clustered(50, dim=8)
        index.add([str(n) for n in range(50)], rows, [{"n": n} for n in range(50)], space="s")
        index.add("a private key", rows[10], {"word": "a private word"}, space="s")
        index.remove([*(str(n) for n in range(0, 50, 10)), "a private key"])
        secret = rows[10].tobytes()
        index.save()
        assert secret in b"".join(path.read_bytes() for path in index.path.glob("vectors-*"))
        index.save(compact=True)
        assert secret not in b"".join(path.read_bytes() for path in index.path.glob("vectors-*"))
        assert b"a private" not in b"".join(path.read_bytes() for path in index.path.iterdir())
        index.verify()
        for n in (1, 11, 49):
            assert index.search(rows[n], 1, space="s", where={"n": n})[0][0].key == str(n)
        np.testing.assert_array_equal(index.get(["11"]), rows[11:12])


def test_a_fifth_removed_is_compacted_by_save(tmp_path: Path, small_caches: None) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", DIM) as index:
        rows = clustered(500)
        index.add([str(n) for n in range(500)], rows, space="s")
        index.save(threads=1)
        index.remove([str(n) for n in range(0, 500, 4)])
        size = (index.path / "vectors-0.bin").stat().st_size
        index.save(threads=1)
        assert sorted(path.name.split(".")[0] for path in index.path.glob("vectors-*")) == ["vectors-1"]
        assert (index.path / "vectors-1.bin").stat().st_size == size * 3 // 4
        assert index.search(rows[1], 1, space="s")[0][0].key == "1"


def test_a_cache_is_extended(tmp_path: Path, small_caches: None) -> None:
    for dtype in ("f32", "binary"):
        with EmbeddingIndex.create(tmp_path / dtype, "s", DIM, dtype=dtype) as index:  # type: ignore[arg-type]
            rows = clustered(900)
            for at in (0, 300, 310, 500):
                upto = {0: 300, 300: 310, 310: 500, 500: 900}[at]
                index.add([str(n) for n in range(at, upto)], rows[at:upto], space="s")
                index.save(threads=1)
            assert len(list(index.path.glob("cache-*"))) == 1
            hits = index.search(rows, 1, space="s", candidates=100)
            assert np.mean([some[0].key == str(n) for n, some in enumerate(hits)]) > 0.98


def test_an_index_is_reopened_by_another_object(tmp_path: Path, small_caches: None) -> None:
    rows = clustered(600)
    with EmbeddingIndex.create(tmp_path / "x", "s", DIM) as writer, EmbeddingIndex.load(tmp_path / "x") as reader:
        for at in range(0, 600, 200):
            writer.add([str(n) for n in range(at, at + 200)], rows[at : at + 200], space="s")
            assert len(reader) == at + 200
            assert reader.search(rows[at], 1, space="s")[0][0].key == str(at)
        writer.save(threads=1)
        assert reader.search(rows[3], 1, space="s")[0][0].key == "3"
        writer.remove([str(n) for n in range(300)])
        writer.save(compact=True, threads=1)
        assert reader.search(rows[3], 600, space="s")[0][0].key != "3"
        assert reader.search(rows[400], 1, space="s")[0][0].key == "400"


# --- refusals -----------------------------------------------------------------------------------------------

MODEL = SimpleNamespace(contract=SimpleNamespace(space_id="s"), dim=4)


def test_a_model_brings_its_space_and_width(tmp_path: Path) -> None:
    with EmbeddingIndex.create(tmp_path / "x", MODEL) as index:
        assert (index.space_id, index.dim, index.dtype) == ("s", 4, "f16")
        index.add("a", [1, 0, 0, 0], space=MODEL)
        teacher = SimpleNamespace(contract=SimpleNamespace(space_id="s"), dim=4)
        assert index.search([1, 0, 0, 0], space=teacher)[0][0].key == "a"
        other = SimpleNamespace(contract=SimpleNamespace(space_id="other"), dim=4)
        for call in (
            lambda: index.search([1, 0, 0, 0], space=other),
            lambda: index.add("b", [1, 0, 0, 0], space=other),
        ):
            with pytest.raises(UsageError, match=r"embedding space 'other' were given and index .* holds 's'"):
                call()
    with pytest.raises(UsageError, match="the model gives 4 numbers"):
        EmbeddingIndex.create(tmp_path / "y", MODEL, 3)
    with pytest.raises(UsageError, match="its width is expected"):
        EmbeddingIndex.create(tmp_path / "y", "s")


@pytest.mark.parametrize(
    ("keys", "vectors", "metadata", "message"),
    [
        (["a"], [[1, 2, 3]], None, r"shape \(1, 3\) was given and \[N, 2\]"),
        (["a"], [[[1, 2]]], None, r"shape \(1, 1, 2\)"),
        (["a", "b"], [[1, 2], [np.nan, 1]], None, "vector 1 .* holds NaN"),
        (["a"], [[np.inf, 1]], None, "holds NaN or infinity"),
        (["a"], [[0, 0]], None, "is zero"),
        (["a"], [["x", "y"]], None, "numbers are expected"),
        (["a", "b"], [[1, 2]], None, "2 keys were given with 1 vectors"),
        (["a"], [[1, 2]], [{}, {}], "2 metadata"),
        (["a", "b", "a"], [[1, 2]] * 3, None, "key 'a' is given more than once"),
        ([3], [[1, 2]], None, "the key 3 was given and text"),
        (["\udc80"], [[1, 2]], None, "the key .* could not be stored"),
        (["a"], [[1, 2]], [{"x": [1]}], r"'x' has the value '\[1\]' \(list\)"),
        (["a"], [[1, 2]], [{"x": float("nan")}], "finite numbers"),
        (["a"], [[1, 2]], [{"x": 1 << 63}], "64 bits"),
        (["a"], [[1, 2]], [{"x": "\ud800"}], "metadata holds text"),
        (["a"], [[1, 2]], [{3: "x"}], "metadata has the name 3"),
    ],
)
def test_what_cannot_be_added_changes_nothing(
    tmp_path: Path, keys: Any, vectors: Any, metadata: Any, message: str
) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", 2) as index:
        with pytest.raises(UsageError, match=message):
            index.add(keys, vectors, metadata, space="s")
        assert len(index) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0 was given"),
        ({"where": {"x": {"<": None}}}, "< None has no meaning"),
        ({"where": {"x": {"in": "abc"}}}, "a list is expected"),
        ({"where": {"x": {"~": 1}}}, "unknown filter operator '~'"),
        ({"where": {"x": object()}}, "no filter could compare it"),
        ({"where": {3: 1}}, "the name 3"),
    ],
)
def test_what_cannot_be_searched(tmp_path: Path, arguments: Any, message: str) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", 2) as index:
        index.add("a", [1, 2], space="s")
        with pytest.raises(UsageError, match=message):
            index.search([1, 2], space="s", **arguments)
        with pytest.raises(UsageError, match=r"query 0 .* holds NaN"):
            index.search([np.nan, 2], space="s")
        assert len(index.search([1, 2], space="s")[0]) == 1


def test_where_an_index_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(UsageError, match="not an empty folder"):
            EmbeddingIndex.create(tmp_path / name, "s", 2)
    with pytest.raises(UnknownNameError, match="dtype of an index"):
        EmbeddingIndex.create(tmp_path / "x", "s", 2, dtype="int4")  # type: ignore[arg-type]
    for name, problem in (("file", "is a file"), ("full", "holds no index"), ("nowhere", "does not exist")):
        with pytest.raises(UsageError, match=problem):
            EmbeddingIndex.load(tmp_path / name)
    with pytest.raises(UsageError, match="an index cannot be made"):
        EmbeddingIndex.create(tmp_path / "file" / "below", "s", 2)


# --- damage -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["f32", "binary"])
def closed(request: pytest.FixtureRequest, tmp_path: Path, small_caches: None) -> Path:
    with EmbeddingIndex.create(tmp_path / "x", "s", DIM, dtype=request.param) as index:
        index.add([str(n) for n in range(400)], clustered(400), space="s")
        index.save(threads=1)
    return tmp_path / "x"


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0xFF
    path.write_bytes(raw)


def test_rows_cut_short_are_refused(closed: Path) -> None:
    path = closed / "vectors-0.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"vectors-0.bin has .* bytes and 400 rows need .* make it again"):
        EmbeddingIndex.load(closed)
    path.unlink()
    with pytest.raises(IntegrityError, match="has 0 bytes"):
        EmbeddingIndex.load(closed)


def test_a_changed_row_is_found_by_verify(closed: Path) -> None:
    flip(closed / "vectors-0.bin", 777)
    EmbeddingIndex.load(closed).close()
    with pytest.raises(IntegrityError, match="differ from their checksum"):
        EmbeddingIndex.load(closed, verify=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_broken_cache_costs_time_and_nothing_else(closed: Path, damage: str) -> None:
    (path,) = closed.glob("cache-*")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "flipped":
        flip(path, path.stat().st_size // 2)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    rows = clustered(400)
    with pytest.warns(UserWarning, match=r"is not used: it .* until save"):
        index = EmbeddingIndex.load(closed)
    with index, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index.search(rows[7], 1, space="s")[0][0].key == "7"
        index.save(threads=1)
        assert index._current_cache(index._store.state()) is not None
        assert index.search(rows[7], 1, space="s")[0][0].key == "7"


def test_a_database_that_is_none(closed: Path) -> None:
    for raw, problem in ((b"not sqlite at all" * 100, "index.sqlite cannot be read"), (b"", "is no index of this kit")):
        (closed / "index.sqlite").write_bytes(raw)
        with pytest.raises(IntegrityError, match=problem):
            EmbeddingIndex.load(closed)
    (closed / "index.sqlite").unlink()
    sqlite3.connect(closed / "index.sqlite").executescript("CREATE TABLE meta (name, value);")
    with pytest.raises(IntegrityError, match="is no index of this kit"):
        EmbeddingIndex.load(closed)


def test_a_database_cut_short(closed: Path) -> None:
    path = closed / "index.sqlite"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(IntegrityError, match=r"index.sqlite (cannot be read|is inconsistent)"):
        EmbeddingIndex.load(closed, verify=True)
    with pytest.raises(IntegrityError, match=r"index.sqlite cannot be read"), EmbeddingIndex.load(closed) as index:
        index.search(clustered(400), 400, space="s")


def test_an_index_of_a_later_release(closed: Path) -> None:
    db = sqlite3.connect(closed / "index.sqlite")
    db.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (json.dumps("2.0"),))
    db.commit()
    db.close()
    with pytest.raises(VersionError, match=r"has schema 2.0 and this release reads 1.0"):
        EmbeddingIndex.load(closed)


def test_a_folder_that_cannot_be_written_to_can_be_searched(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root everything can be written to, so the answer of the system is replaced; the lock is a folder."""
    (closed / "writer.lock").unlink()
    (closed / "writer.lock").mkdir()
    monkeypatch.setattr("pocketvlm.edge.index_store.os.access", lambda path, mode: False)
    before = sorted(path.name for path in closed.iterdir())
    with EmbeddingIndex.load(closed, verify=True) as index:
        assert index.search(clustered(400)[3], 1, space="s")[0][0].key == "3"
        with pytest.raises(UsageError, match=r"cannot be written to .* can still be searched"):
            index.add("new", clustered(1), space="s")
        assert sorted(path.name for path in closed.iterdir()) == before


def test_threads_share_one_object(tmp_path: Path, small_caches: None) -> None:
    rows = clustered(600)
    with EmbeddingIndex.create(tmp_path / "x", "s", DIM) as index, ThreadPoolExecutor(8) as pool:
        index.add([str(n) for n in range(300)], rows[:300], space="s")
        index.save(threads=1)

        def work(n: int) -> bool:
            if n % 30 == 0:
                index.add(str(300 + n), rows[300 + n], space="s")
                return True
            return index.search(rows[n], 1, space="s")[0][0].key == str(n)

        assert np.mean(list(pool.map(work, range(300)))) > 0.98
        assert len(index) == 310


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    with EmbeddingIndex.create(tmp_path / "x", "s", 4) as index:
        index.add("a", [1, 0, 0, 0], space="s")
        pages = index._store.db.execute("PRAGMA page_count").fetchone()[0]
        index._store.db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(UsageError, match=r"cannot be written to \(database or disk is full\)"):
            index.add([str(n) for n in range(5000)], np.ones((5000, 4)), space="s")
        assert list(index.keys()) == ["a"]
        index._store.db.execute("PRAGMA max_page_count = 1000000")
        index.add("b", [0, 1, 0, 0], space="s")
        index.verify()
