"""A data module from outside of the packages: any Lightning one that gives the framework's batches."""

import pytest
import torch
from outside import outside  # noqa: F401  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")

OWN = '''
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_modules.batches import PreferencePairs


class Colours(LightningDataModule):
    """Pictures of one colour each: the chosen ones are bright."""

    def __init__(self, pairs: int = 8, batch_size: int = 2, size: int = 32):
        super().__init__()
        self.pairs, self.batch_size, self.size = pairs, batch_size, size

    def batch(self, first):
        indices = torch.arange(first, first + self.batch_size)
        bright = (indices / self.pairs)[:, None, None, None].expand(-1, 3, self.size, self.size)
        ids = torch.tensor([float(self.size)] * 2 + [0.0] * 2 + [float(self.size)] * 2).expand(self.batch_size, 6)
        return PreferencePairs(bright, -bright, ("a colour",) * self.batch_size, ids, ids, indices)

    def train_dataloader(self):
        batches = [self.batch(first) for first in range(0, self.pairs, self.batch_size)]
        return DataLoader(batches, batch_size=None)

    val_dataloader = train_dataloader
'''


def test_the_command_trains_and_validates_on_it(outside, tmp_path):  # noqa: F811
    words = ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=1"]
    trained = outside(OWN, *words, data=["--data=own.Colours", "--data.pairs=12"])
    assert trained.datamodule.pairs == 12
    assert trained.trainer.global_step == 2
    assert trained.trainer.callback_metrics["val/loss"].isfinite()
    assert "class_path: own.Colours" in (tmp_path / "run" / "config.yaml").read_text()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
