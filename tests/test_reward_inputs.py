"""What the published scorers' tokenizers make of texts, and how near pictures as floats score to their files."""

import json

import open_clip
import pytest
import torch
from reward_pictures import FOLDER, PROMPTS, pictures, scored
from test_image_reward import FILES
from test_open_clip_rewards import TINY

from lightning_modules.rewards import AestheticPredictor, PickScore
from lightning_modules.rewards.clip import read_tokenizer, tokenize
from lightning_modules.rewards.image_reward import ImageReward
from lightning_modules.rewards.open_clip_models import HPSv2

ROWS = [0, 1, 2, 4, 5]  # the one with alpha left out
LEVEL = 1 / 255 / 0.26


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    """CLIP's, in transformers' files, made of the vocabulary that open_clip brings."""
    folder, known = tmp_path_factory.mktemp("clip"), open_clip.tokenizer.SimpleTokenizer()
    vocabulary = {name.replace("start_of_text", "|startoftext|"): i for name, i in known.encoder.items()}
    vocabulary = {name.replace("end_of_text", "|endoftext|"): i for name, i in vocabulary.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in known.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    names = {"bos_token": "<|startoftext|>", **dict.fromkeys(["eos_token", "unk_token", "pad_token"], "<|endoftext|>")}
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | names))
    return read_tokenizer(str(folder), local_files_only=True)


def test_clips_two_tokenizers_are_the_published_ones(golden, clip_tokenizer):
    known = golden("reward_clip_tokens")
    assert torch.equal(open_clip.get_tokenizer("ViT-H-14")(PROMPTS), known["clip.open_clip_ids"])
    ids, mask = tokenize(clip_tokenizer, PROMPTS)
    assert torch.equal(ids, known["clip.hf_ids"])
    assert torch.equal(mask, known["clip.hf_mask"])


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "ViT-tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return {
        "pickscore": PickScore(str(FOLDER / "tiny-pickscore"), None, scale="cosine"),
        "hpsv2": HPSv2("2.1", str(FOLDER / "HPS_v2.1_compressed.pt"), "ViT-tiny-hps"),
        "aesthetic": AestheticPredictor(str(FOLDER / "sac+logos+ava1-l14-linearMSE.pth"), str(FOLDER / "tiny-clip")),
        "image_reward": ImageReward(**FILES),
    }


@pytest.mark.parametrize(
    ("name", "scores", "pixels", "bound"),
    [
        ("pickscore", "scores.cosine", "pixels", 2e-3),
        ("hpsv2", "scores.letterbox_antialias", "pixels.letterbox_antialias", 2e-3),
        ("aesthetic", "scores.transformers", "pixels", 2e-3),
        ("image_reward", "scores", "pixels", 5e-3),
    ],
)
def test_pictures_as_floats_score_as_their_files(rewards, golden, name, scores, pixels, bound):
    """Floats between the levels, as a decoder gives them: each less than half a level off what the file has."""
    reward, known = rewards[name], golden(f"reward_{name}")
    source = torch.Generator().manual_seed(0)
    drawn = [image + (torch.rand(image.shape, generator=source) - 0.5) * 0.99 / 255 for image in pictures()]
    found = torch.cat([reward.score(image, [prompt]) for image, prompt in zip(drawn, PROMPTS)])
    assert torch.equal(found, scored(reward))  # rounded first: the very numbers of the file
    assert (found - known[scores])[ROWS].abs().max() < bound
    inputs = torch.cat([reward.preprocess(image)[..., ::7, ::7] for image in drawn])
    assert (inputs - known[pixels])[ROWS].abs().max() < LEVEL


def test_every_picture_against_every_prompt_and_probabilities(rewards, golden):
    known, reward = golden("reward_pickscore"), rewards["pickscore"]
    matrix = torch.stack([reward.score(picture.expand(6, -1, -1, -1), PROMPTS) for picture in pictures()])
    torch.testing.assert_close(matrix, known["score_matrix"], rtol=0, atol=1e-5)
    logits = matrix[:, 0] * known["logit_scale"].exp()
    ids, mask = tokenize(reward.tokenizer, PROMPTS)
    assert torch.equal(ids, known["token_ids"])
    assert torch.equal(mask, known["attention_mask"])
    torch.testing.assert_close(logits.softmax(0), known["probabilities_of_prompt0"], rtol=0, atol=1e-4)
