"""Long work tells how far it is: a bar on a terminal, elsewhere one plain line per interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}"
INTERVAL = 30.0  # seconds between plain lines; a log is read later, and a line per step drowns the rest


class Work:
    """A piece of work with a known number of parts, as its progress is shown on standard error.

    Args:
        title: what is being done.
        total: parts in all, or None where nobody knows.
        shown: False prints nothing, for all ranks but one and where bars are switched off.
        done: parts that an earlier start has done.
        first_line: off a terminal, print a line after the first part, too; short pieces of work print none.
        keep: leave the finished bar on the terminal.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        shown: bool = True,
        done: int = 0,
        first_line: bool = False,
        keep: bool = False,
    ) -> None:
        self.title, self.total, self.done, self._start = title, total, done, done
        self._keep, self._shown = keep, shown
        self._began = time.monotonic()
        self._next = self._began + (0.0 if first_line else INTERVAL)
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(desc=title, total=total, initial=done, leave=keep, dynamic_ncols=True, bar_format=FORMAT)

    def advance(self, parts: int = 1, details: Callable[[], str] | None = None) -> None:
        """Count parts, and show it if it is time to.

        Args:
            parts: how many have been done since.
            details: what else to say, asked for only when it is shown: a metric may have to wait for a GPU.
        """
        self.done += parts
        now = time.monotonic()
        if self._bar is not None:
            if now >= self._next:
                self._next = now + 0.5
                self._bar.set_postfix_str(details() if details else "", refresh=False)
            self._bar.update(parts)
        elif self._shown and now >= self._next:
            self._next = now + INTERVAL
            self.write(self.line(details() if details else ""))

    def line(self, details: str = "") -> str:
        """How far it is, as ``step 120 of 2000, 0:05:10 so far, 1:21:00 left, loss 0.69``."""
        known = f"{self.title} {self.done}" + (f" of {self.total}" if self.total is not None else "")
        spent = self.seconds
        words = [known, f"{_clock(spent)} so far"]
        if self.total is not None and self.done > self._start:
            words.append(f"{_clock(spent * (self.total - self.done) / (self.done - self._start))} left")
        return ", ".join([*words, *([details] if details else [])])

    @property
    def seconds(self) -> float:
        """Since this start."""
        return time.monotonic() - self._began

    @staticmethod
    def write(text: str) -> None:
        """A line on standard error, beside all bars and not into them."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Take the bar off the terminal, or leave it as it is, with ``keep``."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def tracked(items: Sequence[T], title: str) -> Iterator[T]:
    """The items one by one, with a line of progress after each if it is time to."""
    with Work(title, len(items), first_line=True) as work:
        for item in items:
            yield item
            work.advance()
