"""The step-wise resampler: the official pools from the official draws, what it costs, and what it doesn't depend on."""

import math

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors import safe_open
from tiny_world import trained_parameters

from lightning_modules.batches import Conditioning
from lightning_modules.errors import ConfigError
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.sdxl import StableDiffusionXL
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.rewards import StepAwarePreferenceModel
from lightning_modules.rewards.base import RewardModel, StepRewardModel
from lightning_modules.sampling.comparisons import Comparisons
from lightning_modules.sampling.step_sampler import Draws, SeededDraws, StepSampler, best_and_worst
from lightning_modules.sampling.step_scorers import (
    RandomScorer,
    RewardScorer,
    ShuffledScorer,
    StepAwareScorer,
    StepScorer,
)
from lightning_modules.schedules.discrete import NoiseSchedule

PROMPTS = ("a photo of a cat on the mat", "a painting of the sea at night")
PLAIN = {"steps": 4, "branch_from_step": 1, "candidates": 2, "threshold": 0.0}


class RecordedDraws(Draws):
    """The official run's draws, in call order; used up exactly."""

    def __init__(self, known):
        self.normal = [known[name] for name in sorted(known) if name.startswith("draw.randn")]
        self.integers = [known[name] for name in sorted(known) if name.startswith("draw.randint")]

    def randn(self, copies, shape):
        return self.normal.pop(0).reshape(copies, -1, *shape)

    def randint(self, high):
        return self.integers.pop(0)

    def control_noise(self, copies):
        return torch.zeros(copies, 2)

    @property
    def used_up(self):
        return not self.normal and not self.integers


class RecordedText:
    """A policy that, once it is told recorded embeddings, conditions on them."""

    recorded = None

    def encode_prompts(self, prompts):
        known = self.recorded is not None and tuple(prompts) == PROMPTS
        return self.recorded if known else super().encode_prompts(prompts)


class RecordedSD15(RecordedText, StableDiffusion):
    pass


class RecordedSDXL(RecordedText, StableDiffusionXL):
    pass


class OfficialPreference(StepScorer):
    """The recorded run's preference: the red of the decoded x0-prediction, before any clamp, scaled by time."""

    def __init__(self, policy, mult):
        super().__init__()
        self.vae, self.mult, self.seen = policy.vae, mult, []

    def score(self, candidates):
        images = self.vae.decode(candidates.clean / self.vae.config.scaling_factor).sample
        self.seen.append(images)
        return images[:, 0].mean((1, 2)) * self.mult * 0.1 / (7e-5 + 3e-6 * candidates.timesteps.float())


class Redness(RewardModel):
    name = "redness"

    def score(self, images, prompts):
        return 100 * images[:, 0].mean((1, 2))


class Same(RewardModel):
    name = "same"

    def score(self, images, prompts):
        return torch.zeros(len(images))


class LaterIsBetter(StepRewardModel):
    """Notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def score(self, images, prompts, timesteps):
        self.asked.append((images, prompts, timesteps))
        return images.mean((1, 2, 3)) - timesteps


@pytest.fixture(scope="module")
def sd15(pipelines):
    return StableDiffusion(str(pipelines / "tiny-sd15"), LoRA()).eval()


@pytest.fixture
def unet_calls(sd15):
    calls = []
    handle = sd15.unet.register_forward_pre_hook(lambda unet, inputs: calls.append(inputs[0].shape[0]))
    yield calls
    handle.remove()


def rollout(policy, scorer=None, prompts=PROMPTS, indices=None, seed=0, epoch=0, **settings):
    draws = SeededDraws(seed, epoch, range(len(prompts)) if indices is None else indices)
    return StepSampler(**(PLAIN | settings)).sample(policy, scorer or RewardScorer(Redness()), prompts, draws)


# The official pools


def settings_of(path):
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    sampler = StepSampler(
        steps=int(notes["num_inference_steps"]),
        guidance_scale=float(notes["guidance_scale"]),
        eta=float(notes["eta"]),
        candidates=int(notes["k"]),
        branch_from_step=int(notes["divert_start_step"]),
        threshold=float(notes["threshold"]),
        num_inner_step=int(notes.get("num_inner_step", 0)),
    )
    return sampler, float(notes["mult"])


def replay(policy, known, path):
    """Our sampler on the official draws gives the official pairs. The embeddings are the recorded ones too: the last
    bits of another machine's text encoder would alone move the last latents by 4e-5."""
    own = policy.encode_prompts(PROMPTS)
    torch.testing.assert_close(own.embeds, known["prompt_embeds"], rtol=0, atol=1e-5)
    policy.recorded = Conditioning(known["prompt_embeds"], known.get("pooled_prompt_embeds"))
    sampler, mult = settings_of(path)
    draws, scorer = RecordedDraws(known), OfficialPreference(policy, mult)
    result = sampler.sample(policy, scorer, PROMPTS, draws)
    assert draws.used_up
    scores = result.comparisons.scores.unflatten(0, (-1, len(PROMPTS))).transpose(1, 2).flatten(1)  # candidate-major
    assert torch.equal(result.comparisons.judged_at[:: len(PROMPTS)], known["pref.timesteps"][:, 0])
    torch.testing.assert_close(scores, known["pref.scores"], rtol=1e-3, atol=0)
    torch.testing.assert_close(scorer.seen[0], known["pref.image_first"], rtol=0, atol=1e-3)
    torch.testing.assert_close(scorer.seen[-1], known["pref.image_last"], rtol=0, atol=1e-3)
    pairs = result.pairs
    assert torch.equal(pairs.timesteps, known["out.timesteps"][:, 0])
    assert torch.equal(pairs.next_timesteps, (pairs.timesteps - 1000 // sampler.steps).clamp(min=-1))
    assert pairs.prompts == tuple(PROMPTS[row] for row in result.prompt_rows.tolist())
    assert torch.equal(policy.recorded.embeds[result.prompt_rows], known["out.prompt_embeds"][:, 0])
    ends = torch.stack([pairs.chosen, pairs.rejected], dim=1)
    assert_same_latents(ends, known["out.next_latents"])
    return pairs


def assert_same_latents(actual, expected):
    """Within 1e-4; beyond latents of 33 within 3e-6 of the largest. These random networks drive them to 87, where
    1e-4 is thirteen of fp32's last bits and CPUs differ."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= max(1e-4, 3e-6 * expected.abs().max())


@pytest.mark.parametrize("name", ["spo_pool_sd15", "spo_pool_sd15_div0_k2_5steps"])
def test_the_official_draws_give_the_official_pool(pipelines, golden, name, request):
    known = golden(name)
    policy = RecordedSD15(str(pipelines / "tiny-sd15"), LoRA()).eval()
    pairs = replay(policy, known, request.path.parent / "golden" / f"{name}.safetensors")
    assert pairs.rejected_latents is None
    assert_same_latents(pairs.latents, known["out.current_latents"][:, 0])


def test_inner_steps_give_the_official_sdxl_pool(pipelines, golden, request):
    """The official run contrasts with zeros, as the pipeline does when no negative prompt is given."""
    name = "spo_pool_sdxl_inner3"
    known = golden(name)
    policy = RecordedSDXL(str(pipelines / "tiny-sdxl"), LoRA(), negative_prompt=None).eval()
    pairs = replay(policy, known, request.path.parent / "golden" / f"{name}.safetensors")
    starts = torch.stack([pairs.latents, pairs.rejected_latents], dim=1)
    assert_same_latents(starts, known["out.current_latents"])
    shared = (pairs.latents == pairs.rejected_latents).flatten(1).all(dim=1)
    assert torch.equal(shared, torch.isin(pairs.timesteps, torch.tensor([751, 551, 351, 151])))


# Best, worst, valid


@pytest.mark.parametrize("k", [2, 4])
def test_best_worst_and_validity_are_the_official_ones(golden, k):
    known = golden("compare")
    choice, gaps = best_and_worst(known[f"k{k}_scores"])
    assert torch.equal(choice, known[f"k{k}_indices"])
    assert torch.equal(gaps > 0.3, known[f"k{k}_valid"])


def test_ties_name_a_best_and_a_worst_of_the_right_score(golden):
    known = golden("compare")
    choice, gaps = best_and_worst(known["ties_scores"])
    expected = known["ties_scores"].gather(0, known["ties_indices"])
    assert torch.equal(known["ties_scores"].gather(0, choice), expected)
    assert torch.equal(gaps > 0.3, known["ties_valid"])


def test_the_gap_by_hand():
    """softmax([2, 0])[0] - [1] = tanh(1)."""
    _, gaps = best_and_worst(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
    assert gaps.tolist() == pytest.approx([math.tanh(1), 0.0])


def test_only_pairs_above_the_threshold_are_kept(sd15):
    everything, some = rollout(sd15), rollout(sd15, threshold=0.02)
    gaps = everything.comparisons.gaps
    assert torch.equal(gaps, some.comparisons.gaps)
    assert 0 < len(some.pairs) < len(everything.pairs) == gaps.numel()
    assert len(some.pairs) == (gaps > 0.02).sum() == some.comparisons.valid.sum()
    assert (some.pairs.score_gap > 0.02).all()
    assert some.pairs.indices.tolist() == list(range(len(some.pairs)))


def test_a_gap_that_equals_the_threshold_is_none(sd15):
    """Candidates of one score: their gap is 0, and a threshold of 0 wants more."""
    tied = rollout(sd15, RewardScorer(Same()), threshold=0.0)
    assert tied.comparisons.gaps.tolist() == [0.0] * 6
    assert not tied.comparisons.valid.any()
    assert len(tied.pairs) == 0


def test_a_threshold_that_nothing_passes_gives_an_empty_pool_with_its_gaps(sd15):
    none = rollout(sd15, threshold=0.999)
    assert len(none.pairs) == len(none.prompt_rows) == 0
    assert none.pairs.chosen.shape == (0, 4, 8, 8)
    assert none.comparisons.gaps.max() < 0.999


# What a step costs


@pytest.mark.parametrize("inner", [0, 1, 2])
def test_every_unet_pass_is_used_and_the_chosen_one_twice(sd15, unet_calls, inner):
    """6 steps, branching from step 2, 3 candidates of 2 prompts: plain passes while all share x_t, then one of all
    candidates a step, the comparison's own being the next step's."""
    result = rollout(sd15, steps=6, branch_from_step=2, candidates=3, num_inner_step=inner)
    assert unet_calls == [4] * 3 + [12] * 3
    assert result.unet_evaluations == sum(unet_calls)
    compared = math.ceil(4 / (inner + 1))
    assert result.decodes == 6 * compared
    assert result.comparisons.scores.shape == (2 * compared, 3)


def test_without_guidance_a_pass_costs_one_evaluation(sd15, unet_calls):
    result = rollout(sd15, guidance_scale=1.0)
    assert unet_calls == [2] * 2 + [4] * 2
    assert result.unet_evaluations == sum(unet_calls) == 12


def test_the_random_control_needs_no_candidates_pass_and_no_decode(sd15, unet_calls):
    result = rollout(sd15, RandomScorer())
    assert unet_calls == [4] * 4
    assert result.decodes == 0
    assert len(result.pairs) == 6


def test_pictures_are_decoded_in_chunks(sd15):
    chunks = []

    def decode(latents):
        chunks.append(len(latents))
        return sd15.decode(latents)

    draws = SeededDraws(0, 0, range(2))
    sampler = StepSampler(**PLAIN | {"candidates": 4, "decode_batch": 3, "steps": 2})
    sampler.sample(sd15, RewardScorer(Redness()), PROMPTS, draws, decode=decode)
    assert chunks == [3, 3, 2]


def test_progress_is_told_after_every_step_and_group(sd15):
    told = []
    sampler = StepSampler(**PLAIN | {"steps": 6, "branch_from_step": 2, "num_inner_step": 2})
    sampler.sample(sd15, RandomScorer(), PROMPTS, SeededDraws(0, 0, range(2)), after_step=told.append)
    assert told == [1, 2, 5, 6]


# Trajectories


@pytest.mark.parametrize("continuation", ["best", "worst"])
def test_the_trajectory_goes_on_from_the_named_candidate(sd15, continuation):
    pairs = rollout(sd15, continuation=continuation).pairs
    before, after = pairs.latents.split(2), (pairs.chosen if continuation == "best" else pairs.rejected).split(2)
    assert len(before) == 3
    for left, entered in zip(after[:-1], before[1:]):
        assert torch.equal(left, entered)


def test_random_continuation_takes_every_candidate_sometimes(sd15):
    taken = set()
    for seed in range(4):
        pairs = rollout(sd15, RandomScorer(), seed=seed, steps=3, branch_from_step=0).pairs
        for i in range(4):
            taken.add(torch.equal(pairs.latents[i + 2], pairs.chosen[i]))
    assert taken == {True, False}


def test_transitions_of_a_group_follow_one_another(sd15):
    """Each inner step starts where its own trajectory's last one ended; only the first start is shared."""
    pairs = rollout(sd15, num_inner_step=2, continuation="best").pairs
    assert pairs.rejected_latents is not None
    assert torch.equal(pairs.latents[:2], pairs.rejected_latents[:2])
    for first, second in ((0, 2), (2, 4)):
        assert torch.equal(pairs.latents[second : second + 2], pairs.chosen[first : first + 2])
        assert torch.equal(pairs.rejected_latents[second : second + 2], pairs.rejected[first : first + 2])
    assert torch.equal(pairs.score_gap[:2], pairs.score_gap[2:4])


# Randomness


def test_a_pool_does_not_depend_on_how_prompts_are_batched(sd15):
    prompts = (*PROMPTS, "a red square", "two dogs", PROMPTS[0])
    together = rollout(sd15, prompts=prompts)
    split = [rollout(sd15, prompts=prompts[i:j], indices=range(i, j)) for i, j in ((0, 2), (2, 5))]
    rows = [torch.cat([split[0].prompt_rows, split[1].prompt_rows + 2])]
    found = _by_prompt(rows[0], torch.cat([part.pairs.timesteps for part in split]))
    known = _by_prompt(together.prompt_rows, together.pairs.timesteps)
    assert together.prompt_rows[known].tolist() == rows[0][found].tolist()
    for name in ("latents", "chosen", "rejected", "timesteps", "score_gap"):
        parts = torch.cat([getattr(part.pairs, name) for part in split])
        torch.testing.assert_close(parts[found], getattr(together.pairs, name)[known], rtol=0, atol=1e-4)
    joined = Comparisons.cat([part.comparisons for part in split])
    order = joined.timesteps.argsort(descending=True, stable=True)
    torch.testing.assert_close(joined.scores[order], together.comparisons.scores, rtol=1e-4, atol=1e-4)
    assert sum(part.unet_evaluations for part in split) == together.unet_evaluations
    assert sum(part.decodes for part in split) == together.decodes


def _by_prompt(rows, timesteps):
    return torch.argsort(rows * 1000 - timesteps)


def test_seed_epoch_and_index_each_change_the_draws_and_nothing_else_does(sd15):
    def chosen(**change):
        return rollout(sd15, RandomScorer(), steps=1, branch_from_step=0, **change).pairs.chosen

    first = chosen()
    torch.manual_seed(99)
    assert torch.equal(chosen(), first)
    for change in ({"seed": 1}, {"epoch": 1}, {"indices": [5, 6]}):
        assert not torch.equal(chosen(**change), first)


def test_sampling_leaves_mode_gradients_and_the_global_generator_alone(sd15):
    sd15.train()
    state = torch.get_rng_state()
    modes = []
    handle = sd15.unet.register_forward_pre_hook(lambda unet, inputs: modes.append(unet.training))
    result = rollout(sd15)
    handle.remove()
    assert modes == [False] * 4
    assert torch.equal(torch.get_rng_state(), state)
    assert sd15.unet.training
    assert not sd15.vae.training
    assert not result.pairs.chosen.requires_grad
    assert all(p.grad is None for p in trained_parameters(sd15))
    sd15.eval()


# Scorers


def test_a_step_aware_model_sees_clamped_pictures_prompts_and_the_arrival(sd15):
    """Four steps are at 751, 501, 251 and 1; the first is plain."""
    model = LaterIsBetter()
    rollout(sd15, StepAwareScorer(model))
    assert [asked[2].tolist() for asked in model.asked] == [[t] * 4 for t in (251, 1, 0)]
    for images, prompts, _ in model.asked:
        assert images.shape == (4, 3, 64, 64)
        assert 0 <= images.min() <= images.max() <= 1
        assert prompts == PROMPTS * 2


def test_after_the_last_step_the_finished_latents_are_judged(sd15):
    decoded = []

    def decode(latents):
        decoded.append(latents)
        return sd15.decode(latents)

    sampler = StepSampler(**PLAIN)
    pairs = sampler.sample(sd15, RewardScorer(Redness()), PROMPTS, SeededDraws(0, 0, range(2)), decode=decode).pairs
    finished = {row.numpy().tobytes() for row in decoded[-1]}
    assert {row.numpy().tobytes() for row in torch.cat([pairs.chosen[-2:], pairs.rejected[-2:]])} == finished


def test_the_reward_scale_widens_the_gaps(sd15):
    plain = rollout(sd15).comparisons
    wide = rollout(sd15, RewardScorer(Redness(), scale=3.0), continuation="random").comparisons
    torch.testing.assert_close(wide.scores, 3 * plain.scores)
    torch.testing.assert_close(wide.gaps, (3 * plain.gaps.atanh()).tanh(), rtol=1e-4, atol=1e-5)


def test_shuffled_scores_are_the_real_ones_on_other_candidates(sd15):
    real = rollout(sd15, candidates=4).comparisons
    shuffled = rollout(sd15, ShuffledScorer(RewardScorer(Redness())), candidates=4).comparisons
    # The same candidates were seen, so each comparison has the same scores, dealt otherwise.
    torch.testing.assert_close(shuffled.scores.sort(dim=1).values, real.scores.sort(dim=1).values)
    assert torch.equal(shuffled.gaps, real.gaps)
    assert not torch.equal(shuffled.scores, real.scores)


def test_a_score_that_is_not_finite_is_refused(sd15):
    with pytest.raises(ConfigError, match="RewardScorer gave a score that is not finite at t = "):
        rollout(sd15, RewardScorer(Redness(), scale=float("nan")))


def test_the_step_aware_preference_model_judges_the_decoded_predictions_at_their_timestep(sd15, pipelines):
    model = StepAwarePreferenceModel(str(pipelines / "tiny-spm"), None)
    seen = []

    def decode(latents):
        seen.append(sd15.decode(latents))
        return seen[-1]

    sampler = StepSampler(**PLAIN)
    scores = sampler.sample(sd15, StepAwareScorer(model), PROMPTS, SeededDraws(0, 0, range(2)), decode).comparisons
    judged_at = scores.judged_at[:: len(PROMPTS)]
    assert judged_at.tolist() == [251, 1, 0]
    for images, t, found in zip(seen, judged_at, scores.scores.split(len(PROMPTS))):
        torch.testing.assert_close(found.T.flatten(), model.score(images, PROMPTS * 2, t.repeat(4)))


# Agreement


@pytest.mark.parametrize(
    ("decode", "same_choice"),
    [(lambda policy: policy.decode, True), (lambda policy: lambda latents: 1 - policy.decode(latents), False)],
    ids=["the VAE itself", "its negative"],
)
def test_agreement_of_decoders_of_which_one_knows_the_answer(sd15, decode, same_choice):
    """The negative's reddest picture is the least red one, by as much: nothing is chosen alike, all is kept alike."""
    sampler = StepSampler(**PLAIN | {"candidates": 4})
    found = sampler.sample(
        sd15, RewardScorer(Redness()), PROMPTS, SeededDraws(0, 0, range(2)), decode=decode(sd15), checked=2
    )
    same = found.comparisons
    assert same.same_choice.shape == same.same_valid.shape == (6,)
    assert same.checked.all()
    assert (same.same_choice == same_choice).all()
    assert same.same_valid.all()
    assert same.metrics()["decoder_agreement"] == float(same_choice)


def test_checking_a_tiny_decoder_changes_no_pair_asks_no_network_again_and_is_counted(sd15, tmp_path, unet_calls):
    torch.manual_seed(0)
    tiny = TinyDecoder(str(tiny_autoencoder(tmp_path)))
    sampler = StepSampler(**PLAIN | {"candidates": 4})
    plain, checked = (
        sampler.sample(
            sd15, RewardScorer(Redness()), PROMPTS, SeededDraws(0, 0, range(2)), decode=tiny, checked=checked
        )
        for checked in (0, 1)
    )
    assert len(unet_calls) == 2 * 4
    assert torch.equal(plain.pairs.chosen, checked.pairs.chosen)
    assert torch.equal(plain.comparisons.scores, checked.comparisons.scores)
    # Three comparisons of four candidates of one of the two prompts.
    assert checked.decodes == plain.decodes + 3 * 4 * 1
    assert checked.unet_evaluations == plain.unet_evaluations
    assert not any("agreement" in name for name in plain.comparisons.metrics())
    assert 0 <= checked.comparisons.metrics()["decoder_agreement"] < 1


def tiny_autoencoder(folder):
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(folder)
    return folder


def test_a_tiny_decoder_reads_the_vaes_scaled_latents(tmp_path):
    """As ``AutoencoderTiny`` does by itself, but in [0, 1] and clamped."""
    torch.manual_seed(0)
    theirs = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    theirs.save_pretrained(tmp_path)
    latents = 3 * torch.randn(2, 4, 4, 4)
    expected = ((theirs.decode(latents).sample + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(TinyDecoder(str(tmp_path))(latents), expected.detach())


# Statistics and settings


def test_metrics_by_hand():
    comparisons = Comparisons(
        timesteps=torch.tensor([751, 751, 701, 701]),
        judged_at=torch.tensor([701, 701, 651, 651]),
        scores=torch.tensor([[1.0, 3.0], [2.0, 4.0], [5.0, 5.0], [5.0, 5.0]]),
        gaps=torch.tensor([0.5, 0.1, 0.0, 0.0]),
        valid=torch.tensor([True, False, False, False]),
        checked=torch.tensor([True, False, True, False]),
        same_choice=torch.tensor([True, False, False, False]),
        same_valid=torch.tensor([True, False, True, False]),
    )
    metrics = comparisons.metrics()
    assert metrics["score"] == 3.75
    assert metrics["valid_fraction"] == 0.25
    assert metrics["valid_fraction/t751"] == 0.5
    assert metrics["score_gap/t751"] == pytest.approx(0.3)
    assert metrics["score/t701"] == 5.0
    assert (metrics["decoder_agreement"], metrics["decoder_agreement/t751"]) == (0.5, 1.0)
    assert metrics["decoder_agreement_valid"] == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance_scale": 0.0},
        {"eta": 0.0},
        {"candidates": 1},
        {"branch_from_step": 20},
        {"threshold": 1.0},
        {"num_inner_step": -1},
        {"decode_batch": 0},
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(ConfigError) as error:
        StepSampler(**wrong)
    assert str(error.value).startswith(f"step sampler: {next(iter(wrong))} must be")
    assert "\n" not in str(error.value)


def test_a_schedule_whose_last_step_is_certain_is_refused_before_any_pass(sd15, unet_calls, monkeypatch):
    certain = NoiseSchedule(sd15.schedule.alphas_cumprod, final_alpha_cumprod=1.0)
    monkeypatch.setattr(sd15, "schedule", certain)
    with pytest.raises(ConfigError, match="set_alpha_to_one"):
        rollout(sd15)
    assert unet_calls == []
