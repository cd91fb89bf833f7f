"""A tiny Stable Diffusion in the real module, pairs of noise, a quiet trainer: what callbacks are tried on."""

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import PreferencePairs
from lightning_modules.objectives import DPO
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.sampling.pictures import Sampler

QUICK = Sampler(steps=2, guidance_scale=2.0)
PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


def make(pipelines, adaptation=None, reference=None, objective=None, ema=None):
    seed_everything(3, verbose=False)
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), adaptation or LoRA())
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    return AlignmentModule(policy, objective or DPO(), reference, optimizer, ema=ema)


def trained_parameters(policy):
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def pairs(batches=4):
    def batch(n):
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(n)) * 2 - 1
        ids = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(2, 6)
        return PreferencePairs(images[:2], images[2:], ("a", "b"), ids, ids, torch.tensor([2 * n, 2 * n + 1]))

    return DataLoader([batch(n) for n in range(batches)], batch_size=None)


def trainer(folder, *callbacks, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                "enable_model_summary": False, "default_root_dir": folder, "callbacks": list(callbacks),
                "use_distributed_sampler": False}  # fmt: skip
    return Trainer(**(defaults | options))
