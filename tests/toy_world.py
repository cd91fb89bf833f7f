"""A world without networks for the command line: a module, its data and a YAML."""

from abc import ABC
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.utils.data import DataLoader

from experiments import run


class Loss(ABC):  # noqa: B024  # a kind of strategy, with nothing to do here
    """What ``ToyModule`` is trained for."""


@dataclass(frozen=True)
class Strict(Loss):
    beta: float = 5000.0


@dataclass(frozen=True)
class Lenient(Loss):
    beta: float = 10.0
    clip: float = 0.1


class ToyModule(LightningModule):
    def __init__(
        self, objective: Loss, optimizer: OptimizerCallable = torch.optim.AdamW, seed: int = 0, width: int = 2
    ) -> None:
        super().__init__()
        self.objective, self.make_optimizer, self.seed = objective, optimizer, seed
        self.net = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class ToyData(LightningDataModule):
    def __init__(self, batch_size: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def train_dataloader(self):
        return DataLoader(torch.ones(64, 2), self.batch_size)


TOY = """
seed_everything: 7
trainer: {accelerator: cpu, max_steps: 2, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: ToyModule
  init_args:
    seed: ${seed_everything}
    objective: {class_path: Lenient, init_args: {beta: 11.0}}
    optimizer: {class_path: AdamW, init_args: {lr: 1e-4}}
data:
  class_path: ToyData
  init_args: {seed: "${seed_everything}"}
"""


def toy_folder(tmp_path, monkeypatch):
    """An empty working folder with toy.yaml in it; what a run does to the environment is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls the parser by an older name
    (tmp_path / "toy.yaml").write_text(TOY)
    return tmp_path


def start(*words):
    return run.main([*words, "--config", "toy.yaml"])
