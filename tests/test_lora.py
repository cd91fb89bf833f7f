"""LoRA: what it computes, where it starts, and files that every reader takes whole."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_world import trained_parameters

from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies import LoRA, StableDiffusion, StableDiffusionXL
from lightning_modules.randomness import generator

PIPELINES = Path(__file__).parent / "pipelines"
KINDS = {
    "sd": (StableDiffusion, PIPELINES / "tiny-sd15", StableDiffusionPipeline),
    "sdxl": (StableDiffusionXL, PIPELINES / "tiny-sdxl", StableDiffusionXLPipeline),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "attention": ATTENTION,
    "projections": (*ATTENTION, "proj_in", "proj_out"),
    "convolutions": ("conv_in", "conv_out", "conv1", "conv2"),
    "all": (*ATTENTION, "proj_in", "proj_out", "conv_in", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1"),
}


def trained(kind, adaptation):
    policy_class, folder, _ = KINDS[kind]
    policy = policy_class(str(folder), adaptation)
    for index, parameter in enumerate(trained_parameters(policy)):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator("perturb", index)))
    return policy


def query(policy):
    latents = torch.randn(2, 4, 8, 8, generator=generator("query"))
    return DenoiserQuery(latents, torch.tensor([951, 3]), policy.encode_prompts(["a cat", "two dogs"]))


def plain(kind, weights):
    _, folder, pipeline_class = KINDS[kind]
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.load_lora_weights(weights)
    return pipeline.unet


def adapted_layers(network):
    return sorted(name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer))


class TestComputation:
    @pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4.0, 1.0), (2.0, 0.5), (12.0, 3.0)])
    def test_a_layer_adds_alpha_over_rank_times_b_a_x(self, alpha, scale):
        policy = trained("sd", LoRA(rank=4, alpha=alpha))
        name, layer = next((n, m) for n, m in policy.unet.named_modules() if isinstance(m, BaseTunerLayer))
        weights = dict(policy.unet.named_parameters())
        a, b = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
        x = torch.randn(3, a.shape[1], generator=generator("x"))
        torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ a.T @ b.T)

    def test_a_is_gaussian_with_std_one_over_rank(self):
        torch.manual_seed(0)
        policy = StableDiffusion(str(KINDS["sd"][1]), LoRA(rank=8))
        values = torch.cat([p.flatten() for n, p in policy.named_parameters() if ".lora_A." in n])
        assert values.std().item() == pytest.approx(1 / 8, rel=0.05)
        kurtosis = ((values / values.std()) ** 4).mean().item()
        assert kurtosis == pytest.approx(3, abs=0.3)  # 1.8 were it uniform

    def test_kaiming_is_uniform_within_one_over_the_root_of_the_inputs(self):
        torch.manual_seed(0)
        policy = StableDiffusion(str(KINDS["sd"][1]), LoRA(rank=8, init="kaiming"))
        for name, parameter in policy.named_parameters():
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                assert 0.95 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("kind", KINDS)
class TestExport:
    @pytest.mark.parametrize("targets", TARGETS)
    @pytest.mark.parametrize("alpha", [None, 8.0])
    def test_plain_diffusers_takes_every_layer(self, kind, targets, alpha, tmp_path):
        policy = trained(kind, LoRA(rank=4, alpha=alpha, targets=TARGETS[targets]))
        policy.save_pretrained(tmp_path / "lora")
        unet = plain(kind, tmp_path / "lora")
        assert adapted_layers(unet) == adapted_layers(policy.unet)
        asked = query(policy)
        expected = policy.predict_noise(asked)
        torch.testing.assert_close(policy.predict_noise(asked, denoiser=unet), expected, rtol=1e-5, atol=1e-6)
        with policy.adapters_disabled():
            assert (policy.predict_noise(asked) - expected).abs().max() > 1e-3

    def test_readers_of_the_weights_alone_get_the_scale(self, kind, tmp_path):
        policy = trained(kind, LoRA(rank=4, alpha=8.0))
        policy.save_pretrained(tmp_path / "lora")
        weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
        save_file(weights, tmp_path / "bare.safetensors", metadata={"format": "pt"})
        asked = query(policy)
        without_metadata = plain(kind, tmp_path / "bare.safetensors")
        assert torch.equal(policy.predict_noise(asked, denoiser=without_metadata), policy.predict_noise(asked))

    @pytest.mark.parametrize("targets", ["attention", "projections"])
    def test_the_file_of_kohyas_kind_is_read_by_plain_diffusers(self, kind, targets, tmp_path):
        policy = trained(kind, LoRA(rank=4, alpha=8.0, targets=TARGETS[targets]))
        policy.save_pretrained(tmp_path / "lora")
        file = tmp_path / "lora" / "kohya" / "lora.safetensors"
        keys = load_file(file)
        assert len(keys) == 3 * len(adapted_layers(policy.unet))
        assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in keys)
        assert all(value == 4 for key, value in keys.items() if key.endswith(".alpha"))
        unet = plain(kind, file)
        assert adapted_layers(unet) == adapted_layers(policy.unet)
        asked = query(policy)
        assert torch.equal(policy.predict_noise(asked, denoiser=unet), policy.predict_noise(asked))


def test_exported_bytes_do_not_depend_on_the_order_of_a_set(tmp_path):
    """Written here, and by an interpreter whose sets lie in another order."""
    code = f"""
import sys, torch
from lightning_modules.policies import LoRA, StableDiffusion
torch.manual_seed(0)
StableDiffusion({str(KINDS["sd"][1])!r}, LoRA()).save_pretrained(sys.argv[1])
"""
    torch.manual_seed(0)
    StableDiffusion(str(KINDS["sd"][1]), LoRA()).save_pretrained(tmp_path / "here")
    environment = {"PYTHONHASHSEED": "1", "PATH": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "1")], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    first, second = ((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in ("here", "1"))
    assert first == second
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert list(header["__metadata__"]) == ["format", "lora_adapter_metadata"]  # safetensors would draw their order


class TestStart:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors", "kohya/lora.safetensors"])
    def test_it_computes_what_the_file_computes_whatever_the_alphas(self, kind, file, tmp_path):
        first = trained(kind, LoRA(rank=4, alpha=8.0))
        first.save_pretrained(tmp_path)
        second = KINDS[kind][0](str(KINDS[kind][1]), LoRA(rank=4, alpha=2.0, weights=str(tmp_path / file)))
        asked = query(first)
        torch.testing.assert_close(second.predict_noise(asked), first.predict_noise(asked), rtol=1e-5, atol=1e-6)
        assert {parameter.dtype for parameter in trained_parameters(second)} == {torch.float32}
        with second.adapters_disabled(), first.adapters_disabled():
            assert torch.equal(second.predict_noise(asked), first.predict_noise(asked))

    def test_alphas_of_a_published_file_count(self, tmp_path):
        """As diffusers reads them: alpha / rank in kohya's kind, alpha of the metadata in its own."""
        trained("sd", LoRA(rank=4)).save_pretrained(tmp_path)
        file = tmp_path / "kohya" / "lora.safetensors"
        halved = {k: torch.tensor(2.0) if k.endswith(".alpha") else v for k, v in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
        policy = StableDiffusion(str(KINDS["sd"][1]), LoRA(rank=4, weights=str(file)))
        asked = query(policy)
        expected = policy.predict_noise(asked, denoiser=plain("sd", file))
        torch.testing.assert_close(policy.predict_noise(asked), expected, rtol=1e-5, atol=1e-6)

    def test_alpha_of_the_metadata_counts(self, tmp_path):
        trained("sd", LoRA(rank=4)).save_pretrained(tmp_path)
        file = tmp_path / "pytorch_lora_weights.safetensors"
        text = '{"unet.r": 4, "unet.lora_alpha": 12, "unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}'
        save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": text})
        policy = StableDiffusion(str(KINDS["sd"][1]), LoRA(rank=4, weights=str(file)))
        asked = query(policy)
        expected = policy.predict_noise(asked, denoiser=plain("sd", file))
        torch.testing.assert_close(policy.predict_noise(asked), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("other", [LoRA(rank=8), LoRA(targets=("to_q",)), LoRA(targets=(*ATTENTION, "proj_in"))])
    def test_other_layers_and_ranks_are_refused_and_named(self, other, tmp_path):
        trained("sd", other).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=rf"missing, .* they are of rank {other.rank} and adapt \d+ layers"):
            StableDiffusion(str(KINDS["sd"][1]), LoRA(weights=str(tmp_path)))

    def test_what_is_no_lora_is_refused(self, tmp_path):
        source = str(KINDS["sd"][1])
        with pytest.raises(ConfigError, match="no checkpoint 'nowhere'"):
            StableDiffusion(source, LoRA(weights="nowhere"))
        with pytest.raises(ConfigError, match="holds 0 .safetensors files"):
            StableDiffusion(source, LoRA(weights=str(tmp_path)))
        (tmp_path / "bad.safetensors").write_bytes(b"no weights")
        with pytest.raises(ConfigError, match="bad.safetensors: damaged"):
            StableDiffusion(source, LoRA(weights=str(tmp_path)))
        save_file({"text_encoder.x.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "text.safetensors")
        with pytest.raises(ConfigError, match="they adapt text_encoder, too"):
            StableDiffusion(source, LoRA(weights=str(tmp_path / "text.safetensors")))
