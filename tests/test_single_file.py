"""A single file in the original layout of Stable Diffusion gives the same model as the folder that it was made of."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies import LoRA, StableDiffusion, StableDiffusionXL

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip


def original_unet(name, per_block, levels):
    """The name of a UNet's weight in CompVis' code, after the numbering of its ``openaimodel.py``."""
    ends = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "conv_norm_out": "out.0", "conv_in": "input_blocks.0.0", "conv_out": "out.2"}  # fmt: skip
    for ours, theirs in ends.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs, 1)
    for ours, theirs in RESNET.items():
        name = re.sub(rf"(resnets\.\d+)\.{ours}\.", rf"\1.{theirs}.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle_block.1")

    def down(m):
        block, part = int(m[1]), int(m[3])
        if m[2] == "downsamplers":
            return f"input_blocks.{(per_block + 1) * (block + 1)}.0.op."
        return f"input_blocks.{(per_block + 1) * block + part + 1}.{0 if m[2] == 'resnets' else 1}."

    def up(m):
        block, part = int(m[1]), int(m[3])
        if m[2] == "upsamplers":  # behind a resnet, and an attention where this block has them
            return f"output_blocks.{(per_block + 1) * block + per_block}.{2 if block in levels else 1}.conv."
        return f"output_blocks.{(per_block + 1) * block + part}.{0 if m[2] == 'resnets' else 1}."

    name = re.sub(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(?:conv\.)?", down, name)
    return re.sub(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(?:conv\.)?", up, name)


def original_vae(name, blocks):
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)


def original_open_clip(weights):
    """The second text encoder of SDXL as open_clip names it: query, key and value in one, the projection transposed."""
    renames = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.",
               "self_attn": "attn", "text_model.encoder.layers": "transformer.resblocks",
               "text_model.final_layer_norm": "ln_final", "text_model.embeddings.token_embedding": "token_embedding",
               "text_model.embeddings.position_embedding.weight": "positional_embedding"}  # fmt: skip
    found = {"text_projection": weights["text_projection.weight"].T}
    for name, value in weights.items():
        other = name
        for ours, theirs in renames.items():
            other = other.replace(ours, theirs)
        if ".q_proj." in other:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[other.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in other and ".v_proj." not in other and name != "text_projection.weight":
            found[other] = value
    return found


@pytest.fixture(scope="module")
def folder_xl(pipelines, tmp_path_factory):
    """A tiny SDXL whose text encoders differ in width, as the real ones do: diffusers tells them apart by it."""
    folder = Path(shutil.copytree(pipelines / "tiny-sdxl", tmp_path_factory.mktemp("sdxl") / "model"))
    torch.manual_seed(1)
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2", hidden_size=48)
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    unet = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(unet, cross_attention_dim=32 + 48).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def single_xl(folder_xl, tmp_path_factory):
    folder, content = folder_xl, {}
    for name, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        other = original_unet(name, per_block=1, levels={0})
        other = other.replace("add_embedding.linear_1", "label_emb.0.0").replace(
            "add_embedding.linear_2", "label_emb.0.2"
        )
        content["model.diffusion_model." + other] = value
    content |= as_original_vae(folder)
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        other = name if name.startswith("text_model.") else f"text_model.{name}"
        content[f"conditioner.embedders.0.transformer.{other}"] = value
    second = original_open_clip(load_file(folder / "text_encoder_2" / "model.safetensors"))
    content |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    file = tmp_path_factory.mktemp("single") / "xl.safetensors"
    save_file({name: value.contiguous() for name, value in content.items()}, file, metadata={"format": "pt"})
    return file


def as_original_vae(folder):
    found = {}
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        other = original_vae(name, blocks=4)
        is_projection = "attn_1" in other and other.endswith("weight") and "norm" not in other
        found["first_stage_model." + other] = value[:, :, None, None] if is_projection else value
    return found


@pytest.fixture(scope="module")
def single(pipelines, tmp_path_factory):
    folder, content = pipelines / "tiny-sd15", {}
    for name, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        content["model.diffusion_model." + original_unet(name, per_block=1, levels={1})] = value
    content |= as_original_vae(folder)
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        other = name if name.startswith("text_model.") else f"text_model.{name}"
        content[f"cond_stage_model.transformer.{other}"] = value
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({name: value.contiguous() for name, value in content.items()}, file, metadata={"format": "pt"})
    return file


def test_it_is_the_model_of_the_folder(single, pipelines):
    folder = str(pipelines / "tiny-sd15")
    torch.manual_seed(0)
    expected = StableDiffusion(folder, LoRA())
    torch.manual_seed(0)
    policy = StableDiffusion(str(single), LoRA(), layout=folder)
    ours, theirs = policy.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []
    latents = torch.randn(1, 4, 8, 8)
    asked = [DenoiserQuery(latents, torch.tensor([500]), p.encode_prompts(["a cat"]), 3.0) for p in (policy, expected)]
    assert torch.equal(policy.predict_noise(asked[0]), expected.predict_noise(asked[1]))
    assert torch.equal(policy.decode(latents), expected.decode(latents))


def test_sdxl_is_the_model_of_the_folder(single_xl, folder_xl):
    folder = str(folder_xl)
    torch.manual_seed(0)
    expected = StableDiffusionXL(folder, LoRA()).state_dict()
    torch.manual_seed(0)
    ours = StableDiffusionXL(str(single_xl), LoRA(), layout=folder).state_dict()
    assert ours.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(ours[name], value)] == []


def test_a_layout_of_another_kind_is_refused(single, single_xl, pipelines):
    for policy_class, file, layout in (
        (StableDiffusionXL, single, "tiny-sdxl"),
        (StableDiffusion, single_xl, "tiny-sd15"),
    ):
        with pytest.raises(ConfigError, match="layout") as caught:
            policy_class(str(file), LoRA(), layout=str(pipelines / layout))
        assert "\n" not in str(caught.value)


def test_its_number_type_is_the_one_asked_for(single, pipelines):
    policy = StableDiffusion(str(single), LoRA(), layout=str(pipelines / "tiny-sd15"), frozen_dtype="bf16")
    found = {parameter.dtype for name, parameter in policy.named_parameters() if ".lora_" not in name}
    assert found == {torch.bfloat16}


@pytest.mark.parametrize("part", ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.bias",
                                  "cond_stage_model.transformer.text_model.final_layer_norm.bias"])  # fmt: skip
def test_a_file_that_lacks_a_weight_is_refused(single, pipelines, tmp_path, part):
    content = load_file(single)
    del content[part]
    save_file(content, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"does not hold all weights|is damaged or holds no") as caught:
        StableDiffusion(str(tmp_path / "part.safetensors"), LoRA(), layout=str(pipelines / "tiny-sd15"))
    assert "\n" not in str(caught.value)


def test_without_a_layout_it_is_said_what_is_missing(single, tmp_path):
    with pytest.raises(ConfigError, match="is a single file; set the policy's `layout`"):
        StableDiffusion(str(single), LoRA())
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ConfigError, match="convert it to .safetensors"):
        StableDiffusion(str(tmp_path / "model.ckpt"), LoRA(), layout="embedded/shapes")
