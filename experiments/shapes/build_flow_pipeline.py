r"""Makes the embedded flow world's pipeline folder: a Stable Diffusion 3 of shapes, to train from or to ship.

Retraining it from scratch, 39 minutes of one thread beside other work:

    python -m experiments.shapes.build_flow_pipeline --output runs/shapes_flow
    python -m experiments.run --config pretrain_shapes_flow
    python -m experiments.shapes.build_flow_pipeline --output runs/flow_trained \
        --trained runs/shapes_flow runs/pretrain_shapes_flow/export/step=0011000

Autoencoder and first text encoder are the embedded Stable Diffusion's, trained. The second CLIP and T5 keep their
random weights. Only the transformer learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from experiments.cli.command import run_command
from experiments.shapes.build_pipeline import TOKENS, make, words
from lightning_modules.shapes.world import SIDE
from lightning_modules.weights.pretrained import Pretrained

SECOND = 16  # width of the second CLIP
HEADS, HEAD = 4, 32  # of the transformer
CELLS = SIDE // 4  # along one side of the latents
NETWORKS = {
    "vae": AutoencoderKL,
    "transformer": SD3Transformer2DModel,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}


def first_text_encoder(pipeline: Pretrained) -> CLIPTextModelWithProjection:
    """The trained CLIP, whose pooled embedding is passed on as it is."""
    trained: Any = pipeline.component("text_encoder").load_model(CLIPTextModel, torch.float32)
    settings = trained.config.to_dict() | {"projection_dim": trained.config.hidden_size}
    settings.pop("_name_or_path", None)
    encoder: Any = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    encoder.text_model.load_state_dict(trained.state_dict())
    torch.nn.init.eye_(encoder.text_projection.weight)
    return encoder


def second_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=SECOND,
            intermediate_size=2 * SECOND,
            projection_dim=SECOND,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    """A token of every word of the grammar, and of every letter for other words."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -1.0) for word in words()] + [("▁", -8.0)] + [(letter, -9.0) for letter in letters]
    return T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=TOKENS)


def third_text_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=16,
            d_ff=width,
            num_layers=1,
            num_heads=4,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build(folder: Path, seed: int) -> None:
    """Writes a Stable Diffusion 3 pipeline of plain diffusers' classes, in fp32; its transformer is random."""
    pipeline = Pretrained.find("embedded/shapes")
    tokenizer: Any = pipeline.component("tokenizer").load(CLIPTokenizer.from_pretrained, kind="tokenizer")
    vae: Any = pipeline.component("vae").load_model(AutoencoderKL, torch.float32)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    first = first_text_encoder(pipeline)
    torch.manual_seed(seed)
    second, words_of_t5 = second_text_encoder(tokenizer), t5_tokenizer()
    width = first.config.hidden_size + SECOND
    third = third_text_encoder(words_of_t5, width)
    transformer: Any = SD3Transformer2DModel(
        sample_size=CELLS,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=4,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        caption_projection_dim=HEADS * HEAD,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=CELLS // 2,
        qk_norm="rms_norm",
    )
    whole: Any = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=words_of_t5,
    )
    whole.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    make(argv, __doc__, build, NETWORKS)


if __name__ == "__main__":
    run_command(main)
