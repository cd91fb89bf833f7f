"""Options of the policy beside the plain policy of the same weights: times as fast, and what they move.

What moves: DPO's argument before the first step, where policy and reference are equal and it is 0; gradients, as a
share of the largest; pictures, in levels of 255.
"""

import math

import pytest
import torch
from alternating import alternate
from networks import policy

from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import LatentPairs
from lightning_modules.objectives import DPO
from lightning_modules.policies import LoRA
from lightning_modules.references import AdapterOff
from lightning_modules.sampling.pictures import Sampler, initial_noise

NETWORKS = ("channels_last", "compile")  # options that shape the denoiser, too


@pytest.fixture
def ways(request, size, networks, device):
    """The plain policy and one with the option, by name."""
    if request.param == "compile" and request.config.getoption("--size") == "tiny":
        pytest.skip("compiles for minutes: --size mid")
    found = {}
    for name, options in (("plain", {}), (request.param, {request.param: True})):
        torch.manual_seed(0)  # LoRA's A
        found[name] = policy(size, networks, LoRA(), device, **options)
    return found


@pytest.mark.parametrize("ways", [*NETWORKS, "merged_upsampling"], indirect=True)
def test_drawing(ways, size, rounds, clock, rows):
    sampler = Sampler(steps=size.steps)

    def draws(own):
        def run():
            noise, generators = initial_noise(own, [(0, "option")])
            return sampler.generate(own.eval(), own.predict_noise, ["a picture"], noise, generators)

        return run

    plain, option = ways
    timings = alternate({name: draws(own) for name, own in ways.items()}, rounds, clock)
    levels = 255 * (timings.results[option] - timings.results[plain]).abs().max().item()
    assert levels < 2
    rows.ratio(f"Drawing with {option}", timings, plain, option, moves=f"a picture by {levels:.1g} of 255 levels")


@pytest.mark.parametrize("ways", NETWORKS, indirect=True)
def test_a_training_step(ways, size, device, rounds, clock, rows):
    b, some = size.pairs, next(iter(ways.values()))
    latent = (b, 4, *[some.image_size // some.downscale] * 2)
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randn(latent, generator=draw).to(device) for _ in range(2))

    def steps(own):
        module = AlignmentModule(own.train(), DPO(), AdapterOff()).to(device)
        module.setup("fit")
        prompts = tuple(f"picture {n}" for n in range(b))
        ids = torch.full((b, 6), float(own.image_size), device=device)
        pairs = LatentPairs(chosen, rejected, prompts, ids, ids, torch.arange(b), own.encode_prompts(prompts))

        def run():
            loss = module.compute_loss(pairs, "train").loss
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])
            own.zero_grad()
            return 2 * (math.log(2) - loss.item()), gradient

        return run

    plain, option = ways
    timings = alternate({name: steps(own) for name, own in ways.items()}, rounds, clock)
    (_, expected), (argument, gradient) = timings.results[plain], timings.results[option]
    share = ((gradient - expected).abs().max() / expected.abs().max()).item()
    assert share < 1e-2
    moves = f"DPO's argument at step 0 by {abs(argument):.1g}, a gradient by {share:.1g} of the largest"
    rows.ratio(f"DPO training step with {option}", timings, plain, option, moves=moves)
