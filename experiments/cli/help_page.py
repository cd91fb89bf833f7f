"""The first page of help, without the seconds that the framework takes to import; and help for what a YAML names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.cli.compose import JOBS, find_config, overlays, packaged_configs
from experiments.cli.tree import class_of, find

WIDTH = 20  # of a config's name on the page
_PAGE = """\
usage: python -m experiments.run [{jobs}] --config NAME [--config NAME ...] [--KEY=VALUE ...]
       python -m experiments.run [{jobs}] --run_dir FOLDER [--resume last] [--KEY=VALUE ...]

Align a text-to-image diffusion model with preferences, or evaluate one. Without a job: fit.

Jobs:
  fit        Train, in a folder of the run's own.
  validate   Compute the loss on data.val_shards.
  test       Draw pictures for the test prompts and let the rewards judge them against the base model's.
  predict    Draw pictures for --pictures.prompts=FILE and save them.

Options:
  --config NAME      A YAML file, or one of the packaged configs below; several are laid over each other.
  --run_dir FOLDER   Folder of the run (runs/NAME). A run that is resumed or evaluated has its own settings.
  --resume WHAT      Checkpoint to start from: last, the newest intact one of the folder; auto, the same if there is
                     one; a file; none (of other jobs than fit), the untrained model. --ckpt_path is the same.
  --allow_changes    Resume or evaluate under settings that make another experiment of the run.
  --KEY=VALUE        Any setting: --model.objective.beta=2000  --data.batch_size=8  --trainer.max_steps=100
                     Another class: --model.objective=IPO  --model.ema=ExponentialMovingAverage
                     A callback, by its name: --trainer.callbacks.WinRate.every_n_steps=100
                     One fewer, one more: --trainer.callbacks.WinRate=null  --trainer.callbacks+=Cost
  --print_config     Show all settings after everything that was given, and end.

More help:
  --help_all                        Every option of the trainer and of the command, with its default.
  --model.help CLASS                The settings of a class, as of AlignmentModule; --data.help is the same.
  --config NAME --model.KEY.help    The settings of the class that the config has there, as of --model.objective.help.

Packaged configs:
{configs}

Overlays, as in --config dpo_sd15 --config lora:
{overlays}
"""


def help_page() -> str:
    """What ``--help`` shows."""
    return _PAGE.format(jobs="|".join(JOBS), configs=_listed(packaged_configs()), overlays=_listed(overlays()))


def _listed(files: Sequence[str]) -> str:
    names = [file.removesuffix(".yaml") for file in files]
    return "\n".join(f"  {name:{WIDTH}}  {_first_sentence(name)}" for name in names)


def _first_sentence(name: str) -> str:
    head = find_config(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
    return head.removeprefix("Overlay: ")


def asks_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def with_named_classes(tree: Mapping[str, Any], words: Sequence[str]) -> tuple[str, ...]:
    """``--model.objective.help`` with the class that the settings name there, since the parser wants to be told."""
    named: list[str] = []
    for word in words:
        path = class_of(find(tree, word.removeprefix("--").removesuffix(".help")))
        if word.endswith(".help") and path is not None:
            word = f"{'--trainer.callbacks.help' if word.startswith('--trainer.callbacks.') else word}={path}"
        named.append(word)
    return tuple(named)
