"""What stands between a bad moment and a lost run: steps that are skipped, weights that are looked at, signals, a lock.

A step whose loss or gradient is no number, or whose gradient norm leaps, changes nothing: no weight, no moment, no
average, no running statistic. The run goes on with the next step, and stops when too many follow each other.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from pocketvlm.distill.checkpoint import latest_checkpoint
from pocketvlm.distill.masking import NORMS
from pocketvlm.distill.recipe import TrainSection
from pocketvlm.distill.run_folder import LOCK
from pocketvlm.edge.errors import PocketvlmError, UsageError

# sysexits' "try again later": the run is whole and wants to go on
STOPPED = 75


class DivergedError(PocketvlmError, ArithmeticError):
    """Losses, gradients or weights stopped being numbers; the checkpoints written before are good."""


class RunStopped(PocketvlmError, RuntimeError):
    """A signal asked the run to stop; it saved a checkpoint and can go on."""

    exit_code = STOPPED


class StepGuard:
    """Counts and undoes bad steps. skipped: of the whole run. in_a_row: since the last good one.

    checkpoints: the folder whose newest checkpoint an error names, once there is one.
    """

    def __init__(self, train: TrainSection, student: nn.Module) -> None:
        self.train, self.skipped, self.in_a_row = train, 0, 0
        self.checkpoints: Path | None = None
        norms = [module for module in student.modules() if isinstance(module, NORMS)]
        # a forward that overflows has moved them before its loss is known
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._before = [buffer.clone() for buffer in self._statistics]

    @torch.no_grad()
    def remember(self) -> None:
        """Called before a step: what `skip` goes back to."""
        if self._statistics:
            torch._foreach_copy_(self._before, self._statistics)

    def too_steep(self, norm: float) -> bool:
        """Whether a step of this gradient norm is not taken."""
        limit = self.train.skip_norm_above
        return not math.isfinite(norm) or (limit is not None and norm > limit)

    @torch.no_grad()
    def skip(self, step: int, what: str, terms: Mapping[str, float]) -> dict[str, Any]:
        """Undo what the 0-based step has moved, and count it; returns what the log says of it.

        Raises:
            DivergedError: it is one more in a row than `train.max_skipped`.
        """
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._before)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        where = f" (in {', '.join(bad)})" if bad else ""
        if self.in_a_row > self.train.max_skipped:
            count = f", after {self.in_a_row - 1} steps in a row that were skipped" if self.in_a_row > 1 else ""
            raise self.diverged(f"the {what} at step {step + 1}{where}{count}")
        return {"skipped": self.skipped, "skipped_because": f"the {what}{where}"}

    def diverged(self, what: str) -> DivergedError:
        """The error that ends the run."""
        last = latest_checkpoint(self.checkpoints) if self.checkpoints is not None else None
        good = f"the last good checkpoint is {last.name}" if last is not None else "there is no checkpoint yet"
        return DivergedError(
            f"{what}, so every later step would be noise; lower train.lr, raise train.warmup_steps or use "
            f"train.precision fp32, and start again ({good})"
        )

    def taken(self) -> None:
        """A step was good."""
        self.in_a_row = 0

    def check_weights(self, step: int, **modules: nn.Module) -> None:
        """Look at everything that a checkpoint would hold.

        Raises:
            DivergedError: a weight or statistic is no number; names the first.
        """
        for key, module in modules.items():
            state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
            # a sum of squares may overflow where no number is infinite, so the absolute maximum is asked
            found = [value.detach().abs().amax() for value in state.values() if value.numel()]
            if found and not bool(torch.isfinite(torch.stack([value.float() for value in found])).all()):
                name = next(name for name, value in state.items() if not bool(torch.isfinite(value).all()))
                raise self.diverged(f"{key}.{name} is not finite after step {step} and no checkpoint was made of it")

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, value: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = int(value["skipped"]), int(value["in_a_row"])


class StopSignals:
    """SIGTERM and SIGINT as a wish that the loop reads between steps. A second signal does what it did before.

    asked: whether one came; name: which. Elsewhere than in the main thread, which alone may listen, none ever comes.
    """

    def __init__(self) -> None:
        self.asked, self.name = False, ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.name = True, signal.Signals(number).name
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


_held: set[int] = set()


def _close_in_child() -> None:
    # a lock belongs to the open file and not to the process: a worker that outlives the run would keep it
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the output folder for this process, which makes it where it is absent.

    The lock is the operating system's (flock) on the file `run.lock`, which also says who holds it; it ends with the
    process, however that ends, so a file that was left behind is no obstacle. Windows has none.

    Raises:
        UsageError: another process holds it, or nothing can be written there.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    if folder.is_file():  # said by whoever opens the folder
        yield
        return
    made = not folder.exists()
    handle = -1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                # the run before may have removed the file between the two calls, and the next would make another
                if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                    break
            os.close(handle)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise UsageError(
            f"{folder} is in use by {holder}, and two runs would overwrite each other's checkpoints; wait for it, or "
            "name another folder"
        ) from None
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        raise UsageError(
            f"output folder {folder} cannot be written to ({error.strerror}), so nothing of a run would be kept; make "
            "it writable, free some space, or name another one"
        ) from error
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)
        if made:
            with suppress(OSError):  # a run that made nothing leaves nothing
                folder.rmdir()
