"""A DPO training step, full fine-tuning, against the official one, restated from the formulas.

The official step (train.py:1020-1145): both pictures of a pair through the VAE in one pass, the prompts through the
text encoder, one noise and one timestep per pair, policy and a frozen copy of the UNet on both, AdamW. From cached
latents the framework reads what the first two would compute.
"""

import copy

import pytest
import torch
from alternating import alternate
from networks import policy
from torch.nn.functional import logsigmoid

from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import Conditioning, DenoiserQuery, LatentPairs, PreferencePairs
from lightning_modules.objectives import DPO
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.randomness import generator, randn
from lightning_modules.references import FrozenCopy

BETA = 5000.0


class Official:
    """Draws are keyed as the framework's are, so that loss and gradient can be compared."""

    def __init__(self, policy):
        self.policy, self.reference = policy, copy.deepcopy(policy.unet).requires_grad_(False).eval()

    def loss(self, batch):
        policy, schedule = self.policy, self.policy.schedule
        with torch.no_grad():
            posterior = policy.vae.encode(torch.cat([batch.chosen, batch.rejected])).latent_dist
            draws = [
                generator(0, "train", "posterior", role, n) for role in ("chosen", "rejected") for n in index(batch)
            ]
            noise = randn(posterior.mean.shape[1:], draws, policy.device)
            latents = (posterior.mean + posterior.std * noise) * policy.vae.config.scaling_factor
            cond = policy.encode_prompts(batch.prompts)
            cond = Conditioning.cat(
                [cond.with_time_ids(batch.chosen_time_ids), cond.with_time_ids(batch.rejected_time_ids)]
            )
        draws = [generator(0, "train", "noise", n) for n in index(batch)]
        timesteps = schedule.draw(draws, latents.device).repeat(2)
        noise = randn(latents.shape[1:], draws, latents.device).repeat(2, 1, 1, 1)
        query = DenoiserQuery(schedule.add_noise(latents, noise, timesteps), timesteps, cond)
        errors = [(policy.predict_noise(query) - noise).square().mean((1, 2, 3))]
        with torch.no_grad():
            errors.append((policy.predict_noise(query, denoiser=self.reference) - noise).square().mean((1, 2, 3)))
        own, reference = (chosen - rejected for chosen, rejected in (part.chunk(2) for part in errors))
        return -logsigmoid(-0.5 * BETA * (own - reference)).mean()


def index(batch):
    return batch.indices.tolist()


@pytest.fixture(scope="module")
def step(size, networks, device):
    """Pixels and cached latents of one batch, and the steps on them."""
    own = policy(size, networks, FullFineTuning(), device)
    module = AlignmentModule(own, DPO(beta=BETA), FrozenCopy()).to(device)
    module.setup("fit")
    official = Official(own)
    side, b = own.image_size, size.pairs
    draw = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, b, 3, side, side, generator=draw) * 2 - 1
    ids = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32).repeat(b, 1)
    prompts = tuple(f"picture {n}" for n in range(b))
    pixels = PreferencePairs(*pictures, prompts, ids, ids, torch.arange(b)).to(device)
    latents = [own.encode_images(part.to(device)) for part in pictures]
    cached = LatentPairs(*latents, prompts, pixels.chosen_time_ids, pixels.rejected_time_ids, torch.arange(b),
                         own.encode_prompts(prompts))  # fmt: skip

    def with_loss(loss, fused=None):
        optimizer = torch.optim.AdamW(own.unet.parameters(), lr=0.0, weight_decay=0.0, fused=fused)

        def run():
            value = loss()
            value.backward()
            gradient = own.unet.conv_out.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            return value.item(), gradient

        return run

    return {
        "official": with_loss(lambda: official.loss(pixels)),
        "pixels": with_loss(lambda: module.compute_loss(pixels, "train").loss),
        "pixels, fused AdamW": with_loss(lambda: module.compute_loss(pixels, "train").loss, fused=True),
        "cached": with_loss(lambda: module.compute_loss(cached, "train").loss),
    }


def test_a_training_step(step, rounds, clock, rows):
    timings = alternate(step, rounds, clock, peers=["official"])
    (loss, gradient), (expected, wanted) = timings.results["pixels"], timings.results["official"]
    assert loss == pytest.approx(expected, abs=1e-3)
    assert (gradient - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    for way in ("pixels", "pixels, fused AdamW"):
        rows.ratio(f"DPO training step from {way}", timings, "official", way)
    rows.ratio("DPO training step from cached latents", timings, "official", "cached")


def test_a_fused_optimizer(size, networks, device, rounds, clock, rows):
    """``--model.optimizer.fused=true``: AdamW's update of a whole UNet alone; equal up to rounding."""
    draw = torch.Generator().manual_seed(0)
    shapes = [tuple(p.shape) for p in policy(size, networks, FullFineTuning(), "cpu").unet.parameters()]
    weights = [torch.randn(shape, generator=draw) for shape in shapes]
    gradients = [torch.randn(shape, generator=draw).to(device) for shape in shapes]

    def updated(fused):
        own = [torch.nn.Parameter(weight.to(device, copy=True)) for weight in weights]
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        optimizer = torch.optim.AdamW(own, lr=1e-3, weight_decay=0.01, fused=fused)

        def step():
            optimizer.step()
            return own

        return step

    timings = alternate({"AdamW": updated(None), "fused": updated(True)}, rounds, clock)
    for plain, fused in zip(timings.results["AdamW"], timings.results["fused"], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    rows.ratio("AdamW's update alone, fused", timings, "AdamW", "fused", numbers=sum(w.numel() for w in weights))
