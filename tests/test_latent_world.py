"""The embedded world's latent reward model, and LPO with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drawn_pairs import drawn_pairs

import experiments
from experiments import prepare_pickapic, run
from experiments.shapes import prepare as prepare_shapes
from lightning_modules.policies import Frozen, StableDiffusion
from lightning_modules.randomness import generator, randn
from lightning_modules.rewards import LatentRewardModel
from lightning_modules.shapes.reward import ShapesReward


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")
def test_the_commands_of_lrm_tiny_make_a_model_that_lpo_tiny_takes_as_its_judge(tmp_path, monkeypatch):
    """On a handful of pairs and prompts; nothing is decoded."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("drawn", "0"), ("feedback-val", "1")):
        prepare_shapes.main(["--output", f"data/shapes/{name}", "--pairs", "16", "--seed", seed])
        prepare_pickapic.main(["--input", f"data/shapes/{name}", "--output", f"data/shapes/{name}-pairs"])
    quiet = "--trainer.enable_progress_bar=false"
    run.main(["--config", "lrm_tiny", "--data.batch_size=4", "--trainer.max_steps=2", "--trainer.val_check_interval=1",
              "--trainer.limit_val_batches=1", quiet])  # fmt: skip
    exported = tmp_path / "runs" / "lrm_tiny" / "export" / "preference"
    assert sum(file.stat().st_size for file in exported.rglob("*") if file.is_file()) < 3e6
    run.main(
        ["--config", "lpo_tiny", "--data.prompts_per_pool=2", "--data.prompts_per_batch=2", "--data.batch_size=4",
         "--data.sampler.steps=4", "--data.sampler.branch_from_step=0", "--data.sampler.threshold=0.0",
         "--trainer.max_steps=2", quiet,
         "--trainer.callbacks.SampleGrid=null",
         "--trainer.callbacks.WinRate=null"]
    )  # fmt: skip
    entry = json.loads((tmp_path / "runs" / "lpo_tiny" / "cost.json").read_text())[-1]
    assert entry["step"] == 2
    assert entry["drawn_pictures"] == 0
    # Two prompts, twice for guidance: the first step, then three inner steps of four candidates, which end it.
    assert entry["sampling_denoiser_rows"] % (2 * 2 * (1 + 3 * 4)) == 0


@torch.no_grad()
def test_the_model_that_ships_is_small_and_sides_with_the_exact_reward_on_new_drawings():
    """On noisy latents for prompts that no training shows; a coin would be right on half of 236 pairs, +- 3%."""
    folder = Path(experiments.__file__).parent / "embedded" / "latent_reward"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6
    prompts, images = drawn_pairs(8)
    policy = StableDiffusion("embedded/shapes", Frozen())
    judge = LatentRewardModel("embedded/latent_reward", "embedded/shapes", guidance_scale=2.5)
    latents, timesteps = policy.encode_images(images * 2 - 1), torch.full((len(images),), 51)
    noise = randn(latents.shape[1:], [generator("noise", n) for n in range(len(images))], latents.device)
    noisy = policy.schedule.add_noise(latents, noise, timesteps)
    scores = [ShapesReward().score(images, prompts * 2), judge.score(noisy, prompts * 2, timesteps)]
    exact, found = (score.reshape(2, -1).diff(dim=0)[0] for score in scores)
    clear = exact.abs() > 0.1
    assert clear.sum() > 150
    assert (exact.sign() == found.sign())[clear].float().mean() > 0.63
