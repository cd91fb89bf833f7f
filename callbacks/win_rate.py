"""How often the policy's picture is judged better than the reference's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from callbacks.evaluation.pictures import (
    Shot,
    alignment,
    gathered,
    make_pictures,
    my_share,
    policy_step,
    undisturbed,
)
from callbacks.evaluation.statistics import Mean, WinCount
from callbacks.files import write_atomically
from callbacks.resume.due_evaluations import PolicyEvaluation
from callbacks.resume.preemption import interruptible
from datamodules.prompts import prompt_texts
from lightning_modules.alignment import AlignmentModule
from lightning_modules.errors import ConfigError, UserError
from lightning_modules.rewards.base import RewardModel
from lightning_modules.sampling.pictures import Denoise, Sampler

# Column -> one number a picture. Columns are the rewards' names, and "<reward>/<part>" for their parts.
Scores = dict[str, list[float]]


class WinRate(PolicyEvaluation):
    """Judges the policy against the reference on held-out prompts, both drawn from the same noise.

    Runs at the end of every validation (or every ``every_n_steps``), after the training, and in ``validate`` and
    ``test``; ``test`` uses ``test_prompts`` and logs under ``test/`` instead of ``val/``. Pictures are spread over
    the ranks. The reference's scores are computed once and kept in the run folder. Without a reference (``SFT``) only
    the policy's rewards are reported.

    Logs ``val/win_rate/<reward>`` with ``_low`` and ``_high``, ``val/reward/<reward>``, ``val/reference_reward/...``
    with ``_se`` each, and their parts ``val/reward/<reward>/<part>``; appends to ``win_rate.json``.

    Args:
        prompts: validation prompts: texts, or a prompt file.
        rewards: the judges.
        test_prompts: prompts of the ``test`` job, which nothing may be tuned on.
        sampler: how the pictures are made.
        every_n_steps: optimizer steps between evaluations; None evaluates with every validation.
        images_per_prompt: pictures a prompt.
        batch_size: pictures at a time on one device.
        image_size: side in pixels; None takes the policy's own.
        seed: of the noise, which is keyed by prompt and picture. Not the run's: then runs can be compared.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        rewards: list[RewardModel],
        test_prompts: list[str] | str | None = None,
        sampler: Sampler = Sampler(),  # noqa: B008  # frozen
        every_n_steps: int | None = None,
        images_per_prompt: int = 1,
        batch_size: int = 8,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = [reward.name for reward in rewards]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"WinRate wants one or more rewards with different names, got {names}")
        self.texts = prompt_texts(prompts)
        self.test_texts = None if test_prompts is None else prompt_texts(test_prompts)
        self.rewards, self.sampler, self.every_n_steps = rewards, sampler, every_n_steps
        self.images_per_prompt, self.batch_size = images_per_prompt, batch_size
        self.image_size, self.seed = image_size, seed

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.judge(trainer, pl_module, "val")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not trainer.sanity_checking and not (fitting and self.every_n_steps is not None):
            # Within the loop, so that checkpoints and early stopping can monitor the numbers.
            pl_module.log_dict(self.judge(trainer, pl_module, "val"), logger=False, batch_size=1, sync_dist=True)
            if fitting:
                self.note(trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.test_texts is None:
            raise ConfigError("WinRate.test_prompts is not set; give the prompts that nothing was tuned on")
        pl_module.log_dict(self.judge(trainer, pl_module, "test"), logger=False, batch_size=1, sync_dist=True)

    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> dict[str, float]:
        """Draw, score, compare, write and log. All ranks must call it; returns the metrics, equal on all."""
        module = alignment(pl_module, "WinRate")
        texts = self.test_texts if split == "test" and self.test_texts is not None else self.texts
        pictures = range(self.images_per_prompt)
        shots = [Shot(text, (self.seed, "win_rate", p, i)) for p, text in enumerate(texts) for i in pictures]
        with interruptible(trainer), undisturbed(module):
            for reward in self.rewards:
                reward.to(module.device).eval()
            policy = self._score(trainer, module, module.policy.predict_noise, shots, "policy")
            reference = self._reference_scores(trainer, module, shots)
        step = policy_step(trainer)
        report = Report.of(split, step, policy, reference, self.protocol(module, split))
        if trainer.is_global_zero:
            report.append_to(Path(trainer.default_root_dir) / "win_rate.json")
            Console().print(report.table())
            for logger in trainer.loggers:
                logger.log_metrics(report.metrics(), step)
        return report.metrics()

    def protocol(self, module: AlignmentModule, split: str) -> dict[str, Any]:
        """Everything that two runs must have in common for their scores to be comparable."""
        texts = self.test_texts if split == "test" and self.test_texts is not None else self.texts
        return {
            "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
            "number_of_prompts": len(texts),
            "images_per_prompt": self.images_per_prompt,
            "image_size": self.image_size or module.policy.image_size,
            "seed": self.seed,
            "sampler": asdict(self.sampler),
            "rewards": [reward.name for reward in self.rewards],
        }

    def _score(
        self, trainer: pl.Trainer, module: AlignmentModule, denoise: Denoise, shots: Sequence[Shot], title: str
    ) -> Scores:
        """Every reward's scores and parts of every shot's picture, in the shots' order, on every rank."""
        mine: list[dict[str, float]] = []
        for batch in my_share(trainer, shots, self.batch_size, f"win rate ({title})"):
            images = make_pictures(trainer, module, self.sampler, denoise, batch, self.image_size)
            columns = self._columns(images, [shot.prompt for shot in batch])
            for i, shot in enumerate(batch):
                row = {name: values[i] for name, values in columns.items()}
                bad = [name for name, value in row.items() if not math.isfinite(value)]
                if bad:
                    raise UserError(
                        f"reward {bad[0]} is {row[bad[0]]} for a picture of the {title} ({shot.prompt!r}); "
                        "the training has probably diverged: lower the learning rate"
                    )
                mine.append(row)
        rows = gathered(trainer, mine)
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _columns(self, images: Any, prompts: Sequence[str]) -> Scores:
        columns: Scores = {}
        for reward in self.rewards:
            columns[reward.name] = reward.score(images, prompts).tolist()
            for part, values in reward.parts(images, prompts).items():
                columns[f"{reward.name}/{part}"] = values.tolist()
        return columns

    def _reference_scores(self, trainer: pl.Trainer, module: AlignmentModule, shots: Sequence[Shot]) -> Scores | None:
        """The reference never changes: its scores are read back where the same evaluation was made before."""
        if module.reference is None:
            return None
        denoise = module.reference.predict_noise
        fingerprint = trainer.strategy.broadcast(self._fingerprint(trainer, module, denoise, shots))
        path = Path(trainer.default_root_dir) / "win_rate_reference" / f"{fingerprint}.json"
        # Rank 0 decides for all: another node may not see the file yet.
        known: Scores | None = trainer.strategy.broadcast(_read(path) if trainer.is_global_zero else None)
        if known is None:
            known = self._score(trainer, module, denoise, shots, "reference")
            if trainer.is_global_zero:
                write_atomically(path, json.dumps(known).encode())
        return known

    def _fingerprint(
        self, trainer: pl.Trainer, module: AlignmentModule, denoise: Denoise, shots: Sequence[Shot]
    ) -> str:
        """A hash of the evaluation's settings and of what reference and rewards do on one cheap picture.

        What they do, instead of their weights: it covers denoiser, text encoder, autoencoder, precision and every
        reward alike, whatever they are made of, in one denoiser pass. At worst it differs where nothing has changed.
        """
        probe = Sampler(steps=1, guidance_scale=self.sampler.guidance_scale, eta=0.0)
        image = make_pictures(trainer, module, probe, denoise, shots[:1], self.image_size)
        settings = [self.sampler, self.image_size, list(shots), self._columns(image, [shots[0].prompt])]
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(image.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Report:
    """One evaluation.

    Attributes:
        split: "val" or "test".
        step: optimizer steps that the policy has seen.
        policy, reference: means of every column; the reference's is empty if there is none.
        comparisons: of every column, parts included.
        protocol: how it was judged, ``WinRate.protocol``.
    """

    split: str
    step: int
    policy: Mapping[str, Mean]
    reference: Mapping[str, Mean]
    comparisons: Mapping[str, WinCount]
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        split: str,
        step: int,
        policy: Scores,
        reference: Scores | None,
        protocol: Mapping[str, Any] | None = None,
    ) -> Report:
        against = reference or {}
        return Report(
            split,
            step,
            {name: Mean.of(values) for name, values in policy.items()},
            {name: Mean.of(values) for name, values in against.items()},
            {name: WinCount.of(policy[name], values) for name, values in against.items()},
            protocol or {},
        )

    def metrics(self) -> dict[str, float]:
        """What is logged: win rates of the rewards (not of their parts), means of everything."""
        metrics = {}
        for name, count in self.comparisons.items():
            if "/" not in name:
                metrics[f"{self.split}/win_rate/{name}"] = count.rate
                metrics[f"{self.split}/win_rate/{name}_low"] = count.low
                metrics[f"{self.split}/win_rate/{name}_high"] = count.high
        for kind, means in (("reward", self.policy), ("reference_reward", self.reference)):
            for name, mean in means.items():
                metrics[f"{self.split}/{kind}/{name}"] = mean.mean
                metrics[f"{self.split}/{kind}/{name}_se"] = mean.standard_error
        return metrics

    def append_to(self, path: Path) -> None:
        """Add this report to the history; one of the same split and step (a repeated evaluation) is replaced."""
        history = {(entry["split"], entry["step"]): entry for entry in _read(path) or []}
        history[self.split, self.step] = asdict(self)
        write_atomically(path, json.dumps(list(history.values()), indent=1).encode())

    def table(self) -> Table:
        """The report for people, at most 80 characters wide; parts stand indented under their reward."""
        caption = "mean ± standard error; reference: the model before alignment" if self.comparisons else None
        table = Table(title=f"{self.split} prompts, step {self.step}", caption=caption)
        columns = ["reference", "policy", "win rate [95%]", "n"] if self.comparisons else ["policy"]
        table.add_column("reward", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, mean in self.policy.items():
            cells = [_shown(mean)]
            if name in self.comparisons:
                count = self.comparisons[name]
                rate = f"{100 * count.rate:.1f}% [{100 * count.low:.1f}, {100 * count.high:.1f}]"
                cells = [_shown(self.reference[name]), *cells, rate, str(count.n)]
            reward, _, part = name.partition("/")
            table.add_row(f"  {part}" if part else reward, *cells)
        return table


def _shown(mean: Mean) -> str:
    return f"{mean.mean:.3f} ±{mean.standard_error:.3f}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
