from __future__ import annotations

import hashlib

import pytest

from pocketvlm.data.openmoji import _names
from pocketvlm.data.openmoji_groups import base_concept
from pocketvlm.data.sample import ImageRef, Sample
from pocketvlm.data.source import DataSource
from pocketvlm.data.splits import FOLDS, check_pool, few_shots, has_caption, pool_of, stable_hash
from pocketvlm.edge.errors import UnknownNameError, UsageError


@pytest.fixture(scope="module")
def groups() -> list[str]:
    return sorted({base_concept(names["en"]) for names in _names().values()})


def test_hash_has_known_values() -> None:
    # the first eight bytes of the published SHA-256 test vectors for "" and "abc"
    assert stable_hash("") == 0xE3B0C44298FC1C14
    assert stable_hash("abc") == 0xBA7816BF8F01CFEA
    assert stable_hash("é") == int(hashlib.sha256(b"\xc3\xa9").hexdigest()[:16], 16)


def test_pools_have_known_values() -> None:
    found = {group: [pool_of(group, fold) for fold in range(5)] for group in ("cat", "dog", "running", "keycap")}
    assert found == {
        "cat": ["student", "student", "test", "student", "student"],
        "dog": ["teacher", "teacher", "test", "teacher", "teacher"],
        "running": ["student", "student", "student", "test", "student"],
        "keycap": ["student", "student", "student", "test", "student"],
    }


def test_five_folds_test_every_group_exactly_once(groups: list[str]) -> None:
    for group in groups:
        pools = [pool_of(group, fold) for fold in range(FOLDS)]
        assert pools.count("test") == 1
        assert len(set(pools) - {"test"}) == 1, "outside its test fold a group never changes sides"


@pytest.mark.parametrize("fold", range(FOLDS))
def test_pool_sizes(groups: list[str], fold: int) -> None:
    pools = [pool_of(group, fold) for group in groups]
    assert pools.count("test") / len(pools) == pytest.approx(0.2, abs=0.025)
    assert pools.count("student") / len(pools) == pytest.approx(0.4, abs=0.03)
    assert pools.count("teacher") / len(pools) == pytest.approx(0.4, abs=0.03)


def test_few_captions_are_nested_and_near_their_share(groups: list[str]) -> None:
    kept = [{group for group in groups if has_caption(group, share)} for share in (0.0, 0.1, 0.2, 0.5, 1.0)]
    assert kept[0] == set()
    assert kept[1] < kept[2] < kept[3] < kept[4] == set(groups)
    assert len(kept[1]) / len(groups) == pytest.approx(0.1, abs=0.025)
    student = {group for group in groups if pool_of(group, 0) == "student"}
    # independent of the pools: the student's share is the same as everybody's
    assert len(kept[1] & student) / len(student) == pytest.approx(0.1, abs=0.035)


def test_few_shots_are_nested_and_even() -> None:
    samples = [Sample(f"{name}{i}", ImageRef(data=b""), label=name) for name in "ab" for i in range(9)]
    samples.append(Sample("free", ImageRef(data=b"")))
    one, four, all_of_them = (few_shots(samples, shots) for shots in (1, 4, 99))
    assert one < four < all_of_them
    assert [sum(uid[0] == name for uid in four) for name in "abf"] == [4, 4, 0]
    assert few_shots(samples[::-1], 4) == four
    kept = DataSource("x", samples).select(shots=4).samples
    assert {sample.uid for sample in kept if sample.label is not None} == four
    assert len(kept) == 19
    for wrong in (samples[-1:], samples):
        with pytest.raises(UsageError, match="no sample would keep one"):
            few_shots(wrong, 0 if wrong is samples else 4)


@pytest.mark.parametrize(("fold", "folds"), [(-1, 5), (5, 5), (0, 1)])
def test_impossible_folds(fold: int, folds: int) -> None:
    with pytest.raises(UsageError, match="use folds >= 2"):
        pool_of("cat", fold, folds)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_impossible_share(share: float) -> None:
    with pytest.raises(UsageError, match="from 0"):
        has_caption("cat", share)


def test_unknown_pool_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'student'"):
        check_pool("students")
