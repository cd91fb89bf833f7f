"""The tiny decoder as a run uses it: named in a YAML, judged against the VAE, its cost counted."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.pools.fingerprint import fingerprint
from datamodules.step_pool import StepPoolDataModule, check_decoder
from experiments import run
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.policies import Frozen, StableDiffusion
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.sampling.comparisons import Comparisons
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
    return save_a_decoder(folder, levels=4)


def save_a_decoder(folder, levels):
    blocks = {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels}
    ones = (1,) * levels
    AutoencoderTiny(**blocks, num_encoder_blocks=ones, num_decoder_blocks=ones).save_pretrained(folder)
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


def start(decoder, pipelines, folder, *more):
    folder.mkdir(exist_ok=True)
    config = folder / "spo.yaml"
    config.write_text(CONFIG.format(pipelines=pipelines, decoder=decoder))
    run.main(["--config", str(config), "--run_dir", str(folder / "run"), *more])


def test_a_run_can_demand_a_least_agreement(decoder, pipelines, tmp_path, monkeypatch):
    # Three of four checked comparisons agree.
    monkeypatch.setattr(Comparisons, "metrics", lambda self: metrics(self) | {"decoder_agreement": 0.75})
    start(decoder, pipelines, tmp_path / "met", "--data.decoder.least_agreement=0.75")
    told = "in 0.750 of the checked comparisons, and data.decoder.least_agreement is 0.76; lower that, or"
    with pytest.raises(DataError, match=told) as caught:
        start(decoder, pipelines, tmp_path / "not", "--data.decoder.least_agreement=0.76")
    assert "\n" not in str(caught.value)


def test_a_demand_that_means_nothing_is_refused(decoder, pipelines):
    module = SimpleNamespace(policy=StableDiffusion(str(pipelines / "tiny-sd15"), Frozen()))
    demanding = TinyDecoder(str(decoder), least_agreement=0.5)
    check_decoder(module, demanding, checks=1)
    with pytest.raises(ConfigError, match="needs data.decoder_checks"):
        check_decoder(module, demanding, checks=0)
    with pytest.raises(ConfigError, match="a share from 0 to 1, got 1.5"):
        TinyDecoder(str(decoder), least_agreement=1.5)


metrics = Comparisons.metrics


def test_what_is_demanded_names_no_other_pool(decoder):
    assert fingerprint(TinyDecoder(str(decoder))) == fingerprint(TinyDecoder(str(decoder), least_agreement=0.5))


def test_a_decoder_for_other_latents_is_refused(pipelines, tmp_path):
    decoder = save_a_decoder(tmp_path / "two", levels=2)
    with pytest.raises(ConfigError, match="reads 4 channels and makes 2 pixels of a latent, .* have 4 and 8; give"):
        start(decoder, pipelines, tmp_path)
    assert not (tmp_path / "run" / "pools").exists()


def test_a_decoder_that_is_no_decoder_is_named(pipelines, tmp_path):
    with pytest.raises(ConfigError, match="tiny-sd15"):
        TinyDecoder(str(pipelines / "tiny-sd15"))
    with pytest.raises(ConfigError, match="data.decoder_checks must be 0"):
        StepPoolDataModule(StepSampler(), 1, prompts=["a"], scorer=RandomScorer(), decoder_checks=-1)
