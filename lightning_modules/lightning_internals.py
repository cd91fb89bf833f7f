"""What this framework needs of Lightning beyond its public interface: every use of that is here, with its reason.

``tests/test_lightning_internals.py`` fails where a version of Lightning has lost one of these parts, or changed its
meaning, and where another file of ours uses such a part.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

# --------------------------------------------------------------------------------------------- where a run is


def batches_trained(trainer: Trainer) -> int:
    """Batches that this rank has trained on since the run began.

    ``trainer.global_step`` counts optimizer steps alone; this counter is restored on resume, too.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    return int(loop.batch_progress.total.processed)


def at_epochs_last_batch(trainer: Trainer) -> bool:
    """Whether the batch at hand is the last of its epoch: at its end a pool is used up, and no hook says so."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def batch_is_open(trainer: Trainer) -> bool:
    """Whether a batch is trained on whose end the loop has not seen yet: callbacks are still called for it."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.completed < batches.processed)


def amid_batch(trainer: Trainer) -> bool:
    """Whether a batch is begun and not yet trained on."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.processed < batches.started)


def epoch_is_open(trainer: Trainer) -> bool:
    """Whether an epoch has begun that is not closed yet: a resumed run may be between its last batch and its end."""
    epochs = trainer.fit_loop.epoch_progress.current
    return epochs.ready > epochs.completed


def expect_batches(trainer: Trainer, batches: int) -> None:
    """Announce how many batches the epoch that begins has.

    Resuming at an epoch's end, Lightning forgets that epoch's batches only if the new epoch has no more of them than
    it had; else it would leave out as many of the new epoch's.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    current = loop.batch_progress.current
    current.completed = max(current.completed, batches)


def replaces_samplers(trainer: Trainer) -> bool:
    """Whether Lightning puts samplers of its own in the place of ours; no public property tells."""
    connector = trainer._accelerator_connector
    return bool(connector.use_distributed_sampler and connector.is_distributed)


class SavedProgress:
    """How far a fit has come, as a checkpoint says it: the layout of its ``loops`` is Lightning's own affair.

    Args:
        state: of the fit loop; kept, and changed in place.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        batches = state["epoch_loop.batch_progress"]
        self._this_epoch, self._all_epochs = batches["current"], batches["total"]

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> SavedProgress:
        """A copy of what the checkpoint says."""
        return cls(deepcopy(checkpoint["loops"]["fit_loop"]))

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Make a copy of it what the checkpoint says."""
        checkpoint["loops"]["fit_loop"] = deepcopy(self.state)
        checkpoint["epoch"] = self.state["epoch_progress"]["current"]["processed"]

    @property
    def batches_trained(self) -> int:
        """As ``batches_trained`` counts them."""
        return int(self._all_epochs["processed"])

    @property
    def validation_due(self) -> bool:
        """Ours: whether the validation at the end of the last batch is still to be made."""
        return bool(self.state["epoch_loop.state_dict"].get("validation_due", False))

    @validation_due.setter
    def validation_due(self, due: bool) -> None:
        self.state["epoch_loop.state_dict"]["validation_due"] = due

    @property
    def at_batch_end(self) -> bool:
        """Whether callbacks are being called at the end of a batch; that batch does not count as completed yet."""
        return bool(self._this_epoch["completed"] < self._this_epoch["processed"])

    def give_up_validation(self) -> None:
        """Back to the end of the batch before it, with nothing validated."""
        for counters in (self._this_epoch, self._all_epochs):
            counters["completed"] -= 1
        for counters in self.state["epoch_loop.val_loop.batch_progress"].values():
            if isinstance(counters, dict):
                counters.update(ready=0, started=0, processed=0, completed=0)

    def reopen_epoch(self) -> None:
        """An epoch is under way: a run that resumed from an epoch's end never counts the next one as begun."""
        for counters in self.state["epoch_progress"].values():
            done = counters["processed"]
            counters.update(ready=done + 1, started=done + 1, completed=done)

    def round_down(self, accumulated: int) -> None:
        """Back to the end of the last optimizer step, of ``accumulated`` batches or the rest of an epoch."""
        batches = self.state["epoch_loop.batch_progress"]
        all_processed = self._this_epoch["processed"] == self._this_epoch["ready"]
        at_epoch_end = batches["is_last_batch"] and all_processed
        lost = 0 if at_epoch_end else self._this_epoch["processed"] % accumulated
        if lost == 0 and all_processed:
            return
        for counters in (self._this_epoch, self._all_epochs):
            kept = counters["processed"] - lost
            counters.update(ready=kept, started=kept, processed=kept, completed=kept)
        batches["is_last_batch"] = False


# --------------------------------------------------------------------------------------------- what a run does


def run_fit_by(trainer: Trainer, run: Callable[[], None]) -> None:
    """Let ``run`` be called in place of the fit loop's, which it may call by ``fit_as_lightning``.

    No hook comes after a fit that trains nothing, as one that resumes from its last step does.
    """
    trainer.fit_loop.run = run  # type: ignore[method-assign]


def run_fit_by_itself(trainer: Trainer) -> None:
    """Take back ``run_fit_by``."""
    vars(trainer.fit_loop).pop("run", None)


def fit_as_lightning(trainer: Trainer) -> None:
    """The fit loop's own run."""
    type(trainer.fit_loop).run(trainer.fit_loop)


def begin_and_end(trainer: Trainer) -> None:
    """All that a fit does besides batches: ``on_train_start`` and ``on_train_end`` of everything."""
    trainer.fit_loop.on_run_start()
    trainer.fit_loop.on_run_end()


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the loop will validate at the end of the batch at hand; callbacks are called before it decides."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def validate_now(trainer: Trainer) -> None:
    """A validation within a training, as the loop makes it at the end of a batch; there is no public way."""
    loop, results = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first = results._first_loop_iter
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    results._first_loop_iter = first


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """What ``trainer.save_checkpoint`` writes, unwritten; all ranks must call it.

    That method waits for all ranks after writing, and they would wait for ever for one that could not write.
    """
    return trainer._checkpoint_connector.dump_checkpoint(False)


def replace_signal_handlers(trainer: Trainer, install: Callable[[], None]) -> None:
    """Let ``install`` be called where Lightning would install handlers of its own.

    Those run collectives and save wherever a signal hits. Lightning installs them after the last hook that comes
    before a training's data is asked for.
    """
    trainer._signal_connector.register_signal_handlers = install  # type: ignore[method-assign]


def restore_signal_handlers(trainer: Trainer) -> None:
    """Take back ``replace_signal_handlers``."""
    vars(trainer._signal_connector).pop("register_signal_handlers", None)


def take_children(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """The ranks that this process has started, which Lightning forgets.

    It watches them, and kills this process as soon as one of them ends with a code, whatever is still to be said.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return []
    children = list(launcher.procs)
    launcher.procs.clear()
    return children


# --------------------------------------------------------------------------------------------- what is logged


def update_step_logs(trainer: Trainer) -> None:
    """Write what the step that just ended has logged by ``log`` to the loggers, which Lightning does only after all
    callbacks; it does so once more then, the same."""
    trainer._logger_connector.update_train_step_metrics()


def count_logged_steps(trainer: Trainer) -> None:
    """Let loggers be told ``trainer.global_step``: resuming from a rewound place, Lightning may count a step twice."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


# --------------------------------------------------------------------------------------------- how a run is built


def shard_over_all_processes(strategy: ModelParallelStrategy) -> None:
    """Let all processes share out the weights of one model; the numbers are known only after its constructor.

    Its own "auto" shares out a model over the processes of one node alone, by tensor parallelism.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1


def configured_trainer(cli: LightningCLI, config: dict[str, Any], callbacks: Sequence[Callback]) -> Trainer:
    """The command line's trainer by a changed config; its public method takes single values, and no other plugins."""
    return cli._instantiate_trainer(config, list(callbacks))


def configured_optimizers(module: LightningModule) -> tuple[list[Optimizer], list[Any]]:
    """Optimizers and schedulers as the module's settings make them, in whatever form it returns them.

    A resumed trainer's own have taken over the checkpoint's settings; Lightning reads the forms that
    ``configure_optimizers`` may have, but not for others.
    """
    optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
    return optimizers, [config.scheduler for config in schedulers]
