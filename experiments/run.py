"""The one command: ``python -m experiments.run [fit|validate|test|predict] --config NAME [--key=value ...]``.

    python -m experiments.run --config dpo_sd15
    python -m experiments.run --config dpo_tiny --model.objective.beta=2000 --run_dir runs/beta2000
    python -m experiments.run --run_dir runs/beta2000 --resume last     (or auto, or a file; --ckpt_path is the same)
    python -m experiments.run test --run_dir runs/beta2000

A run lives in one folder (``--run_dir``, else ``runs/<config>``): config.yaml (resolved), TensorBoard events,
checkpoints/, samples/, export/, win_rate.json. A new run never starts in a folder that holds another's checkpoints.
One that is resumed or evaluated has the settings that it was started with, see ``experiments.cli.saved_settings``.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from experiments.cli.command import run_command
from experiments.cli.compose import CommandLine, import_all, import_named, no_config
from experiments.cli.help_page import asks_help, help_page
from experiments.cli.orphans import end_with_launcher
from experiments.cli.start import Start
from lightning_modules.errors import ConfigError

if TYPE_CHECKING:
    from experiments.cli.experiment_cli import ExperimentCLI


def main(argv: Sequence[str] | None = None) -> ExperimentCLI:
    """Run one job and return what ran it (its ``trainer``, ``model`` and ``datamodule``).

    Args:
        argv: the words after the program's name; None takes them from ``sys.argv``.

    Raises:
        UserError: something that the user can mend; the command line shows it as one line.
    """
    # Processes that DDP starts read sys.argv again, the job's word included: it must not be changed here.
    line = CommandLine.split(sys.argv[1:] if argv is None else argv)
    if asks_help(line.overrides):
        print(help_page(), end="")
        raise SystemExit(0)
    start = Start.of(line)  # before the heavy imports: a mistyped name should not wait for them
    explains = any("help" in word.partition("=")[0] for word in line.overrides)
    if not line.configs and start.saved is None and not explains:
        raise ConfigError(no_config(line.overrides))

    end_with_launcher()
    # Lightning takes seconds to import, and a wrong word should be told at once.
    from experiments.cli.experiment_cli import ExperimentCLI
    from experiments.cli.preflight import check_kind_of_pairs
    from experiments.cli.setting_errors import one_line

    quiet()
    for tree in (start.tree, start.saved.tree if start.saved else {}):
        import_named(tree, start.words)
    if explains:
        import_all()
    with ExitStack() as held:
        if not explains:
            check_kind_of_pairs(start.tree)
        with one_line("settings"):
            cli = ExperimentCLI(start, held)
        cli.run_job()
    return cli


def quiet() -> None:
    """Silence what is so on purpose, and advertisements; every other warning is shown."""
    for on_purpose in (
        r"Found \d+ module\(s\) in eval mode",  # frozen networks stay there
        "You defined a `validation_step` but have no `val_dataloader`",  # pictures are judged, not pairs
        ".*your dataloader is not resumable",  # the data module resumes by the run's counters
        ".*does not have many workers",
        r"The number of training batches \(\d+\) is smaller than the logging interval",  # it counts steps of the run
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own affair with a newer torch
    ):
        warnings.filterwarnings("ignore", message=on_purpose)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_no_advertisement)


def is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in str(record.msg)


if __name__ == "__main__":
    run_command(main)
