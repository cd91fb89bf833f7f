"""The embedded world's tiny decoder: small, made by its command, and near to the VAE."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny

import experiments
from datamodules.shapes.drawing import prompt_splits
from experiments.shapes import build_decoder
from lightning_modules.policies import Frozen, StableDiffusion
from lightning_modules.policies.tiny_decoder import TinyDecoder
from lightning_modules.shapes.autoencoder import psnr

FOLDER = Path(experiments.__file__).parent / "embedded" / "tiny_decoder"
DECIBEL = 27.0  # 29.2 over all held-out prompts


def test_it_ships_in_half_a_megabyte():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 500_000


def test_it_draws_held_out_predictions_as_the_vae_does():
    policy, decoder = StableDiffusion("embedded/shapes", Frozen()).eval(), TinyDecoder("embedded/tiny_decoder")
    assert (decoder.latent_channels, decoder.downscale) == (policy.latent_channels, policy.downscale)
    latents = build_decoder.predictions(policy, prompt_splits()["validation"][:3], ("test",))
    pictures = decoder(latents)
    assert pictures.shape == (3 * 21, 3, 32, 32)  # 20 steps, and where they end
    found = psnr(pictures * 2 - 1, policy.decode(latents) * 2 - 1).mean()
    assert found > DECIBEL


def test_the_command_makes_one_from_scratch(monkeypatch, tmp_path, capsys):
    few = {name: prompts[:2] for name, prompts in prompt_splits().items()}
    monkeypatch.setattr(build_decoder, "prompt_splits", lambda: few)
    for name in ("one", "two"):
        build_decoder.main(["--output", str(tmp_path / name), "--rounds", "1", "--steps", "3"])
    assert "dB from the VAE's pictures" in capsys.readouterr().out
    one, two = (AutoencoderTiny.from_pretrained(tmp_path / name).decoder.state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert TinyDecoder(str(tmp_path / "one")).downscale == 4
