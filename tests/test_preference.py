"""Training the step-aware preference model: the official criterion, pictures and labels, and what a run keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from drawn_pairs import drawn_pairs
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import experiments
from callbacks.export_preference import ExportPreferenceModel
from experiments import prepare_feedback, prepare_pickapic, run
from experiments.cli.compose import find_config
from experiments.shapes import build_pipeline as build_shapes_pipeline
from experiments.shapes import build_preference as build_shapes_preference
from lightning_modules.batches import DenoiserQuery, PreferencePairs
from lightning_modules.errors import ConfigError
from lightning_modules.policies import (
    Flux,
    Frozen,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
)
from lightning_modules.preference import HumanLabels, RewardLabels, StepAwarePreferenceModule
from lightning_modules.preference_loss import preference_loss
from lightning_modules.randomness import generator, randn
from lightning_modules.rewards import PickScore, StepAwarePreferenceModel
from lightning_modules.rewards.clip import text_embeds
from lightning_modules.sampling.step_scorers import StepAwareScorer
from lightning_modules.shapes.reward import ShapesReward

TIGHT = {"rtol": 1e-5, "atol": 1e-5}
TIME_IDS = torch.tensor([64.0, 64, 0, 0, 64, 64])


def preference_model(pipelines, name="tiny-spm"):
    return StepAwarePreferenceModel(str(pipelines / name), None)


NETWORKS = {
    "tiny-sd15": (StableDiffusion, {"negative_prompt": ""}),
    "tiny-sdxl": (StableDiffusionXL, {"negative_prompt": None}),
    "tiny-sd3": (StableDiffusion3, {"t5_tokens": 16}),
    "tiny-flux": (Flux, {"t5_tokens": 16, "image_size": 64}),
}


def make(pipelines, labels=None, policy="tiny-sd15", **options):
    network, own = NETWORKS[policy]
    frozen = network(str(pipelines / policy), Frozen(), **own)
    options = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)} | options
    return StepAwarePreferenceModule(frozen, preference_model(pipelines), labels or HumanLabels(), **options)


def batch(start, stop):
    """Pairs start .. stop - 1 of an endless stream: bright is preferred to dark, every fourth is a tie."""
    draws = [torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(start, stop)]
    chosen, rejected = torch.stack([d[0] for d in draws]), torch.stack([d[1] for d in draws]) - 1
    ids = TIME_IDS.expand(stop - start, 6)
    indices = torch.arange(start, stop)
    labels = torch.where(indices % 4 == 3, 0.5, 1.0)
    prompts = tuple(f"picture {n}" for n in range(start, stop))
    return PreferencePairs(chosen, rejected, prompts, ids, ids, indices, labels, 1 / (1 + indices % 3))


def fit(tmp_path, module, batches, validation=None, ckpt_path=None, callbacks=(), **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path,
                "num_sanity_val_steps": 0, "callbacks": list(callbacks)}  # fmt: skip
    trainer = Trainer(**(defaults | options))
    loaders = [None if data is None else DataLoader(data, batch_size=None) for data in (batches, validation)]
    trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return trainer


# Criterion and labels


def test_gradient_of_every_parameter_equals_the_official_one(golden, pipelines):
    known, model = golden("spm_loss_full"), preference_model(pipelines).requires_grad_(True)
    pixels, steps = torch.cat([known["pixel_values_0"], known["pixel_values_1"]]), known["timesteps"].repeat(2)
    first, second = model.encode_pixels(pixels, steps).chunk(2)
    text = text_embeds(model.model, known["input_ids"], torch.ones_like(known["input_ids"]))
    weights = 1 / known["num_examples_per_prompt"]
    loss = preference_loss(first, second, text, model.logit_scale, known["label_0"], weights)
    loss.backward()
    torch.testing.assert_close(loss, known["loss"], rtol=1e-5, atol=0)
    grads = {f"grad.{name}": value.grad for name, value in model.named_parameters()}
    assert grads.keys() == {name for name in known if name.startswith("grad.")}
    largest = max(known[name].abs().max() for name in grads)
    for name, value in grads.items():
        difference = (value - known[name]).abs().max()
        assert difference <= 1e-4 * known[name].abs().max() + 1e-7 * largest, name


def test_a_reward_labels_pairs_whatever_the_data_set_says(pipelines):
    pairs = batch(0, 4)
    reward = PickScore(str(pipelines / "tiny-pickscore"), None)
    scores = [reward.score(images / 2 + 0.5, pairs.prompts) for images in (pairs.chosen, pairs.rejected)]
    for threshold in (0.0, 0.6):
        expected = [0.5 if abs(math.tanh((a - b) / 2)) <= threshold else float(a > b) for a, b in zip(*scores)]
        assert RewardLabels(reward, threshold)(pairs).tolist() == expected
    assert RewardLabels(reward, 0.999999)(pairs).unique().tolist() == [0.5]
    # A gap of tanh(s d / 2) above the threshold: the scale decides which pairs are ties.
    gaps = [abs(a - b).item() for a, b in zip(*scores)]
    scale = 2 * math.atanh(0.5) / sorted(gaps)[1] * 1.001  # the second smallest gap is just enough
    clear = [label != 0.5 for label in RewardLabels(reward, 0.5, scale)(pairs).tolist()]
    assert clear == [gap >= sorted(gaps)[1] for gap in gaps]
    assert HumanLabels()(pairs) is pairs.labels
    assert HumanLabels()(replace(pairs, labels=None)).tolist() == [1.0] * 4
    with pytest.raises(ConfigError, match=r"threshold in \[0, 1\)"):
        RewardLabels(reward, 1.5)


# Pictures


@pytest.mark.parametrize(("name", "policy"), [("spm_noised_imgs", "tiny-sd15"), ("spm_noised_imgs_sdxl", "tiny-sdxl")])
def test_noised_denoised_and_decoded_pictures_equal_the_official_ones(golden, pipelines, name, policy):
    known, module = golden(name), make(pipelines, policy=policy)
    tokenizer = AutoTokenizer.from_pretrained(pipelines / policy / "tokenizer")
    prompts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in known["input_ids"]]
    cond = module.policy.encode_prompts(prompts)
    ids = known["add_time_ids"].float().expand(len(prompts), 6) if policy == "tiny-sdxl" else None
    cond = cond.with_time_ids(ids).repeat_interleave(2)[torch.arange(10).reshape(5, 2).T.flatten()]
    latents = torch.cat([known["latent_0"], known["latent_1"]])
    noise = known["noise"].repeat(2, 1, 1, 1)

    def both(key):
        return torch.cat([known[f"{key}_0"], known[f"{key}_1"]])

    seen = []
    handle = module.policy.unet.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.sample)))
    images = module.view(latents, noise, known["timesteps"], cond)
    handle.remove()
    [(noisy, raw)] = seen  # one pass for both pictures and both branches of guidance
    torch.testing.assert_close(noisy[:10], both("noisy_latent"), **TIGHT)
    unguided, guided = raw.chunk(2)
    official = [torch.cat([known[f"unet_out_{k}"].chunk(2)[i] for k in (0, 1)]) for i in (0, 1)]
    torch.testing.assert_close(unguided, official[0], **TIGHT)
    torch.testing.assert_close(guided, official[1], **TIGHT)
    noise_pred = unguided + 5 * (guided - unguided)
    torch.testing.assert_close(noise_pred, both("noise_pred_cfg"), rtol=1e-4, atol=1e-4)
    clean, _ = module.policy.schedule.predict_clean(noise_pred, noisy[:10], known["timesteps"].repeat(2))
    torch.testing.assert_close(clean, both("pred_x0"), rtol=1e-5, atol=2e-4)  # 14 times the guided noise's, at t = 951
    torch.testing.assert_close(images, (both("noised_img") / 2 + 0.5).clamp(0, 1), rtol=0, atol=5e-5)
    torch.testing.assert_close(module.preference.preprocess(images), both("processed"), rtol=0, atol=2e-4)


def test_latents_are_the_official_ones_up_to_their_own_noise(golden, pipelines):
    known, module = golden("spm_noised_imgs"), make(pipelines)
    config, mean, std = module.policy.vae.config, known["posterior_mean_0"], known["posterior_std_0"]
    torch.testing.assert_close(
        module.policy.encode_images(known["pixel_values_0"]), mean * config.scaling_factor, **TIGHT
    )
    pairs = batch(0, 5)
    latents, noise = module._latents(pairs, "train")
    assert torch.equal(noise[:5], noise[5:])
    centre = module.policy.encode_images(torch.cat([pairs.chosen, pairs.rejected]))
    off = (latents - centre) / config.scaling_factor
    assert 0.3 < off.std() < 3 * std.mean()
    assert not torch.equal(off[:5], off[5:])  # the posterior is drawn apart, as the official code does


def test_what_a_pair_sees_does_not_depend_on_its_company(pipelines):
    module = make(pipelines, vae_batch_size=3)
    pairs = batch(0, 4)
    together, noise = module._latents(pairs, "train")
    alone = [module._latents(batch(n, n + 1), "train") for n in range(4)]
    torch.testing.assert_close(together[:4], torch.cat([latents[:1] for latents, _ in alone]), **TIGHT)
    torch.testing.assert_close(noise[:4], torch.cat([own[:1] for _, own in alone]))


# A step, by hand


def views_of(module, pairs, purpose, timesteps):
    """What the preference model sees of each pair, chosen picture and rejected one, each computed by itself."""
    policy, seen = module.policy, ([], [])
    for i, index in enumerate(pairs.indices.tolist()):
        noise = randn((policy.latent_channels, 8, 8), [generator(7, purpose, "noise", index)])
        cond, t = policy.encode_prompts([pairs.prompts[i]]), timesteps[i : i + 1]
        for side, pictures, found in zip(("chosen", "rejected"), (pairs.chosen, pairs.rejected), seen):
            draw = generator(7, purpose, "posterior", side, index)
            clean = policy.encode_images(pictures[i : i + 1], [draw])
            found.append(module.preference.encode_images(policy.decode(predicted(policy, clean, noise, t, cond)), t))
    return [torch.cat(found) for found in seen]


def predicted(policy, clean, noise, t, cond):
    """The x0-prediction; a flow's by hand."""
    if policy.schedule.kind == "diffusion":
        noisy = policy.schedule.add_noise(clean, noise, t)
        return policy.schedule.predict_clean(policy.predict_noise(DenoiserQuery(noisy, t, cond, 3.0)), noisy, t)[0]
    s = t.item() / 1000
    noisy = (1 - s) * clean + s * noise
    return noisy - s * policy.predict_noise(DenoiserQuery(noisy, torch.tensor([1000 * s]), cond, 3.0))


def criterion(module, pairs, purpose, timesteps, negatives):
    chosen, rejected = views_of(module, pairs, purpose, timesteps)
    text = module.preference.encode_text(pairs.prompts)
    return preference_loss(
        chosen, rejected, text, module.preference.logit_scale, pairs.labels, pairs.weights, negatives
    ).item()


def drawn_timestep(policy, index):
    """The pair's own draw: from all alike, or on SD3 the row of its shifted table that a logit-normal number names."""
    own = generator(7, "timestep", index)
    if policy == "tiny-sd15":
        return torch.randint(1000, (1,), generator=own)
    level = 1 - int(1000 * torch.sigmoid(torch.randn((), generator=own)).item()) / 1000
    return torch.tensor([1000 * 3 * level / (1 + 2 * level)])


@pytest.mark.parametrize(("policy", "negatives"), [("tiny-sd15", False), ("tiny-sd15", True), ("tiny-sd3", False)])
def test_a_training_step_is_the_criterion_on_what_each_pair_sees(pipelines, policy, negatives):
    """Draws by their keys: t, both pictures' posteriors, their common noise; t of each picture; weights and labels."""
    module = make(pipelines, policy=policy, guidance_scale=3.0, in_batch_negatives=negatives, seed=7)
    pairs = batch(2, 6)
    timesteps = torch.cat([drawn_timestep(policy, n) for n in range(2, 6)])
    loss = module.training_step(pairs, 0)
    assert loss.item() == pytest.approx(criterion(module, pairs, "train", timesteps, negatives), rel=1e-5)
    logged = module._means["train"].compute(lambda sums: sums)
    assert logged["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("policy", ["tiny-sd15", "tiny-sd3"])
def test_a_validation_is_the_criterion_at_its_timesteps_with_draws_of_its_own(pipelines, policy):
    module = make(pipelines, policy=policy, guidance_scale=3.0, seed=7, validation_timesteps=(0, 900))
    pairs = batch(2, 5)
    module.validation_step(pairs, 0)
    losses = [criterion(module, pairs, "val", torch.full((3,), t), False) for t in (0, 900)]
    found = module._means["val"].compute(lambda sums: sums)
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_flows_sampler_steps_are_those_that_start_above_pure_noise(pipelines):
    """FLUX's levels, whose shift depends on the size of the picture: 64 pixels are 16 tokens."""
    module = make(pipelines, policy="tiny-flux", sampler_steps=4)
    factor = math.exp(0.5 + 0.65 * (16 - 256) / (4096 - 256))
    expected = [1000 * factor * s / (1 + (factor - 1) * s) for s in (0.75, 0.5, 0.25)]
    assert module.candidates.tolist() == pytest.approx(expected, rel=1e-6)


def test_timesteps_reach_from_the_first_to_the_last(pipelines):
    """200 uniform draws: below 50 and above 950 there is one with probability 1 - 4e-5 each; their mean is within four
    standard errors."""
    module, drawn = make(pipelines), []
    module.view = lambda latents, noise, timesteps, cond: drawn.append(timesteps) or latents
    module._latents = lambda pairs, purpose: (torch.rand(2 * len(pairs), 3, 28, 28), None)
    module.training_step(replace(batch(0, 1), **stream(200)), 0)
    assert drawn[0].min() < 50
    assert drawn[0].max() > 950
    assert abs(drawn[0].float().mean() - 499.5) < 4 * 289 / 200**0.5


def stream(pairs):
    """Fields of as many pairs of one black picture."""
    black = torch.zeros(pairs, 3, 8, 8)
    ids = TIME_IDS.expand(pairs, 6)
    return {"chosen": black, "rejected": black, "prompts": ("a",) * pairs, "chosen_time_ids": ids,
            "rejected_time_ids": ids, "indices": torch.arange(pairs), "labels": torch.ones(pairs),
            "weights": torch.ones(pairs)}  # fmt: skip


def test_each_picture_keeps_its_own_time_ids(pipelines):
    module, pairs = make(pipelines, policy="tiny-sdxl"), batch(0, 3)
    chosen, rejected = torch.arange(36.0).reshape(2, 3, 6)
    cond = module._conditioning(replace(pairs, chosen_time_ids=chosen, rejected_time_ids=rejected))
    assert torch.equal(cond.time_ids, torch.cat([chosen, rejected]))
    assert torch.equal(cond.embeds[:3], cond.embeds[3:])


# Whose timesteps it has learned


@pytest.mark.parametrize(("policy", "other"), [("tiny-sd15", "tiny-sd3"), ("tiny-sd3", "tiny-sd15")])
def test_a_trained_model_judges_steps_of_its_own_kind_of_schedule_alone(tmp_path, pipelines, policy, other):
    module = make(pipelines, policy=policy)
    module.preference.save_pretrained(tmp_path / "saved")
    saved = StepAwareScorer(StepAwarePreferenceModel(str(tmp_path / "saved"), None))
    saved.check(module.policy)
    wrong = make(pipelines, policy=other).policy
    learned, name = module.policy.schedule.kind, type(wrong).__name__
    said = f"of a {learned} schedule, and the policy {name} has a {wrong.schedule.kind} schedule"
    with pytest.raises(ConfigError, match=said) as caught:
        saved.check(wrong)
    assert "\n" not in str(caught.value)


def test_published_weights_are_stable_diffusions_and_a_plain_clip_is_anyones(pipelines):
    flow, spm = make(pipelines, policy="tiny-sd3").policy, str(pipelines / "tiny-spm")
    for file in ("official_style_ckpt.bin", "model.safetensors"):
        published = StepAwarePreferenceModel(spm, None, checkpoint=f"{spm}/{file}")
        with pytest.raises(ConfigError, match="has learned the timesteps of a diffusion schedule"):
            StepAwareScorer(published).check(flow)
    StepAwareScorer(preference_model(pipelines, "tiny-pickscore")).check(flow)


# Runs


class Losses(Callback):
    """The loss of every training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def test_training_lowers_the_loss_and_changes_the_preference_model_alone(tmp_path, pipelines):
    module, losses = make(pipelines), Losses()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(tmp_path, module, [batch(0, 8)] * 12, callbacks=[losses])
    assert losses.seen[-1] < 0.5 * losses.seen[0]
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == module.trainable_names()
    assert all(name.startswith("preference.") for name in changed)


def test_validation_reports_accuracy_at_every_timestep_and_their_mean(tmp_path, pipelines):
    run = fit(tmp_path, make(pipelines), [batch(0, 2)], [batch(0, 4), batch(4, 8)])
    found = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    steps = [found.pop(f"val/accuracy/t{t}") for t in (0, 251, 501, 701, 951)]
    assert found.keys() == {"val/loss", "val/accuracy", "val/margin", "val/tie_fraction"}
    assert found["val/accuracy"] == pytest.approx(sum(steps) / 5)
    assert found["val/tie_fraction"] == 0.25
    assert all(round(6 * accuracy) == pytest.approx(6 * accuracy) for accuracy in steps)  # of 6 pairs that are no ties


def test_checkpoint_holds_the_preference_model_and_resuming_equals_never_having_stopped(tmp_path, pipelines):
    batches = [batch(n, n + 2) for n in range(0, 8, 2)]
    whole, resumed = make(pipelines), make(pipelines)
    fit(tmp_path, whole, batches, max_steps=4)
    half = fit(tmp_path, make(pipelines), batches[:2])
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == whole.trainable_names()
    fit(tmp_path, resumed, batches[2:], max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.preference.state_dict().items():
        assert torch.equal(value, resumed.preference.state_dict()[name]), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path, pipelines):
    run = fit(tmp_path, make(pipelines), [batch(0, 2)])
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    saved["state_dict"].pop("preference.model.logit_scale")
    torch.save(saved, tmp_path / "bad.ckpt")
    with pytest.raises(ConfigError, match=r"1 \(preference.model.logit_scale, ...\) missing"):
        fit(tmp_path, make(pipelines), [batch(0, 2)], max_epochs=2, ckpt_path=tmp_path / "bad.ckpt")


def test_the_best_model_of_a_run_is_exported_and_the_last_where_nothing_was_validated(tmp_path, pipelines):
    def exported(name, validation, learning_rate, epochs):
        module = make(pipelines, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=learning_rate))
        start = module.preference.model.text_projection.weight.clone()
        callbacks = [ExportPreferenceModel()]
        fit(tmp_path / name, module, [batch(0, 2)], validation, callbacks=callbacks, max_epochs=epochs)
        loaded = StepAwarePreferenceModel(str(tmp_path / name / "export" / "preference"), None)
        return start, module.preference.model.text_projection.weight, loaded.model.text_projection.weight

    start, last, found = exported("last", None, 1e-3, 1)
    assert torch.equal(found, last)
    assert not torch.equal(found, start)
    # Nothing learned, nothing better: the first validation's model stays.
    start, last, found = exported("best", [batch(0, 4)], 0.0, 2)
    assert torch.equal(found, start)


def test_settings_that_cannot_be_are_refused(pipelines):
    with pytest.raises(ConfigError, match="validation_timesteps"):
        make(pipelines, validation_timesteps=(0, 1000))
    with pytest.raises(ConfigError, match="guidance_scale"):
        make(pipelines, guidance_scale=0.5)


@pytest.mark.parametrize(
    "name", ["spm_sd15", "spm_sdxl", "spm_tiny", "spm_flow_tiny", "lrm_sd15", "lrm_sdxl", "lrm_tiny"]
)
def test_packaged_configs_parse_and_say_what_they_cost(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run.main(["--config", name, "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["seed"] == printed["data"]["init_args"]["seed"] == 42
    head = find_config(name).read_text().split("seed_everything")[0]
    assert f"python -m experiments.run --config {name}" in head
    assert all(word in head for word in ("Hardware:", "Cost:", "Expected:"))


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")
def test_the_embedded_worlds_config_trains_from_nothing_and_exports_a_small_model(tmp_path, monkeypatch):
    """The commands that the YAML names, on random weights and a handful of pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 speaks to it as of old
    build_shapes_pipeline.main(["--output", "pipeline"])
    build_shapes_preference.main(["--output", "runs/shapes_preference", "--pipeline", "pipeline", "--steps", "2"])
    for name, seed in (("feedback", "0"), ("feedback-2", "2"), ("feedback-val", "1")):
        prepare_feedback.main(
            ["--config", "dpo_tiny", "--reward", "ShapesReward", "--seed", seed,
             "--sampler.guidance_scale=2", "--sampler.steps=6", "--pairs=8", "--candidates=2",
             "--prompts", "embedded/prompts/shapes_train.txt", f"--output=data/shapes/{name}"]
        )  # fmt: skip
        prepare_pickapic.main(
            ["--input", f"data/shapes/{name}", "--output", f"data/shapes/{name}-pairs", "--keep-ties"]
        )
    run.main(
        ["--config", "spm_tiny", "--model.policy.pretrained=pipeline", "--data.batch_size=4", "--trainer.max_steps=2",
         "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"]
    )  # fmt: skip
    exported = tmp_path / "runs" / "spm_tiny" / "export" / "preference"
    assert "_name_or_path" not in (exported / "config.json").read_text()  # a path of the machine that made it
    assert sum(file.stat().st_size for file in exported.iterdir()) < 4e6
    scores = StepAwarePreferenceModel(str(exported), None).score(
        torch.rand(2, 3, 32, 32), ["one large red circle on a white background"] * 2, torch.tensor([0, 951])
    )
    assert scores.isfinite().all()
    with pytest.raises(ConfigError, match="exists already"):
        build_shapes_preference.main(["--output", "runs/shapes_preference", "--pipeline", "pipeline", "--steps", "2"])


def test_the_model_that_ships_is_small_and_sides_with_the_exact_reward_on_new_drawings():
    """On prompts that no training of this world shows; a coin would be right on half of the pairs."""
    folder = Path(experiments.__file__).parent / "embedded" / "step_aware"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    prompts, images = drawn_pairs(4)
    judge = StepAwarePreferenceModel("embedded/step_aware", None)
    gaps = [reward.score(images, prompts * 2).reshape(2, -1).diff(dim=0)[0] for reward in (ShapesReward(), judge)]
    clear = gaps[0].abs() > 0.1
    assert clear.sum() > 72
    assert (gaps[0].sign() == gaps[1].sign())[clear].float().mean() > 0.7
