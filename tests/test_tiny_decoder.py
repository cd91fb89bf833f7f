"""The tiny decoder as a run uses it: named in a YAML, judged against the VAE, its cost counted."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.step_pool import StepPoolDataModule
from experiments import run
from lightning_modules.errors import ConfigError
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.sampling.step_sampler import StepSampler
from lightning_modules.sampling.step_scorers import RandomScorer

CONFIG = """
seed_everything: 7
trainer:
  accelerator: cpu
  max_epochs: 1
  reload_dataloaders_every_n_epochs: 1
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks: {{class_path: Cost}}
model:
  class_path: AlignmentModule
  init_args:
    policy: {{class_path: StableDiffusion, init_args: {{pretrained: {pipelines}/tiny-sd15, adaptation: LoRA}}}}
    objective: {{class_path: SPO, init_args: {{guidance_scale: 1.0}}}}
    reference: AdapterOff
data:
  class_path: StepPoolDataModule
  init_args:
    prompts: [a cat, a dog, the sea]
    sampler: {{steps: 3, branch_from_step: 1, candidates: 2, threshold: 0.0, guidance_scale: 1.0}}
    scorer:
      class_path: RewardScorer
      init_args:
        reward: {{class_path: PickScore, init_args: {{pretrained: {pipelines}/tiny-pickscore, processor: null}}}}
        scale: 100.0
    decoder: {{class_path: TinyDecoder, init_args: {{pretrained: {decoder}}}}}
    prompts_per_batch: 2
    batch_size: 2
"""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A real ``AutoencoderTiny`` of random weights."""
    folder = tmp_path_factory.mktemp("taesd")
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(folder)
    return folder


def test_a_run_reports_and_counts_how_far_its_decoder_agrees(decoder, pipelines, tmp_path):
    config = tmp_path / "spo.yaml"
    config.write_text(CONFIG.format(pipelines=pipelines, decoder=decoder))
    run.main(["--config", str(config), "--run_dir", str(tmp_path / "run")])
    (manifest,) = (tmp_path / "run" / "pools").glob("*/manifest.json")
    statistics = json.loads(manifest.read_text())["statistics"]
    # Two of three prompts were checked, in two comparisons each.
    assert statistics["decoder_agreement"] * 4 in range(5)
    assert statistics["decoder_agreement_valid"] == 1.0  # a threshold of 0 keeps all
    assert statistics["decodes"] == 3 * 2 * 2 + 2 * 2 * 2
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())[-1]
    assert cost["drawn_pictures"] == statistics["decodes"]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (shown,) = events.Scalars("pool/decoder_agreement")
    assert shown.value == statistics["decoder_agreement"]


def test_a_decoder_that_is_no_decoder_is_named(pipelines, tmp_path):
    with pytest.raises(ConfigError, match="tiny-sd15"):
        TinyDecoder(str(pipelines / "tiny-sd15"))
    with pytest.raises(ConfigError, match="data.decoder_checks must be 0"):
        StepPoolDataModule(StepSampler(), 1, prompts=["a"], scorer=RandomScorer(), decoder_checks=-1)
