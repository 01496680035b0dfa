"""A child process that answers one JSON line with one JSON line: its own memory, thread pools and crashes.

The parent has a `Worker`; the child's module calls `serve`. Light on purpose: the child that runs ONNX must not load
torch, or its memory would be measured with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pocketvlm.edge.errors import IntegrityError, PocketvlmError

Answer = Callable[[dict[str, Any]], dict[str, Any]]

_TIMEOUT_S = 1800.0


class WorkerError(IntegrityError):
    """The child refused a request, or ended. reason: what it said, or how it ended. ended: it is gone."""

    def __init__(self, reason: str, *, ended: bool) -> None:
        super().__init__(reason)
        self.reason, self.ended = reason, ended


class Worker:
    """Starts `python -m module` and waits for what it opens. A context: leaving it ends the child.

    opened: the child's answer to the request that it was started with.

    Raises:
        WorkerError: it could not open what was asked for.
    """

    def __init__(self, module: str, request: dict[str, Any], *, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            # a runtime's own threads are set by number; torch is only a carrier of tensors there
            env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        )
        try:
            self.opened = self.ask(request)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            WorkerError: the child raised, ended, or did not answer in time.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        clock = threading.Timer(self._timeout_s, self._child.kill)
        clock.start()
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            clock.cancel()
        if not line:
            raise WorkerError(self._last_words(), ended=True)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], ended=False)
        return answer

    def close(self) -> None:
        """End the child and wait for it."""
        self._child.kill()
        self._child.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        code = self._child.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or [""])[-1][:300]
        how = f"its process was ended by signal {-code}" if code < 0 else f"its process ended with code {code}"
        return f"{how}: {last}" if last else how


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Answer]]) -> None:
    """The child's side: the first line goes to `start`, which answers it and gives what answers all others."""
    # runtimes print; their lines must not mix with ours
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer: Answer | None = None
    for line in sys.stdin:
        try:
            if answer is None:
                reply, answer = start(json.loads(line))
            else:
                reply = answer(json.loads(line))
        except PocketvlmError as error:
            reply = {"error": str(error)}
        except Exception as error:  # runtimes and converters raise whatever they like
            first = (str(error).strip().splitlines() or [""])[0][:300]
            reply = {"error": f"{type(error).__name__}: {first}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
