"""Training the latent reward model: the official step, its draws, and what a run keeps and exports."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from safetensors import safe_open
from test_preference import batch, fit

from callbacks.export_preference import ExportPreferenceModel
from lightning_modules.errors import ConfigError
from lightning_modules.policies import Frozen, StableDiffusion, StableDiffusionXL
from lightning_modules.preference import HumanLabels, StepAwarePreferenceModule
from lightning_modules.preference_loss import preference_loss
from lightning_modules.preference_views import DecodedPrediction, NoisyLatents
from lightning_modules.randomness import generator, randn
from lightning_modules.rewards import LatentRewardModel, StepAwarePreferenceModel

KINDS = ("sd15", "sdxl")
LPO_STEPS = 20


def reward_of(pipelines, kind="sd15", **options):
    return LatentRewardModel(str(pipelines / f"tiny-lrm-{kind}"), str(pipelines / f"tiny-{kind}"), **options)


def make(pipelines, kind="sd15", preference=None, **options):
    network = StableDiffusionXL if kind == "sdxl" else StableDiffusion
    policy = network(str(pipelines / f"tiny-{kind}"), Frozen(), negative_prompt=None if kind == "sdxl" else "")
    defaults = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), "sees": NoisyLatents(),
                "sampler_steps": LPO_STEPS, "independent_noise": True, "seed": 7,
                "validation_timesteps": (1, 951)}  # fmt: skip
    return StepAwarePreferenceModule(
        policy, preference or reward_of(pipelines, kind), HumanLabels(), **(defaults | options)
    )


# The official step


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_the_gradient_of_every_parameter_equal_the_official_ones(golden, pipelines, request, kind):
    known = golden(f"lrm_train_step_{kind}")
    with safe_open(request.path.parent / "golden" / f"lrm_train_step_{kind}.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
    module = make(pipelines, kind)
    scaling = module.policy.vae.config.scaling_factor
    latents = (known["posterior_mean"] + known["posterior_std"] * known["draw.posterior"]) * scaling
    torch.testing.assert_close(latents, known["latents"], rtol=1e-5, atol=1e-5)
    steps, others = known["timestep"].reshape(5, 2).T  # of either picture of each pair
    assert torch.equal(steps, others)
    seen = module.view(known["latents"], known["draw.noise"], steps, None)
    torch.testing.assert_close(seen, known["noisy_latents"], rtol=1e-5, atol=1e-5)
    weights = 1 / known["num_example_per_prompt"].float()
    loss, metrics = module._judge(seen, module.preference.read_prompts(prompts), steps, known["label_0"], weights)
    torch.testing.assert_close(loss, known["loss"], rtol=1e-4, atol=0)
    loss.backward()
    grads = {official(name): value.grad for name, value in module.preference.named_parameters() if value.requires_grad}
    expected = {name.removeprefix("grad."): value for name, value in known.items() if name.startswith("grad.")}
    assert grads.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in grads.items():
        assert (value - expected[name]).abs().max() <= 1e-4 * largest, name
        assert value.shape == expected[name].shape
    clear = known["label_0"] != 0.5
    right = (known["scores_0"] > known["scores_1"]) == (known["label_0"] == 1)
    assert metrics["accuracy"] == right[clear].float().mean()


def official(name):
    """The official name of a parameter; transformers 4 nests a text encoder's."""
    if name == "log_scale":
        return "logit_scale"
    first, _, rest = name.partition(".")
    if first.startswith("text_encoder") and not rest.startswith(("text_model.", "text_projection.")):
        return f"{first}.text_model.{rest}"
    return name


@pytest.mark.parametrize("kind", KINDS)
def test_without_guidance_the_loss_equals_the_official_one(golden, pipelines, request, kind):
    known = golden(f"lrm_train_step_{kind}")
    with safe_open(request.path.parent / "golden" / f"lrm_train_step_{kind}.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
    module = make(pipelines, kind, reward_of(pipelines, kind, guidance_scale=1.0))
    weights = 1 / known["num_example_per_prompt"].float()
    read = module.preference.read_prompts(prompts)
    loss, _ = module._judge(known["noisy_latents"], read, known["timestep"][::2], known["label_0"], weights)
    torch.testing.assert_close(loss, known["loss_guidance1"], rtol=1e-4, atol=0)


def test_the_timesteps_are_the_twenty_that_the_sampler_judges_at(golden, pipelines):
    module = make(pipelines)
    assert module.candidates.sort().values.tolist() == golden("lrm_data")["candidate_timesteps"].tolist()


def test_a_training_step_is_the_criterion_on_noisy_latents_of_keyed_draws(pipelines):
    """Each picture its own noise; t of the pair from the twenty; the posterior drawn; no UNet, no decoder."""
    module, pairs = make(pipelines), batch(2, 6)
    asked = []
    module.policy.unet.register_forward_hook(lambda *_: asked.append("unet"))
    module.policy.vae.decoder.register_forward_hook(lambda *_: asked.append("decoder"))
    module.policy.text_encoder.register_forward_hook(lambda *_: asked.append("text"))
    grid = [step.timestep for step in module.policy.schedule.trajectory(LPO_STEPS)]
    found = []
    for i, index in enumerate(pairs.indices.tolist()):
        t = torch.tensor([grid[torch.randint(20, (1,), generator=generator(7, "timestep", index)).item()]])
        row = []
        for side, pictures, purpose in (("chosen", pairs.chosen, ()), ("rejected", pairs.rejected, ("rejected",))):
            clean = module.policy.encode_images(pictures[i : i + 1], [generator(7, "train", "posterior", side, index)])
            noise = randn((4, 8, 8), [generator(7, "train", "noise", *purpose, index)])
            noisy = module.policy.schedule.add_noise(clean, noise, t)
            row.append(module.preference.encode_seen(noisy, t, module.preference.read_prompts([pairs.prompts[i]])))
        found.append(row)
    chosen, rejected = (torch.cat([row[side] for row in found]) for side in (0, 1))
    text = module.preference.read_prompts(pairs.prompts).text
    expected = preference_loss(chosen, rejected, text, module.preference.logit_scale, pairs.labels, pairs.weights)
    assert module.training_step(pairs, 0).item() == pytest.approx(expected.item(), rel=1e-4)
    assert asked == []


def test_the_two_noises_of_a_pair_are_two_and_do_not_depend_on_company(pipelines):
    module = make(pipelines)
    _, noise = module._latents(batch(0, 3), "train")
    assert not torch.equal(noise[:3], noise[3:])
    alone = [module._latents(batch(n, n + 1), "train")[1] for n in range(3)]
    assert torch.equal(noise, torch.cat([own[0:1] for own in alone] + [own[1:2] for own in alone]))
    _, shared = make(pipelines, independent_noise=False)._latents(batch(0, 3), "train")
    assert torch.equal(shared[:3], shared[3:])
    assert torch.equal(shared[:3], noise[:3])


# Runs


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_the_whole_model_and_lowers_the_loss(tmp_path, pipelines, kind):
    """All but what no score depends on: SDXL's first text encoder behind the layer that is read."""
    module = make(pipelines, kind)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pairs = batch(0, 4)
    first = module.training_step(pairs, 0).item()
    fit(tmp_path, module, [pairs] * 6)
    assert module.training_step(pairs, 0).item() < first
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == module.trainable_names()
    still = {official(name.removeprefix("preference.")) for name in before.keys() - changed if "preference." in name}
    assert all("text_encoder.text_model.encoder.layers.1" in n or "final_layer_norm" in n for n in still)
    assert bool(still) == (kind == "sdxl")


def test_resuming_equals_never_having_stopped_and_early_stopping_stops(tmp_path, pipelines):
    batches = [batch(n, n + 2) for n in range(0, 8, 2)]
    whole, resumed = make(pipelines), make(pipelines)
    fit(tmp_path, whole, batches, max_steps=4)
    half = fit(tmp_path, make(pipelines), batches[:2])
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == whole.trainable_names()
    assert not any("up_blocks" in name for name in saved)
    fit(tmp_path, resumed, batches[2:], max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.preference.state_dict().items():
        assert torch.equal(value, resumed.preference.state_dict()[name]), name
    # Nothing is learned, so accuracy never rises: after the first and two more validations it is over.
    lazy = make(pipelines, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    stop = EarlyStopping("val/accuracy", mode="max", patience=2)
    run = fit(tmp_path, lazy, [batch(0, 2)], [batch(0, 4)], max_epochs=9, callbacks=[stop])
    assert run.current_epoch == 3


def test_the_best_model_is_exported_in_the_published_form(tmp_path, pipelines):
    module = make(pipelines, preference=reward_of(pipelines, export_up_part=False))
    fit(tmp_path, module, [batch(0, 2)], callbacks=[ExportPreferenceModel(dtype="fp32")])
    exported = tmp_path / "export" / "preference"
    assert (exported / "state_dict.pt").is_file()
    loaded = LatentRewardModel(str(exported), str(pipelines / "tiny-sd15"))
    latents, steps = torch.randn(2, 4, 8, 8), torch.tensor([1, 951])
    expected = module.preference.score(latents, ["a", "b"], steps)
    assert torch.equal(loaded.score(latents, ["a", "b"], steps), expected)


def test_what_cannot_be_judged_is_refused(pipelines):
    with pytest.raises(ConfigError, match="StepAwarePreferenceModel judges pictures"):
        make(pipelines, preference=StepAwarePreferenceModel(str(pipelines / "tiny-spm"), None))
    with pytest.raises(ConfigError, match="LatentRewardModel judges noisy latents"):
        make(pipelines, sees=DecodedPrediction())
    with pytest.raises(ConfigError, match="trained on latents of SDXL"):
        make(pipelines, preference=reward_of(pipelines, "sdxl"))
