"""Stable Diffusion 3 and FLUX: diffusers' prompts, velocities and pictures, the official training steps, exports."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_world import trained_parameters

from datamodules.pairs.latents_key import latents_fingerprint
from datamodules.pools.fingerprint import fingerprint
from lightning_modules import prompt_lengths
from lightning_modules.alignment import AlignmentModule
from lightning_modules.batches import DenoiserQuery, LatentPairs
from lightning_modules.errors import ConfigError
from lightning_modules.objectives import DPO, SFT
from lightning_modules.policies import Flux, FullFineTuning, LoRA, StableDiffusion3
from lightning_modules.policies.flow_transformer import CLIP_CUTS, T5_CUTS
from lightning_modules.policies.flux import image_ids, packed, unpacked
from lightning_modules.randomness import generator
from lightning_modules.references import AdapterOff, FrozenCopy
from lightning_modules.sampling.pictures import Sampler, initial_noise
from lightning_modules.sampling.schedulers import SchedulerSampler
from lightning_modules.schedules.base import gaussian_log_prob
from lightning_modules.schedules.flow import DynamicShift
from lightning_modules.schedules.step_rules import CPS, FlowSDE

TESTS = Path(__file__).parent
PROMPTS = ["a photo of a red cat on a wooden table", "two large green triangles on a white background"]
ATTENTION = tuple(
    f"attn.{name}"
    for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_q", "to_k", "to_v", "to_out.0")
)


@dataclass(frozen=True)
class Kind:
    policy: Any
    pipeline: Any
    transformer: Any
    latents: str  # the known answers' name of the network's input
    level_unit: float  # what their levels are multiplied by to be timesteps
    levels: str
    velocity: str
    guided: str
    gradient: str
    guidance: float  # of the guided pass

    @property
    def name(self):
        return "sd3" if self.policy is StableDiffusion3 else "flux"

    @property
    def folder(self):
        return TESTS / "pipelines" / f"tiny-{self.name}"

    def make(self, adaptation=None, **options):
        options = {"t5_tokens": 32, "image_size": 64} | options
        return self.policy(str(self.folder), adaptation or LoRA(), **options).eval()


KINDS = {
    "sd3": Kind(StableDiffusion3, StableDiffusion3Pipeline, SD3Transformer2DModel, "x", 1.0, "timesteps", "velocity",
                "velocity_cfg4.5", "grad_x", 4.5),
    "flux": Kind(Flux, FluxPipeline, FluxTransformer2DModel, "latents", 1000.0, "sigmas", "velocity_guidance3.5",
                 "velocity_true_cfg2", "grad_latents", 2.0),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def policies():
    """Frozen in the tests that share them."""
    return {name: kind.make() for name, kind in KINDS.items()}


@pytest.fixture
def policy(policies, kind):
    return policies[kind.name]


def notes(name):
    with safe_open(TESTS / "golden" / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def perturbed(policy):
    for index, parameter in enumerate(trained_parameters(policy)):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator("perturb", index)))
    return policy


def asked(policy, n=2, guidance=1.0):
    latents = torch.randn(n, 16, 8, 8, generator=generator("query"))
    timesteps = torch.tensor([1000.0, 250.5, 3.0])[:n]
    return DenoiserQuery(latents, timesteps, policy.encode_prompts((PROMPTS * 2)[:n]), guidance)


class TestNetworks:
    @pytest.mark.parametrize("length", [16, 32])
    def test_prompts_are_the_pipelines(self, golden, kind, length):
        known = golden(f"{kind.name}_prompts")
        prompts = ast.literal_eval(notes(f"{kind.name}_prompts")["prompts"])
        cond = kind.make(t5_tokens=length).encode_prompts(prompts)
        torch.testing.assert_close(cond.embeds, known[f"length{length}.embeds"], rtol=0, atol=1e-5)
        torch.testing.assert_close(cond.pooled, known[f"length{length}.pooled"], rtol=0, atol=1e-5)
        assert cond.time_ids is None

    def test_velocities_and_their_gradient_are_diffusers(self, golden, kind, policy):
        known = golden(f"{kind.name}_transformer")
        cond = policy.encode_prompts(ast.literal_eval(notes(f"{kind.name}_transformer")["prompts"]))
        x, timesteps = known[kind.latents].clone().requires_grad_(), kind.level_unit * known[kind.levels]
        assert timesteps[0] == 1000
        velocity = policy.predict_noise(DenoiserQuery(x, timesteps, cond))
        torch.testing.assert_close(velocity, known[kind.velocity], rtol=0, atol=3e-5)
        (gradient,) = torch.autograd.grad((velocity * known["cotangent"]).sum(), x)
        expected = known[kind.gradient]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
        with torch.no_grad():
            guided = policy.predict_noise(DenoiserQuery(x.detach(), timesteps, cond, kind.guidance))
        torch.testing.assert_close(guided, known[kind.guided], rtol=0, atol=5e-5)

    @torch.no_grad()
    def test_pictures_that_are_not_square(self, golden, kind, policy):
        known = golden(f"{kind.name}_transformer")
        timesteps = kind.level_unit * known[f"{kind.levels}_wide"]
        query = DenoiserQuery(known[f"{kind.latents}_wide"], timesteps, policy.encode_prompts(PROMPTS))
        expected = known["velocity_wide" if kind.name == "sd3" else "velocity_wide_guidance3.5"]
        torch.testing.assert_close(policy.predict_noise(query), expected, rtol=0, atol=2e-5)

    @torch.no_grad()
    def test_pictures_and_latents_are_the_pipelines(self, golden, kind, policy):
        known = golden(f"{kind.name}_pipeline")
        steps, guidance = (10, 4.5) if kind.name == "sd3" else (6, 1.0)
        pictures = Sampler(steps, guidance).generate(policy, policy.predict_noise, PROMPTS, known["initial"], [])
        torch.testing.assert_close(pictures, known["images"], rtol=0, atol=1e-4)
        torch.testing.assert_close(policy.decode(known["final"]), known["images"], rtol=0, atol=1e-4)
        latents = policy.encode_images(known["vae.images"])
        torch.testing.assert_close(latents, known["vae.latents"], rtol=0, atol=1e-4)

    def test_other_guidance_gives_the_pipelines_other_pictures(self, golden, kind, policies):
        known = golden(f"{kind.name}_pipeline")
        if kind.name == "sd3":
            policy, guidance, expected = policies["sd3"], 1.0, known["images_4steps_noguidance"]
        else:
            policy, guidance = kind.make(embedded_guidance=1.0), 2.0
            expected = known["images_4steps_true_cfg2_guidance1"]
        pictures = Sampler(4, guidance).generate(policy, policy.predict_noise, PROMPTS, known["initial"], [])
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)

    def test_packing_and_positions_are_the_pipelines(self, golden):
        known = golden("flux_transformer")
        assert torch.equal(packed(known["latents"]), known["packed"])
        assert torch.equal(packed(known["latents_wide"]), known["packed_wide"])
        assert torch.equal(unpacked(known["packed_wide"], 2, 6), known["latents_wide"])
        assert torch.equal(image_ids(4, 4, torch.device("cpu")), known["image_ids"])
        assert torch.equal(image_ids(2, 6, torch.device("cpu")), known["image_ids_wide"])

    def test_the_schedules_are_the_pipelines(self, policies):
        sd3, flux = policies["sd3"].schedule, policies["flux"].schedule
        assert (sd3.shift, sd3.own_levels) == (3.0, False)
        assert (flux.shift, flux.own_levels) == (DynamicShift(), True)
        even = KINDS["sd3"].make(own_levels=True, step_rule=CPS(0.5)).schedule
        assert (even.own_levels, even.rule) == (True, CPS(0.5))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind_name", "rule", "guidance"),
    [("sd3_sde_rollout", "sd3", FlowSDE(0.7), 4.5), ("flux_sde_rollout", "flux", FlowSDE(0.9), 1.0)],
)
def test_steps_with_noise_go_where_flow_grpos_went(golden, name, kind_name, rule, guidance):
    known, policy = golden(name), KINDS[kind_name].make(step_rule=rule)
    cond, latents = policy.encode_prompts(PROMPTS), known["initial"]
    trajectory = policy.schedule.trajectory(len(known["noise"]), 64)
    for step in trajectory:
        start = torch.full((2,), step.timestep)
        end = torch.full_like(start, step.next_timestep)
        output = policy.predict_noise(DenoiserQuery(latents, start, cond, guidance))
        mean, std = policy.schedule.step_distribution(output, latents, start, end, 1.0)
        latents = policy.schedule.step(output, latents, start, end, 1.0, known["noise"][step.index])
        torch.testing.assert_close(latents, known["latents"][step.index + 1], rtol=0, atol=1e-4)
        torch.testing.assert_close(gaussian_log_prob(latents, mean, std), known["logp"][step.index], rtol=0, atol=5e-6)
    torch.testing.assert_close(policy.decode(latents), known["images"], rtol=0, atol=1e-4)


class TestTraining:
    @pytest.mark.parametrize("name", ["sd3_official_init", "sd3_perturbed", "flux_perturbed"])
    def test_flow_dpo_steps_are_the_official_ones(self, golden, name, monkeypatch):
        known, kind = golden(f"flow_dpo_train_step_{name}"), KINDS[name.partition("_")[0]]
        policy = kind.make(LoRA(rank=4, alpha=8.0, targets=ATTENTION))
        network = policy.transformer
        set_peft_model_state_dict(network, part(known, "lora_init."))
        optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, weight_decay=1e-4)  # noqa: E731
        module = AlignmentModule(policy, DPO(beta=100.0), AdapterOff(), optimizer)
        module.setup("fit")
        stepper = module.configure_optimizers()["optimizer"]
        decided = dict.fromkeys(part(known, "lora_init."), True)
        for step, losses in enumerate(known["losses"]):
            output = self.official_query(known, step, module, monkeypatch)
            torch.testing.assert_close(output.loss, losses, rtol=0, atol=5e-5)
            stepper.zero_grad()
            output.loss.backward()
            gradients = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
            expected = part(known, f"grad_step{step}.")
            largest = max(value.abs().max() for value in expected.values())
            for key, value in expected.items():
                found = gradients[key.replace(".weight", ".default.weight")]
                assert (found - value).abs().max() <= 1e-4 * largest
                # AdamW makes steps of one size of gradients of any size: of one that is rounding, it may be either way.
                decided[key] = decided[key] & ((value.abs() > 1e-3 * value.abs().max()) | (value == found))
            norm = torch.nn.utils.clip_grad_norm_(trained_parameters(policy), 1.0)
            assert norm.item() == pytest.approx(known["grad_norms"][step].item(), rel=1e-4)
            stepper.step()
            weights = get_peft_model_state_dict(network)
            after = part(known, f"lora_after{step}.")
            assert after.keys() == weights.keys()
            for key, value in after.items():
                torch.testing.assert_close(weights[key][decided[key]], value[decided[key]], rtol=0, atol=5e-6)
                torch.testing.assert_close(weights[key], value, rtol=0, atol=2 * 3e-4 * (step + 1))
            assert sum(map(torch.sum, decided.values())) > 0.9 * sum(map(torch.numel, after.values()))

    def official_query(self, known, step, module, monkeypatch):
        """The module's own step, on the recorded levels and noise."""
        ids = torch.zeros(2, 6)
        pairs = LatentPairs(
            known["chosen"][step], known["rejected"][step], tuple(PROMPTS), ids, ids, torch.tensor([0, 1])
        )
        schedule = type(module.policy.schedule)
        torch.testing.assert_close(
            module.policy.schedule.at(known["u"][step]), known["timesteps"][step], rtol=0, atol=1e-3
        )
        monkeypatch.setattr(schedule, "draw", lambda *_: known["timesteps"][step])
        monkeypatch.setattr("lightning_modules.objectives.pairwise.randn", lambda *_: known["noise"][step])
        return module.compute_loss(pairs, "train")

    @pytest.mark.parametrize("adaptation", [LoRA(), FullFineTuning()])
    def test_sft_and_dpo_train_what_the_adaptation_says(self, kind, adaptation):
        policy = kind.make(adaptation, gradient_checkpointing=True)
        reference = AdapterOff() if isinstance(adaptation, LoRA) else FrozenCopy()
        ids, pictures = torch.zeros(2, 6), torch.randn(2, 2, 16, 8, 8, generator=generator("pairs"))
        pairs = LatentPairs(pictures[0], pictures[1], tuple(PROMPTS), ids, ids, torch.tensor([0, 1]))
        for objective in (SFT(), DPO(beta=100.0)):
            module = AlignmentModule(policy, objective, reference)
            module.setup("fit")
            loss = module.compute_loss(pairs, "train").loss
            loss.backward()
            if isinstance(objective, DPO):
                assert loss.item() == pytest.approx(0.6931472, abs=1e-6)
            gradients = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
            assert all(name.startswith("transformer.") for name in gradients)
            assert all(value is not None for name, value in gradients.items() if ".1." in name)
            policy.zero_grad()

    def test_lora_goes_where_the_official_recipe_has_it(self, policies):
        def adapted(policy):
            keys = get_peft_model_state_dict(policy.transformer)
            return {key.rpartition(".lora_")[0].partition(".attn")[2] or key for key in keys if "attn" in key}

        assert adapted(policies["sd3"]) == {name.removeprefix("attn") for name in ATTENTION}
        assert not any("attn2" in key for key in get_peft_model_state_dict(policies["sd3"].transformer))
        flux = get_peft_model_state_dict(policies["flux"].transformer)
        assert any("ff_context.net.2" in key for key in flux)
        assert not any("proj_mlp" in key for key in flux)
        both = KINDS["sd3"].make(LoRA(targets=("to_q",)))
        assert any("attn2.to_q" in key for key in get_peft_model_state_dict(both.transformer))


def test_every_repeating_block_is_named(kind, policy):
    """What is sharded, quantised and compiled at a time."""
    lists = [child for child in policy.transformer.children() if isinstance(child, torch.nn.ModuleList)]
    assert {type(block) for blocks in lists for block in blocks} == set(policy.blocks)


class TestExports:
    @pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=2, alpha=8.0)], ids=["alpha=rank", "alpha=4*rank"])
    def test_a_lora_changes_plain_diffusers_as_it_does_here(self, tmp_path, kind, lora):
        policy = perturbed(kind.make(lora))
        query = asked(policy)
        with torch.no_grad():
            ours, base = policy.predict_noise(query), kind.make().predict_noise(query)
        policy.save_pretrained(tmp_path / "export")
        assert [path.name for path in (tmp_path / "export").iterdir()] == ["pytorch_lora_weights.safetensors"]
        plain = kind.pipeline.from_pretrained(kind.folder)
        plain.load_lora_weights(tmp_path / "export")
        fresh = kind.make()
        with torch.no_grad():
            theirs = fresh.predict_noise(query, plain.transformer)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
        assert (ours - base).abs().max() > 0.01

    def test_keys_are_pefts_and_the_scale_is_in_b(self, tmp_path, kind):
        """What ComfyUI reads, which knows no metadata and takes alpha for the rank."""
        policy = perturbed(kind.make(LoRA(rank=2, alpha=8.0)))
        policy.save_pretrained(tmp_path / "export")
        file = tmp_path / "export" / "pytorch_lora_weights.safetensors"
        written, inside = load_file(file), get_peft_model_state_dict(policy.transformer)
        assert written.keys() == {f"transformer.{key}" for key in inside}
        for key, value in inside.items():
            torch.testing.assert_close(written[f"transformer.{key}"], value * (4 if ".lora_B." in key else 1))
        with safe_open(file, "pt") as opened:
            config = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert config["transformer.lora_alpha"] == config["transformer.r"] == 2

    def test_training_can_start_from_an_export(self, tmp_path, kind):
        policy = perturbed(kind.make(LoRA(rank=2, alpha=8.0)))
        policy.save_pretrained(tmp_path / "export")
        again = kind.make(LoRA(rank=2, alpha=2.0, weights=str(tmp_path / "export")))
        with torch.no_grad():
            torch.testing.assert_close(
                again.predict_noise(asked(again)), policy.predict_noise(asked(policy)), rtol=0, atol=1e-5
            )

    def test_keys_of_another_kind_are_refused(self, tmp_path, kind):
        save_file(
            {"transformer.transformer_blocks.0.attn.to_q.lora.up.weight": torch.ones(32, 2)}, tmp_path / "a.safetensors"
        )
        with pytest.raises(ConfigError, match="read under peft's names alone"):
            kind.make(LoRA(rank=2, weights=str(tmp_path / "a.safetensors")))

    def test_a_full_transformer_is_a_folder_of_its_name(self, tmp_path, kind):
        policy = perturbed(kind.make(FullFineTuning()))
        policy.save_pretrained(tmp_path / "export")
        network = kind.transformer.from_pretrained(tmp_path / "export", subfolder="transformer")
        with torch.no_grad():
            assert torch.equal(policy.predict_noise(asked(policy)), policy.predict_noise(asked(policy), network))
        again = kind.make(transformer=str(tmp_path / "export" / "transformer"))
        with torch.no_grad():
            assert torch.equal(policy.predict_noise(asked(policy)), again.predict_noise(asked(policy)))


class TestSettings:
    def test_own_sizes(self):
        assert StableDiffusion3(str(KINDS["sd3"].folder), LoRA()).image_size == 64
        assert Flux(str(KINDS["flux"].folder), LoRA()).image_size == 1024
        assert StableDiffusion3(str(KINDS["sd3"].folder), LoRA()).t5_tokens == 256
        assert Flux(str(KINDS["flux"].folder), LoRA()).t5_tokens == 512

    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"image_size": 72}, "multiple of 16"), ({"t5_tokens": 513}, "1 .. 512"), ({"layout": "a/b"}, "single files")],
    )
    def test_what_does_not_fit_is_refused(self, kind, options, reason):
        with pytest.raises(ConfigError, match=reason):
            kind.make(**options)

    def test_latents_of_odd_sides_are_refused(self, policy):
        query = DenoiserQuery(torch.zeros(1, 16, 8, 7), torch.tensor([500.0]), policy.encode_prompts(["a"]))
        with pytest.raises(ConfigError, match="8 x 7 cells don't divide"):
            policy.predict_noise(query)

    def test_samplers_of_other_models_are_refused(self, policy):
        noise, sources = initial_noise(policy, [(0,)])
        with pytest.raises(ConfigError, match="is a flow; use Sampler"):
            SchedulerSampler().generate(policy, policy.predict_noise, ["a"], noise, sources)

    def test_the_length_of_t5_is_part_of_cached_embeddings(self, kind, policy):
        here = latents_fingerprint(policy, 64, "centre", "float16")
        assert latents_fingerprint(kind.make(), 64, "centre", "float16") == here
        assert latents_fingerprint(kind.make(t5_tokens=16), 64, "centre", "float16") != here

    def test_the_policys_embedded_guidance_reaches_the_network_and_the_names_of_pools(self):
        torch.manual_seed(0)
        one = KINDS["flux"].make(embedded_guidance=1.0)
        torch.manual_seed(0)
        other = KINDS["flux"].make()
        assert fingerprint(one) != fingerprint(other)
        with torch.no_grad():
            assert (one.predict_noise(asked(one)) - other.predict_noise(asked(one))).abs().max() > 1e-3
        with pytest.raises(ConfigError, match="embedded_guidance"):
            KINDS["flux"].make(embedded_guidance=-1.0)


def part(known, prefix):
    return {key.removeprefix(prefix): value for key, value in known.items() if key.startswith(prefix)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_cut_prompt_is_told_of_by_every_kind_of_text_encoder(kind, monkeypatch):
    told = []
    monkeypatch.setattr(prompt_lengths, "rank_zero_info", told.append)
    for cuts in (CLIP_CUTS, T5_CUTS):  # as in a new process
        monkeypatch.setattr(cuts, "_seen", set())
    policy = kind.make()
    policy.encode_prompts(["a cat", ""])
    assert told == []
    policy.encode_prompts([f"{kind.name} " + "cat " * 100])
    assert sorted(line.split(" tokens that ")[1].split(" reads")[0] for line in told) == [
        "the policy's CLIP encoder", "the policy's T5 encoder"
    ]  # fmt: skip
