"""LightningCLI with this framework's rules: one-line errors, run folders, safe resuming, jobs without subcommands."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf.errors import OmegaConfBaseException

from callbacks.loss_guard import LossGuard
from callbacks.resume.checkpoint_files import (
    AtomicCheckpointIO,
    damage_reason,
    newest_checkpoint,
    newest_intact_checkpoint,
)
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.due_evaluations import PolicyEvaluation
from callbacks.resume.exact_resume import ExactResume
from callbacks.resume.preemption import Preemption
from callbacks.save_pictures import SavePictures
from datamodules.stream.cursor import CursorDataModule
from experiments.cli.compose import JOBS, CommandLine, packaged_configs, settings
from experiments.cli.explain import explain
from lightning_modules.errors import ConfigError, UserError
from lightning_modules.lightning_internals import configured_trainer
from lightning_modules.weights.sharding import FullyShardedStrategy


class OneLineParser(LightningArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a nested class: the outermost one adds where, and tells
            super().error(message, ex)
        options = [action.dest for action in self._actions if not action.dest.endswith("help")]
        raise ConfigError(explain(str(message), options)) from ex


class SaveRunConfig(SaveConfigCallback):
    """The resolved settings, as config.yaml in the run folder; a resumed run writes its own over it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config["ckpt_path"] = None  # where this process started is no setting of the experiment
            self.parser.save(config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class ExperimentCLI(LightningCLI):
    """Parses, builds and runs one job.

    Args:
        line: the job and the names of the configs.
        args: what the parser is to read.
    """

    def __init__(self, line: CommandLine, args: Sequence[str]) -> None:
        self.line = line
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            run=False,  # Lightning's own subcommands would merge a checkpoint's settings over the command line's
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=list(args),
            parser_class=OneLineParser,
            parser_kwargs={
                # Resolves ${...} once, after every override; plain "omegaconf" would keep the file's values.
                "parser_mode": "omegaconf+",
                "prog": "python -m experiments.run",
                "usage": f"python -m experiments.run [{'|'.join(JOBS)}] --config NAME [--KEY=VALUE ...]",
                "description": (
                    "Align a text-to-image diffusion model, or evaluate one. Without a job word: fit. "
                    f"Packaged configs: {', '.join(packaged_configs())}. --model.help CLASS explains a class."
                ),
                "allow_abbrev": False,
            },
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=42,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # What predict draws. The other jobs leave it alone, so that one YAML serves all.
        parser.add_lightning_class_args(SavePictures, "pictures")
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of this run; default runs/<config>."
        )
        parser.add_argument(
            "--ckpt_path",
            "--resume",
            type=str | None,
            default=None,
            help=(
                "A checkpoint to go on from or to evaluate: a path; 'last', the run folder's newest whole one; 'auto' "
                "(fit), the same if there is any; 'none' (validate, test, predict), the weights that the config names."
            ),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except OmegaConfBaseException as error:
            raise ConfigError(f"interpolation in the settings: {' '.join(str(error).split())}") from error

    def before_instantiate_classes(self) -> None:
        """Settle where the run lives and what it starts from before anything large is built."""
        given = self.config.run_dir or self.config.trainer.default_root_dir
        self.run_dir = Path(given or Path("runs") / self.line.run_name)
        _check_writable(self.run_dir)
        self.config.trainer.default_root_dir = str(self.run_dir)
        given = dict(settings(self.line.overrides))  # the parser takes the last of both words
        if given.get("resume", given.get("ckpt_path")) != given.get("ckpt_path", given.get("resume")):
            raise ConfigError(
                f"--resume {given['resume']} and --ckpt_path {given['ckpt_path']} are two words for one thing; give one"
            )
        self.checkpoint = self._checkpoint(self.config.ckpt_path)

    def instantiate_classes(self) -> None:
        """Build everything; a UserError comes out as it was, not as the parser's account of what it tried."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, UserError):
                reason = reason.__cause__ or reason.__context__
            raise (reason or error) from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The configured trainer, with this framework's logger, checkpoints and plugins where none are named."""
        config = {**self.config_init.get("trainer", {}), **kwargs}
        _check_strategy(config["strategy"])
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardLogger(self.run_dir, name="", version="")
        callbacks = config["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        _check_callbacks(callbacks)
        if not any(isinstance(callback, LossGuard) for callback in callbacks):
            callbacks.append(LossGuard())
        if config["enable_checkpointing"] is not False:
            if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
                callbacks.append(RunCheckpoint())
            callbacks.append(ExactResume())
            plugins = config["plugins"] or []
            config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if self.line.job == "fit":
            # After what counts a batch, before what may take minutes at its end.
            slow = [callback for callback in callbacks if isinstance(callback, PolicyEvaluation)]
            callbacks = [*(callback for callback in callbacks if callback not in slow), Preemption(), *slow]
        config["callbacks"] = callbacks
        if isinstance(self.datamodule, CursorDataModule):
            # It says which rank reads what, from the run's position, which Lightning's samplers don't know.
            config["use_distributed_sampler"] = False
        try:
            return configured_trainer(self, config, [self.config_init.get("pictures")])
        except MisconfigurationException as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error

    def run_job(self) -> None:
        """Run the job of the command line; test and predict are what the callbacks do, and read no data."""
        job = getattr(self.trainer, self.line.job)
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        try:
            if self.line.job in ("test", "predict"):
                # One batch of nothing on every rank: Lightning calls no hooks around a loop without any.
                job(self.model, dataloaders=range(1), ckpt_path=checkpoint, weights_only=True)
            else:
                job(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)
                if self.line.job == "validate" and not sum(self.trainer.num_val_batches):
                    raise ConfigError(  # Lightning would end without a word
                        "validate found no validation batches; set data.val_shards and a trainer.limit_val_batches "
                        "above 0, or judge pictures with test"
                    )
        except MisconfigurationException as error:
            raise ConfigError(f"{self.line.job}: {' '.join(str(error).split())}") from error

    def _checkpoint(self, asked: str | None) -> Path | None:
        """Which file to start from.

        Raises:
            ConfigError: there is none where one was asked for, or a new run would overwrite an old one.
        """
        folder = self.run_dir / "checkpoints"
        fits = self.line.job == "fit"
        if asked is None and fits:
            found = newest_checkpoint(folder)
            if found is not None:
                raise ConfigError(
                    f"{folder} already holds a run ({found}); go on with --ckpt_path last, or give another --run_dir"
                )
            return None
        if asked in ("last", "auto", None):
            newest = self._newest(folder)
            if newest is None and not (fits and asked == "auto"):
                remedy = "start without --ckpt_path" if fits else "fit first, or evaluate with --ckpt_path none"
                raise ConfigError(f"no checkpoint in {folder}; {remedy}, or point --run_dir at the run that you mean")
            return newest
        if asked == "none":
            return None
        if not Path(asked).is_file():
            raise ConfigError(f"checkpoint {asked} does not exist; give a file, or 'last' for the newest in {folder}")
        reason = damage_reason(Path(asked))
        if reason is not None:
            raise ConfigError(f"checkpoint {asked} {reason}; give another, or 'last' for the newest in {folder}")
        return Path(asked)

    def _newest(self, folder: Path) -> Path | None:
        """The newest whole checkpoint, None where there are none at all; tells of damaged ones.

        Raises:
            ConfigError: all are damaged. Starting anew would not be what was asked for.
        """
        found = newest_intact_checkpoint(folder)
        if not found.damaged:
            return found.checkpoint
        told = ", ".join(f"{file} {reason}" for file, reason in found.damaged.items())
        if found.checkpoint is None:
            raise ConfigError(
                f"no checkpoint is whole: {told}; bring one back from a copy, or start anew with another --run_dir"
            )
        rank_zero_info(f"{told}; taking the one before, {found.checkpoint}")
        return found.checkpoint


def _check_writable(folder: Path) -> None:
    """Before anything large is built; nothing is made yet.

    Raises:
        ConfigError: the run folder can't be made or written to.
    """
    for place in (folder, folder / "checkpoints"):
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise ConfigError(f"run folder {folder}: {place} is no folder; give another --run_dir")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"run folder {folder}: {place} cannot be written to; give another --run_dir")


def _check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """
    Raises:
        ConfigError: one of them saves whole models, from which a run of trainable weights cannot go on; or two would
            write the same files.
    """
    evaluations = Counter(type(callback).__name__ for callback in callbacks if isinstance(callback, PolicyEvaluation))
    for name, number in evaluations.items():
        if number > 1:
            raise ConfigError(f"trainer.callbacks names {name} {number} times, and all would write the same files")
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} averages frozen networks, too, and a run cannot go on "
                "from its checkpoints; use --model.ema=ExponentialMovingAverage"
            )


def _check_strategy(strategy: Any) -> None:
    """
    Raises:
        ConfigError: one under which this framework has not been made to work.
    """
    if isinstance(strategy, str):
        known, name = strategy in ("auto", "fsdp2") or strategy.startswith("ddp"), strategy
    else:
        kinds = pl.strategies.DDPStrategy | pl.strategies.SingleDeviceStrategy | FullyShardedStrategy
        known, name = isinstance(strategy, kinds), type(strategy).__name__
    if not known:
        raise ConfigError(
            f"trainer.strategy {name} is not supported: pools, pictures, exports and checkpoints take whole weights; "
            "use ddp, or fsdp2 (ModelParallelStrategy, set up for them) where a process has no room for all weights, "
            "gradients and moments"
        )
