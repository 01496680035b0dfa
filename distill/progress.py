"""Progress for people: bars on a terminal, plain lines elsewhere (a log file, CI), nothing when switched off."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Reporter:
    """Where a run speaks. enabled=False is silent. Lines go to stderr, so that stdout stays for results."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._console: Any = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True)

    def line(self, text: str) -> None:
        """One line, now."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, total: int, *, done: int = 0, every: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Yields `update(done, note)`. Elsewhere than on a terminal a line appears every `every` units (0: at
        the end, and at most every ten seconds before it)."""
        if self._console is not None:
            with self._bar(title, total, done) as bar:
                yield bar
            return
        started = last = time.monotonic()
        said = done

        def update(now: int, note: str = "") -> None:
            nonlocal last, said
            due = now // every > said // every if every else time.monotonic() - last > 10
            if self.enabled and now != said and (due or now >= total):
                elapsed = time.monotonic() - started
                self.line(f"{title}: {now}/{total}{'  ' + note if note else ''}  [{elapsed:.0f} s]")
                last, said = time.monotonic(), now

        yield update

    @contextmanager
    def _bar(self, title: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as bars:
            task = bars.add_task(title, total=total, completed=done, note="")

            def update(now: int, note: str = "") -> None:
                bars.update(task, completed=now, note=note)

            yield update


class Stages:
    """Turns (done, total, what) calls, as data and teachers make them, into one stage per `what`."""

    def __init__(self, report: Reporter, title: str) -> None:
        self.report, self.title = report, title
        self.open: Any = None
        self.what = ""
        self.update: Callable[[int, str], None] = lambda done, note: None

    def __enter__(self) -> Callable[[int, int, str], None]:
        return self._tell

    def _tell(self, done: int, total: int, what: str) -> None:
        if what != self.what:
            self.__exit__()
            self.open = self.report.stage(f"{self.title} ({what})", total)
            self.update, self.what = self.open.__enter__(), what
        self.update(done, "")

    def __exit__(self, *_: object) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.open = None
