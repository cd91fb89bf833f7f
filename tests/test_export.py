"""Exports: when they are written, how many stay, who can read them, and that plain diffusers does."""

import os
import signal

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny_world import make, pairs, trainer

from callbacks.export_policy import ExportPolicy, exports
from callbacks.resume.checkpointing import RunCheckpoint
from lightning_modules.policies.adaptation import FullFineTuning
from lightning_modules.policies.lora import LoRA
from lightning_modules.references import AdapterOff, FrozenCopy
from lightning_modules.rewards.step_aware import StepAwarePreferenceModel


def exported(folder):
    return [path.name for path in exports(folder / "export")]


def test_written_with_every_checkpoint_and_at_the_end(tmp_path, pipelines):
    module = make(pipelines, LoRA(), AdapterOff())
    callbacks = ExportPolicy(keep=-1), RunCheckpoint(every_n_steps=2)
    trainer(tmp_path, *callbacks, max_steps=3, enable_checkpointing=True).fit(module, pairs())
    assert exported(tmp_path) == ["step=0000002", "step=0000003"]


def test_written_every_n_steps_and_the_newest_stay(tmp_path, pipelines):
    module = make(pipelines, LoRA(), AdapterOff())
    trainer(tmp_path, ExportPolicy(every_n_steps=1, keep=2), max_steps=4).fit(module, pairs())
    assert exported(tmp_path) == ["step=0000003", "step=0000004"]


class Dies(LoRA):
    def write(self, networks, folder):
        super().write(networks, folder)
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_export_left_is_cleared_away_by_the_next(tmp_path, pipelines):
    folder, policy = tmp_path / "export", make(pipelines, Dies(), AdapterOff()).policy
    (folder / ".step=0000001-mine").mkdir(parents=True)
    child = os.fork()
    if child == 0:
        policy.save_pretrained(folder / "step=0000001")
    os.waitpid(child, 0)
    left = [path.name for path in folder.iterdir() if path.name != ".step=0000001-mine"]
    assert len(left) == 1
    assert left[0].startswith(".step=0000001-unfinished-")
    trainer(tmp_path, ExportPolicy(), max_steps=2).fit(make(pipelines, LoRA(), AdapterOff()), pairs())
    assert sorted(path.name for path in folder.iterdir()) == [".step=0000001-mine", "step=0000002"]


@pytest.mark.parametrize("kind", ["lora", "full", "preference"])
@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_files_have_the_mode_of_new_files(tmp_path, pipelines, kind, umask):
    if kind == "preference":
        exporter = StepAwarePreferenceModel(str(pipelines / "tiny-spm"), processor=None)
    else:
        exporter = make(pipelines, LoRA() if kind == "lora" else FullFineTuning(), FrozenCopy()).policy
    before = os.umask(umask)
    try:
        exporter.save_pretrained(tmp_path / "export")
    finally:
        os.umask(before)
    written = [tmp_path / "export", *(tmp_path / "export").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in written if path.is_file()} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in written if path.is_dir()} == {0o777 & ~umask}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_plain_diffusers_reads_the_full_network(tmp_path, pipelines):
    module = make(pipelines, FullFineTuning(), FrozenCopy())
    trainer(tmp_path, ExportPolicy(), max_steps=1).fit(module, pairs())
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "step=0000001" / "unet")
    ours = module.policy.unet.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in unet.state_dict().items())


def test_plain_diffusers_reads_the_lora(tmp_path, pipelines):
    module = make(pipelines, LoRA(), AdapterOff())
    trainer(tmp_path, ExportPolicy(), max_steps=1).fit(module, pairs())
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines / "tiny-sd15", safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "export" / "step=0000001")
    theirs = {name.replace("default_0", "default"): value for name, value in pipeline.unet.state_dict().items()}
    trained = {name: p for name, p in module.policy.unet.named_parameters() if p.requires_grad}
    assert trained
    assert all(torch.equal(theirs[name], value) for name, value in trained.items())


def test_a_run_that_goes_back_keeps_its_own_export(tmp_path, pipelines):
    """Steps of the line that it left are dropped, where the one just written would be the oldest by its number."""
    trainer(tmp_path, ExportPolicy(), max_steps=3).fit(make(pipelines, LoRA(), AdapterOff()), pairs())
    assert [path.name for path in exports(tmp_path / "export")] == ["step=0000003"]
    trainer(tmp_path, ExportPolicy(), max_steps=1).fit(make(pipelines, LoRA(), AdapterOff()), pairs())
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["step=0000001"]
