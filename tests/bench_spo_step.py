"""What one forward instead of two is worth: an SPO training step against a plain restatement of the official one.

Not collected by default. Run with

    OMP_NUM_THREADS=1 python -m pytest tests/bench_spo_step.py -s

The official step (train_spo.py:538-600) evaluates policy and reference on the chosen and again on the rejected
sample, though both share x_t, t and prompt, and keeps a second UNet as reference. Both steps run alternately in one
process; what is reported is the ratio of their CPU times and of what they hold, for an equal loss and gradient.
"""

import statistics
import time
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from large_unet import SIDE, WIDTH, save_a_35m_unet
from tiny_world import trained_parameters
from torch.nn.functional import logsigmoid

from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import Conditioning, StepPairs
from lightning_modules.objectives import SPO
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.references import AdapterOff
from lightning_modules.schedules.base import gaussian_log_prob

BATCH, ROUNDS = 4, 6


def module_with_a_35m_unet(pipelines, tmp_path):
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA(rank=4), unet=save_a_35m_unet(tmp_path))
    for name, parameter in policy.unet.named_parameters():
        if "lora_B" in name:  # away from the start, where the ratio would be 1 and the clip far
            torch.nn.init.normal_(parameter, std=0.01)
    module = AlignmentModule(policy, SPO(), AdapterOff())
    module.setup("fit")
    return module


def pairs_near_the_policy(module):
    """Step pairs with ratios within the clip: ends drawn from the policy's own steps."""
    timesteps = torch.tensor([751, 551, 351, 151])
    latents = torch.randn(BATCH, 4, SIDE, SIDE)
    cond = Conditioning(torch.randn(BATCH, 77, WIDTH))
    own = module.policy.encode_prompts  # of the negative prompt, which is one
    module.policy.encode_prompts = lambda prompts: cond if len(prompts) == BATCH else own(prompts)
    pairs = StepPairs(
        latents, latents, latents, timesteps, timesteps - 50, ("",) * BATCH, torch.ones(BATCH), torch.arange(BATCH)
    )
    schedule = module.policy.schedule
    with torch.no_grad():
        output = module.policy.predict_noise(module.objective.query(pairs, cond, schedule, []))
        ends = [
            schedule.step(output, latents, timesteps, timesteps - 50, 1.0, torch.randn_like(latents)) for _ in range(2)
        ]
    return replace(pairs, chosen=ends[0], rejected=ends[1])


def restated_loss(module, reference_unet, pairs):
    """The official step in plain words: four forwards, the reference on a UNet of its own."""
    policy, objective, schedule = module.policy, module.objective, module.policy.schedule
    log_ratios = []
    for end in (pairs.chosen, pairs.rejected):
        query = objective.query(pairs, policy.encode_prompts(pairs.prompts), schedule, [])
        with torch.no_grad():
            reference = policy.predict_noise(query, denoiser=reference_unet)
        log_probs = []
        for output in (policy.predict_noise(query), reference):
            mean, std = schedule.step_distribution(
                output, pairs.latents, pairs.timesteps, pairs.next_timesteps, objective.eta
            )
            log_probs.append(gaussian_log_prob(end, mean, std))
        ratio = (log_probs[0] - log_probs[1]).exp().clamp(1 - objective.ratio_clip, 1 + objective.ratio_clip)
        log_ratios.append(ratio.log())
    return -logsigmoid(objective.beta * (log_ratios[0] - log_ratios[1])).mean()


def step(module, loss):
    """One forward and backward: loss, LoRA gradient, and CPU seconds."""
    module.policy.unet.zero_grad()
    start = time.process_time()
    value = loss()
    value.backward()
    seconds = time.process_time() - start
    gradient = torch.cat([p.grad.flatten() for p in trained_parameters(module.policy)])
    return value.item(), gradient, seconds


def saved_bytes(module, loss):
    """Bytes of activations that the graph holds for the backward pass, each storage once; weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(held.values())


@pytest.mark.timeout(1200)
def test_one_shared_forward_costs_half_of_the_official_step(pipelines, tmp_path, benchmark):
    module = module_with_a_35m_unet(pipelines, tmp_path)
    pairs = pairs_near_the_policy(module)
    reference_unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").requires_grad_(False)

    def ours():
        return module.compute_loss(pairs, "train").loss

    def official():
        return restated_loss(module, reference_unet, pairs)

    step(module, ours), step(module, official)  # warm up
    seconds = {"ours": [], "official": []}
    for number in range(ROUNDS):
        runs = [("ours", ours), ("official", official)]
        measured = {}
        for name, loss in runs if number % 2 else reversed(runs):
            measured[name] = step(module, loss)
            seconds[name].append(measured[name][2])
        assert measured["ours"][0] == pytest.approx(measured["official"][0], abs=1e-5)
        gradient, expected = measured["ours"][1], measured["official"][1]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
    ratios = [slow / fast for slow, fast in zip(seconds["official"], seconds["ours"])]
    report = {
        "unet_parameters": sum(p.numel() for p in reference_unet.parameters()),
        "loss": measured["ours"][0],
        "gradient_difference": ((gradient - expected).abs().max() / expected.abs().max()).item(),
        "cpu_time_ratio": statistics.median(ratios),
        "cpu_time_ratio_range": (min(ratios), max(ratios)),
        "cpu_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "saved_mib": {
            name: saved_bytes(module, loss) / 2**20 for name, loss in (("ours", ours), ("official", official))
        },
    }
    benchmark.extra_info.update(report)
    benchmark.pedantic(lambda: step(module, ours), rounds=2)
    print("\n" + "\n".join(f"{name}: {value}" for name, value in report.items()))
