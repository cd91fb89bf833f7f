"""Training the embedded world's autoencoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from datamodules.shapes.data import ShapesDataModule
from lightning_modules.errors import ConfigError
from lightning_modules.shapes.autoencoder import AutoencoderModule, psnr


@pytest.fixture
def pipeline(tmp_path: Path, pipelines: Path) -> Path:
    folder = tmp_path / "pipeline"
    shutil.copytree(pipelines / "tiny-sd15", folder)
    return folder


def fit(module: AutoencoderModule, steps: int, folder: Path) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, ShapesDataModule(batch_size=4, batches_per_epoch=steps, size=8))
    return trainer


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 8, 8)
    off = torch.stack([images[0] + 0.2, images[1] + 0.02])
    # An error of 0.2 in a range of 2 is a tenth: 20 dB; a hundredth is 40.
    torch.testing.assert_close(psnr(off, images), torch.tensor([20.0, 40.0]))


def test_training_saves_fp16_weights_that_diffusers_loads_and_nothing_else(pipeline: Path):
    module = AutoencoderModule(str(pipeline), warmup_steps=1)
    before = weights(module.vae)
    trainer = fit(module, 2, pipeline.parent)
    assert any(not torch.equal(before[name], value) for name, value in module.vae.state_dict().items())
    stored = load_file(pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = AutoencoderKL.from_pretrained(pipeline / "vae").state_dict()
    for name, value in module.vae.state_dict().items():
        assert torch.equal(loaded[name].half(), value.half())
    assert sorted(path.name for path in pipeline.iterdir() if path.name.startswith(".")) == []
    assert torch.isfinite(trainer.callback_metrics["val/psnr"])


def test_the_scaling_factor_makes_latents_of_unit_variance(pipeline: Path):
    module = AutoencoderModule(str(pipeline))
    fit(module, 1, pipeline.parent)
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", torch_dtype=torch.float32)
    images = torch.cat([batch.chosen for batch in ShapesDataModule(size=1).val_dataloader()])
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.02)


def test_only_the_decoder_trains_once_the_encoder_is_frozen(pipeline: Path):
    module = AutoencoderModule(str(pipeline), warmup_steps=1, freeze_encoder_after=0)
    encoder, decoder = weights(module.vae.encoder), weights(module.vae.decoder)
    fit(module, 2, pipeline.parent)
    assert all(torch.equal(encoder[name], value) for name, value in module.vae.encoder.state_dict().items())
    assert any(not torch.equal(decoder[name], value) for name, value in module.vae.decoder.state_dict().items())


def test_the_same_seed_trains_the_same_weights(pipeline: Path):
    def trained() -> dict[str, torch.Tensor]:
        folder = pipeline.with_name("copy")
        shutil.copytree(pipeline, folder)
        module = AutoencoderModule(str(folder), warmup_steps=1)
        fit(module, 2, folder.parent)
        shutil.rmtree(folder)
        return weights(module.vae)

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_without_autoencoder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no autoencoder in"):
        AutoencoderModule(str(tmp_path))


def test_weights_that_are_missing_are_not_drawn_at_random(pipeline: Path):
    file = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("decoder.conv_out")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"does not hold the weights of the AutoencoderKL.*decoder\.conv_out"):
        AutoencoderModule(str(pipeline))
