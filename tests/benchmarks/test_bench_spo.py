"""SPO's pool, training step and whole iteration against the official ones, restated in ``official_spo.py``.

Equal draws give equal pairs, losses and gradients; what differs is the work. The threshold is chosen so that half of
the comparisons are valid, as the paper's counts assume.
"""

import statistics
from dataclasses import replace

import pytest
import torch
from alternating import alternate
from diffusers import UNet2DConditionModel
from networks import judge, policy, tiny_decoder
from official_spo import OfficialPool, OfficialStep

from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import StepPairs
from lightning_modules.objectives import SPO
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff
from lightning_modules.rewards.latent import LatentRewardModel
from lightning_modules.sampling.step_sampler import SeededDraws, StepSampler
from lightning_modules.sampling.step_scorers import LatentScorer, StepAwareScorer

MOST_PAIRS = 10  # of a training step


class World:
    """Policy, judge, sampler and both ways of everything."""

    def __init__(self, size, folder, device):
        own = policy(size, folder, LoRA(rank=4), device)
        torch.manual_seed(1)
        for name, parameter in own.unet.named_parameters():
            if "lora_B" in name:  # away from the start, where the ratio would be 1 and the clip far
                torch.nn.init.normal_(parameter, std=0.01)
        self.module = AlignmentModule(own, SPO(), AdapterOff()).to(device)
        self.module.setup("fit")
        self.merged = policy(size, folder, LoRA(rank=4), device, merged_upsampling=True)
        self.merged.load_state_dict(own.state_dict())
        self.judge, self.scorer = judge(folder, device), StepAwareScorer(judge(folder, device))
        self.prompts = [f"number {n} of many pictures" for n in range(size.prompts)]
        self.sampler = StepSampler(size.steps, candidates=size.candidates, branch_from_step=size.branch_from_step,
                                   threshold=0.0, decode_batch=8)  # fmt: skip
        gaps = self.rollout().comparisons.gaps
        self.sampler = replace(self.sampler, threshold=statistics.median(gaps.tolist()))
        reference = UNet2DConditionModel.from_pretrained(folder / "sd" / "unet").requires_grad_(False).to(device)
        self.official_step = OfficialStep(own, reference, self.module.objective)
        self.optimizers = {
            name: torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=0.0)
            for name in ("ours", "official")
        }

    def rollout(self, decode=None, policy=None):
        draws = SeededDraws(0, 0, range(len(self.prompts)))
        return self.sampler.sample(policy or self.module.policy, self.scorer, self.prompts, draws, decode)

    def pool(self, decode=None, policy=None):
        return self.rollout(decode, policy).pairs.to(self.module.device)

    def latent_pool(self, scorer):
        """LPO's: from the first step on, no picture decoded."""
        draws, sampler = SeededDraws(0, 0, range(len(self.prompts))), replace(self.sampler, branch_from_step=0)
        return sampler.sample(self.module.policy, scorer, self.prompts, draws).pairs

    def official_pool(self):
        draws = SeededDraws(0, 0, range(len(self.prompts)))
        return as_batch(OfficialPool(self.module.policy, self.judge, self.sampler, self.prompts).pairs(draws))

    def own_loss(self, pairs):
        return self.module.compute_loss(pairs, "train").loss

    def step(self, pairs, name, loss):
        """A pass forward and backward, and the optimizer's; the loss."""
        value = loss(pairs)
        value.backward()
        gradient = torch.cat([p.grad.flatten() for p in self.module.parameters() if p.requires_grad])
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        return value.item(), gradient

    def iteration(self, pairs, name, loss):
        return pairs, [self.step(part_of(pairs, first), name, loss) for first in range(0, len(pairs), MOST_PAIRS)]


def part_of(pairs, first):
    part = slice(first, first + MOST_PAIRS)
    fields = {name: getattr(pairs, name)[part] for name in ("latents", "chosen", "rejected", "timesteps",
              "next_timesteps", "prompts", "score_gap", "indices")}  # fmt: skip
    return StepPairs(**fields)


def as_batch(found):
    latents, chosen, rejected, starts, ends, prompts = zip(*found)
    device = latents[0].device
    stacked = [torch.stack(part) for part in (latents, chosen, rejected)]
    times = [torch.tensor(part, device=device) for part in (starts, ends)]
    return StepPairs(*stacked, *times, prompts, torch.zeros(len(found), device=device), torch.arange(len(found)))


@pytest.fixture(scope="module")
def world(size, networks, device):
    return World(size, networks, device)


def test_a_pool(world, rounds, clock, rows):
    timings = alternate({"official": world.official_pool, "ours": world.pool}, rounds, clock, peers=["official"])
    ours, official = timings.results["ours"], timings.results["official"]
    assert len(ours)
    torch.testing.assert_close(ours.latents, official.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.chosen, official.chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.rejected, official.rejected, rtol=1e-4, atol=1e-4)
    rows.ratio("SPO pool", timings, "official", "ours", pairs=len(ours))


def test_a_training_step(world, rounds, clock, rows):
    pairs = part_of(world.pool(), 0)
    ways = {
        "official": lambda: world.step(pairs, "official", world.official_step.loss),
        "ours": lambda: world.step(pairs, "ours", world.own_loss),
    }
    timings = alternate(ways, rounds, clock, peers=["official"])
    check_equal([timings.results["ours"]], [timings.results["official"]])
    memory = held_memory(world, pairs)
    rows.ratio("SPO training step", timings, "official", "ours", pairs=len(pairs), memory_ratio=memory[1] / memory[0],
               peer_mib=memory[0], own_mib=memory[1])  # fmt: skip


def test_an_iteration(world, rounds, clock, rows, size, networks, device):
    small = tiny_decoder(size, networks, device)
    exact = world.pool()

    def with_tiny_decoder():
        """Random weights keep other pairs, or none; it trains on as many as the others."""
        world.pool(small)
        return world.iteration(exact, "ours", world.own_loss)

    ways = {
        "official": lambda: world.iteration(world.official_pool(), "official", world.official_step.loss),
        "ours": lambda: world.iteration(world.pool(), "ours", world.own_loss),
        "merged upsampling": lambda: world.iteration(world.pool(policy=world.merged), "ours", world.own_loss),
        "tiny decoder": with_tiny_decoder,
    }
    timings = alternate(ways, rounds, clock, peers=["official"])
    official, official_steps = timings.results["official"]
    for way in ("ours", "merged upsampling"):
        ours, own_steps = timings.results[way]
        assert len(ours) == len(official)
        check_equal(own_steps, official_steps)
    told = {"pairs": len(ours), "comparisons": len(world.prompts) * (size.steps - size.branch_from_step)}
    rows.ratio("SPO iteration", timings, "official", "ours", **told)
    rows.ratio("SPO iteration, merged upsampling", timings, "official", "merged upsampling", **told)
    rows.ratio("SPO iteration, tiny decoder", timings, "official", "tiny decoder", **told)


def test_an_iteration_of_lpo(world, rounds, clock, rows, networks, device):
    """Both train on SPO's pairs, so that what differs is how candidates are judged."""
    pipeline = str(networks / "sd")
    scorer = LatentScorer(
        LatentRewardModel(pipeline, pipeline, world.sampler.guidance_scale, untrained=True).to(device)
    )
    pairs = world.pool()

    def lpo():
        world.latent_pool(scorer)
        return world.iteration(pairs, "ours", world.own_loss)

    ways = {"SPO": lambda: world.iteration(world.pool(), "ours", world.own_loss), "LPO": lpo}
    rows.ratio("LPO iteration", alternate(ways, rounds, clock), "SPO", "LPO", pairs=len(pairs))


def check_equal(own, official):
    for (loss, gradient), (expected, wanted) in zip(own, official, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)
        assert (gradient - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def held_memory(world, pairs):
    """MiB at the end of the forward pass, official and ours: the UNets, and what the graph holds for the backward pass.

    Of a device it is the step's peak above what is held between steps, and the networks.
    """
    networks = {"official": [world.module.policy.unet, world.official_step.reference_unet],
                "ours": [world.module.policy.unet]}  # fmt: skip
    losses = {"official": world.official_step.loss, "ours": world.own_loss}
    found = []
    for name in ("official", "ours"):
        kept = sum(p.nbytes for network in networks[name] for p in network.parameters())
        found.append((kept + activations(world, losses[name], pairs)) / 2**20)
    return found


def activations(world, loss, pairs):
    if world.module.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(pairs).backward()
        return torch.cuda.max_memory_allocated() - before
    held = {}
    weights = {p.untyped_storage().data_ptr() for p in world.module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(pairs)
    del value
    return sum(held.values())
