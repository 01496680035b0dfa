"""Every student x target x precision tried: does it lower, does it run, how large, how faithful, how fast here.

The committed table (`export/matrix.json`, from which `pocketvlm pick` chooses) is made by this. Weights are random
unless a run is given, so it says what the converters and runtimes do, and nothing about accuracy.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
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
from pocketvlm.export.workers import Worker, WorkerError

SCHEMA_VERSION = "1.0"
FILE, TABLE = "matrix.json", "matrix.md"
COMMITTED = Path(__file__).with_name(FILE)
WORKER = "pocketvlm.export.matrix_worker"
_ROUNDS, _RUNS = 5, 10

Progress = Callable[[str], None]
Row = dict[str, Any]


def make_matrix(
    students: Sequence[str],
    out: str | Path,
    *,
    targets: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    data: str | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try what is not yet in OUT/matrix.json, and write it after each row with a table beside it (matrix.md).

    Args:
        students: shipped names, or run or student folders. targets: None: all. precisions: None: all that each target
            names; one that a target does not know is left out there.
        data: a `--data` source to calibrate and judge on, for run folders; None: made-up inputs.
        retry: try rows again that failed.

    Returns:
        The content of matrix.json: schema_version, sessions (machine and versions, which rows name by number), rows.
        A row: student, weights ("random" or "given"), target, precision, status, reason, session; and unless it failed
        mb, of_float (of four bytes a parameter), seconds and processor_seconds to lower, schemes and, by tower,
        cosine_mean, cosine_min, sqnr_db (over the eager model's values), p50_ms and rounds_ms (batch 1, one thread,
        by the clock), processor_ms (the same on its processor, which others' work hardly changes) and between (mean
        cosine of different inputs, which random weights push towards 1). status: "works"; "lowers",
        where the file cannot be run on this system; "fails".

    Raises:
        UsageError: nothing to try, `data` beside a student's name. UnknownNameError: no such student, target or
        precision. MissingExtraError: a converter is not installed. VersionError: matrix.json of a newer release.
    """
    say = progress or (lambda line: None)
    out = Path(out)
    plan = _plan(students, targets, precisions, data)
    table = read_matrix(out / FILE) if (out / FILE).is_file() else {"sessions": [], "rows": []}
    rows: dict[tuple[str, str, str], Row] = {_key(row): row for row in table["rows"]}
    todo = [key for key in plan if key not in rows or (retry and rows[key]["status"] == "fails")]
    say(f"{len(todo)} of {len(plan)} to try, {len(plan) - len(todo)} known already")
    sessions = list(table["sessions"])
    if todo:
        sessions.append(_session(data))
    for student in dict.fromkeys(key[0] for key in todo):
        source = next(path for path in students if _name(path) == student)
        for row in try_student(source, [key[1:] for key in todo if key[0] == student], data, say):
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
    columns = ["student", "target", "precision", "MB", "of float"]
    columns += ["scheme, picture", "cosine", "SQNR dB", "ms", "scheme, text", "cosine", "SQNR dB", "ms", "lowered in s"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * 3 + "|---:" * 2 + "|---|---:|---:|---:" * 2 + "|---:|"]
    for row in table["rows"]:
        head = f"| {row['student']} | {row['target']} | {row['precision']} |"
        if row["status"] == "fails":
            lines.append(f"{head} **fails**: {row['reason']}" + " |" * 11)
            continue
        cells = [f"{row['mb']:.2f}", f"{row['of_float']:.3f}"]
        for tower in ("image", "text"):
            found = row["towers"].get(tower) or {}
            cells.append(found.get("scheme") or "–")
            if "processor_ms" in found:
                cells += [f"{found['cosine_mean']:.5f}", f"{found['sqnr_db']:.1f}", f"{found['processor_ms']:.2f}"]
            else:
                cells += ["not run here" if row["status"] == "lowers" and found else "–", "–", "–"]
        lines.append(f"{head} {' | '.join(cells)} | {row['seconds']:.0f} |")
    for session in table["sessions"]:
        machine = session["machine"]
        load = f"load average {machine['load_average_before']} on {machine['cores']} cores"
        lines.append(
            f"\n{machine['cpu']} ({', '.join(machine['flags'])}), {load} at the start, {machine['date'][:10]}."
        )
    return "\n".join(lines) + "\n"


def try_student(
    source: str, pairs: Sequence[tuple[str, str]], data: str | None = None, progress: Progress | None = None
) -> Iterator[Row]:
    """One row for each (target, precision) of a student, as `make_matrix` describes them, without `session`.

    A converter that takes its process down makes a row that fails, and the rest is tried in a new process.
    """
    say = progress or (lambda line: None)
    pending = list(pairs)
    while pending:
        with tempfile.TemporaryDirectory(prefix="pocketvlm-matrix-") as scratch:
            try:
                worker = Worker(WORKER, {"student": source, "data": data, "folder": scratch})
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
        "reason": "",
        "mb": round(size, 3),
        "of_float": round(size / opened["float_mb"], 4),
        "seconds": round(done["seconds"], 1),
        "processor_seconds": round(done["processor_seconds"], 1),
        "inputs": opened["inputs"],
        "towers": {
            tower: {"scheme": notes[tower].get("scheme"), "between": round(opened["between"][tower], 4)}
            for tower in opened["rows"]
        },
    }
    if target == "coreml" and platform.system() != "Darwin":
        return row | {"status": "lowers", "reason": f"Core ML predicts on macOS only, not on {platform.system()}"}
    for tower, rows in opened["rows"].items():
        request = {"folder": str(folder), "variant": variant, "tower": tower, "threads": 1, "rows": rows}
        try:
            row["towers"][tower] |= _measured(request, opened["expected"][tower], folder / f"{tower}-found.npy")
        except WorkerError as error:
            return _failed(source, target, precision, f"the {tower} file does not run: {error.reason}")
        if not np.isfinite(row["towers"][tower]["cosine_mean"]):
            return _failed(source, target, precision, f"the {tower} file gives values that are not finite")
    return row


def _measured(request: dict[str, Any], expected: str, found: Path) -> dict[str, Any]:
    with Worker(BENCH_WORKER, request) as worker:
        worker.ask({"do": "embed", "out": str(found)})
        rounds = [worker.ask({"do": "turn", "runs": _RUNS}) for _ in range(_ROUNDS)]
    medians = [float(np.median(times["run"])) for times in rounds]
    a, b = np.load(found).astype(np.float64), np.load(expected).astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    noise = max(float(np.square(a - b).sum()), 1e-30)
    return {
        "cosine_mean": round(float(cosine.mean()), 7),
        "cosine_min": round(float(cosine.min()), 7),
        "sqnr_db": round(10 * float(np.log10(np.square(b).sum() / noise)), 2),
        "p50_ms": round(float(np.median(medians)), 3),
        "rounds_ms": [round(min(medians), 3), round(max(medians), 3)],
        "processor_ms": round(float(np.median([np.median(times["run_processor"]) for times in rounds])), 3),
    }


def _failed(source: str, target: str, precision: str, reason: str) -> Row:
    names = {"student": _name(source), "weights": "given" if Path(source).is_dir() else "random"}
    return {**names, "target": target, "precision": precision, "status": "fails", "reason": reason, "towers": {}}


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    students: Sequence[str], targets: Sequence[str] | None, precisions: Sequence[str] | None, data: str | None
) -> list[tuple[str, str, str]]:
    from pocketvlm.export.targets import get_target, list_targets
    from pocketvlm.students.config import student_names

    if not students:
        raise UsageError(
            "no student was given; nothing would be tried, so name one or more ('pocketvlm list students')"
        )
    for student in students:
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


def _name(source: str) -> str:
    return Path(source).name if Path(source).is_dir() else source


def _key(row: Row) -> tuple[str, str, str]:
    return row["student"], row["target"], row["precision"]


def _session(data: str | None) -> dict[str, Any]:
    from importlib import metadata

    from pocketvlm.distill.environment import git_commit

    machine = describe_machine()
    for package in ("timm", "onnx", "onnxscript", "torchao"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            machine["packages"][package] = metadata.version(package)
    return {"kit_version": pocketvlm.__version__, "commit": git_commit(), "data": data, "machine": machine}


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
