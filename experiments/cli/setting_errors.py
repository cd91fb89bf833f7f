"""Exceptions of libraries that a setting or a missing package causes, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_modules.errors import ConfigError, UserError

# Where arguments are checked. What comes from elsewhere may be a bug of ours, and keeps its traceback.
CHECKED_IN = ("lightning.", "torch.optim.", "torch.utils.data.", "jsonargparse.", "lightning_utilities.")
KINDS = (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError, AttributeError, KeyError)


@contextmanager
def one_line(where: str) -> Iterator[None]:
    """
    Args:
        where: what was being done, for the message.

    Raises:
        ConfigError: in place of an exception that a library raises about its arguments.
    """
    try:
        yield
    except UserError:
        raise
    except KINDS as error:
        if not isinstance(error, MisconfigurationException) and not _raised_in(error.__traceback__, CHECKED_IN):
            raise
        for cause in _causes(error):
            if isinstance(cause, UserError):  # of a class that jsonargparse tried, among others, for a setting
                raise cause from None
        missing = "a package is missing: " if isinstance(error, ImportError) else ""
        raise ConfigError(f"{where}: {missing}{' '.join(str(error).split())}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raised_in(trace: TracebackType | None, packages: tuple[str, ...]) -> bool:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(packages)
