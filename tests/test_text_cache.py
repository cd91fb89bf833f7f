"""Embeddings by caption: as the encoders give them, told beforehand, refused where they belong to others."""

from pathlib import Path

import pytest
import torch
from pairs_data import write_shards
from safetensors.torch import load_file
from tiny_world import pairs, trainer

from datamodules.pairs.latents_key import latents_fingerprint
from datamodules.pools.fingerprint import fingerprint
from experiments import encode_prompts, run
from experiments.cli.configured_policy import load_policy
from lightning_modules.alignment import AlignmentModule
from lightning_modules.errors import ConfigError, DataError
from lightning_modules.objectives import DPO
from lightning_modules.policies import Flux, FullFineTuning, LoRA, StableDiffusion, StableDiffusion3, StableDiffusionXL
from lightning_modules.policies.text_cache import TextCache, cached_captions
from lightning_modules.references import AdapterOff

FLOW = {"t5_tokens": 16, "image_size": 64}
KINDS = {
    "sd15": (StableDiffusion, "tiny-sd15", {}),
    "sdxl": (StableDiffusionXL, "tiny-sdxl", {"negative_prompt": None}),
    "sd3": (StableDiffusion3, "tiny-sd3", FLOW),
    "flux": (Flux, "tiny-flux", FLOW),
}
CAPTIONS = ["", "a red cat", "two squares"]


def made(pipelines, name="sd15", seed=0, **options):
    kind, folder, settings = KINDS[name]
    torch.manual_seed(seed)
    return kind(str(pipelines / folder), LoRA(), **(settings | options)).eval()


def filled(policy, folder, captions=CAPTIONS):
    TextCache(folder, policy.text_key()).add(captions, policy.encode_prompts(captions))
    return str(folder)


def equal(one, other):
    parts = [(getattr(one, name), getattr(other, name)) for name in ("embeds", "pooled")]
    return all((a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in parts)


@pytest.mark.parametrize("frozen_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_embeddings_are_the_encoders_bit_for_bit_and_the_encoders_are_gone(pipelines, tmp_path, name, frozen_dtype):
    plain = made(pipelines, name, frozen_dtype=frozen_dtype)
    known = plain.encode_prompts(CAPTIONS)
    policy = made(pipelines, name, frozen_dtype=frozen_dtype, text_cache=filled(plain, tmp_path))
    assert equal(policy.encode_prompts(["two squares", "", "two squares"]), known[torch.tensor([2, 0, 2])])
    empty = known[torch.tensor([0, 0])]
    assert equal(policy._negative(2), empty._map(torch.zeros_like) if name == "sdxl" else empty)
    assert not [key for key in policy.state_dict() if key.startswith("text_encoder")]
    assert not any(child.startswith("text_encoder") for child, _ in policy.named_children())


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_cached_latents_know_their_encoders_although_they_are_freed(pipelines, tmp_path, name):
    plain = made(pipelines, name)
    policy = made(pipelines, name, text_cache=filled(plain, tmp_path))
    assert latents_fingerprint(policy, 64, "centre", "float16") == latents_fingerprint(plain, 64, "centre", "float16")
    assert not any(parameter.requires_grad for part in policy.encoders().values() for parameter in part.parameters())
    assert not any(child.startswith("text_encoder") for child, _ in policy.named_children())


def test_a_pool_drawn_with_a_cache_has_a_name_of_its_own(pipelines, tmp_path):
    plain = made(pipelines)
    policies = [plain, *(made(pipelines, text_cache=filled(plain, tmp_path)) for _ in range(2))]
    names = [fingerprint(policy) for policy in policies]
    assert names[0] != names[1] == names[2]
    assert policies[1].texts_of == plain.text_key()
    policies[1].texts_of = "of other encoders"
    assert fingerprint(policies[1]) not in names


class TestRefusals:
    def test_a_caption_that_is_missing_is_named(self, pipelines, tmp_path):
        policy = made(pipelines, text_cache=filled(made(pipelines), tmp_path))
        with pytest.raises(
            ConfigError, match=r"no embeddings of 'a dog'; add them with python -m experiments.encode_p"
        ):
            policy.encode_prompts(["a red cat", "a dog"])

    @pytest.mark.parametrize("other", [{"t5_tokens": 32}, {"frozen_dtype": "bf16"}])
    def test_embeddings_of_other_lengths_and_precisions(self, pipelines, tmp_path, other):
        folder = filled(made(pipelines, "flux"), tmp_path)
        with pytest.raises(ConfigError, match="fill another folder"):
            made(pipelines, "flux", text_cache=folder, **other)

    def test_embeddings_of_other_weights_and_words(self, pipelines):
        policy = made(pipelines)
        keys = [policy.text_key()]
        next(policy.text_encoder.parameters()).data.view(-1)[5] += 1e-3
        keys.append(policy.text_key())
        policy.tokenizer.model_max_length = 5
        keys.append(policy.text_key())
        assert len(set(keys)) == 3

    def test_text_encoders_that_train(self):
        with pytest.raises(ConfigError, match="text_cache holds embeddings that training the text encoders would"):
            StableDiffusion("no/where", FullFineTuning(text_encoder=True), text_cache="texts")

    def test_a_damaged_file(self, pipelines, tmp_path):
        folder = filled(made(pipelines), tmp_path)
        (tmp_path / "00000.safetensors").write_bytes((tmp_path / "00000.safetensors").read_bytes()[:-9])
        with pytest.raises(DataError, match="00000.safetensors cannot be read .*; delete it and fill the cache again"):
            made(pipelines, text_cache=folder)


def trained(pipelines, folder, steps, ckpt_path=None, **options):
    policy = made(pipelines, seed=5, **options)
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    module = AlignmentModule(policy, DPO(beta=100.0), AdapterOff(), optimizer, caption_dropout=0.3)
    fit = trainer(folder, max_steps=steps)
    fit.fit(module, pairs(1), ckpt_path=ckpt_path)
    fit.save_checkpoint(folder / f"{steps}.ckpt")
    return {name: value.detach().clone() for name, value in policy.named_parameters() if value.requires_grad}


def test_training_learns_what_it_learns_with_encoders_and_resumes_exactly(pipelines, tmp_path):
    texts = filled(made(pipelines), tmp_path / "texts", ["", "a", "b"])
    plain, cached = trained(pipelines, tmp_path, 4), trained(pipelines, tmp_path, 4, text_cache=texts)
    assert plain.keys() == cached.keys()
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=1e-5)
    trained(pipelines, tmp_path, 2, text_cache=texts)
    resumed = trained(pipelines, tmp_path, 4, tmp_path / "2.ckpt", text_cache=texts)
    assert all(torch.equal(resumed[name], value) for name, value in cached.items())


CONFIG = """
trainer:
  max_steps: 2
  callbacks:
    - {{class_path: SampleGrid, init_args: {{prompts: [a grid, another], sampler: {{class_path: Sampler}}}}}}
    - {{class_path: WinRate, init_args: {{prompts: prompts.txt, rewards: [], sampler: {{class_path: Sampler}}}}}}
model:
  class_path: AlignmentModule
  init_args:
    policy:
      class_path: StableDiffusion
      init_args: {{pretrained: {pipelines}/tiny-sd15, adaptation: LoRA, negative_prompt: ugly, text_cache: texts}}
    objective: {{class_path: DPO}}
    reference: AdapterOff
data:
  class_path: PreferencePairsDataModule
  init_args: {{shards: pairs, batch_size: 2, resolution: 64}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, pipelines):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(pipelines=pipelines))
    (tmp_path / "prompts.txt").write_text("win\na grid\n")
    write_shards(tmp_path / "pairs", [3, 2])
    return tmp_path


def stored(folder):
    return [load_file(file) for file in sorted((folder / "texts").glob("*.safetensors"))]


class TestCommand:
    def test_it_tells_the_size_and_keeps_every_text_of_the_config_once(self, folder, capsys, monkeypatch):
        monkeypatch.setattr(encode_prompts, "FILE", 4)
        words = ["--config", "config.yaml", "--output", "texts"]
        encode_prompts.main([*words, "--size_only"])
        assert not (folder / "texts").exists()
        told = capsys.readouterr().out
        encode_prompts.main(words)
        assert capsys.readouterr().out.startswith(told)
        captions = cached_captions(folder / "texts")
        assert {"", "ugly", "a grid", "another", "win"} < captions
        assert len(captions) == 5 + len({caption for caption in captions if caption.startswith("caption")})
        files = stored(folder)
        assert [len(file["embeds"]) for file in files] == [4] * (len(captions) // 4) + [len(captions) % 4] * (
            len(captions) % 4 > 0
        )
        size = sum(file["embeds"].nbytes for file in files)
        assert f"{len(captions)} captions, 0 of them in texts already" in told
        assert f"{len(captions)} of {size / len(captions) / 1e6:.3f} MB, {size / 1e9:.3f} GB in all" in told
        policy = load_policy("config.yaml")  # which reads no cache
        with torch.no_grad():
            torch.testing.assert_close(
                files[0]["embeds"], policy.encode_prompts(["", "ugly", "a grid", "another"]).embeds
            )

    def test_what_is_there_is_kept_and_more_is_added(self, folder, capsys):
        words = ["--config", "config.yaml", "--output", "texts"]
        encode_prompts.main(words)
        before = cached_captions(folder / "texts")
        (folder / "more.txt").write_text("one more\nwin\n")
        encode_prompts.main([*words, "--prompts", "more.txt"])
        assert f"{len(before) + 1} captions, {len(before)} of them in" in capsys.readouterr().out
        assert cached_captions(folder / "texts") == before | {"one more"}
        assert len(stored(folder)) == 2
        encode_prompts.main(words)
        assert len(stored(folder)) == 2

    def test_a_disk_without_room_is_refused_before_anything_is_encoded(self, folder, monkeypatch):
        usage = encode_prompts.shutil.disk_usage(folder)
        monkeypatch.setattr(encode_prompts.shutil, "disk_usage", lambda place: usage._replace(free=100))
        with pytest.raises(ConfigError, match=r"GB are needed and 0.0 GB are free; make room"):
            encode_prompts.main(["--config", "config.yaml", "--output", "texts"])
        assert not Path("texts").exists()

    def test_a_run_says_beforehand_what_its_cache_lacks(self, folder, capsys):
        with pytest.raises(ConfigError, match="text_cache: texts does not exist; fill it first .python -m exper"):
            run.main(["--config", "config.yaml"])
        encode_prompts.main(["--config", "config.yaml", "--output", "texts"])
        (folder / "prompts.txt").write_text("win\nanother win\n")
        with pytest.raises(
            ConfigError, match="texts lacks 1 of the prompts that the settings name, such as 'another w"
        ):
            run.main(["--config", "config.yaml"])
