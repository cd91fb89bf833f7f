r"""Makes the embedded world's pipeline folder: with random weights to train from, or of trained parts to ship.

Retraining it from scratch, about 40 minutes on 2 cores:

    python -m experiments.shapes.build_pipeline --output runs/shapes
    python -m experiments.run --config pretrain_shapes_vae
    python -m experiments.run --config pretrain_shapes
    python -m experiments.shapes.build_pipeline --output runs/trained \
        --trained runs/shapes runs/pretrain_shapes/export/step=0005000
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from experiments.cli.command import run_command
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_folder, packaged
from lightning_modules.shapes.world import SCENES, SIDE
from lightning_modules.weights.pretrained import Pretrained

TOKENS = 12  # 8 words, start and end, and two to spare
START, END = "<|startoftext|>", "<|endoftext|>"
NETWORKS = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


def words() -> list[str]:
    """Every word of every prompt, sorted."""
    return sorted({word for caption in SCENES for word in caption.split()})


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make one token of every word of the grammar.

    Other words still have tokens: their letters.
    """
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges = merges_for(words())
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocabulary = [*dict.fromkeys(vocabulary), START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, unk_token=END, bos_token=START, eos_token=END, pad_token=END, model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, by falling priority, that join every word into one token.

    A word is first split as the merges so far would split it: a later merge, having less priority, cannot undo
    what earlier words came to.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            pieces = _merged(pieces, merge)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges[-1])
    return merges


def _merged(pieces: list[str], merge: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == merge:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def build(folder: Path, seed: int) -> None:
    """Writes tokenizer, networks and scheduler as a Stable Diffusion pipeline of plain diffusers' classes, in fp32."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    # Stable Diffusion 1.5's schedule, so that what is shown here is shown of its numbers.
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def assemble(folder: Path, sources: list[Path], networks: Mapping[str, Any]) -> None:
    """Fills the pipeline with the trained networks of other folders, the last one that has a network giving it.

    Text encoders are stored in fp32, the others in fp16.

    Args:
        networks: the class of each network by its name in the pipeline.

    Raises:
        ConfigError: no folder has one of the networks, or its weights are not those of its configuration.
    """
    for name, network in networks.items():
        found = [source / name for source in sources if (source / name / "config.json").is_file()]
        if not found:
            places = ", ".join(str(source) for source in sources)
            raise ConfigError(f"no trained {name} in {places}; train it first, or name the folder that holds it")
        # transformers loads weights in the type that they are stored in, diffusers in fp32: an fp16 text encoder
        # would not fit its denoiser in a plain from_pretrained. It is a twentieth of the folder.
        dtype = torch.float32 if name.startswith("text_encoder") else torch.float16
        trained = Pretrained.find(str(found[-1])).load_model(network, dtype)
        shutil.rmtree(folder / name)
        trained.save_pretrained(folder / name)
        config = folder / name / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # where it lay here means nothing elsewhere
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make(
    argv: Sequence[str] | None, description: str, build: Callable[[Path, int], None], networks: Mapping[str, Any]
) -> None:
    """The command: ``build`` writes the pipeline into a folder from a seed, ``networks`` are what ``assemble`` fills.

    Raises:
        ConfigError: the folder exists, or as ``assemble``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument(
        "--trained",
        type=packaged,
        nargs="+",
        help="folders with trained networks to take instead of random ones; the last that has one gives it",
    )
    parser.add_argument(
        "--untrained",
        nargs="+",
        default=[],
        choices=networks,
        help="networks that keep their random weights all the same",
    )
    options = parser.parse_args(argv)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists already: name a new folder, or delete it first")
    with atomic_folder(options.output) as unfinished:
        build(unfinished, options.seed)
        if options.trained:
            taken = {name: network for name, network in networks.items() if name not in options.untrained}
            assemble(unfinished, options.trained, taken)


def main(argv: Sequence[str] | None = None) -> None:
    make(argv, __doc__, build, NETWORKS)


if __name__ == "__main__":
    run_command(main)
