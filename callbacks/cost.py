"""What a training costs: denoiser evaluations, pictures, processor seconds, memory. Evaluations are not counted."""

from __future__ import annotations

import json
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from callbacks.clock import EVALUATION, Seconds
from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import LabelledPictures, LatentPairs, PreferencePairs
from lightning_modules.files import atomic_file
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.training import note_step

# Added over the ranks.
SUMMED = (
    "pairs",
    "data_pictures",
    "drawn_pictures",
    "training_denoiser_rows",
    "sampling_denoiser_rows",
    "cpu_seconds",
)
SECONDS = ("wall_seconds",)  # of the slowest rank
PEAKS = ("process_memory_bytes", "device_memory_bytes")  # of the largest rank


class Cost(Callback):
    """Counts what the training costs, over all ranks and over restarts, and writes ``cost.json`` in the run folder.

    What validation and the callbacks' evaluations (``WinRate``, ``SampleGrid``) cost is left out. After a restart the
    counts continue from the checkpoint's: what a killed run has to do again is counted once.

    ``cost.json`` holds the history and, last, the end; each entry has

    - ``step``: optimizer steps;
    - ``pairs``: pairs trained on, or single pictures;
    - ``data_pictures``: pictures of the data set that they took: two per pair, one where the objective reads the
      chosen one alone, none for pairs that the run has drawn itself;
    - ``drawn_pictures``: pictures decoded for the training, such as a step sampler's candidates;
    - ``training_denoiser_rows``, ``sampling_denoiser_rows``: samples through the denoiser, the policy's and the
      reference's alike, in training steps and outside of them (pools). Guidance costs two. Backward passes and
      what gradient checkpointing computes again are not counted;
    - ``cpu_seconds``: processor time of all ranks, without data workers (Python's ``process_time``), from the start
      of the fit on; ``wall_seconds``: of the slowest rank;
    - ``process_memory_bytes``, ``device_memory_bytes``: peaks of the largest rank: resident memory, and what torch
      had allocated on a GPU (0 without one). They include evaluations.

    The same numbers are logged as ``cost/...``.

    Args:
        every_n_steps: optimizer steps between entries of the history, beside those at checkpoints and at the end.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._totals: dict[str, float] = dict.fromkeys((*SUMMED, *SECONDS, *PEAKS), 0.0)
        self._history: list[dict[str, float]] = []
        self._mine: defaultdict[str, float] = defaultdict(float)  # of this rank, since ranks were last added up
        self._hooks: list[Any] = []
        self._since: Seconds | None = None  # None while the clock stands still
        self._in_batch = False
        self._step = 0

    # What is counted

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for network in denoisers(pl_module):
            # Reads the first argument alone: the latents that the denoiser is to look at.
            self._hooks.append(network.register_forward_pre_hook(self._counter(trainer, "denoiser_rows")))
        for network in picture_decoders(trainer, pl_module):
            self._hooks.append(network.register_forward_pre_hook(self._counter(trainer, "drawn_pictures")))
        self._start_clock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step  # known only now where a checkpoint was restored

    def _counter(self, trainer: pl.Trainer, what: str) -> Any:
        def count(network: nn.Module, args: Sequence[Any]) -> None:
            if trainer.training and not EVALUATION.is_running:
                phase = "training_" if self._in_batch else "sampling_"
                self._mine[what if what == "drawn_pictures" else phase + what] += len(args[0])

        return count

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = True
        self._mine["pairs"] += len(batch)
        self._mine["data_pictures"] += data_pictures(pl_module, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = False
        if trainer.global_step == self._step:
            return  # gradients are being accumulated; a checkpoint goes back to the last step, so the counts must too
        self._step = trainer.global_step
        self._add_up(trainer)
        note_step(pl_module, {f"cost/{name}": value for name, value in self._totals.items()})
        if self._step % self.every_n_steps == 0:
            self._history = self._entries()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._since is not None:
            self._stop_clock()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._start_clock()

    # Where it goes

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._since = [], None

    def state_dict(self) -> dict[str, Any]:
        # No collective here: a checkpoint may be written where one rank alone has failed.
        return {"history": self._entries()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = list(state_dict["history"])
        self._totals = {name: value for name, value in self._history[-1].items() if name != "step"}

    def _add_up(self, trainer: pl.Trainer) -> None:
        """Move what the ranks have counted into the totals, equal on all; all ranks must call it."""
        self._stop_clock()
        self._start_clock()
        peaks = {"process_memory_bytes": _process_memory(), "device_memory_bytes": _device_memory(trainer)}
        device = trainer.strategy.root_device

        def over_ranks(values: list[float], how: str) -> list[float]:
            if trainer.world_size == 1:
                return values  # without a device that would have to be waited for
            numbers = torch.tensor(values, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
            return trainer.strategy.reduce(numbers, reduce_op=how).tolist()

        for name, value in zip(SUMMED, over_ranks([self._mine[name] for name in SUMMED], "sum")):
            self._totals[name] += value
        highest = over_ranks([self._mine["wall_seconds"], *peaks.values()], "max")
        self._totals["wall_seconds"] += highest[0]
        for name, value in zip(PEAKS, highest[1:]):
            self._totals[name] = max(self._totals[name], value)
        self._mine.clear()

    def _entries(self) -> list[dict[str, int | float]]:
        """The history up to the last step."""
        return [*(e for e in self._history if e["step"] < self._step), {"step": self._step, **self._totals}]

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "cost.json"
            with atomic_file(path) as file:
                file.write(json.dumps(self._entries(), indent=1).encode())

    # The clock: runs from the start of the fit, but for validation and evaluations

    def _start_clock(self) -> None:
        self._since = Seconds.now() - EVALUATION.total

    def _stop_clock(self) -> None:
        assert self._since is not None
        spent = Seconds.now() - EVALUATION.total - self._since
        self._mine["cpu_seconds"] += spent.cpu
        self._mine["wall_seconds"] += spent.wall
        self._since = None


def denoisers(module: pl.LightningModule) -> list[nn.Module]:
    """The policy's denoiser and the reference's copy of it, where there are any."""
    if isinstance(module, AlignmentModule):
        return module.denoisers()
    policy = getattr(module, "policy", None)
    return [policy.denoiser] if isinstance(policy, DiffusionPolicy) else []


def picture_decoders(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[nn.Module]:
    """The networks that turn latents into pictures: the policy's VAE decoder, and a tiny one of the data's."""
    data = getattr(trainer, "datamodule", None)
    owned = [] if data is None else [value for value in vars(data).values() if isinstance(value, nn.Module)]
    networks = {network for root in (module, *owned) for network in root.modules()}  # one network may have two owners
    yield from (network for network in networks if isinstance(network, Decoder | DecoderTiny))


def data_pictures(module: pl.LightningModule, batch: Any) -> int:
    """How many of the data set's pictures a training step on this batch looks at."""
    if isinstance(batch, LabelledPictures):
        return len(batch)
    if not isinstance(batch, PreferencePairs | LatentPairs):
        return 0
    both = not isinstance(module, AlignmentModule) or module.objective.needs_rejected
    return len(batch) * (2 if both else 1)


def _process_memory() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)  # Linux tells kibibytes


def _device_memory(trainer: pl.Trainer) -> float:
    device = trainer.strategy.root_device
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0
