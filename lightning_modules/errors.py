"""Errors a user can act on. Everything else that is raised is a bug of ours."""


class UserError(Exception):
    """Something outside the program is wrong: a path, a file, a setting, a disk.

    The message says what was wanted, what was found, and how to mend it. ``experiments.run`` prints it as
    one line and exits with status 2; no traceback is shown because none would help.
    """


class DataError(UserError):
    """A data file, shard, manifest or prompt file is missing, damaged, or not what the run expects."""


class ConfigError(UserError):
    """Settings that contradict each other, or that name something that does not exist."""


class DivergenceError(UserError):
    """The training itself goes wrong: its loss or gradient is not finite, again and again."""
