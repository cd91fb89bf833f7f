"""The LightningModule that trains a policy with an objective against a reference."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.batches import (
    Conditioning,
    LabelledLatents,
    LabelledPictures,
    LatentPairs,
    PreferencePairs,
    StepPairs,
)
from lightning_modules.errors import ConfigError
from lightning_modules.learning_rates import ConstantWithWarmup
from lightning_modules.objectives.base import LossOutput, Objective
from lightning_modules.policies.base import DiffusionPolicy
from lightning_modules.randomness import rand
from lightning_modules.references import Reference
from lightning_modules.training import TrainingModule
from lightning_modules.weights.averaging import ExponentialMovingAverage
from lightning_modules.weights.sharding import shard

Encoded = LatentPairs | StepPairs | LabelledLatents
Batch = PreferencePairs | LabelledPictures | Encoded


class AlignmentModule(TrainingModule):
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
        optimizer: an optimizer of the policy's trainable parameters.
        lr_scheduler: stepped once an optimiser step.
        caption_dropout: probability of training a pair on the empty prompt, which keeps guidance working.
        seed: the run's seed; the YAMLs set it to ``${seed_everything}``.
        ema: an average of the trained weights. Pictures are drawn with it and it is what is exported; losses, SPO's
            pools and ``val/loss`` are those of the weights under training.

    Raises:
        ConfigError: an objective that needs a reference without one; on load, a checkpoint whose trainable
            weights are not exactly this policy's.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        objective: Objective,
        reference: Reference | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = ConstantWithWarmup,
        caption_dropout: float = 0.0,
        seed: int = 0,
        ema: ExponentialMovingAverage | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, ema)
        if objective.needs_reference and reference is None:
            raise ConfigError(
                f"{type(objective).__name__} compares with a reference and model.reference is not set; "
                "use AdapterOff with LoRA, FrozenCopy with full fine-tuning"
            )
        if not 0 <= caption_dropout <= 1:
            raise ConfigError(f"model.caption_dropout is a probability, got {caption_dropout}")
        self.policy, self.objective, self.reference = policy, objective, reference
        self.caption_dropout = caption_dropout

    def setup(self, stage: str) -> None:
        """Before any checkpoint is restored: the reference is the policy as it was before training."""
        if self.reference is not None:
            self.reference.attach(self.policy)
        if self.policy.quantisation is not None:
            # DDP cannot send quantised weights, and every process has read the same files.
            frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def denoisers(self) -> list[nn.Module]:
        """The policy's, and what the reference keeps beside it: the large networks."""
        return [self.policy.denoiser, *(self.reference.own_networks() if self.reference is not None else [])]

    def shard(self, mesh: DeviceMesh) -> None:
        """Leave this process its part of them (``trainer.strategy: fsdp2``).

        Raises:
            ConfigError: their weights are quantised.
        """
        if self.policy.quantisation is not None:
            raise ConfigError(
                f"trainer.strategy fsdp2: the policy's base is quantised ({type(self.policy.quantisation).__name__}), "
                "and quantised weights are not shared out; use ddp, or leave model.policy.quantisation out"
            )
        for network in self.denoisers():
            shard(network, self.policy.blocks, mesh)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self.compute_loss(batch, "train")
        self._means["train"].add({"loss": output.loss.detach()} | output.metrics, len(batch))
        return output.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.objective.observe(self._log_step_means())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if kept := self.objective.state_dict():
            checkpoint["objective"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.objective.load_state_dict(checkpoint.get("objective", {}))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output = self.compute_loss(batch, "val")
        self._means["val"].add({"loss": output.loss} | output.metrics, len(batch))

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

    def _encode_images(self, batch: Batch, purpose: str) -> Encoded:
        """Latents drawn from the VAE's posterior, as the official training does (cached shards hold its mean).

        Raises:
            ConfigError: pairs for an objective on single pictures, or the reverse.
        """
        if isinstance(batch, LabelledPictures | LabelledLatents) != self.objective.single_pictures:
            wanted = "single pictures" if self.objective.single_pictures else "pairs"
            raise ConfigError(
                f"{type(self.objective).__name__} trains on {wanted}, and the data are {type(batch).__name__}; "
                "KTO goes with SinglePicturesDataModule, the others with one of pairs"
            )
        if isinstance(batch, LabelledPictures):
            latents = self.policy.encode_images(batch.pictures, self._generators(batch, purpose, "posterior", "single"))
            return LabelledLatents(latents, batch.liked, batch.prompts, batch.time_ids, batch.indices)
        if not isinstance(batch, PreferencePairs):
            return batch
        chosen = self.policy.encode_images(batch.chosen, self._generators(batch, purpose, "posterior", "chosen"))
        rejected = None
        if self.objective.needs_rejected:
            drawn = self._generators(batch, purpose, "posterior", "rejected")
            rejected = self.policy.encode_images(batch.rejected, drawn)
        ids = (batch.chosen_time_ids, batch.rejected_time_ids, batch.indices)
        return LatentPairs(chosen, rejected, batch.prompts, *ids)

    def _encode_prompts(self, pairs: Encoded, dropout: float) -> Conditioning:
        """One row a pair; both pictures of a dropped pair lose their caption."""
        dropped = rand(self._generators(pairs, "caption_dropout")) < dropout
        if not isinstance(pairs, LatentPairs) or pairs.cond is None:
            return self.policy.encode_prompts(["" if d else p for d, p in zip(dropped.tolist(), pairs.prompts)])
        if not dropped.any():
            return pairs.cond
        both = Conditioning.cat([pairs.cond, self.policy.encode_prompts([""])])
        rows = torch.arange(len(pairs)).where(~dropped, len(pairs))
        return both[rows.to(both.embeds.device)]
