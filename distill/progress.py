"""Progress for people: bars and a live table on a terminal, plain lines elsewhere, nothing when switched off."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pocketvlm.distill.live import note_of, table_of
from pocketvlm.distill.meter import Meter

_REFRESH_S = 0.25


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
    def training(self, meter: Meter, *, every: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Yields `tell(row)`, called after each step that `meter` counted: a live table on a terminal, drawn at most
        four times a second and in this thread, and elsewhere a line every `every` steps."""
        if self._console is None:
            with self.stage("training", meter.total, done=meter.step, every=every) as update:
                yield lambda row: update(row["step"], note_of(meter, row))
            return
        from rich.live import Live

        drawn = -_REFRESH_S
        with Live(console=self._console, auto_refresh=False) as live:

            def tell(row: Mapping[str, Any]) -> None:
                nonlocal drawn
                now = time.monotonic()
                if now - drawn >= _REFRESH_S or meter.step >= meter.total:
                    live.update(table_of(meter, row), refresh=True)
                    drawn = now

            yield tell

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
