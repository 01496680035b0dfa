"""Recipe key `train.trackers`: the rows of metrics.jsonl for TensorBoard or trackio, on this machine only.

Trackers see what metrics.jsonl holds and nothing else. One that fails while a run trains is switched off with a
sentence; the run and metrics.jsonl go on.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.run_folder import METRICS, MetricsLog
from pocketvlm.edge.errors import UsageError, require, require_installed

# a variable that makes trackio send a run, or alerts, to another machine
_TRACKIO_AWAY = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL")
PROJECT = "pocketvlm"


def open_log(out: Path, recipe: Recipe, step: int, say: Callable[[str], None]) -> MetricsLog:
    """metrics.jsonl of a run at `step`, with the recipe's trackers behind it. say: where faults are told.

    Raises:
        MissingExtraError, UsageError: as `check_trackers`.
    """
    check_trackers(recipe.train.trackers)
    also = [_Guarded(name, partial(_OPEN[name], out, recipe, step), say) for name in recipe.train.trackers]
    return MetricsLog(out / METRICS, step, say=say, also=also)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before anything is computed, trackers that cannot be opened here.

    Raises:
        MissingExtraError: a tracker's package is absent; the message names the extra, which has the tracker's name.
        UsageError: the environment tells trackio to send runs away.
    """
    for name in names:
        require_installed([name], name)
    if "trackio" in names and (away := [key for key in _TRACKIO_AWAY if os.environ.get(key)]):
        raise UsageError(
            f"{', '.join(away)} is set, so trackio would send this run to another machine, and pocketvlm tracks on "
            "this one only; unset it, and publish the finished run by trackio's own 'trackio sync'"
        )


class _Trackio:
    """A trackio run, named like the run's folder; it lies where TRACKIO_DIR says, as `trackio show` expects it."""

    def __init__(self, out: Path, recipe: Recipe, step: int) -> None:
        self._trackio = require("trackio", "trackio")
        # it prints how to open its dashboard, and results are all that belongs on stdout
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = self._trackio.init(
                project=PROJECT,
                name=f"{recipe.name} {out.resolve().name}",
                config=recipe.to_dict(),
                resume="allow" if step else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            # not the run's own, after which trackio would finish it again, and say so, when the process ends
            self._trackio.finish()


class _TensorBoard:
    """Event files in the run folder's `tensorboard/`."""

    def __init__(self, out: Path, recipe: Recipe, step: int) -> None:
        module = require("torch.utils.tensorboard", "distill")
        # events of later steps, which a resumed run repeats, are hidden
        self._writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


_OPEN: dict[str, Callable[[Path, Recipe, int], Any]] = {"tensorboard": _TensorBoard, "trackio": _Trackio}


class _Guarded:
    """A `run_folder.Tracker` that never stops a run: the first failure is told, and what follows is not sent."""

    def __init__(self, name: str, opened: Callable[[], Any], say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._inner: Any = self
        self._try(lambda _: setattr(self, "_inner", opened()))

    def write(self, row: dict[str, Any]) -> None:
        values = {key: float(value) for key, value in row.items() if _is_number(value) and key not in ("step", "final")}
        self._try(lambda inner: inner.add_scalars(values, int(row["step"])))

    def close(self) -> None:
        self._try(lambda inner: inner.close())

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._inner is None:
            return
        try:
            action(self._inner)
        except Exception as error:
            self._inner = None
            self._say(
                f"tracker {self._name} failed ({type(error).__name__}: {error}) and is switched off for the rest of "
                "the run, which goes on; metrics.jsonl has every row"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
