"""What may reach a terminal: names and texts out of files that anybody may have written are shown, never obeyed."""

from __future__ import annotations

from rich.text import Text


def printable(text: object) -> str:
    """A text in one line, its control characters, which could move the cursor or worse, as escapes: ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def literal(text: object) -> Text:
    """The same for ``rich``, which would otherwise read ``[red]`` in a name as an instruction."""
    return Text(printable(text))
