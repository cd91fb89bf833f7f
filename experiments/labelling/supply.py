"""Where pairs come from, and the next ones made in the background while somebody chooses."""

from __future__ import annotations

import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence

from experiments.labelling.pairs import PicturePair
from lightning_modules.errors import UserError


class Stopped(Exception):
    """The command ends; what was begun is given up."""


class PairSource(ABC):
    """Pairs 0 to ``total - 1``, in the order in which they are shown.

    Attributes:
        total: how many there are, or will be.
        makes: what making one is called on the page ("drawn").
    """

    total: int
    makes = "made"

    @abstractmethod
    def ready(self, number: int) -> bool:
        """Whether the pair's pictures are on the disk already."""

    @abstractmethod
    def pair(self, number: int, stop: threading.Event) -> PicturePair:
        """The pair; its pictures are made first where they are missing.

        Args:
            number: 0 to ``total - 1``.
            stop: set when the command ends.

        Raises:
            UserError: they cannot be made.
            Stopped: ``stop`` was set meanwhile.
        """


class ListedPairs(PairSource):
    """Pairs whose pictures exist."""

    def __init__(self, pairs: Sequence[PicturePair]) -> None:
        self._pairs, self.total = pairs, len(pairs)

    def ready(self, number: int) -> bool:
        return True

    def pair(self, number: int, stop: threading.Event) -> PicturePair:
        return self._pairs[number]


class Supply:
    """The pairs that can be shown: first those on the disk, then those that a thread adds.

    Args:
        source: makes them.
        ahead: pairs to keep ready beyond the last one that somebody has come to.

    Attributes:
        pairs: ready ones, in their order; the list only grows.
        problem: why no more come, or None.
    """

    def __init__(self, source: PairSource, ahead: int) -> None:
        self.source, self.ahead, self.problem = source, ahead, None
        self.pairs: list[PicturePair] = []
        self._by_key: dict[str, PicturePair] = {}
        self._reached = 0
        self._stop = threading.Event()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="pair-supply")
        while len(self.pairs) < source.total and source.ready(len(self.pairs)):
            self._add(source.pair(len(self.pairs), self._stop))

    problem: str | None

    def start(self) -> None:
        if len(self.pairs) < self.source.total:
            self._thread.start()

    def close(self) -> None:
        """End the thread; a pair that it was making is given up."""
        self._stop.set()
        with self._wake:
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def find(self, key: str) -> PicturePair | None:
        return self._by_key.get(key)

    def reached(self, number: int) -> None:
        """Somebody has come to the pair of this number, so that more may be needed."""
        with self._wake:
            self._reached = max(self._reached, number)
            self._wake.notify()

    def _add(self, pair: PicturePair) -> None:
        self._by_key[pair.key] = pair
        self.pairs.append(pair)

    def _work(self) -> None:
        try:
            while len(self.pairs) < self.source.total:
                with self._wake:
                    self._wake.wait_for(lambda: self._stop.is_set() or len(self.pairs) <= self._reached + self.ahead)
                if self._stop.is_set():
                    return
                self._add(self.source.pair(len(self.pairs), self._stop))
        except Stopped:
            return
        except UserError as error:
            self.problem = str(error)
            sys.stderr.write(f"error: {error}\n")
        except Exception as error:  # the people at the page are told; pairs that are ready can still be chosen from
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc()
