"""Training steps of the real module on a tiny Stable Diffusion: what changes, what must not, and what is saved."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_world import trained_parameters
from torch.utils.data import DataLoader

from callbacks.resume.checkpoint_files import AtomicCheckpointIO, newest_checkpoint
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import LatentPairs, PreferencePairs
from lightning_modules.errors import ConfigError
from lightning_modules.learning_rates import ConstantWithWarmup, CosineWithWarmup
from lightning_modules.objectives import DPO, SFT
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.stable_diffusion import StableDiffusion
from lightning_modules.randomness import derive_seed, generator, randn
from lightning_modules.references import AdapterOff, FrozenCopy


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def make(pipelines, objective=None, adaptation=None, reference=None, seed=0, optimizer=adamw, **options):
    seed_everything(3, verbose=False)  # LoRA's A is drawn from the global generator
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), adaptation or LoRA())
    reference = reference if reference is not None else AdapterOff()
    return AlignmentModule(policy, objective or DPO(), reference, optimizer, seed=seed, **options)


def batch(start, stop):
    """Pairs start .. stop - 1 of an endless stream of pictures of noise."""
    draws = [torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(start, stop)]
    chosen, rejected = (torch.stack(images) * 2 - 1 for images in zip(*draws))
    ids = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(stop - start, 6)
    prompts = tuple(f"picture {n}" for n in range(start, stop))
    return PreferencePairs(chosen, rejected, prompts, ids, ids, torch.arange(start, stop))


def loader(batch_size, pairs=8):
    batches = [batch(start, start + batch_size) for start in range(0, pairs, batch_size)]
    return DataLoader(batches, batch_size=None)


def trainer(tmp_path, **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                "enable_model_summary": False, "accelerator": "cpu", "default_root_dir": tmp_path}  # fmt: skip
    return Trainer(**(defaults | options))


def fit(tmp_path, module, data, ckpt_path=None, **options):
    run = trainer(tmp_path, **options)
    run.fit(module, data, ckpt_path=ckpt_path)
    return run


def weights(module, trainable):
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad == trainable}


@pytest.mark.parametrize(
    ("adaptation", "reference"), [(LoRA(), AdapterOff()), (FullFineTuning(), FrozenCopy())], ids=["lora", "full"]
)
def test_training_changes_every_trainable_and_no_frozen_weight(tmp_path, pipelines, adaptation, reference):
    module = make(pipelines, adaptation=adaptation, reference=reference)
    frozen, trained = weights(module, False), weights(module, True)
    assert all(value.dtype == torch.float32 for value in trained.values())
    fit(tmp_path, module, loader(4), max_epochs=2)
    assert all(torch.equal(value, frozen[name]) for name, value in weights(module, False).items())
    unchanged = [name for name, value in weights(module, True).items() if torch.equal(value, trained[name])]
    assert unchanged == []


def test_first_loss_is_ln_2_because_policy_and_reference_are_one(pipelines):
    module = make(pipelines)
    module.setup("fit")
    output = module.compute_loss(batch(0, 4), "train")
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert output.metrics["accuracy"].item() == 0.5
    output.loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained_parameters(module.policy))


def test_adapter_off_equals_a_frozen_copy_bit_for_bit(pipelines):
    """Also once the adapter is far from zero: the copy is of the plain UNet, loaded again."""
    module = make(pipelines, DPO(), LoRA(), AdapterOff())
    plain = StableDiffusion(str(pipelines / "tiny-sd15"), FullFineTuning())
    copy = FrozenCopy()
    copy.attach(plain)
    module.setup("fit")
    for parameter in trained_parameters(module.policy):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    pairs = module._encode_images(batch(0, 2), "train")
    query = module.objective.query(
        pairs, module.policy.encode_prompts(pairs.prompts), module.policy.schedule, module._generators(pairs, "noise")
    )
    assert torch.equal(module.reference.predict_noise(query), copy.predict_noise(query))
    assert not torch.equal(module.policy.predict_noise(query), copy.predict_noise(query))


def test_a_step_asks_policy_and_reference_once_each(pipelines):
    module = make(pipelines)
    module.setup("fit")
    calls = []
    module.policy.unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    module.compute_loss(batch(0, 3), "train")
    assert calls == [False, True]


@pytest.mark.parametrize("caption_dropout", [0.0, 0.5])
def test_accumulating_four_times_one_pair_equals_one_batch_of_four(tmp_path, pipelines, caption_dropout):
    """Of SGD, whose update is the gradient itself: two steps, equal within fp32 rounding."""
    changes = []
    for batch_size in (1, 4):
        module = make(pipelines, DPO(beta=100.0), optimizer=sgd, caption_dropout=caption_dropout)
        before = weights(module, True)
        fit(tmp_path, module, loader(batch_size), accumulate_grad_batches=4 // batch_size)
        changes.append(torch.cat([(value - before[n]).flatten() for n, value in weights(module, True).items()]))
    ones, four = changes
    assert (ones - four).abs().max() <= 1e-4 * four.abs().max()
    assert four.abs().max() > 1e-3


def test_the_first_logged_loss_is_the_mean_over_its_whole_accumulation_window(tmp_path, pipelines):
    module = make(pipelines, SFT())
    with torch.no_grad():
        expected = torch.stack([module.compute_loss(pairs, "train").loss for pairs in loader(1, pairs=3)]).mean()
    run = fit(tmp_path, module, loader(1, pairs=3), accumulate_grad_batches=3)
    torch.testing.assert_close(run.callback_metrics["train/loss"], expected)


def test_a_checkpoint_holds_no_step_whose_loss_is_not_logged_yet(tmp_path, pipelines):
    logged, held = [], []

    class Log(DummyLogger):
        def log_metrics(self, metrics, step):
            logged.append(step)

    class Written(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            held.append((checkpoint["global_step"], sorted(set(logged))))

    options = {"logger": Log(), "enable_checkpointing": True, "log_every_n_steps": 1, "plugins": [Written()]}
    fit(tmp_path, make(pipelines, SFT()), loader(2), callbacks=[RunCheckpoint(every_n_steps=1)], **options)
    assert {step for step, _ in held} == {1, 2, 3, 4}
    assert all(seen == list(range(step)) for step, seen in held)


def test_a_run_stopped_at_the_ends_of_two_epochs_trains_no_epoch_more(tmp_path, pipelines):
    def go_on(**until):
        callbacks = [RunCheckpoint(every_n_steps=2), ExactResume()]
        options = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], "callbacks": callbacks} | until
        return fit(tmp_path, make(pipelines, SFT()), loader(2, pairs=4), newest_checkpoint(saved), **options)

    saved = tmp_path / "checkpoints"
    assert [go_on(max_steps=steps, max_epochs=-1).global_step for steps in (2, 4)] == [2, 4]
    assert go_on(max_epochs=3).global_step == 6


def test_the_loss_of_a_pair_does_not_depend_on_its_company(pipelines):
    module = make(pipelines, SFT(), caption_dropout=0.3)
    together = module.compute_loss(batch(0, 4), "train").loss
    alone = torch.stack([module.compute_loss(batch(n, n + 1), "train").loss for n in range(4)])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=1e-6)


def test_another_seed_draws_other_noise(pipelines):
    losses = [make(pipelines, SFT(), seed=seed).compute_loss(batch(0, 2), "train").loss.item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_latents_are_draws_of_each_pictures_own(pipelines):
    """By the VAE alone: mean and standard deviation, and the numbers of the picture's own key."""
    module, pairs = make(pipelines, seed=5), batch(3, 5)
    encoded = module._encode_images(replace(pairs, rejected=pairs.chosen), "train")
    for side, latents in (("chosen", encoded.chosen), ("rejected", encoded.rejected)):
        noise = randn((4, 8, 8), [generator(5, "train", "posterior", side, index) for index in (3, 4)])
        with torch.no_grad():
            posterior = module.policy.vae.encode(pairs.chosen).latent_dist
        expected = (posterior.mean + posterior.std * noise) * module.policy.vae.config.scaling_factor
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_noise_and_timesteps_are_those_of_the_purpose_and_the_pair(pipelines):
    module, pairs = make(pipelines, DPO(), seed=5), batch(3, 5)
    module.setup("fit")
    asked = []
    query = type(module.objective).query

    def note(objective, batch, cond, schedule, generators):
        asked.append([g.initial_seed() for g in generators])
        return query(objective, batch, cond, schedule, generators)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPO, "query", note)
        for purpose in ("train", "val"):
            module.compute_loss(pairs, purpose)
    assert asked == [[derive_seed(5, purpose, "noise", index) for index in (3, 4)] for purpose in ("train", "val")]


def test_validation_is_never_of_the_empty_prompt_and_has_draws_of_its_own(pipelines):
    losses = {}
    for dropout in (0.0, 1.0):
        module = make(pipelines, SFT(), caption_dropout=dropout)
        module.validation_step(batch(0, 3), 0)
        losses[dropout] = module._means["val"].compute(lambda sums: sums)["loss"]
        assert losses[dropout] == module.compute_loss(batch(0, 3), "val").loss.item()
    assert losses[0.0] == losses[1.0] != module.compute_loss(batch(0, 3), "train").loss.item()
    assert losses[0.0] != make(pipelines, SFT()).compute_loss(batch(0, 3), "train").loss.item()


def test_network_dropout_of_a_batch_is_keyed_by_seed_and_first_pair(pipelines):
    module = make(pipelines, SFT(), seed=5)
    for first in (0, 3):
        module.on_train_batch_start(batch(first, first + 2), 0)
        assert torch.initial_seed() == derive_seed(5, "dropout", first)


def test_the_learning_rate_is_scheduled_per_optimizer_step(tmp_path, pipelines):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    warm_up = partial(ConstantWithWarmup, warmup_steps=2)
    module = make(pipelines, SFT(), lr_scheduler=warm_up)
    fit(tmp_path, module, loader(1), accumulate_grad_batches=2, callbacks=[Rates()])
    assert rates == [0.0, 0.0, 5e-4, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3]


def test_caption_dropout_of_one_trains_on_the_empty_prompt(pipelines):
    module = make(pipelines, SFT(), caption_dropout=1.0)
    pairs = module._encode_images(batch(0, 2), "train")
    empty = module.policy.encode_prompts(["", ""])
    assert torch.equal(module._encode_prompts(pairs, 1.0).embeds, empty.embeds)
    cached = LatentPairs(
        pairs.chosen, pairs.rejected, pairs.prompts, pairs.chosen_time_ids, pairs.rejected_time_ids, pairs.indices,
        module.policy.encode_prompts(pairs.prompts),
    )  # fmt: skip
    torch.testing.assert_close(module._encode_prompts(cached, 1.0).embeds, empty.embeds)
    assert torch.equal(module._encode_prompts(cached, 0.0).embeds, cached.cond.embeds)


def test_checkpoint_holds_the_trainable_weights_and_nothing_else(tmp_path, pipelines):
    module = make(pipelines)
    run = fit(tmp_path, module, loader(4))
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == weights(module, True).keys()
    assert all("lora" in name for name in saved)


def test_resuming_equals_never_having_stopped(tmp_path, pipelines):
    whole = make(pipelines)
    fit(tmp_path, whole, loader(2), max_steps=4)
    half = make(pipelines)
    run = fit(tmp_path, half, loader(2, pairs=4), max_epochs=1)
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make(pipelines)
    data = DataLoader([batch(4, 6), batch(6, 8)], batch_size=None)
    fit(tmp_path, resumed, data, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    for name, value in weights(whole, True).items():
        assert torch.equal(value, weights(resumed, True)[name]), name


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_a_checkpoint_of_another_policy_is_refused(tmp_path, pipelines, damage):
    module = make(pipelines)
    run = fit(tmp_path, module, loader(4))
    run.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    name = sorted(checkpoint["state_dict"])[0]
    if damage == "missing":
        checkpoint["state_dict"].pop(name)
    elif damage == "unknown":
        checkpoint["state_dict"]["policy.extra"] = torch.zeros(1)
    else:
        checkpoint["state_dict"][name] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    expected = {
        "missing": r"1 \(policy.unet.* missing",
        "unknown": r"1 \(policy.extra.* unknown",
        "shape": "another shape",
    }
    with pytest.raises(ConfigError, match=expected[damage]):
        fit(tmp_path, make(pipelines), loader(4), max_epochs=2, ckpt_path=tmp_path / "bad.ckpt")


def test_an_objective_that_compares_needs_something_to_compare_with(pipelines):
    policy = StableDiffusion(str(pipelines / "tiny-sd15"), LoRA())
    with pytest.raises(ConfigError, match=r"model\.reference is not set; use AdapterOff with LoRA"):
        AlignmentModule(policy, DPO())


def test_full_fine_tuning_cannot_switch_adapters_off(pipelines):
    module = make(pipelines, adaptation=FullFineTuning(), reference=AdapterOff())
    with pytest.raises(ConfigError, match="FrozenCopy"):
        module.setup("fit")


def test_half_precision_of_trainable_weights_is_refused(tmp_path, pipelines):
    with pytest.raises(ConfigError, match="trainable weights must be fp32, trainer.precision=bf16-true"):
        fit(tmp_path, make(pipelines), loader(4), precision="bf16-true")


def test_learning_rates_by_hand():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)

    def rates(scheduler, steps):
        seen = []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    assert rates(ConstantWithWarmup(optimizer, warmup_steps=4), 6) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"]
    assert rates(CosineWithWarmup(optimizer, total_steps=4), 5) == pytest.approx(
        [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0]
    )
    # Two steps up, then four down: a half of the cosine over the steps that are left, and 0 from the last one on.
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"]
    assert rates(CosineWithWarmup(optimizer, total_steps=6, warmup_steps=2), 8) == pytest.approx(
        [0.0, 1.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0]
    )
