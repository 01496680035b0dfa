"""Every student x target x precision tried: does it lower, does it run, how large, how faithful, how fast here.

The committed table (`export/matrix.json`, from which `pocketvlm pick` chooses) is made by this. Weights are random
unless a run is given, and then it says what the converters and runtimes do, and nothing about accuracy.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pocketvlm
from pocketvlm.edge.bundle import check_schema_version
from pocketvlm.edge.errors import IntegrityError, PocketvlmError, UsageError, unknown_name
from pocketvlm.export.bench import WORKER as BENCH_WORKER
from pocketvlm.export.bench import describe_machine
from pocketvlm.export.compare import paired_change, target_ranks
from pocketvlm.export.delegation import all_warnings
from pocketvlm.export.workers import Worker, WorkerError

SCHEMA_VERSION = "1.0"
FILE, TABLE = "matrix.json", "matrix.md"
COMMITTED = Path(__file__).with_name(FILE)
WORKER = "pocketvlm.export.matrix_worker"
_ROUNDS, _RUNS = 5, 10
_AT = 5

Progress = Callable[[str], None]
Row = dict[str, Any]


def make_matrix(
    students: Sequence[str],
    out: str | Path,
    *,
    targets: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    data: str | None = None,
    judge: str | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try what is not yet in OUT/matrix.json, and write it after each row with a table beside it (matrix.md).

    Args:
        students: shipped names, run or student folders, or NAME=FOLDER, which names the rows of a folder. targets:
            None: all. precisions: None: all that each target names; one that a target does not know is left out there.
            A row of random weights makes way for one of a folder.
        data: a `--data` source to calibrate with, for run folders; None: made-up inputs.
        judge: another to judge on, by the order of its captions too; None: 32 inputs that did not calibrate.
        retry: try rows again that failed.

    Returns:
        The content of matrix.json: schema_version, sessions (machine and versions, which rows name by number), rows.
        A row: student, weights ("random" or "given"), target, precision, status, reason, session; and unless it failed
        mb, of_float (of four bytes a parameter), seconds and processor_seconds to lower, schemes and, by tower,
        cosine_mean, cosine_min, sqnr_db (over the eager model's values), p50_ms and rounds_ms (batch 1, one thread,
        by the clock), processor_ms (the same on its processor, which others' work hardly changes) and between (mean
        cosine of different inputs, which random weights push towards 1). Core ML files off macOS are computed by
        `coreml-mil` (`runtime`), which has no times; ExecuTorch rows have `delegation` (`export.delegation`), and its
        warnings as reason. status: "works" or "fails". With `judge`, `task`: direction ->
        recall of the float model, change (fractions) and its one-sided 95 % bound: what may be lost at most.

    Raises:
        UsageError: nothing to try, `data` beside a student's name. UnknownNameError: no such student, target or
        precision. MissingExtraError: a converter is not installed. VersionError: matrix.json of a newer release.
    """
    say = progress or (lambda line: None)
    out = Path(out)
    plan = _plan(students, targets, precisions, data, judge)
    table = read_matrix(out / FILE) if (out / FILE).is_file() else {"sessions": [], "rows": []}
    rows: dict[tuple[str, str, str], Row] = {_key(row): row for row in table["rows"]}
    given = {_name(source) for source in students if Path(_path(source)).is_dir()}
    todo = [
        key
        for key in plan
        if key not in rows
        or (retry and rows[key]["status"] == "fails")
        or (key[0] in given and rows[key]["weights"] == "random")
    ]
    say(f"{len(todo)} of {len(plan)} to try, {len(plan) - len(todo)} known already")
    sessions = list(table["sessions"])
    if todo:
        sessions.append(_session(data, judge))
    for student in dict.fromkeys(key[0] for key in todo):
        source = next(path for path in students if _name(path) == student)
        for row in try_student(source, [key[1:] for key in todo if key[0] == student], data, say, judge):
            rows[_key(row)] = row | {"session": len(sessions) - 1}
            table = _content(sessions, rows)
            _write(out, table)
    return _content(sessions, rows)


def read_matrix(path: str | Path = COMMITTED) -> dict[str, Any]:
    """A matrix.json; the committed one unless another is named.

    Raises:
        UsageError: there is none. IntegrityError: it is no such file. VersionError: of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"matrix {str(path)!r} does not exist; there is nothing to choose from, so make one with 'pocketvlm matrix'"
        )
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        check_schema_version(table["schema_version"], "matrix", SCHEMA_VERSION)
        for row in table["rows"]:
            _ = _key(row), table["sessions"][row["session"]], row["status"]
    except PocketvlmError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise IntegrityError(
            f"matrix {str(path)!r} lacks or garbles a field ({type(error).__name__}: {error}); its rows would be "
            "guessed, so make it again with 'pocketvlm matrix'"
        ) from error
    return dict(table)


def matrix_table(table: dict[str, Any]) -> str:
    """The rows as a Markdown table, a line on the machines below it."""
    columns = ["student", "weights", "target", "precision", "MB", "of float"]
    columns += ["scheme, picture", "cosine", "SQNR dB", "ms", "scheme, text", "cosine", "SQNR dB", "ms"]
    columns += ["R@5 change, picture to text / back (lost at most)", "outside XNNPACK", "lowered in s"]
    lines = [
        "| " + " | ".join(columns) + " |",
        "|---" * 4 + "|---:" * 2 + "|---|---:|---:|---:" * 2 + "|---:" * 3 + "|",
    ]
    for row in table["rows"]:
        head = f"| {row['student']} | {row['weights']} | {row['target']} | {row['precision']} |"
        if row["status"] == "fails":
            lines.append(f"{head} **fails**: {row['reason']}" + " |" * 13)
            continue
        cells = [f"{row['mb']:.2f}", f"{row['of_float']:.3f}"]
        for tower in ("image", "text"):
            found = row["towers"].get(tower) or {}
            cells.append(found.get("scheme") or "–")
            if "cosine_mean" in found:
                time = f"{found['processor_ms']:.2f}" if "processor_ms" in found else "–"
                cells += [f"{found['cosine_mean']:.5f}", f"{found['sqnr_db']:.1f}", time]
            else:
                cells += ["not run here" if row["status"] == "lowers" and found else "–", "–", "–"]
        cells += [_task_cell(row.get("task")), _outside_cell(row.get("delegation")), f"{row['seconds']:.0f}"]
        lines.append(f"{head} {' | '.join(cells)} |")
    if any(row.get("runtime") for row in table["rows"]):
        lines.append(
            "\nCore ML: computed by `coreml-mil` from the written packages, not on a device, so without times."
        )
    for session in table["sessions"]:
        machine = session["machine"]
        load = f"load average {machine['load_average_before']} on {machine['cores']} cores"
        lines.append(
            f"\n{machine['cpu']} ({', '.join(machine['flags'])}), {load} at the start, {machine['date'][:10]}."
        )
    return "\n".join(lines) + "\n"


def _task_cell(task: dict[str, dict[str, float]] | None) -> str:
    if task is None:
        return "–"
    found = [task[direction] for direction in ("image-to-text", "text-to-image")]
    # no sign on a change that rounds to nothing
    return " / ".join(f"{round(100 * t['change'], 1) + 0.0:+.1f} ({100 * t['loss_bound']:.1f})" for t in found)


def _outside_cell(found: dict[str, Any] | None) -> str:
    """Operators that the backend left, of all, by method."""
    methods = (found or {}).values()
    return " / ".join(f"{row['outside']} of {row['outside'] + row['delegated']}" for row in methods) or "–"


def try_student(
    source: str,
    pairs: Sequence[tuple[str, str]],
    data: str | None = None,
    progress: Progress | None = None,
    judge: str | None = None,
) -> Iterator[Row]:
    """One row for each (target, precision) of a student, as `make_matrix` describes them, without `session`.

    A converter that takes its process down makes a row that fails, and the rest is tried in a new process.
    """
    say = progress or (lambda line: None)
    pending = list(pairs)
    while pending:
        with tempfile.TemporaryDirectory(prefix="pocketvlm-matrix-") as scratch:
            try:
                request = {"student": _path(source), "data": data, "judge": judge, "folder": scratch}
                worker = Worker(WORKER, request)
            except WorkerError as error:
                for target, precision in pending:
                    yield _failed(source, target, precision, f"the student cannot be built: {error.reason}")
                return
            with worker:
                while pending:
                    target, precision = pending.pop(0)
                    say(f"{_name(source)} {target} {precision}")
                    try:
                        done = worker.ask({"target": target, "precision": precision})
                    except WorkerError as error:
                        yield _failed(source, target, precision, error.reason)
                        if error.ended:
                            break
                        continue
                    yield _tried(source, target, precision, Path(scratch), worker.opened, done)


def _tried(source: str, target: str, precision: str, folder: Path, opened: dict[str, Any], done: dict[str, Any]) -> Row:
    variant = done["variant"]
    size = sum(_bytes(folder / name) for name in set(variant["files"].values())) / 1e6
    notes = {tower: variant["notes"].get(tower) or {} for tower in opened["rows"]}
    row: Row = {
        "student": _name(source),
        "weights": opened["weights"],
        "target": target,
        "precision": precision,
        "status": "works",
        "reason": "; ".join(all_warnings(variant["notes"].get("delegation"))),
        "mb": round(size, 3),
        "of_float": round(size / opened["float_mb"], 4),
        "seconds": round(done["seconds"], 1),
        "processor_seconds": round(done["processor_seconds"], 1),
        "delegation": variant["notes"].get("delegation"),
        "inputs": opened["inputs"],
        "judged": opened["judged"],
        "towers": {
            tower: {"scheme": notes[tower].get("scheme"), "between": round(opened["between"][tower], 4)}
            for tower in opened["rows"]
        },
    }
    found: dict[str, str] = done.get("found") or {}
    if found:
        row |= {"runtime": done["runtime"], "not_modelled": done["not_modelled"]}
    for tower, rows in opened["rows"].items():
        timed: dict[str, Any] = {}
        if tower not in done.get("found", {}):
            found[tower] = str(folder / f"{tower}-found.npy")
            request = {"folder": str(folder), "variant": variant, "tower": tower, "threads": 1, "rows": rows}
            try:
                timed = _timed(request, found[tower])
            except WorkerError as error:
                return _failed(source, target, precision, f"the {tower} file does not run: {error.reason}")
        distance = _distance(found[tower], opened["expected"][tower])
        if not np.isfinite(distance["cosine_mean"]):
            why = done.get("overflow", {}).get(tower)
            reason = f"the {tower} file gives values that are not finite{f' ({why})' if why else ''}"
            return _failed(source, target, precision, reason)
        row["towers"][tower] |= distance | timed
    if opened.get("positives"):
        row["task"] = task_change(opened["positives"], *(_rows(opened["expected"]), _rows(found)))
    return row


def _rows(files: dict[str, str]) -> dict[str, Any]:
    return {tower: np.load(path).astype(np.float64) for tower, path in files.items()}


def task_change(
    positives: Sequence[Sequence[int]], expected: dict[str, Any], found: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """How retrieval changes from one pair of towers to another.

    positives: for each picture the rows of its texts. expected, found: tower -> embeddings [n, D], not nec. unit.

    Returns:
        "image-to-text" and "text-to-image" -> recall at 5 of `expected`, change to `found` (negative: lost), loss_bound
        (the one-sided 95 % paired bound of the loss), queries. Texts that no picture has are no queries.
    """
    right = np.zeros((len(expected["image"]), len(expected["text"])), bool)
    for picture, texts in enumerate(positives):
        right[picture, list(texts)] = True
    scores = []
    for rows in (expected, found):
        image, text = (rows[tower] / np.linalg.norm(rows[tower], axis=1, keepdims=True) for tower in ("image", "text"))
        scores.append(image @ text.T)
    result = {}
    for direction, turn in (("image-to-text", False), ("text-to-image", True)):
        mask = right.T if turn else right
        asked = mask.any(axis=1)
        before, after = (target_ranks((score.T if turn else score)[asked], mask[asked]) <= _AT for score in scores)
        change = paired_change(int((before & ~after).sum()), int((after & ~before).sum()), int(asked.sum()))
        result[direction] = {
            "recall_at_5": round(float(before.mean()), 5),
            "change": round(-change.loss, 5),
            "loss_bound": round(change.bound, 5),
            "queries": change.queries,
        }
    return result


def _distance(found: str, expected: str) -> dict[str, float]:
    a, b = np.load(found).astype(np.float64), np.load(expected).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        noise = max(float(np.square(a - b).sum()), 1e-30)
        ratio = 10 * float(np.log10(np.square(b).sum() / noise))
    return {
        "cosine_mean": round(float(cosine.mean()), 7),
        "cosine_min": round(float(cosine.min()), 7),
        "sqnr_db": round(ratio, 2),
    }


def _timed(request: dict[str, Any], found: str) -> dict[str, Any]:
    with Worker(BENCH_WORKER, request) as worker:
        worker.ask({"do": "embed", "out": found})
        rounds = [worker.ask({"do": "turn", "runs": _RUNS}) for _ in range(_ROUNDS)]
    medians = [float(np.median(times["run"])) for times in rounds]
    return {
        "p50_ms": round(float(np.median(medians)), 3),
        "rounds_ms": [round(min(medians), 3), round(max(medians), 3)],
        "processor_ms": round(float(np.median([np.median(times["run_processor"]) for times in rounds])), 3),
    }


def _failed(source: str, target: str, precision: str, reason: str) -> Row:
    names = {"student": _name(source), "weights": "given" if Path(_path(source)).is_dir() else "random"}
    return {**names, "target": target, "precision": precision, "status": "fails", "reason": reason, "towers": {}}


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    students: Sequence[str],
    targets: Sequence[str] | None,
    precisions: Sequence[str] | None,
    data: str | None,
    judge: str | None,
) -> list[tuple[str, str, str]]:
    from pocketvlm.export.targets import get_target, list_targets
    from pocketvlm.students.config import student_names

    if not students:
        raise UsageError(
            "no student was given; nothing would be tried, so name one or more ('pocketvlm list students')"
        )
    if judge is not None and data is None:
        raise UsageError(
            f"--judge {judge!r} was given without --data; ranges would be set on made-up inputs and judged on real "
            "ones, so name data to calibrate with too"
        )
    for student in map(_path, students):
        if not Path(student).is_dir() and student not in student_names():
            raise unknown_name("student", student, student_names())
        if data is not None and not Path(student).is_dir():
            raise UsageError(
                f"--data {data!r} was given and {student!r} is a student's name, whose random weights have no "
                "tokenizer; its texts could not be encoded, so leave --data out or give a run folder"
            )
    names = [_name(student) for student in students]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"students {', '.join(twice)} were given more than once; their rows would replace each other, so name each "
            "once"
        )
    opened = [get_target(name) for name in targets or list_targets()]
    # mixed is one student's own plan, which no row has
    known = {precision for target in opened for precision in target.precisions} - {"mixed"}
    for precision in precisions or ():
        if precision not in known:
            raise unknown_name("precision of these targets", precision, known)
    return [
        (name, target.name, precision)
        for name in names
        for target in opened
        for precision in target.precisions
        if precision in (known if precisions is None else precisions)
    ]


def _path(source: str) -> str:
    """The folder of NAME=FOLDER; anything else as it is."""
    _, sign, folder = source.partition("=")
    return folder if sign and Path(folder).is_dir() else source


def _name(source: str) -> str:
    if _path(source) != source:
        return source.partition("=")[0]
    return Path(source).name if Path(source).is_dir() else source


def _key(row: Row) -> tuple[str, str, str]:
    return row["student"], row["target"], row["precision"]


def _session(data: str | None, judge: str | None) -> dict[str, Any]:
    from importlib import metadata

    from pocketvlm.distill.environment import git_commit

    machine = describe_machine()
    for package in ("timm", "onnx", "onnxscript", "torchao"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            machine["packages"][package] = metadata.version(package)
    return {
        "kit_version": pocketvlm.__version__,
        "commit": git_commit(),
        "data": data,
        "judge": judge,
        "machine": machine,
    }


def _content(sessions: list[dict[str, Any]], rows: dict[tuple[str, str, str], Row]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "sessions": sessions, "rows": list(rows.values())}


def _write(out: Path, table: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in ((FILE, json.dumps(table, indent=1) + "\n"), (TABLE, matrix_table(table))):
        draft = out / f".{name}.part"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, out / name)


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in ([path] if path.is_file() else path.rglob("*")) if part.is_file())
