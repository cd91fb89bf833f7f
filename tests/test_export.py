"""Exports: when they are written, how many stay, and that plain diffusers reads them."""

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny_world import make, pairs, trainer

from callbacks.checkpointing import RunCheckpoint
from callbacks.export import ExportPolicy, exports
from lightning_modules.policies.adaptation import FullFineTuning, LoRA
from lightning_modules.references import AdapterOff, FrozenCopy


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
