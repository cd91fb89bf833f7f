"""Prompts that are longer than a text encoder reads: they are cut, as everywhere, but not without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor


class CutPrompts:
    """Counts the different prompts that were cut, and says so at the first, the tenth, the hundredth, ...

    Args:
        reader: who reads only the beginning, for the message.
    """

    def __init__(self, reader: str) -> None:
        self.reader = reader
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        """How many different prompts this process has cut."""
        return len(self._seen)

    def look(self, tokenizer: Any, prompts: Sequence[str], mask: Int[Tensor, "n l"]) -> None:
        """Count those of a batch.

        Args:
            tokenizer: made the mask, cutting at l tokens.
            prompts: one per row.
            mask: 1 where there is a token and no padding.
        """
        for prompt, row in zip(prompts, mask.bool()):
            if row.all() and hash(prompt) not in self._seen:
                self.note(prompt, len(tokenizer(prompt, verbose=False).input_ids), len(row))

    def note(self, prompt: str, length: int, limit: int) -> None:
        """Count a prompt of ``length`` tokens, of which ``limit`` are read, if it is cut and was not counted yet."""
        if length <= limit or hash(prompt) in self._seen:
            return
        self._seen.add(hash(prompt))
        if str(self.count).strip("0") == "1":
            cut = "prompt so far is" if self.count == 1 else "prompts so far are"
            rank_zero_info(
                f"{self.count} {cut} longer than the {limit} tokens that {self.reader} reads, and cut there "
                f"(the latest has {length} tokens: {prompt[:60]!r}...)"
            )
