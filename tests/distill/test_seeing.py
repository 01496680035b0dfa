"""What people see of a run while it trains: the meter, the live table, metrics.jsonl under faults, the trackers."""

from __future__ import annotations

import errno
import io
import json
import math
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distill_toys import toy_recipe
from rich.console import Console

from pocketvlm.distill import meter as meter_module
from pocketvlm.distill import run_folder
from pocketvlm.distill.checkpoint import latest_checkpoint
from pocketvlm.distill.live import duration, note_of, table_of
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.meter import TREND, WINDOW, Meter
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import MetricsLog, read_metrics
from pocketvlm.distill.trackers import check_trackers, open_log
from pocketvlm.edge.errors import MissingExtraError, UsageError


def row(step: int, loss: float = 1.0, phase: str = "pairs", **more: Any) -> dict[str, Any]:
    return {"step": step, "phase": phase, "loss": loss, "loss/crd": loss / 2, "lr": 1e-3, "grad_norm": 2.0} | more


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A monotonic clock that only moves when it is told to."""
    now = [100.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_speed_wait_and_time_left_are_of_the_last_steps(clock: Callable[[float], None]) -> None:
    meter = Meter(1000, elapsed=50.0)
    for step in range(1, 101):
        slow = step <= 100 - WINDOW
        taken = 9.0 if slow else 2.0
        # half a second of each step is no training: evaluations, checkpoints
        clock(taken + 0.5)
        found = meter.measure(row(step), samples=64, waited=0.9 * taken if slow else 0.5, taken=taken)
    assert found["samples_per_s"] == pytest.approx(32)
    assert meter.samples_per_s == pytest.approx(32)
    assert found["data_wait_share"] == pytest.approx(0.25)
    assert found["data_wait_s"] == 0.5
    assert found["step_s"] == 2.0
    assert meter.left_s == pytest.approx(900 * 2.5)
    assert found["elapsed_s"] == pytest.approx(50 + WINDOW * 9.5 + WINDOW * 2.5)
    assert found["rss_mb"] > 10


def test_another_phase_begins_anew(clock: Callable[[float], None]) -> None:
    meter = Meter(10)
    assert math.isnan(meter.left_s)
    clock(5)
    meter.measure(row(1, phase="texts") | {"loss/bank": 1.0}, samples=10, waited=5, taken=5)
    assert meter.left_s == pytest.approx(45)
    clock(1)
    meter.measure(row(2), samples=10, waited=0, taken=1)
    assert meter.left_s == pytest.approx(8)
    assert meter.data_wait_share == 0
    assert [term.name for term in meter.terms()] == ["loss", "crd"]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (lambda i: 2.0 - i / TREND + 0.01 * (-1) ** i, -0.285),
        (lambda i: 1.0 + i / TREND, 0.4),
        (lambda i: 1.0 + 0.5 * (-1) ** i, None),
    ],
    ids=["falls", "rises", "noise"],
)
def test_a_trend_is_told_when_it_is_more_than_noise(curve: Callable[[int], float], expected: float | None) -> None:
    meter = Meter(TREND)
    values = [curve(i) for i in range(TREND)]
    for step, value in enumerate(values, 1):
        meter.measure(row(step, value), samples=1, waited=0, taken=1)
    term = meter.terms()[0]
    assert term.mean == pytest.approx(sum(values) / TREND)
    assert term.last == values[-1]
    if expected is None:
        assert term.change is None
    else:
        assert term.change == pytest.approx(expected, rel=0.02)


def test_a_few_steps_and_broken_losses_have_no_trend() -> None:
    meter = Meter(40)
    for step in range(1, 16):
        meter.measure(row(step, 10.0 / step), samples=1, waited=0, taken=1)
    assert meter.terms()[0].change is None
    for step in range(16, 41):
        meter.measure(row(step, math.nan), samples=1, waited=0, taken=1)
    assert math.isfinite(meter.terms()[0].mean)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (59.6, "1:00 min"), (725, "12:05 min"), (12_000, "3:20 h"), (187_000, "2 d 4 h"), (math.nan, "–")],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def _trained(steps: int = 30) -> tuple[Meter, dict[str, Any]]:
    meter, last = Meter(3500), {}
    for step in range(1, steps + 1):
        last = row(step, 3.0 / step)
        last |= meter.measure(last, samples=128, waited=0.1, taken=0.4)
    return meter, last


@pytest.mark.parametrize("width", [100, 60])
def test_the_table_tells_everything_that_is_asked_of_it(width: int) -> None:
    meter, last = _trained()
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(table_of(meter, last | {"cuda_max_mb": 2500.0}))
    shown = console.export_text()
    for expected in ("30/3,500", "ETA", "phase pairs", "samples/s 320", "data wait 25 %", "2.5 GB on", "lr 1.00e-03"):
        assert expected in " ".join(shown.split()), expected
    crd = next(line for line in shown.splitlines() if "crd" in line)
    assert f"{sum(1.5 / s for s in range(1, 31)) / 30:.4f}" in crd
    assert "↓" in crd
    assert "0.0500" in crd
    assert all(len(line) <= width for line in shown.splitlines())


def test_a_skipped_step_has_no_loss_and_is_told() -> None:
    meter, _ = _trained()
    skipped = {"step": 31, "phase": "pairs", "lr": 1e-3, "skipped": 2, "skipped_because": "the loss is not finite"}
    skipped |= meter.measure(skipped, samples=128, waited=0.1, taken=0.4)
    assert note_of(meter, skipped).startswith("skipped: the loss is not finite  lr 1.00e-03")
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(table_of(meter, skipped))
    assert "steps skipped 2" in (shown := console.export_text())
    assert "crd" in shown


def test_elsewhere_a_line_tells_the_wait_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(40)
    with Reporter().training(meter, every=20) as tell:
        for step in range(1, 41):
            counted = row(step)
            counted |= meter.measure(counted, samples=10, waited=0.25, taken=1.0)
            tell(counted)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["training: 20/40", "training: 40/40"]
    assert "data wait 25 %  ETA 0 s" in lines[1]


def test_a_terminal_has_a_table_that_lines_go_above() -> None:
    reporter, screen = Reporter(False), io.StringIO()
    reporter._console = Console(file=screen, force_terminal=True, width=90)
    meter = Meter(3)
    with reporter.training(meter, every=20) as tell:
        for step in range(1, 4):
            counted = row(step)
            tell(counted | meter.measure(counted, samples=10, waited=0.0, taken=1.0))
            reporter.line(f"step {step}: said")
    shown = screen.getvalue()
    assert all(f"step {step}: said" in shown for step in (1, 2, 3))
    assert "training 3/3" in shown, "the last step is drawn, however soon after another"


def test_watching_costs_less_than_a_millisecond_a_step(tmp_path: Path) -> None:
    """Everything that a step does for what is seen of it, with a written row; 20 of 21 steps write none."""
    meter, log, steps = Meter(400), MetricsLog(tmp_path / "metrics.jsonl", 0), 200
    terms = {f"loss/term{i}": 0.5 for i in range(10)}
    best = math.inf
    for start in (0, steps):
        began = time.perf_counter()
        for step in range(start + 1, start + steps + 1):
            counted = row(step) | terms
            counted |= meter.measure(counted, samples=128, waited=0.01, taken=0.3)
            log.write(counted)
            note_of(meter, counted)
        best = min(best, (time.perf_counter() - began) / steps)
    log.close()
    print(f"{1e6 * best:.0f} us a step")
    assert best < 1e-3


# -- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_a_line_keeps_every_row(tmp_path: Path) -> None:
    """The system's own limit on a file's size: the write that meets it is short, and the next one fails."""
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, say=said.append)
    log.write(row(1))
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
    try:
        log.write(row(2))
        log.write(row(3))
        assert path.read_bytes() == whole, "no half line"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1
    assert "could not be written because File too large; training goes on" in said[0]
    log.write(row(4))
    log.close()
    assert [found["step"] for found in read_metrics(path)] == [1, 2, 3, 4]
    assert len(said) == 1


def test_a_folder_that_takes_no_file_is_told_and_rows_wait(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run").write_text("in the way")
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", 0, say=said.append)
    log.write(row(1))
    assert "could not be written because Not a directory" in said[0]
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    log.write(row(2))
    log.close()
    assert [found["step"] for found in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_rows_that_never_found_room_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetricsLog, "WAITING", 3)
    said: list[str] = []
    (tmp_path / "run").write_text("in the way")
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", 0, say=said.append)
    for step in range(5):
        log.write(row(step))
    log.close()
    assert said[1:] == [f"5 rows of {tmp_path / 'run' / 'metrics.jsonl'} could not be written and are lost"]


def test_a_resumed_log_goes_on_in_time_and_drops_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [row(1, elapsed_s=4.0), row(2, elapsed_s=9.0), {"step": 2, "eval/x": 1}, row(3, elapsed_s=99.0)]
    path.write_text("".join(json.dumps(item) + "\n" for item in rows) + '{"step": 4, "lo')
    log = MetricsLog(path, 2)
    assert log.elapsed == 9.0
    log.write(row(3))
    log.close()
    assert [found["step"] for found in read_metrics(path)] == [1, 2, 2, 3]


Make = Callable[..., Recipe]


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, toy_teacher: None) -> Make:
    def make(*overrides: str) -> Recipe:
        return load_recipe(toy_recipe(world, teacher_cache), overrides)

    return make


def test_a_run_whose_metrics_find_no_room_ends_well(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.io, "FileIO", Full)
    result = distill_run(recipe("train.steps=3"), tmp_path / "run")
    assert result.evaluation is not None
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None
    said = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl could not be written" in line]
    assert said
    assert "because the disk is full; training goes on" in said[0]


# -- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_rows_and_a_resumed_run_hides_what_comes_again(recipe: Make, tmp_path: Path) -> None:
    # of the extra `tensorboard`, which `all` brings: without it this fails, it does not skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wanted = recipe("train.steps=3", "train.log_every=1", "train.trackers=[tensorboard]")
    distill_run(wanted, tmp_path / "run", progress=False)
    log = open_log(tmp_path / "run", wanted, 2, pytest.fail)
    log.write(row(3, 77.0))
    log.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({item["step"]: item["loss"] for item in rows if "loss" in item})
    assert losses[3] == 77.0
    assert {"loss/crd", "lr", "data_wait_share", "eval/image_to_text/R@5"} <= set(events.Tags()["scalars"])


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in with what the adapter uses of trackio 0.43; the package itself is no part of `all`."""
    calls: list[Any] = []
    module = types.ModuleType("trackio")
    module.__spec__ = types.SimpleNamespace(name="trackio")  # type: ignore[assignment]

    class Run:
        def log(self, metrics: dict[str, float], step: int | None = None) -> None:
            calls.append((step, metrics))

    def finish() -> None:
        print("run finished")
        calls.append("finish")

    def init(*, project: str, name: str, config: dict[str, Any], resume: str, embed: bool, **machine: bool) -> Run:
        print("view the dashboard")
        assert machine == {"auto_log_gpu": False, "auto_log_cpu": False}
        assert embed is False
        calls.append((project, name, resume, config["train"]["steps"]))
        return Run()

    module.init, module.finish = init, finish  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return calls


def test_trackio_has_the_numbers_of_every_row(
    recipe: Make, tmp_path: Path, trackio: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = recipe("train.steps=9", "train.trackers=[trackio]")
    log = open_log(tmp_path, wanted, 0, pytest.fail)
    log.write(row(1) | {"bad": math.nan})
    log.write({"step": 9, "final": True, "eval/R@5": 0.5})
    log.close()
    numbers = {key: value for key, value in row(1).items() if key not in ("step", "phase")}
    name = f"{wanted.name} {tmp_path.name}"
    assert trackio == [("pocketvlm", name, "never", 9), (1, numbers), (9, {"eval/R@5": 0.5}), "finish"]
    assert capsys.readouterr().out == "", "stdout is for results"
    open_log(tmp_path, wanted, 1, pytest.fail).close()
    assert trackio[4][2] == "allow"


@pytest.mark.parametrize("name", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"])
def test_trackio_that_would_leave_the_machine_is_refused(
    recipe: Make, tmp_path: Path, trackio: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "somewhere/else")
    with pytest.raises(UsageError, match=rf"{name} is set, so trackio would send this run to another machine"):
        distill_run(recipe("train.trackers=[trackio]"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert trackio == []


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_an_absent_tracker_names_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'pocketvlm\[{name}\]'"):
        check_trackers([name])


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_switched_off_and_the_rows_stay(
    recipe: Make, tmp_path: Path, trackio: list[Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("database is locked")

    if where == "log":
        run = types.SimpleNamespace(log=broken)
        monkeypatch.setattr(sys.modules["trackio"], "init", lambda **_: run)
    else:
        monkeypatch.setattr(sys.modules["trackio"], where, broken)
    said: list[str] = []
    log = open_log(tmp_path, recipe("train.trackers=[trackio]"), 0, said.append)
    for step in (1, 2):
        log.write(row(step))
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert len(said) == 1
    assert "tracker trackio failed (RuntimeError: database is locked) and is switched off" in said[0]


def test_an_unknown_tracker_is_refused(recipe: Make) -> None:
    with pytest.raises(UsageError, match="tensorboard"):
        recipe("train.trackers=[wandb]")
