"""A reward that reads only the beginning of a prompt says so, once per number of tokens that it reads."""

import json

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from reward_pictures import FOLDER, PROMPTS, pictures
from test_image_reward import FILES
from test_open_clip_rewards import TINY

from lightning_modules import prompt_lengths
from lightning_modules.rewards import PickScore
from lightning_modules.rewards import clip as judge
from lightning_modules.rewards.image_reward import ImageReward
from lightning_modules.rewards.open_clip_models import CLIPScore, HPSv2, _length

LONG = PROMPTS[2]
PICTURE = pictures()[4]


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(prompt_lengths, "rank_zero_info", lines.append)
    return lines


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "ViT-tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    return {"pretrained": str(FOLDER / "HPS_v2.1_compressed.pt"), "architecture": "ViT-tiny-hps"}


@pytest.mark.parametrize("kind", [HPSv2, CLIPScore])
def test_open_clips_networks_read_77_tokens(hps, told, kind):
    reward = kind(**hps)
    fits = " ".join(["cat"] * 75)  # begin and end make it 77
    reward.score(PICTURE.expand(3, -1, -1, -1), ["a cat", "", fits])
    assert told == []
    reward.score(PICTURE.expand(2, -1, -1, -1), [LONG, LONG])
    reward.score(PICTURE, [LONG])
    assert len(told) == 1
    assert f"1 prompt so far is longer than the 77 tokens that {kind.__name__} reads" in told[0]
    reward.score(PICTURE.expand(9, -1, -1, -1), [f"{fits} {'cat ' * n}" for n in range(1, 10)])
    assert [line.split()[0] for line in told] == ["1", "10"]
    assert "(the latest has 86 tokens: 'cat cat" in told[1]


def test_image_reward_reads_35(told):
    reward = ImageReward(**FILES)
    reward.score(PICTURE.expand(2, -1, -1, -1), ["", " ".join(["cat"] * 33)])
    assert told == []
    reward.score(PICTURE.expand(2, -1, -1, -1), [" ".join(["cat"] * 34), "a cat"])
    assert len(told) == 1
    assert "1 prompt so far is longer than the 35 tokens that ImageReward reads" in told[0]
    assert "(the latest has 36 tokens: 'cat cat" in told[0]


def test_pickscore_reads_77(told, monkeypatch):
    monkeypatch.setattr(judge, "CUT_PROMPTS", prompt_lengths.CutPrompts("CLIP as a judge"))
    reward = PickScore(str(FOLDER / "tiny-pickscore"), None)
    reward.score(PICTURE, [" ".join(["cat"] * 75)])
    assert told == []
    reward.score(PICTURE, [" ".join(["cat"] * 76)])
    assert len(told) == 1
    assert "77 tokens that CLIP as a judge reads" in told[0]


def test_open_clips_other_tokenizers_count_as_they_read():
    tokenizer = HFTokenizer(str(FOLDER / "tiny-pickscore"), context_length=8)
    ids = tokenizer(["cat cat cat", "cat cat cat cat cat cat cat cat"])
    assert torch.equal(ids[0, 5:], ids[0, 4:5].expand(3))  # begin, three, end, and the end again as padding
    assert _length(tokenizer, "cat cat cat") == 5
    assert _length(tokenizer, "cat cat cat cat cat cat cat cat") == 10
