"""LPO's pools: candidates judged as noisy latents, without decode, from the official draws; what they cost."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from test_step_sampling import RecordedDraws

from callbacks.cost import Cost
from datamodules.pools.folder import read_manifest
from datamodules.step_pool import StepPoolDataModule
from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import SPO
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.sdxl import StableDiffusionXL
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.references import AdapterOff
from lightning_modules.rewards import LatentRewardModel
from lightning_modules.rewards.base import LatentStepRewardModel
from lightning_modules.sampling.step_sampler import SeededDraws, StepSampler, best_and_worst
from lightning_modules.sampling.step_scorers import LatentScorer, ShuffledScorer
from lightning_modules.sampling.thresholds import AlongSigma, Threshold

PROMPTS = ("a photo of a cat on the mat", "a painting of the sea at night")


@dataclass(frozen=True)
class Recorded(Threshold):
    """The official run's, where its table is not of its steps."""

    values: tuple[float, ...]

    def at(self, trajectory, schedule):
        return list(self.values)


def policy_of(pipelines, kind):
    network = StableDiffusionXL if kind == "sdxl" else StableDiffusion
    return network(str(pipelines / f"tiny-{kind}"), LoRA(), negative_prompt=None if kind == "sdxl" else "").eval()


def reward_of(pipelines, kind):
    return LatentRewardModel(str(pipelines / f"tiny-lrm-{kind}"), str(pipelines / f"tiny-{kind}"))


class Asked(LatentStepRewardModel):
    """Notes what it was asked; higher latents are better."""

    latent_channels, added_conditions = 4, None

    def __init__(self):
        super().__init__()
        self.seen = []

    def score(self, latents, prompts, timesteps):
        self.seen.append((latents, prompts, timesteps))
        return latents.mean((1, 2, 3))


@pytest.fixture(scope="module")
def sd15(pipelines):
    return policy_of(pipelines, "sd15")


@pytest.mark.parametrize("name", ["lpo_pool_sd15", "lpo_pool_sd15_k2_5steps", "lpo_pool_sdxl"])
def test_the_official_draws_give_the_official_pool(pipelines, golden, request, name, monkeypatch):
    known, kind = golden(name), "sdxl" if "sdxl" in name else "sd15"
    with safe_open(request.path.parent / "golden" / f"{name}.safetensors", "pt") as file:
        notes = file.metadata()
    prompts, policy = tuple(json.loads(notes["prompts"])), policy_of(pipelines, kind)
    own = policy.encode_prompts(prompts)
    torch.testing.assert_close(own.embeds, known["prompt_embeds"], rtol=0, atol=1e-5)
    low, high = float(notes["threshold_min"]), float(notes["threshold_max"])
    threshold = AlongSigma(low, high) if "5steps" not in name else Recorded(tuple(known["compare.threshold"].tolist()))
    sampler = StepSampler(steps=int(notes["num_inference_steps"]), candidates=int(notes["k"]), branch_from_step=0,
                          eta=1.0, guidance_scale=5.0, threshold=threshold)  # fmt: skip
    recorded = Conditioning(known["prompt_embeds"], known.get("pooled_prompt_embeds"))
    original = policy.encode_prompts  # the official embeddings: another machine's last bits would grow with the steps
    monkeypatch.setattr(
        policy, "encode_prompts", lambda texts: recorded if tuple(texts) == prompts else original(texts)
    )
    draws = RecordedDraws(known)
    last = len(draws.integers) - 1
    result = sampler.sample(policy, LatentScorer(reward_of(pipelines, kind)), prompts, draws)
    assert len(draws.normal) == 0
    assert len(draws.integers) == 1 <= last  # the official code draws once more after the last step, and reads it never
    found = result.comparisons
    scores = found.scores.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1)  # candidate-major
    assert torch.equal(found.judged_at[::2], known["pref.timesteps"][:, 0])
    assert torch.equal(found.timesteps[::2], known["pref.timesteps"][:, 0])
    largest = known["pref.scores"].abs().max()
    assert (scores - known["pref.scores"]).abs().max() <= 5e-5 * largest
    assert torch.equal(found.valid.reshape(-1, 2), known["compare.valid"])
    if "5steps" not in name:
        given = torch.tensor(sampler.thresholds(policy.schedule.trajectory(sampler.steps), policy.schedule))
        torch.testing.assert_close(given, known["compare.threshold"], rtol=0, atol=2e-5)
    pairs = result.pairs
    assert torch.equal(result.prompt_rows, known["out.prompt_rows"])
    assert torch.equal(pairs.timesteps, known["out.timesteps"][:, 0])
    for latents, expected in (
        (pairs.latents, known["out.current_latents"][:, 0]),
        (torch.stack([pairs.chosen, pairs.rejected], dim=1), known["out.next_latents"]),
    ):
        assert (latents - expected).abs().max() <= max(2e-4, 3e-6 * expected.abs().max())
    assert result.decodes == 0
    assert result.unet_evaluations == 2 * 2 * sampler.steps  # one guided pass of the two prompts a step


@pytest.mark.parametrize("k", [2, 4])
def test_choices_and_validity_are_the_official_ones(golden, sd15, k):
    known = golden("lpo_thresholds")
    choice, gaps = best_and_worst(known[f"k{k}.scores"])
    trajectory = sd15.schedule.trajectory(20)
    needed = dict(zip((step.timestep for step in trajectory), AlongSigma().at(trajectory, sd15.schedule)))
    assert torch.equal(choice, known[f"k{k}.indices"])
    assert torch.equal(
        gaps > torch.tensor([needed[t] for t in known[f"k{k}.timesteps"].tolist()]), known[f"k{k}.valid"]
    )


def test_candidates_are_judged_where_their_step_started_and_nothing_is_decoded(sd15):
    """Four steps are at 751, 501, 251 and 1."""
    model, rows = Asked(), []
    handle = sd15.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))

    def decode(latents):
        raise AssertionError("decoded")

    sampler = StepSampler(steps=4, branch_from_step=1, candidates=2, threshold=0.0, guidance_scale=2.0)
    draws = SeededDraws(0, 0, range(2))
    result = sampler.sample(sd15, LatentScorer(model), PROMPTS, draws, decode=decode)
    handle.remove()
    assert rows == [4] * 4
    assert result.decodes == 0
    assert [seen[2].tolist() for seen in model.seen] == [[t] * 4 for t in (501, 251, 1)]
    assert result.comparisons.judged_at.tolist() == [501, 501, 251, 251, 1, 1]
    assert all(seen[1] == PROMPTS * 2 for seen in model.seen)
    # What was judged is x_{t-1} itself: the best and the worst of them are the pairs.
    judged = {row.numpy().tobytes() for seen in model.seen for row in seen[0]}
    assert {row.numpy().tobytes() for row in torch.cat([result.pairs.chosen, result.pairs.rejected])} <= judged


def test_inner_steps_are_judged_where_the_last_of_them_started(sd15):
    model = Asked()
    sampler = StepSampler(steps=4, branch_from_step=0, candidates=2, threshold=0.0, num_inner_step=1)
    sampler.sample(sd15, LatentScorer(model), PROMPTS, SeededDraws(0, 0, range(2)))
    assert [seen[2][0].item() for seen in model.seen] == [501, 1]


def test_shuffled_scores_are_judged_where_the_real_ones_are(sd15):
    sampler = StepSampler(steps=4, branch_from_step=2, candidates=3, threshold=0.0)
    real, control = (
        sampler.sample(sd15, scorer, PROMPTS, SeededDraws(0, 0, range(2))).comparisons
        for scorer in (LatentScorer(Asked()), ShuffledScorer(LatentScorer(Asked())))
    )
    assert torch.equal(real.judged_at, control.judged_at)
    torch.testing.assert_close(control.scores.sort(dim=1).values[:2], real.scores.sort(dim=1).values[:2])


# A run


def fit(folder, policy, scorer, **options):
    torch.manual_seed(3)
    sampler = StepSampler(steps=3, branch_from_step=0, candidates=2, threshold=0.0, guidance_scale=2.0)
    settings = {"prompts": ["a", "b", "c"], "prompts_per_batch": 2, "batch_size": 2, "seed": 7} | options
    data = StepPoolDataModule(sampler, scorer=scorer, **settings)
    module = AlignmentModule(policy, SPO(beta=500.0, guidance_scale=2.0), AdapterOff(),
                             lambda parameters: torch.optim.AdamW(parameters, lr=1e-4))  # fmt: skip
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, default_root_dir=folder, max_epochs=1, callbacks=[Cost()],
                      reload_dataloaders_every_n_epochs=1)  # fmt: skip
    trainer.fit(module, datamodule=data)


def test_a_pool_costs_one_guided_pass_a_step_and_no_picture(tmp_path, pipelines):
    fit(tmp_path, policy_of(pipelines, "sd15"), LatentScorer(reward_of(pipelines, "sd15")))
    (pool,) = (tmp_path / "pools").iterdir()
    statistics, entry = read_manifest(pool).statistics, json.loads((tmp_path / "cost.json").read_text())[-1]
    # three prompts, three steps, twice for guidance; the reward model's UNet is no denoiser
    assert entry["sampling_denoiser_rows"] == statistics["unet_evaluations"] == 3 * 3 * 2
    assert entry["drawn_pictures"] == statistics["decodes"] == 0
    assert entry["training_denoiser_rows"] == 4 * entry["pairs"] > 0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sdxl", "trained on latents of SDXL, and the policy is of Stable Diffusion"),
        ("channels", "of 4 channels, and the"),
    ],
)
def test_a_model_of_another_base_or_vae_is_refused_before_anything_is_sampled(tmp_path, pipelines, sd15, kind, said):
    scorer = LatentScorer(reward_of(pipelines, "sdxl" if kind == "sdxl" else "sd15"))
    policy = policy_of(pipelines, "sd15")
    if kind == "channels":
        policy.latent_channels = 16
    with pytest.raises(ConfigError, match=said) as caught:
        fit(tmp_path, policy, scorer)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pools").exists()


def test_a_decoder_for_a_scorer_that_sees_no_pictures_is_refused(tmp_path, sd15):
    class Decoder(TinyDecoder):
        def __init__(self):
            torch.nn.Module.__init__(self)

    with pytest.raises(ConfigError, match="LatentScorer looks at none"):
        fit(tmp_path, sd15, LatentScorer(Asked()), decoder=Decoder())


def test_thresholds_along_sigma_of_one_step_are_refused(sd15):
    with pytest.raises(ConfigError, match="have one sigma"):
        AlongSigma().at(sd15.schedule.trajectory(1), sd15.schedule)


def test_thresholds_along_sigma_follow_the_steps_own_sigma(golden, sd15):
    """Of 5 steps: low and high at its own least and largest; the official table of 20 steps would be off by 0.05."""
    trajectory = sd15.schedule.trajectory(5)
    found = AlongSigma().at(trajectory, sd15.schedule)
    assert (max(found), min(found)) == (pytest.approx(0.5), pytest.approx(0.35))
    table = golden("lpo_pool_sd15_k2_5steps")["compare.threshold"]
    assert (torch.tensor(found) - table).abs().max() > 0.01
