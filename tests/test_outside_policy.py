"""A new kind of base model from outside of the packages: a text encoder, one ``_denoise``; the command trains it."""

import sys

import pytest
from diffusers import StableDiffusionPipeline
from pairs_data import write_shards

from callbacks.export_policy import exports
from experiments.run import main
from lightning_modules.policies import StableDiffusion

OWN_MODULE = '''
"""Words become vectors by a table of their letters: a text encoder of its own, and a UNet that diffusers knows."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import nn

from lightning_modules.batches import Conditioning
from lightning_modules.policies import LatentDiffusion


class Letters(LatentDiffusion):
    denoiser_class = UNet2DConditionModel
    lora_loader = StableDiffusionLoraLoaderMixin

    def _load_text(self, pipeline, variant, dtype):
        generator = torch.Generator().manual_seed(0)
        width = self.denoiser.config.cross_attention_dim
        self.text_encoder = nn.Embedding(256, width, dtype=dtype, _weight=torch.randn(256, width, generator=generator))

    def _encode_text(self, prompts):
        letters = torch.zeros(len(prompts), 16, dtype=torch.long)
        for row, prompt in zip(letters, prompts):
            codes = torch.tensor(list(prompt.encode()[:16]), dtype=torch.long)
            row[: len(codes)] = codes
        return Conditioning(embeds=self.text_encoder(letters.to(self.device)))

    def _denoise(self, network, latents, timesteps, cond):
        dtype = network.conv_in.weight.dtype
        return network(latents.to(dtype), timesteps, encoder_hidden_states=cond.embeds.to(dtype)).sample.float()
'''


@pytest.mark.parametrize("adaptation", ["LoRA", "FullFineTuning"])
def test_the_command_trains_and_exports_it(tmp_path, pipelines, monkeypatch, handlers, adaptation):
    (tmp_path / "letters.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    write_shards(tmp_path / "pairs", [8])
    trained = main(
        [
            "--config=dpo_tiny",
            f"--run_dir={tmp_path / 'run'}",
            "--model.policy=letters.Letters",
            f"--model.policy.pretrained={pipelines / 'tiny-sd15'}",
            f"--model.policy.adaptation={adaptation}",
            f"--model.reference={'AdapterOff' if adaptation == 'LoRA' else 'FrozenCopy'}",
            f"--data.shards={tmp_path / 'pairs'}",
            "--data.batch_size=2",
            "--data.resolution=16",
            "--trainer.max_steps=2",
            "--trainer.accelerator=cpu",
            "--trainer.callbacks=[{class_path: ExportPolicy}]",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
    )
    policy = trained.model.policy
    assert type(policy).__name__ == "Letters"
    assert trained.trainer.global_step == 2
    assert list(policy.encoders()) == ["vae", "text_encoder"]
    base = StableDiffusion(str(pipelines / "tiny-sd15"), policy.adaptation).state_dict()
    moved = [n for n, p in policy.named_parameters() if p.requires_grad and "lora_A" not in n and not p.equal(base[n])]
    assert moved
    (export,) = exports(tmp_path / "run" / "export")
    if adaptation == "LoRA":
        StableDiffusionPipeline.from_pretrained(pipelines / "tiny-sd15").load_lora_weights(export)
    sys.modules.pop("letters")
