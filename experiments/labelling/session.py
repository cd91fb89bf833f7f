"""Who sees which pair, what lies at the left, and what a key then means."""

from __future__ import annotations

import hashlib
import shlex
import threading
from pathlib import Path
from typing import Any

from experiments.labelling.choices import Answer, ChoiceLog
from experiments.labelling.pairs import PicturePair
from experiments.labelling.supply import Supply
from lightning_modules.errors import ConfigError

SIDES = ("left", "right")
ANSWERS = (*SIDES, "tie", "skip")


class Session:
    """Pairs, choices and the blind order together; its methods may be called from many threads.

    Everybody goes through the pairs in their order. The side of a picture is drawn from the seed and the pair, and
    nothing that a browser is told says which picture of the pair it is.

    Args:
        supply: the pairs.
        log: the choices.
        seed: of the sides.
    """

    def __init__(self, supply: Supply, log: ChoiceLog, seed: int) -> None:
        self.supply, self.log, self.seed = supply, log, seed
        self._lock = threading.Lock()

    def at_left(self, pair: PicturePair) -> int:
        """0 or 1: the picture of the pair that is shown at the left."""
        return hashlib.blake2b(repr((self.seed, "left", pair.key)).encode()).digest()[0] % 2

    def state(self, annotator: str) -> dict[str, Any]:
        """What the person's page shows: the pair to choose from, the one after it, and how far they have come."""
        with self._lock:
            return self._state(annotator)

    def choose(self, annotator: str, key: str, answer: str) -> dict[str, Any]:
        """Record "left", "right", "tie" or "skip" for the pair of this key; returns the new state.

        Raises:
            ConfigError: no such pair or answer.
            DataError: the disk does not take it.
        """
        pair = self._pair(key)
        if answer not in ANSWERS:
            raise ConfigError(f"answer {answer!r} is unknown; there are {', '.join(ANSWERS)}")
        left = self.at_left(pair)
        meant: dict[str, Answer] = {"left": 1 if left else 0, "right": 0 if left else 1, "tie": "tie", "skip": "skip"}
        with self._lock:
            self.log.record(pair, annotator, meant[answer], left)
            return self._state(annotator)

    def undo(self, annotator: str, key: str) -> dict[str, Any]:
        """Take back what the person said to the pair of this key; returns the new state.

        Raises:
            ConfigError: no such pair.
            DataError: the disk does not take it.
        """
        pair = self._pair(key)
        with self._lock:
            self.log.take_back(pair, annotator)
            return self._state(annotator)

    def picture(self, key: str, side: str) -> Path:
        """The file that the pair shows at "left" or "right".

        Raises:
            ConfigError: no such pair or side.
        """
        pair = self._pair(key)
        if side not in SIDES:
            raise ConfigError(f"side {side!r} is unknown; there are {', '.join(SIDES)}")
        first = (side == "left") == (self.at_left(pair) == 0)
        return self.log.path.parent / (pair.image_0 if first else pair.image_1)

    def _pair(self, key: str) -> PicturePair:
        pair = self.supply.find(key)
        if pair is None:
            raise ConfigError("this pair is not among those of the command; reload the page")
        return pair

    def _state(self, annotator: str) -> dict[str, Any]:
        answers, pairs = self.log.answers(annotator), self.supply.pairs
        ready = len(pairs)
        open_numbers = (number for number in range(ready) if pairs[number] not in answers)
        now, then = next(open_numbers, ready), next(open_numbers, ready)
        self.supply.reached(now)
        mine = [pair for pair in answers if self.supply.find(pair.key) is not None]
        skipped = sum(answers[pair] == "skip" for pair in mine)
        return {
            "annotator": annotator,
            "pair": self._shown(pairs[now]) if now < ready else None,
            "next": self._shown(pairs[then]) if then < ready else None,
            "last": mine[-1].key if mine else None,
            "chosen": len(mine) - skipped,
            "skipped": skipped,
            "ready": ready,
            "total": self.supply.source.total,
            "makes": self.supply.source.makes,
            "problem": self.supply.problem,
            "record": str(self.log.path),
            "command": f"python -m experiments.prepare_pairs --input {shlex.quote(str(self.log.path))} --output DIR",
        }

    def _shown(self, pair: PicturePair) -> dict[str, str]:
        return {"key": pair.key, "prompt": pair.prompt, **{side: f"picture/{pair.key}/{side}" for side in SIDES}}
