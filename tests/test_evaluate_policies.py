"""What a policy's word stands for: runs, exports, LoRA weights, single files, and what is refused of them."""

import shutil

import pytest
import torch
import yaml
from test_single_file import single  # noqa: F401  # a fixture

from experiments.evaluation.policies import find_policy, own_size
from lightning_modules.batches import DenoiserQuery
from lightning_modules.errors import ConfigError
from lightning_modules.policies import Flux, StableDiffusion3
from lightning_modules.policies.adaptation import Frozen, FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.policies.sdxl import StableDiffusionXL
from lightning_modules.policies.stable_diffusion import StableDiffusion


def predicted(policy):
    noise = torch.randn(2, policy.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = policy.encode_prompts(["a red circle", "two blue squares"])
    with torch.no_grad():
        return policy.predict_noise(DenoiserQuery(noise, torch.tensor([700, 20]), cond, 2.0))


def asked(word, base=None, dtype="fp32"):
    source = find_policy(str(word), base)
    source.check()
    return predicted(source.load(dtype))


def moved(policy):
    g = torch.Generator().manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    return policy.eval()


def write_run(folder, policy, settings, average=None):
    """What a run leaves: settings, a checkpoint of what is trained, an export."""
    names = {name for name, value in policy.named_parameters() if value.requires_grad}
    state = {f"policy.{name}": value for name, value in policy.state_dict().items() if name in names}
    content = {"state_dict": state, "loops": {}, "global_step": 3}
    if average is not None:
        content["ema"] = {"steps": 3, "weights": {name: value + average for name, value in state.items()}}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    model = {
        "class_path": "AlignmentModule",
        "init_args": {"policy": {"class_path": "StableDiffusion", "init_args": settings}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    policy.save_pretrained(folder / "export" / "step=0000003")
    return folder


@pytest.fixture(scope="module")
def base(pipelines):
    return str(pipelines / "tiny-sd15")


@pytest.fixture(scope="module")
def untrained(base):
    return predicted(StableDiffusion(base, Frozen()).eval())


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory):
    policy = moved(StableDiffusion(base, LoRA(rank=2, alpha=8.0)))
    settings = {"pretrained": base, "adaptation": {"class_path": "LoRA", "init_args": {"rank": 2, "alpha": 8.0}}}
    return write_run(tmp_path_factory.mktemp("runs") / "lora", policy, settings), predicted(policy)


def test_a_pipelines_folder_is_its_policy(base, untrained):
    assert torch.equal(asked(base), untrained)


def test_a_run_is_its_newest_checkpoint(lora_run, untrained):
    folder, expected = lora_run
    assert torch.equal(asked(folder), expected)
    assert torch.equal(asked(folder / "checkpoints" / "last.ckpt"), expected)
    assert (expected - untrained).abs().max() > 0.01


def test_an_export_stands_on_the_base_of_its_run(lora_run):
    folder, expected = lora_run
    export = folder / "export" / "step=0000003"
    words = [export, export / "pytorch_lora_weights.safetensors", export / "kohya" / "lora.safetensors"]
    for word in words:
        torch.testing.assert_close(asked(word), expected, rtol=0, atol=1e-5)


def test_lora_weights_from_elsewhere_need_a_base(lora_run, base, tmp_path):
    folder, expected = lora_run
    file = shutil.copy(
        folder / "export" / "step=0000003" / "pytorch_lora_weights.safetensors", tmp_path / "x.safetensors"
    )
    with pytest.raises(ConfigError, match="it is a part of a model, and nothing beside it tells which; give"):
        find_policy(str(file), None)
    torch.testing.assert_close(asked(file, base), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(asked(file, str(folder)), expected, rtol=0, atol=1e-5)


def test_of_a_full_fine_tuning_with_its_text_encoder_all_is_taken(base, tmp_path):
    policy = moved(StableDiffusion(base, FullFineTuning(text_encoder=True)))
    adaptation = {"class_path": "FullFineTuning", "init_args": {"text_encoder": True}}
    folder = write_run(tmp_path / "full", policy, {"pretrained": base, "adaptation": adaptation})
    expected = predicted(policy)
    assert torch.equal(asked(folder), expected)
    torch.testing.assert_close(asked(folder / "export" / "step=0000003"), expected, rtol=0, atol=1e-6)
    shutil.rmtree(folder / "checkpoints")
    torch.testing.assert_close(asked(folder), expected, rtol=0, atol=1e-6)


def test_a_run_that_keeps_an_average_is_its_average(base, tmp_path):
    policy = moved(StableDiffusion(base, LoRA()))
    settings = {"pretrained": base, "adaptation": {"class_path": "LoRA"}}
    folder = write_run(tmp_path / "ema", policy, settings, average=0.125)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.125
    assert torch.equal(asked(folder), predicted(policy))


def test_a_single_file_has_its_layout_from_the_base(base, untrained, single):  # noqa: F811
    assert torch.equal(asked(single, base), untrained)


def test_number_types(base, untrained, lora_run):
    half = asked(base, dtype="bf16")
    assert 1e-5 < (half - untrained).abs().max() < 0.1
    policy = find_policy(str(lora_run[0]), None).load("bf16")
    assert {parameter.dtype for parameter in policy.unet.parameters()} == {torch.bfloat16}


def test_lora_weights_of_another_base_are_told_before_weights_are_read(pipelines, base, tmp_path):
    moved(StableDiffusionXL(str(pipelines / "tiny-sdxl"), LoRA(rank=2))).save_pretrained(tmp_path / "xl")
    with pytest.raises(
        ConfigError, match="they are of another base model .layer .*; name theirs with --base"
    ) as caught:
        find_policy(str(tmp_path / "xl"), base).check()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_settings_is_told(lora_run, base, tmp_path):
    folder = shutil.copytree(lora_run[0], tmp_path / "other")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("rank: 2", "rank: 4"))
    with pytest.raises(ConfigError, match=r"last\.ckpt: its weights are not those of its run's settings"):
        find_policy(str(folder), None).load("fp32")


def test_runs_without_weights_or_settings_are_told(lora_run, tmp_path):
    (tmp_path / "begun").mkdir()
    shutil.copy(lora_run[0] / "config.yaml", tmp_path / "begun")
    with pytest.raises(ConfigError, match="no checkpoint in .*begun"):
        find_policy(str(tmp_path / "begun"), None)
    shutil.copytree(lora_run[0] / "checkpoints", tmp_path / "bare" / "checkpoints")
    with pytest.raises(ConfigError, match="bare holds no config.yaml of a run"):
        find_policy(str(tmp_path / "bare" / "checkpoints" / "last.ckpt"), None)
    with pytest.raises(ConfigError, match="the checkpoint does not exist"):
        find_policy(str(lora_run[0] / "checkpoints" / "step=0000009.ckpt"), None)


@pytest.mark.filterwarnings("ignore:The .local_dir_use_symlinks. argument:UserWarning")  # diffusers 0.41's own call
def test_hub_ids_are_told_by_their_form(base):
    assert find_policy("organisation/name/unet", base).overlay.place == "organisation/name/unet"
    assert find_policy("organisation/name/lora.safetensors", base).overlay.name == "organisation/name/lora.safetensors"
    with pytest.raises(ConfigError, match="cannot be fetched from the hub"):
        find_policy("organisation/name", None)


@pytest.mark.parametrize(("name", "policy_class"), [("tiny-sd3", StableDiffusion3), ("tiny-flux", Flux)])
def test_flow_models_are_known_by_their_transformer(pipelines, tmp_path, name, policy_class):
    """A pipeline, a LoRA and a transformer of its own."""
    folder = str(pipelines / name)

    def predicted_by(word, base=None):
        source = find_policy(str(word), base)
        source.check()
        assert own_size(source) == (64 if name == "tiny-sd3" else None)
        return predicted(source.load("fp32"))

    untrained = predicted_by(folder)
    for adaptation in (LoRA(rank=2), FullFineTuning()):
        policy = moved(policy_class(folder, adaptation))
        place = tmp_path / type(adaptation).__name__
        policy.save_pretrained(place)
        torch.testing.assert_close(predicted_by(place, folder), predicted(policy), rtol=0, atol=1e-4)
        assert not torch.allclose(predicted(policy), untrained, atol=1e-2)


def test_what_belongs_to_another_flow_model_is_told(pipelines, tmp_path):
    Flux(str(pipelines / "tiny-flux"), LoRA(rank=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="of another base model"):
        asked(tmp_path / "lora", str(pipelines / "tiny-sd3"))
    Flux(str(pipelines / "tiny-flux"), FullFineTuning()).save_pretrained(tmp_path / "full")
    with pytest.raises(ConfigError, match="its transformer has _class_name FluxTransformer2DModel"):
        asked(tmp_path / "full", str(pipelines / "tiny-sd3"))
