"""Metrics against loop oracles written from their definitions, and budgets that cannot be talked round."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pocketvlm.edge.errors import UnknownNameError, UsageError, VersionError
from pocketvlm.export.budgets import load_budgets
from pocketvlm.export.compare import (
    drift,
    expected_calibration_error,
    paired_change,
    queries_needed,
    ranking_change,
    row_error,
    spearman_rows,
    tango_bound,
    target_ranks,
    top_k_overlap,
    top_one_flips,
)


def _rows(seed: int, n: int = 12, d: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


# --- embeddings ---------------------------------------------------------------------------------------------------


def test_drift_equals_a_loop_over_rows() -> None:
    ref, cand = _rows(0), _rows(0) + 0.05 * _rows(1)
    found = drift(ref, cand)
    cosines, ratios, relative = [], [], 0.0
    for a, b in zip(ref.tolist(), cand.tolist()):
        na, nb = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        cosines.append(sum(x * y for x, y in zip(a, b)) / na / nb)
        ratios.append(nb / na)
        rms = na / math.sqrt(len(a))
        relative = max(relative, max(abs(x - y) / max(abs(x), 0.1 * rms) for x, y in zip(a, b)))
    signal = sum(x * x for x in ref.ravel().tolist())
    noise = sum((x - y) ** 2 for x, y in zip(ref.ravel().tolist(), cand.ravel().tolist()))
    assert found.one_minus_cosine_mean == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-14)
    assert found.cosine_min == pytest.approx(min(cosines), abs=1e-14)
    assert found.worst == cosines.index(min(cosines))
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    assert (found.norm_ratio_min, found.norm_ratio_max) == pytest.approx((min(ratios), max(ratios)))
    assert found.max_rel == pytest.approx(relative)


def test_a_tiny_angle_is_not_lost_to_cancellation() -> None:
    # 1 - cos(1e-9) is 5e-19, far below float64's spacing at 1
    ref = np.array([[1.0, 0.0]])
    assert row_error(ref, np.array([[math.cos(1e-9), math.sin(1e-9)]]))[0] == pytest.approx(5e-19, rel=1e-6)


def test_identical_rows_have_no_error_and_a_finite_decibel_value() -> None:
    found = drift(_rows(0), _rows(0))
    assert found.one_minus_cosine_max == 0
    assert found.sqnr_db == 300


def test_cosine_is_blind_to_scale_and_the_norm_is_not() -> None:
    found = drift(_rows(0), 3 * _rows(0))
    assert found.one_minus_cosine_max < 1e-15
    assert found.norm_error == pytest.approx(2)
    assert found.sqnr_db < 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_spoils_every_measure(bad: float) -> None:
    cand = _rows(0)
    cand[3, 2] = bad
    found = drift(_rows(0), cand)
    assert found.non_finite == 1
    assert math.isnan(found.one_minus_cosine_mean)
    assert math.isnan(found.sqnr_db)
    assert found.worst == 3
    assert found.to_dict()["cosine_min"] is None


def test_a_collapsed_row_is_maximally_wrong() -> None:
    cand = _rows(0)
    cand[5] = 0
    assert drift(_rows(0), cand).one_minus_cosine_max == 1


@pytest.mark.parametrize("shape", [(0, 4), (3, 5)])
def test_nothing_to_compare_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="nothing can be compared"):
        drift(np.zeros((3, 4)) if shape[0] else np.zeros(shape), np.zeros(shape))


def test_a_broken_reference_is_refused() -> None:
    with pytest.raises(UsageError, match="record it again"):
        drift(np.array([[np.nan]]), np.array([[1.0]]))


# --- rankings -----------------------------------------------------------------------------------------------------


def test_ranks_count_ties_against_the_model() -> None:
    scores = np.array([[0.5, 0.9, 0.5], [0.2, 0.2, 0.2]])
    positives = np.array([[True, False, False], [False, True, False]])
    assert target_ranks(scores, positives).tolist() == [3, 3]


def test_several_positives_do_not_compete() -> None:
    assert target_ranks(np.array([[0.9, 0.8, 0.7]]), np.array([[False, True, True]])).tolist() == [2]


def test_flips_know_near_ties() -> None:
    reference = np.array([[0.5, 0.4999, 0.1], [0.5, 0.3, 0.1]])
    candidate = np.array([[0.4, 0.5, 0.1], [0.2, 0.3, 0.1]])
    flips = top_one_flips(reference, candidate, tie=1e-3)
    assert [(flip.query, flip.near_tie) for flip in flips] == [(0, True), (1, False)]
    assert flips[1].margin == pytest.approx(0.2)


def test_overlap_forgives_only_ties_at_the_edge() -> None:
    reference = np.array([[4.0, 3.0, 2.0, 1.9999, 0.0]])
    swapped, wrong = np.array([[4.0, 3.0, 1.0, 2.0, 0.0]]), np.array([[4.0, 0.0, 2.0, 1.0, 3.0]])
    assert top_k_overlap(reference, swapped, 3, tie=0.0)[0] == pytest.approx(2 / 3)
    assert top_k_overlap(reference, swapped, 3, tie=1e-3)[0] == 1
    assert top_k_overlap(reference, wrong, 3, tie=1e-3)[0] == pytest.approx(2 / 3)


def test_spearman_equals_its_definition_with_ties() -> None:
    a, b = np.array([[1.0, 2.0, 2.0, 5.0]]), np.array([[0.3, 0.1, 0.4, 0.4]])
    ra, rb = np.array([1, 2.5, 2.5, 4]), np.array([2, 1, 3.5, 3.5])
    assert spearman_rows(a, b)[0] == pytest.approx(np.corrcoef(ra, rb)[0, 1])
    assert spearman_rows(a, -a)[0] == pytest.approx(-1)
    assert spearman_rows(a, np.ones_like(a))[0] == 0


def test_ranking_change_separates_ties_from_changes() -> None:
    positives = np.eye(3, dtype=bool)
    reference = np.array([[0.50, 0.4999, 0.1], [0.1, 0.9, 0.2], [0.0, 0.1, 0.9]])
    tied = reference.copy()
    tied[0, :2] = 0.4999, 0.50
    broken = reference.copy()
    broken[2] = 0.9, 0.1, 0.0
    assert ranking_change(reference, tied, positives, tie=1e-3, ks=(1,)).hard_changes == 0
    assert ranking_change(reference, tied, positives, tie=1e-6, ks=(1,)).hard_changes == 1
    change = ranking_change(reference, broken, positives, tie=1e-3, ks=(1, 2))
    assert change.hard_changes == 1
    assert (change.changes[1].lost, change.changes[1].gained) == (1, 0)
    assert change.top1_agreement == pytest.approx(2 / 3)


def test_non_finite_scores_have_no_order() -> None:
    with pytest.raises(UsageError, match="no order"):
        ranking_change(np.eye(2), np.array([[np.nan, 0], [0, 1]]), np.eye(2, dtype=bool), tie=0)


def test_calibration_error_by_hand() -> None:
    # two queries, two classes, equal scores: confidence 0.5; argmax takes class 0, right once
    scores = np.zeros((2, 2))
    assert expected_calibration_error(scores, np.array([0, 1]), 10.0) == pytest.approx(0)
    assert expected_calibration_error(scores, np.array([0, 0]), 10.0) == pytest.approx(0.5)


# --- paired bounds ------------------------------------------------------------------------------------------------


def _brute_force_bound(lost: int, gained: int, n: int) -> float:
    """Largest d on a grid that the score test at one-sided 5 % does not reject; q by direct maximisation."""
    best = -1.0
    q = np.linspace(1e-9, 0.5, 20_001)
    for d in np.linspace((lost - gained) / n, min(0.3, (lost - gained) / n + 0.2), 401):
        keep = (q + max(d, 0) < 1) & (1 - 2 * q - d > 0) & (q + d > 0)
        x = q[keep]
        likelihood = lost * np.log(x + d) + gained * np.log(x) + (n - lost - gained) * np.log(1 - 2 * x - d)
        top = x[likelihood.argmax()]
        variance = n * (2 * top + d * (1 - d))
        if (lost - gained - n * d) / math.sqrt(variance) >= -1.6448536:
            best = max(best, d)
    return best


@pytest.mark.parametrize(("lost", "gained", "n"), [(4, 1, 394), (10, 5, 1900), (3, 3, 120), (1, 6, 200)])
def test_tango_bound_equals_brute_force(lost: int, gained: int, n: int) -> None:
    assert tango_bound(lost, gained, n) == pytest.approx(_brute_force_bound(lost, gained, n), abs=6e-4)


def test_no_change_at_all_still_has_a_width() -> None:
    z = 1.6448536269514722
    assert tango_bound(0, 0, 394) == pytest.approx(z * z / (394 + z * z), rel=1e-9)
    assert paired_change(0, 0, 394).interval == (0, 0)


@pytest.mark.parametrize("budget", [0.003, 0.01, 0.02])
def test_queries_needed_is_the_smallest_number(budget: float) -> None:
    n = queries_needed(budget)
    assert tango_bound(0, 0, n) <= budget + 1e-12 < tango_bound(0, 0, n - 1)


def test_bound_covers_a_known_loss() -> None:
    """Simulated candidates that lose 1 point: the 95 % bound lies below the truth in about 5 % of runs."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(1500, [0.03, 0.02, 0.95], size=600)
    below = np.mean([tango_bound(int(b), int(c), 1500) < 0.01 for b, c, _ in draws])
    assert 0.02 <= below <= 0.08


def test_mcnemar_is_the_exact_binomial() -> None:
    assert paired_change(5, 1, 100).mcnemar_p == pytest.approx(2 * (1 + 6) / 64)
    assert paired_change(0, 0, 100).mcnemar_p == 1


# --- budgets ------------------------------------------------------------------------------------------------------


def test_every_budget_says_where_it_came_from() -> None:
    for precision in load_budgets().precisions.values():
        assert precision.tie["source"]
        for budget in precision.metrics.values():
            assert len(budget.source) > 10, (precision.precision, budget.metric)


def test_ties_come_from_the_same_precision_or_from_float32() -> None:
    """A tie width from coarser arithmetic excuses every flip, and the agreement budgets can no longer fail."""
    noise = {name: {"scores": {"score_max_abs": 1e-7, "score_rms": 1e-7}} for name in ("float32", "float16")}
    noise["bfloat16"] = {"scores": {"score_max_abs": 0.1, "score_rms": 0.02}}
    for precision in load_budgets().precisions.values():
        assert precision.tie["noise"] in ("float32", precision.noise)
        assert precision.tie_width(noise) <= 5e-4
    assert load_budgets().for_precision("int8").tie_width(noise) == 1e-6


def test_nan_never_passes() -> None:
    fp32 = load_budgets().for_precision("fp32")
    for metric in fp32.metrics:
        assert fp32.judge(metric, math.nan, "image").status == "fail"
        assert fp32.judge(metric, None, "image").status == "fail"


def test_noise_widens_a_budget_but_never_beyond_twice() -> None:
    cosine = load_budgets().for_precision("fp32").metrics["one_minus_cosine_max"]
    assert cosine.limit({"one_minus_cosine_max": 1e-12}) == 1e-6
    assert cosine.limit({"one_minus_cosine_max": 4e-7}) == pytest.approx(1.6e-6)
    assert cosine.limit({"one_minus_cosine_max": 1.0}) == pytest.approx(2e-6)
    decibel = load_budgets().for_precision("fp32").metrics["sqnr_db"]
    assert decibel.limit({"sqnr_db": 20.0}) == pytest.approx(80 - 20 * math.log10(2))
    assert decibel.limit(None) == 80


def test_task_loss_is_decided_by_its_bounds_alone() -> None:
    int8 = load_budgets().for_precision("int8")
    assert int8.judge_task(paired_change(0, 0, 1900), "x").status == "pass"
    assert int8.judge_task(paired_change(0, 0, 100), "x").status == "undecided"
    assert int8.judge_task(paired_change(4, 2, 394), "x").status == "undecided"
    # a healthy fold loses 1.5 points by chance; its bounds are on both sides of the budget
    fold = int8.judge_task(paired_change(8, 2, 394), "x")
    assert (fold.status, fold.value) == ("undecided", pytest.approx(6 / 394))
    assert "pool folds" in fold.note
    # five such folds decide
    assert int8.judge_task(paired_change(40, 10, 1970), "x").status == "undecided"
    assert int8.judge_task(paired_change(80, 10, 1970), "x").status == "fail"
    assert int8.judge_task(paired_change(20, 18, 1970), "x").status == "pass"
    assert int8.judge_task(paired_change(20, 1, 394), "x").status == "fail"
    assert int8.judge_task(paired_change(1, 0, 40), "x").status == "undecided"
    assert int8.judge_task(paired_change(12, 0, 40), "x").status == "fail"


@pytest.mark.parametrize(("lost", "gained", "queries"), [(0, 0, 300), (9, 1, 394), (5, 9, 394), (30, 2, 394)])
def test_a_task_verdict_follows_from_the_two_one_sided_bounds(lost: int, gained: int, queries: int) -> None:
    change = paired_change(lost, gained, queries)
    verdict = load_budgets().for_precision("int8").judge_task(change, "x").status
    expected = "pass" if change.bound <= 0.01 else "fail" if change.floor > 0.01 else "undecided"
    assert verdict == expected


def test_int8_budgets() -> None:
    limits = {name: budget.value for name, budget in load_budgets().for_precision("int8").metrics.items()}
    assert limits["sqnr_db"] == 20
    assert limits["top1_agreement"] == 0.85
    assert limits["top10_overlap"] == 0.9
    assert limits["task_loss"] == 0.01


def _budgets_file(tmp_path, change):  # type: ignore[no-untyped-def]
    from importlib import resources

    value = json.loads(resources.files("pocketvlm.export").joinpath("budgets.json").read_text("utf-8"))
    change(value)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(value))
    return path


def test_a_looser_budget_needs_a_reason(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def loosen(value):  # type: ignore[no-untyped-def]
        value["precisions"]["int8"]["metrics"]["one_minus_cosine_mean"]["value"] = 0.5

    def explain(value):  # type: ignore[no-untyped-def]
        loosen(value)
        value["precisions"]["int8"]["metrics"]["one_minus_cosine_mean"]["reason"] = "gallery of 20"

    with pytest.raises(
        UsageError, match=r"loosens int8 one_minus_cosine_mean from 0\.01 to 0\.5 without a 'reason' of its own"
    ):
        load_budgets(_budgets_file(tmp_path, loosen))

    def hide(value):  # type: ignore[no-untyped-def]
        # its reason is the shipped one, which explains .85 and no other number
        value["precisions"]["int8"]["metrics"]["top1_agreement"]["value"] = 0.05

    with pytest.raises(UsageError, match=r"loosens int8 top1_agreement .* without a 'reason' of its own"):
        load_budgets(_budgets_file(tmp_path, hide))
    loaded = load_budgets(_budgets_file(tmp_path, explain))
    assert loaded.for_precision("int8").metrics["one_minus_cosine_mean"].value == 0.5


def test_a_missing_or_wider_limit_is_not_smuggled_in(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="leaves out fp32 sqnr_db"):
        load_budgets(_budgets_file(tmp_path, lambda v: v["precisions"]["fp32"]["metrics"].pop("sqnr_db")))
    with pytest.raises(UsageError, match="counts as a tie"):
        load_budgets(_budgets_file(tmp_path, lambda v: v["precisions"]["fp32"]["tie"].update(floor=0.5)))
    with pytest.raises(VersionError, match="upgrade"):
        load_budgets(_budgets_file(tmp_path, lambda v: v.update(schema="2.0")))
    with pytest.raises(UsageError, match="cannot be read"):
        load_budgets(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(presicions={}), "unknown key in budgets file mine.json 'presicions'.*'precisions'"),
        (lambda v: v["precisions"].update(int9=v["precisions"]["int8"]), "unknown precision .*did you mean 'int8'"),
        (lambda v: v["precisions"]["int8"].update(row="real"), "unknown int8 key .*did you mean 'rows'"),
        (
            lambda v: v["precisions"]["int8"]["metrics"].update(sqnr_dbs={"value": 30}),
            "unknown int8 metric .*did you mean 'sqnr_db'",
        ),
        (
            lambda v: v["precisions"]["int8"]["metrics"]["sqnr_db"].update(vallue=30),
            "unknown int8 sqnr_db key .*did you mean 'value'",
        ),
        (lambda v: v["precisions"]["int8"]["tie"].update(flor=1e-9), "unknown int8 tie key .*did you mean 'floor'"),
    ],
)
def test_an_unknown_key_of_a_budgets_file_is_refused_with_a_suggestion(tmp_path, change, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnknownNameError, match=words):
        load_budgets(_budgets_file(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["precisions"]["int8"]["metrics"]["sqnr_db"].update(value="30"), "no finite number"),
        (lambda v: v["precisions"]["int8"]["metrics"]["sqnr_db"].update(value=math.nan), "no finite number"),
        (lambda v: v["precisions"]["int8"]["metrics"]["sqnr_db"].update(better="lower"), "how it is measured"),
        (lambda v: v["precisions"]["fp32"].update(rows="real"), "changes 'rows' of fp32"),
        (lambda v: v["precisions"]["fp32"]["metrics"]["sqnr_db"].update(k=40), "raises k of fp32 sqnr_db"),
        (lambda v: v["precisions"]["int8"].pop("tie"), "is incomplete"),
        (lambda v: v["precisions"]["int8"]["tie"].pop("floor"), "is incomplete"),
        (lambda v: v["precisions"]["int8"]["metrics"]["sqnr_db"].pop("better"), "is incomplete"),
        (lambda v: v["precisions"].update(int8=[]), "where keys are expected"),
        (lambda v: v["precisions"].clear(), "limits nothing"),
    ],
)
def test_a_broken_budgets_file_is_refused(tmp_path, change, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=words):
        load_budgets(_budgets_file(tmp_path, change))


def test_a_tighter_budgets_file_is_taken_and_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def tighten(value):  # type: ignore[no-untyped-def]
        value["version"] = "mine-1"
        value["precisions"]["int8"]["metrics"]["sqnr_db"]["value"] = 30

    loaded = load_budgets(_budgets_file(tmp_path, tighten))
    assert (loaded.path, loaded.version, loaded.shipped) == ("mine.json", "mine-1", False)
    assert loaded.for_precision("int8").metrics["sqnr_db"].value == 30
    assert load_budgets().shipped
