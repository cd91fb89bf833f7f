"""How often the policy's picture is judged better than the reference's."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from callbacks.evaluation.kept import drop_later_entries
from callbacks.evaluation.largest_changes import draw_largest_changes
from callbacks.evaluation.pictures import alignment, evaluation_mode, policy_step
from callbacks.evaluation.protocol import Protocol
from callbacks.evaluation.report import Report
from callbacks.evaluation.scores import per_prompt, reference_scores, score_pictures
from callbacks.resume.due_evaluations import PolicyEvaluation
from callbacks.resume.preemption import interruptible
from datamodules.prompts import prompt_texts
from lightning_modules.errors import ConfigError
from lightning_modules.rewards.function import Reward, as_reward_model
from lightning_modules.sampling.pictures import Sampler
from lightning_modules.terminal import literal


class WinRate(PolicyEvaluation):
    """Judges the policy against the reference on held-out prompts, both drawn from the same noise.

    Runs at the end of every validation (or every ``every_n_steps``), after the training, and in ``validate`` and
    ``test``; ``test`` uses ``test_prompts`` and logs under ``test/`` instead of ``val/``. Pictures are spread over
    the ranks. The reference's scores are computed once and kept in the run folder. Without a reference (``SFT``) only
    the policy's rewards are reported. ``test`` ends with the path of a picture: the pairs whose score by the first
    reward has changed most, in both directions (``draw_largest_changes``).

    Logs ``val/win_rate/<reward>`` with ``_low`` and ``_high``, ``val/reward/<reward>``, ``val/reference_reward/...``
    with ``_se`` each, and their parts ``val/reward/<reward>/<part>``; appends to ``win_rate.json``.

    Args:
        prompts: validation prompts: texts, or a prompt file.
        rewards: the judges: reward models, or functions f(images, prompts) by their dotted names.
        test_prompts: prompts of the ``test`` job, which nothing may be tuned on.
        sampler: how the pictures are made.
        every_n_steps: optimizer steps between evaluations; None evaluates with every validation.
        images_per_prompt: pictures per prompt.
        batch_size: pictures at a time on one device.
        image_size: side in pixels; None takes the policy's own.
        seed: seed of the noise, which is keyed by prompt and picture. Not the run's: then runs can be compared.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        rewards: list[Reward],
        test_prompts: list[str] | str | None = None,
        sampler: Sampler = Sampler(),  # noqa: B008  # frozen
        every_n_steps: int | None = None,
        images_per_prompt: int = 1,
        batch_size: int = 8,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        judges = [as_reward_model(reward) for reward in rewards]

        def protocol(texts: list[str]) -> Protocol:
            return Protocol(texts, judges, sampler, images_per_prompt, image_size, seed, batch_size)

        self.validation = protocol(prompt_texts(prompts))
        self.test = None if test_prompts is None else protocol(prompt_texts(test_prompts))
        self._changes: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            drop_later_entries(Path(trainer.default_root_dir) / "win_rate.json", trainer.global_step)
        super().on_train_start(trainer, pl_module)

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.judge(trainer, pl_module, "val")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not trainer.sanity_checking and not (fitting and self.every_n_steps is not None):
            # Within the loop, so that checkpoints and early stopping can monitor the numbers.
            pl_module.log_dict(self.judge(trainer, pl_module, "val"), logger=False, batch_size=1, sync_dist=True)
            if fitting:
                self.mark_evaluated(trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.test is None:
            raise ConfigError("WinRate.test_prompts is not set; give the prompts that nothing was tuned on")
        pl_module.log_dict(self.judge(trainer, pl_module, "test"), logger=False, batch_size=1, sync_dist=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self._changes is not None:
            Console().print(literal(f"largest changes, gains and losses: {self._changes}"), soft_wrap=True)

    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> dict[str, float]:
        """Draw, score, compare, write and log. All ranks must call it; returns the metrics, equal on all."""
        module = alignment(pl_module, "WinRate")
        protocol = self.test if split == "test" and self.test is not None else self.validation
        with interruptible(trainer), evaluation_mode(module):
            for reward in protocol.rewards:
                reward.to(module.device)
            policy = score_pictures(trainer, module, protocol, module.policy.predict_noise, "policy")
            reference = reference_scores(trainer, module, protocol)
        step = policy_step(trainer)
        pictures = protocol.images_per_prompt
        against = None if reference is None else per_prompt(reference, pictures)
        report = Report.of(split, step, per_prompt(policy, pictures), against, protocol.described(module.policy))
        if trainer.is_global_zero:
            report.append_to(Path(trainer.default_root_dir) / "win_rate.json")
            Console().print(report.table())
            for logger in trainer.loggers:
                logger.log_metrics(report.metrics(), step)
        if split == "test" and module.reference is not None and reference is not None:
            denoise, scores = module.reference.predict_noise, (reference, policy)
            with interruptible(trainer), evaluation_mode(module):
                self._changes = draw_largest_changes(trainer, module, denoise, protocol, scores, step)
        return report.metrics()
