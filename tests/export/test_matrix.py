"""The matrix says what was tried and why it failed, goes on where it stopped, and `pick` chooses from it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm.cli import main
from pocketvlm.edge.contract import ImageSpec, ModelContract, TextSpec
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError, VersionError
from pocketvlm.export import matrix as module
from pocketvlm.export import pick as picking
from pocketvlm.export.matrix import COMMITTED, make_matrix, matrix_table, read_matrix, task_change, try_student
from pocketvlm.export.matrix_worker import made_up_inputs, made_up_pictures, random_towers
from pocketvlm.export.pick import pick
from pocketvlm.export.workers import WorkerError
from pocketvlm.students import save_student

ROOT = Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("toy_parity_for_matrix", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toys: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = toys  # dataclasses look their module up
_spec.loader.exec_module(toys)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(toys.toy_student(), tmp_path_factory.mktemp("matrix") / "tiny")


def row(student: str, mb: float, ms: float, **other: Any) -> dict[str, Any]:
    """A row as the matrix writes it, of a student with 4 x as many float bytes."""
    tower = {"cosine_mean": 0.99, "cosine_min": 0.98, "sqnr_db": 20.0, "processor_ms": ms}
    tower |= {"p50_ms": 9 * ms, "rounds_ms": [9 * ms, 9 * ms]}  # by the clock of a busy machine
    made = {"student": student, "weights": "random", "target": "onnx", "precision": "int8", "status": "works"}
    made |= {"reason": "", "mb": mb, "of_float": 0.25, "seconds": 3.0, "session": 0}
    return made | {"towers": {"image": tower, "text": tower | {"processor_ms": ms / 2, "cosine_mean": 0.98}}} | other


def failed(student: str, reason: str, **other: Any) -> dict[str, Any]:
    made = {"student": student, "weights": "random", "target": "onnx", "precision": "int8", "status": "fails"}
    return made | {"reason": reason, "towers": {}, "session": 0} | other


@pytest.fixture
def table(tmp_path: Path) -> Path:
    machine = {"cpu": "a processor", "flags": ["avx2"], "cores": 2, "load_average_before": 0.5, "date": "2026-11-22T"}
    rows = [row("small", 2.0, 1.0), row("large", 5.0, 4.0), row("slow", 4.0, 40.0), failed("broken", "no kernel")]
    rows.append(row("large", 20.0, 3.0, precision="fp32", of_float=1.0))
    rows.append(row("large", 5.0, 0.0, target="coreml", status="lowers", towers={"image": {"scheme": None}}))
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema_version": "1.0", "sessions": [{"machine": machine}], "rows": rows}))
    return path


def test_a_saved_student_is_lowered_run_and_judged(student: Path, tmp_path: Path) -> None:
    table = make_matrix([str(student)], tmp_path / "out", targets=["onnx"], precisions=["fp32"])
    (found,) = table["rows"]
    assert (found["student"], found["weights"], found["status"], found["session"]) == ("tiny", "given", "works", 0)
    for tower in ("image", "text"):
        measured = found["towers"][tower]
        assert measured["cosine_min"] > 1 - 1e-6
        assert measured["sqnr_db"] > 80
        low, high = measured["rounds_ms"]
        assert 0 < low <= measured["p50_ms"] <= high
    assert found["of_float"] == pytest.approx(1.0, abs=0.5)
    assert found["seconds"] > 0
    assert read_matrix(tmp_path / "out/matrix.json") == table
    assert (tmp_path / "out/matrix.md").read_text() == matrix_table(table)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The toy data as a manifest, so that a worker can open it."""
    folder, rows = tmp_path_factory.mktemp("pairs"), []
    for index, sample in enumerate(toys.toy_data().samples):
        (folder / f"{index}.png").write_bytes(sample.image.read())
        rows.append({"image": f"{index}.png", "caption": sample.captions[0].text})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


def test_core_ml_files_are_computed_and_the_order_of_captions_is_judged(
    student: Path, pairs: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"targets": ["coreml"], "precisions": ["fp32", "palette4"], "data": pairs, "judge": pairs}
    exact, coarse = make_matrix([f"mine={student}"], tmp_path, **options)["rows"]
    for found in (exact, coarse):
        assert (found["student"], found["status"], found["runtime"]) == ("mine", "works", "coreml-mil")
        assert "Neural Engine" in found["not_modelled"]
        assert found["towers"]["image"].keys().isdisjoint({"processor_ms", "p50_ms", "rounds_ms"})
        assert found["judged"] == "pairs: 40 pictures, 40 texts"
        assert found["task"]["image-to-text"]["queries"] == 40
    assert exact["towers"]["image"]["sqnr_db"] > 80
    assert {change["change"] for change in exact["task"].values()} == {0.0}
    assert coarse["towers"]["image"]["sqnr_db"] < exact["towers"]["image"]["sqnr_db"] - 40
    text = (tmp_path / "matrix.md").read_text()
    assert "computed by `coreml-mil`" in text
    assert "+0.0 (6.3) / +0.0 (6.3) |" in text, "Tango's bound with 40 queries of which none changed: z2 / (n + z2)"


def test_the_change_of_a_task_counts_what_was_lost_and_won() -> None:
    axes = np.eye(8)
    right = {"image": axes, "text": axes}
    positives = [[i] for i in range(7)]  # the last text has no picture and the last picture no text
    positives.append([])
    same = task_change(positives, right, right)
    assert same["image-to-text"] == {
        "recall_at_5": 1.0,
        "change": 0.0,
        "loss_bound": same["image-to-text"]["loss_bound"],
        "queries": 7,
    }
    assert same["image-to-text"]["loss_bound"] > 0.2
    # the first picture is sent to where it is the farthest from its text
    moved = axes.copy()
    moved[0] = np.r_[-1.0, np.ones(7)]
    lost = task_change(positives, right, {"image": moved, "text": axes})
    assert lost["image-to-text"]["change"] == pytest.approx(-1 / 7, abs=1e-5)
    assert lost["image-to-text"]["loss_bound"] > same["image-to-text"]["loss_bound"]
    assert lost["text-to-image"]["change"] == pytest.approx(-1 / 7, abs=1e-5)
    back = task_change(positives, {"image": 3 * moved, "text": axes}, right)
    assert back["image-to-text"]["recall_at_5"] == pytest.approx(6 / 7, abs=1e-5)
    assert back["image-to-text"]["change"] == pytest.approx(1 / 7, abs=1e-5)


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[tuple[str, str]]]] = []

    def tried(
        source: str, pairs: list[tuple[str, str]], data: str | None, say: Any, judge: str | None
    ) -> Iterator[dict[str, Any]]:
        asked.append((source, list(pairs)))
        name = source.partition("=")[0]
        for target, precision in pairs:
            if len(asked) == 1 and precision == "int8":
                raise KeyboardInterrupt
            fails = failed(name, "no kernel", target=target, precision=precision)
            yield fails if precision == "fp32" else row(name, 1.0, 1.0, target=target, precision=precision)

    monkeypatch.setattr(module, "try_student", tried)
    options: dict[str, Any] = {"targets": ["onnx"], "precisions": ["fp32", "int8"]}
    with pytest.raises(KeyboardInterrupt):
        make_matrix(["mnv4-035"], tmp_path, **options)
    table = make_matrix(["mnv4-035"], tmp_path, **options)
    assert asked == [("mnv4-035", [("onnx", "fp32"), ("onnx", "int8")]), ("mnv4-035", [("onnx", "int8")])]
    assert [(r["precision"], r["status"], r["session"]) for r in table["rows"]] == [
        ("fp32", "fails", 0),
        ("int8", "works", 1),
    ]
    make_matrix(["mnv4-035"], tmp_path, **options)
    assert len(asked) == 2, "nothing is left to try"
    make_matrix(["mnv4-035"], tmp_path, **options, retry=True)
    assert asked[-1] == ("mnv4-035", [("onnx", "fp32")])
    # a run of that student is better than its random weights, which are still there for the row that was not asked for
    (tmp_path / "run").mkdir()
    make_matrix([f"mnv4-035={tmp_path / 'run'}"], tmp_path, targets=["onnx"], precisions=["int8"])
    assert asked[-1] == (f"mnv4-035={tmp_path / 'run'}", [("onnx", "int8")])
    assert len(read_matrix(tmp_path / "matrix.json")["rows"]) == 2


class _Breaking:
    """A worker whose first request ends its process, and whose second is refused."""

    opened: dict[str, Any] = {"rows": {}, "expected": {}, "between": {}}  # noqa: RUF012
    started = 0

    def __init__(self, name: str, request: dict[str, Any]) -> None:
        type(self).started += 1

    def __enter__(self) -> _Breaking:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["target"] == "executorch":
            raise WorkerError("its process was ended by signal 11", ended=True)
        raise WorkerError("RuntimeError: no such operator", ended=False)


def test_a_converter_that_crashes_makes_a_row_and_the_rest_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Worker", _Breaking)
    pairs = [("executorch", "fp32"), ("onnx", "fp32"), ("onnx", "int8")]
    rows = list(try_student("mnv4-035", pairs))
    assert [(r["target"], r["precision"]) for r in rows] == pairs
    assert {r["status"] for r in rows} == {"fails"}
    assert [r["reason"].split()[-1] for r in rows] == ["11", "operator", "operator"]
    assert _Breaking.started == 2, "a new process after the crash, and only then"


def test_a_student_that_cannot_be_built_fails_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, request: dict[str, Any]) -> None:
        raise WorkerError("no such backbone", ended=False)

    monkeypatch.setattr(module, "Worker", refuse)
    rows = list(try_student("mnv4-035", [("onnx", "fp32"), ("onnx", "int8")]))
    assert [r["reason"] for r in rows] == ["the student cannot be built: no such backbone"] * 2


def test_random_towers_answer_differently_to_different_inputs() -> None:
    """Else a cosine with the eager model says nothing; batch norms at their start give nearly one embedding to all."""
    towers = random_towers("mnv4-035")
    assert towers.image is not None
    with torch.no_grad():
        embeddings = towers.image(torch.from_numpy(made_up_pictures(8, 96, seed=3))).numpy()
    cosine = embeddings @ embeddings.T
    assert cosine[~np.eye(8, dtype=bool)].mean() < 0.8
    again = random_towers("mnv4-035")
    for one, other in zip(towers.image.state_dict().values(), again.image.state_dict().values()):  # type: ignore[union-attr]
        assert torch.equal(one, other)


@pytest.mark.parametrize("pad", [0, 7, 19])
def test_made_up_ids_are_words_before_padding(pad: int) -> None:
    contract = ModelContract(
        kind="dual", name="x", model_id="x", space_id="x", embed_dim=4, dims=(4,), image=ImageSpec(size=8),
        text=TextSpec(context_length=9, vocab_size=20, pad_id=pad), logit_scale=1.0,
    )  # fmt: skip
    made = made_up_inputs(contract)
    assert made.pixels.shape == (96, 8, 8, 3)
    assert made.pixels.std() > 20
    seen: set[int] = set()
    for ids in made.ids:
        words = ids[: int(np.flatnonzero(ids == pad)[0])]
        assert len(words) >= 3
        assert (ids[len(words) :] == pad).all()
        seen |= set(words.tolist())
    assert seen == set(range(20)) - {pad}


def test_the_table_shows_failures_and_what_was_not_run(table: Path) -> None:
    text = matrix_table(read_matrix(table))
    lines = text.splitlines()
    assert "| broken | random | onnx | int8 | **fails**: no kernel |" in text
    assert "| 0.99000 | 20.0 | 4.00 |" in text
    assert "not run here" in next(line for line in lines if "coreml" in line)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1, "every row has every cell"


def test_what_the_plan_refuses(tmp_path: Path) -> None:
    for options, says in (
        ({"students": ["mnv4-35"]}, "did you mean 'mnv4-035'"),
        ({"students": ["mnv4-035"], "targets": ["onx"]}, "did you mean 'onnx'"),
        (
            {"students": ["mnv4-035"], "targets": ["onnx"], "precisions": ["palette4"]},
            "precision of these targets 'palette4'",
        ),
    ):
        with pytest.raises(UnknownNameError, match=says):
            make_matrix(out=tmp_path, **options)
    with pytest.raises(UsageError, match="random weights have no tokenizer"):
        make_matrix(["mnv4-035"], tmp_path, data="openmoji")
    with pytest.raises(UsageError, match="without --data"):
        make_matrix(["mnv4-035"], tmp_path, judge="openmoji")
    with pytest.raises(UsageError, match="given more than once"):
        make_matrix(["mnv4-035", "mnv4-035"], tmp_path)
    with pytest.raises(UsageError, match="no student was given"):
        make_matrix([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_none_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_matrix(tmp_path / "none.json")
    content = json.loads(table.read_text())
    table.write_text(json.dumps(content | {"schema_version": "2.0"}))
    with pytest.raises(VersionError, match=r"newer than the 1\.0"):
        read_matrix(table)
    table.write_text(json.dumps(content | {"sessions": []}))
    with pytest.raises(IntegrityError, match="lacks or garbles"):
        read_matrix(table)


def names(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["student"], row["precision"]) for row in rows]


def test_pick_lists_what_fits_largest_first(table: Path) -> None:
    assert names(pick(table=table)) == [("large", "int8"), ("large", "fp32"), ("slow", "int8"), ("small", "int8")]
    found = pick(size_mb=6, latency_ms=10, target="onnx", table=table)
    assert names(found) == [("large", "int8"), ("small", "int8")]
    assert found[0]["cosine"] == 0.98, "of the worse tower"
    assert (found[0]["image_ms"], found[0]["text_ms"], found[0]["measured"]) == (4.0, 2.0, "table")
    assert names(pick(latency_ms=3.0, tower="text", table=table)) == [
        ("large", "int8"),
        ("large", "fp32"),
        ("small", "int8"),
    ]
    assert names(pick(precision="fp32", table=table)) == [("large", "fp32")]


def test_pick_lists_what_has_no_times_by_size_alone(table: Path) -> None:
    content = json.loads(table.read_text())
    made = row("large", 5.0, 0.0, target="coreml", precision="w8", runtime="coreml-mil")
    for found in made["towers"].values():
        del found["processor_ms"], found["p50_ms"], found["rounds_ms"]
    table.write_text(json.dumps(content | {"rows": [*content["rows"], made]}))
    (found,) = pick(size_mb=6, target="coreml", table=table)
    assert (found["precision"], found["image_ms"], found["cosine"]) == ("w8", None, 0.98)
    with pytest.raises(UsageError, match=r"is large as coreml w8 with 5\.0 MB, so allow that"):
        pick(size_mb=1, target="coreml", table=table)
    with pytest.raises(UsageError, match="no row of this target and precision"):
        pick(latency_ms=5, target="coreml", table=table)


def test_pick_says_what_comes_nearest(table: Path) -> None:
    with pytest.raises(UsageError, match=r"no student fits 1 MB and 0\.9 ms; .* is small as onnx int8 with 2\.0 MB"):
        pick(size_mb=1, latency_ms=0.9, table=table)
    with pytest.raises(UsageError, match="no row of this target and precision"):
        pick(target="coreml", table=table)
    for options, says in (({"target": "onx"}, "'onnx'"), ({"precision": "int4"}, "'int8'"), ({"tower": "txt"}, "text")):
        with pytest.raises(UnknownNameError, match=says):
            pick(table=table, **options)
    for options in ({"size_mb": 0.0}, {"latency_ms": -1.0}, {"at_most": 0}):
        with pytest.raises(UsageError, match="must be above 0"):
            pick(table=table, **options)


def test_pick_measures_a_few_here_and_believes_that(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def tried(source: str, pairs: list[tuple[str, str]], progress: Any = None) -> list[dict[str, Any]]:
        asked.append((source, pairs))
        return [row(source, 5.0, 2.0 if source == "large" else 9.0)]

    monkeypatch.setattr(picking, "try_student", tried)
    # 4 ms in the table: this machine may be faster
    found = pick(latency_ms=2.5, precision="int8", table=table, measure=True, at_most=2)
    assert asked == [("large", [("onnx", "int8")]), ("small", [("onnx", "int8")])]
    assert names(found) == [("large", "int8")]
    assert (found[0]["image_ms"], found[0]["measured"]) == (2.0, "here")
    with pytest.raises(UsageError, match="on this machine"):
        pick(latency_ms=1.9, precision="int8", table=table, measure=True)


def test_the_shipped_table_is_the_committed_one_and_the_page_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMITTED.read_bytes() == (ROOT / "benchmarks/results/matrix.json").read_bytes()
    table = read_matrix()
    assert {r["status"] for r in table["rows"]} <= {"works", "lowers", "fails"}
    page = (ROOT / "docs/bench.md").read_text()
    assert matrix_table(table) in page, (
        "python -c 'from pocketvlm.export.matrix import *; print(matrix_table(read_matrix()))'"
    )
    main(["pick", "--size-mb", "20", "--target", "onnx", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(r["mb"] <= 20 and r["target"] == "onnx" for r in rows)
