"""The LightningModule that trains a policy with an objective against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.batches import Conditioning, LatentPairs, PreferencePairs, StepPairs
from lightning_modules.errors import ConfigError
from lightning_modules.learning_rates import ConstantWithWarmup
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import derive_seed, generator, rand
from lightning_modules.references import Reference
from lightning_modules.running_means import RunningMeans


Batch = PreferencePairs | LatentPairs | StepPairs


class AlignmentModule(LightningModule):
    """Trains ``policy`` with ``objective``; asks the networks, knows none of them.

    A step encodes what is not encoded yet, lets the objective say where to look (``query``), asks the reference
    without gradient, then the policy once, and lets the objective compute the loss in fp32 outside autocast.

    All draws for a pair (VAE posterior, caption dropout, timestep, noise) are functions of ``seed`` and the pair's
    index in the run, so neither batch size, accumulation, ranks nor restarts change them. Validation draws do not
    change from one validation to the next.

    Args:
        policy: the model under training.
        objective: what it is trained for.
        reference: what it is compared with; required where the objective needs one. Callbacks also use it to show
            and judge progress.
        optimizer: made over the policy's trainable parameters.
        lr_scheduler: stepped once an optimiser step.
        caption_dropout: probability of training a pair on the empty prompt, which keeps guidance working.
        seed: the run's seed; the YAMLs set it to ``${seed_everything}``.

    Raises:
        ConfigError: an objective that needs a reference without one; on load, a checkpoint whose trainable
            weights are not exactly this policy's.
    """

    strict_loading = False  # checkpoints hold trainable weights only; on_load_checkpoint audits the keys

    def __init__(
        self,
        policy: DiffusionPolicy,
        objective: Objective,
        reference: Reference | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = ConstantWithWarmup,
        caption_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if objective.needs_reference and reference is None:
            raise ConfigError(
                f"{type(objective).__name__} compares with a reference and model.reference is not set; "
                "use AdapterOff with LoRA, FrozenCopy with full fine-tuning"
            )
        if not 0 <= caption_dropout <= 1:
            raise ConfigError(f"model.caption_dropout is a probability, got {caption_dropout}")
        self.policy, self.objective, self.reference = policy, objective, reference
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.caption_dropout, self.seed = caption_dropout, seed
        self._means = {"train": RunningMeans(), "val": RunningMeans()}
        self._logged_step = -1

    def setup(self, stage: str) -> None:
        """Before any checkpoint is restored: the reference is the policy as it was before training."""
        if self.reference is not None:
            self.reference.attach(self.policy)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Network dropout is the one draw that comes from the global generator.
        torch.manual_seed(derive_seed(self.seed, "dropout", int(batch.indices[0])))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self.compute_loss(batch, "train")
        self._means["train"].add({"loss": output.loss.detach()} | output.metrics, len(batch))
        return output.loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log once an optimiser step: means over its accumulated batches and all ranks."""
        if self.trainer.global_step != self._logged_step:
            self._logged_step = self.trainer.global_step
            self._log_means("train", on_step=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output = self.compute_loss(batch, "val")
        self._means["val"].add({"loss": output.loss} | output.metrics, len(batch))

    def on_validation_epoch_end(self) -> None:
        self._log_means("val", on_step=False)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing of its own: a test is what callbacks make of the policy (``WinRate``, ``SampleGrid``)."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Nothing of its own: a callback draws the pictures (``SavePictures``)."""
        return batch

    def compute_loss(self, batch: Batch, purpose: str) -> LossOutput:
        """The objective's loss on a batch; ``purpose`` separates training's draws from validation's."""
        pairs = self._encode_images(batch, purpose)
        cond = self._encode_prompts(pairs, self.caption_dropout if purpose == "train" else 0.0)
        schedule = self.policy.schedule
        query = self.objective.query(pairs, cond, schedule, self._generators(batch, purpose, "noise"))
        # The reference goes first: switching adapters off must not touch a graph that still has to run backward.
        reference_output = None
        if self.objective.needs_reference:
            assert self.reference is not None
            reference_output = self.reference.predict_noise(query)
        policy_output = self.policy.predict_noise(query)
        with torch.autocast(self.device.type, enabled=False):
            return self.objective.loss(pairs, query, policy_output, reference_output, schedule)

    def _generators(self, batch: Batch, *purpose: str) -> list[torch.Generator]:
        return [generator(self.seed, *purpose, index) for index in batch.indices.tolist()]

    def _encode_images(self, batch: Batch, purpose: str) -> LatentPairs | StepPairs:
        """Latents drawn from the VAE's posterior, as the official training does (cached shards hold its mean)."""
        if not isinstance(batch, PreferencePairs):
            return batch
        chosen = self.policy.encode_images(batch.chosen, self._generators(batch, purpose, "posterior", "chosen"))
        rejected = None
        if self.objective.needs_rejected:
            drawn = self._generators(batch, purpose, "posterior", "rejected")
            rejected = self.policy.encode_images(batch.rejected, drawn)
        ids = (batch.chosen_time_ids, batch.rejected_time_ids, batch.indices)
        return LatentPairs(chosen, rejected, batch.prompts, *ids)

    def _encode_prompts(self, pairs: LatentPairs | StepPairs, dropout: float) -> Conditioning:
        """One row a pair; both pictures of a dropped pair lose their caption."""
        dropped = rand(self._generators(pairs, "caption_dropout")) < dropout
        if pairs.cond is None:
            return self.policy.encode_prompts(["" if d else p for d, p in zip(dropped.tolist(), pairs.prompts)])
        if not dropped.any():
            return pairs.cond
        both = Conditioning.cat([pairs.cond, self.policy.encode_prompts([""])])
        rows = torch.arange(len(pairs)).where(~dropped, len(pairs))
        return both[rows.to(both.embeds.device)]

    def _log_means(self, stage: str, on_step: bool) -> None:
        means = self._means[stage].compute(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        for name, value in means.items():
            shown = name in ("loss", "accuracy")
            self.log(f"{stage}/{name}", value, on_step=on_step, on_epoch=not on_step, prog_bar=shown, batch_size=1)

    def configure_optimizers(self) -> Any:
        rounded = {p.dtype for p in self.policy.trainable_parameters()} - {torch.float32}
        if rounded:
            raise ConfigError(
                f"trainable weights must be fp32, trainer.precision={self.trainer.precision} makes them "
                f"{rounded.pop()}; use bf16-mixed or 16-mixed, and policy.frozen_dtype for the frozen ones"
            )
        optimizer = self.make_optimizer(self.policy.trainable_parameters())
        scheduler = self.make_lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trainable_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trainable weights; everything frozen comes back from where it came from."""
        wanted = self.trainable_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in wanted}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = {name: parameter.shape for name, parameter in self.named_parameters() if parameter.requires_grad}
        found = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if own == found:
            return
        missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        reshaped = sorted(name for name in own.keys() & found.keys() if own[name] != found[name])
        raise ConfigError(
            "checkpoint: its trainable weights are not this policy's: "
            f"{_few(missing)} missing, {_few(extra)} unknown, {_few(reshaped)} of another shape; "
            "resume with the base model and adaptation that wrote it"
        )


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({names[0]}, ...)" if names else "0"
