"""An objective from outside of the packages: where to look and what it costs; the command trains with it."""

import math

import pytest
import torch
from outside import outside  # noqa: F401  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")

SLIC = '''
"""SLiC: a ranking loss on the pair beside the chosen picture's own error."""

from dataclasses import dataclass

from lightning_modules.objectives.pairwise import Gains, PairwiseObjective, loss_output


@dataclass(frozen=True)
class Ranking(PairwiseObjective):
    margin: float = 1.0
    weight: float = 0.1

    def loss(self, batch, query, policy_output, reference_output, schedule):
        gains = Gains.of(query, policy_output, reference_output)
        per_pair = (self.margin - gains.margin).clamp(min=0) + self.weight * gains.chosen_error
        return loss_output(per_pair, gains.metrics(query, schedule) | {"ranking": per_pair.mean()})
'''

ALONE = '''
"""An objective without any base of the framework but the contract: it asks at clean latents, at the last timestep."""

from dataclasses import dataclass

import torch

from lightning_modules.batches import DenoiserQuery
from lightning_modules.objectives.base import LossOutput, Objective


@dataclass(frozen=True)
class Silence(Objective):
    needs_reference = False
    needs_rejected = False

    def query(self, batch, cond, schedule, generators):
        last = torch.full((len(batch),), schedule.num_timesteps - 1, device=batch.chosen.device)
        return DenoiserQuery(batch.chosen, last, cond)

    def loss(self, batch, query, policy_output, reference_output, schedule):
        assert batch.rejected is None
        assert reference_output is None
        return LossOutput(policy_output.square().mean(), {"rows": torch.tensor(float(len(policy_output)))})
'''


def test_the_command_trains_with_it(outside, tmp_path):  # noqa: F811
    trained = outside(SLIC, "--model.objective=own.Ranking", "--model.objective.margin=2.0")
    assert trained.model.objective.margin == 2.0
    assert trained.trainer.global_step == 2
    metrics = trained.trainer.callback_metrics
    assert metrics["train/ranking"] == metrics["train/loss"]
    assert math.isfinite(metrics["train/margin"])
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert "class_path: own.Ranking" in (tmp_path / "run" / "config.yaml").read_text()


def test_it_needs_no_more_than_the_contract(outside):  # noqa: F811
    trained = outside(ALONE, "--model.objective=own.Silence", "--model.reference=null")
    assert trained.model.reference is None
    assert trained.trainer.callback_metrics["train/rows"] == 2
