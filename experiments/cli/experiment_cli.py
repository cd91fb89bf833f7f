"""LightningCLI with this framework's rules: one-line errors, run folders, safe resuming, jobs without subcommands."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from callbacks.loss_guard import LossGuard
from callbacks.resume.checkpoint_files import AtomicCheckpointIO
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.due_evaluations import PolicyEvaluation
from callbacks.resume.exact_resume import ExactResume
from callbacks.resume.preemption import Preemption
from callbacks.resume.present_rates import PresentRates
from callbacks.run_progress import RunProgress
from callbacks.save_pictures import SavePictures
from datamodules.stream.cursor import CursorDataModule
from experiments.cli import preflight
from experiments.cli.closing import print_closing
from experiments.cli.compose import JOBS
from experiments.cli.explain import explain
from experiments.cli.run_folder import check_writable, choose_checkpoint, resumable_checkpoint
from experiments.cli.run_lock import locked_run
from experiments.cli.saved_settings import Change, changes, save_settings
from experiments.cli.setting_errors import one_line
from experiments.cli.start import Start
from experiments.cli.step_size import pairs_per_step, settle_step
from experiments.cli.tree import flat, references, within
from lightning_modules.errors import ConfigError, UserError
from lightning_modules.lightning_internals import configured_trainer


class OneLineParser(LightningArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a nested class: the outermost one adds where, and tells
            super().error(message, ex)
        options = [action.dest for action in self._actions if not action.dest.endswith("help")]
        raise ConfigError(explain(str(message), options)) from ex


class _HelpAll(argparse.Action):
    """What ``--help`` does in other programs."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str, **ignored: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *ignored: Any) -> NoReturn:
        parser.print_help()
        parser.exit()


class SaveRunConfig(SaveConfigCallback):
    """Keeps the resolved settings of this start in the run folder, see ``experiments.cli.saved_settings``."""

    def __init__(self, *args: Any, start: Start, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if stage != "fit" or not trainer.is_global_zero or getattr(data, "fill", None) is not None:
            return  # the jobs of an array, which fill a pool together, start no run
        config = self.config.clone()
        # Where this process started, and what it was allowed, are no settings of the experiment.
        config["ckpt_path"] = config["run_dir"] = config["trainer"]["default_root_dir"] = None
        config["allow_changes"] = False
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        save_settings(
            Path(trainer.default_root_dir),
            text,
            by_hand=self.start.by_hand,
            references=self.start.references,
            pairs_per_step=pairs_per_step(trainer, data) if isinstance(data, CursorDataModule) else None,
        )


class ExperimentCLI(LightningCLI):
    """Parses, builds and runs one job.

    Args:
        start: the job, and the settings that the parser is to read.
        held: Takes over the lock on the run folder.
    """

    def __init__(self, start: Start, held: ExitStack) -> None:
        self.start, self.line, self.held = start, start.line, held
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            run=False,  # Lightning's own subcommands would merge a checkpoint's settings over the command line's
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[*_as_config(start.tree), *start.words],
            parser_class=OneLineParser,
            parser_kwargs={
                # Resolves ${...} once, after every override; plain "omegaconf" would keep the file's values.
                "parser_mode": "omegaconf+",
                "prog": "python -m experiments.run",
                "usage": f"python -m experiments.run [{'|'.join(JOBS)}] --config NAME [--KEY=VALUE ...]",
                "description": "Every option and its default; --help is shorter, --model.help CLASS explains a class.",
                "allow_abbrev": False,
            },
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"start": start},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=42,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # What predict draws. The other jobs leave it alone, so that one YAML serves all.
        parser.add_lightning_class_args(SavePictures, "pictures")
        parser.add_argument("--help_all", action=_HelpAll, help="Show this and exit; --help is a shorter page.")
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of this run; default runs/<config>."
        )
        parser.add_argument(
            "--allow_changes",
            action="store_true",
            help="Go on with, or evaluate, a run under settings that make another experiment of it.",
        )
        parser.add_argument(
            "--ckpt_path",
            "--resume",
            type=str | None,
            default=None,
            help=(
                "A checkpoint to resume or evaluate: a path; 'last', the run folder's newest intact one; 'auto' "
                "(fit), the same if there is any; 'none' (other jobs), the weights that the config names."
            ),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = _parsed(parser, args)
        self.changes = self._changes(parser)

    def _changes(self, parser: LightningArgumentParser) -> list[Change]:
        """How this start differs from the run's last, if it resumes or evaluates one.

        Raises:
            ConfigError: in what makes another experiment of it, and without ``--allow_changes``.
        """
        saved = self.start.saved
        if saved is None:
            return []
        try:
            before = _parsed(parser, _as_config({**saved.tree, "run_dir": str(self.start.run_dir)}))
        except ConfigError as error:
            raise ConfigError(f"{saved.file}: {error}") from error
        old, new = (
            flat(yaml.safe_load(parser.dump(config, skip_none=False, skip_validation=True)))
            for config in (before, self.config)
        )
        follow = references(saved.tree).items() & self.start.references.items()
        changed = changes(old, new)
        held = [change for change in changed if saved.holds(change) and change.key not in dict(follow)]
        if held and not self.config.allow_changes:
            raise ConfigError(
                f"{self.start.run_dir} has other settings ({saved.file.name}): {'; '.join(map(str, held))}. Leave them "
                "out to go on with the run's own, allow them with --allow_changes, or give another --run_dir"
            )
        told = [str(change) for change in changed if change.key not in NOT_TOLD]
        if told:
            rank_zero_info(f"settings that differ from {saved.file}: {'; '.join(told)}")
        return changed

    def before_instantiate_classes(self) -> None:
        """Settle where the run lives and what it starts from before anything large is built."""
        self.run_dir = self.start.run_dir
        check_writable(self.run_dir)
        fills = bool(self.config.get("data.init_args.fill"))
        self.held.enter_context(locked_run(self.line.job, self.run_dir, fills))
        self.config.trainer.default_root_dir = str(self.run_dir)
        self.checkpoint = choose_checkpoint(self.line.job, self.run_dir / "checkpoints", self.config.ckpt_path)
        self._check_optimizer_stays()
        preflight.check(as_tree(self.config), self.line.job)

    def _check_optimizer_stays(self) -> None:
        """
        Raises:
            ConfigError: another kind of optimizer, which cannot take over what the former one has gathered.
        """
        for change in self.changes:
            if change.key == "model.optimizer" and self.checkpoint is not None and self.line.job == "fit":
                raise ConfigError(
                    f"{change}: the checkpoint's moments are of the former optimizer and mean nothing to another; go "
                    "on with it, or start a new run from the exported weights"
                )

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
        if config["logger"] in (None, True):
            config["logger"] = TensorBoardLogger(self.run_dir, name="", version="")
        callbacks = config["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        _check_callbacks(callbacks)
        if not any(isinstance(callback, LossGuard) for callback in callbacks):
            callbacks.append(LossGuard())
        if config["enable_progress_bar"] is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks.append(RunProgress())
        if config["enable_model_summary"] is None:
            config["enable_model_summary"] = False  # RunProgress says how much is trained
        if config["enable_checkpointing"] is not False:
            if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
                callbacks.append(RunCheckpoint())
            callbacks.append(ExactResume())
            if any(within(change.key, f"model.{name}") for change in self.changes for name in _RATES):
                callbacks.append(PresentRates())
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
        with one_line("trainer"):
            trainer = configured_trainer(self, config, [self.config_init.get("pictures")])
        if self.line.job == "fit" and isinstance(self.datamodule, CursorDataModule):
            self._settle_step(trainer, self.datamodule)
        return trainer

    def _settle_step(self, trainer: pl.Trainer, data: CursorDataModule) -> None:
        """
        Raises:
            ConfigError: the resumed run took another number of pairs per step.
        """
        told, saved = settle_step(trainer, data), self.start.saved
        before = None if saved is None else saved.pairs_per_step
        if before not in (None, pairs_per_step(trainer, data)) and not self.config.allow_changes:
            raise ConfigError(
                f"{self.start.run_dir} took {before} pairs per step, now {told}; give --data.pairs_per_step={before}, "
                "or allow it with --allow_changes"
            )
        rank_zero_info(told)

    def run_job(self) -> None:
        """Run the job of the command line; test and predict are what the callbacks do, and read no data."""
        job = getattr(self.trainer, self.line.job)
        if self.line.job == "fit" and self.config.ckpt_path == "auto":
            self.checkpoint = resumable_checkpoint(self.datamodule, self.run_dir, self.checkpoint)
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        with one_line(self.line.job):
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
        if self.line.job == "fit" and self.trainer.is_global_zero:
            print_closing(self.run_dir, self.trainer.global_step, self.trainer.max_steps)


_RATES = ("optimizer", "lr_scheduler")
NOT_TOLD = ("allow_changes", "ckpt_path", "run_dir", "trainer.default_root_dir")


def as_tree(node: Any) -> Any:
    """Parsed settings as plain mappings and lists."""
    if isinstance(node, Namespace):
        return {name: as_tree(value) for name, value in vars(node).items()}
    if isinstance(node, list | tuple):
        return [as_tree(entry) for entry in node]
    return node


def _as_config(tree: dict[str, Any]) -> list[str]:
    """A tree of settings as the parser takes it."""
    return ["--config", OmegaConf.to_yaml(OmegaConf.create(tree))] if tree else []


def _parsed(parser: LightningArgumentParser, args: Any) -> Any:
    try:
        return parser.parse_args(args)
    except OmegaConfBaseException as error:
        raise ConfigError(f"interpolation in the settings: {' '.join(str(error).split())}") from error


def _check_callbacks(callbacks: Sequence[pl.Callback]) -> None:
    """
    Raises:
        ConfigError: one of them saves whole models, from which a run of trainable weights cannot resume; or two would
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
