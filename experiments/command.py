"""How every command of this package ends when the user has made a mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning_modules.errors import UserError


def run_command(main: Callable[[], Any]) -> None:
    """Call ``main`` for the shell: a mistake of the user is one line and status 2, a bug of ours a traceback."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
