"""Thresholds that differ from step to step, against the tables of LPO's official code."""

import pytest
import torch

from lightning_modules.errors import ConfigError
from lightning_modules.sampling.step_sampler import StepSampler
from lightning_modules.sampling.thresholds import AlongSigma
from lightning_modules.schedules.discrete import NoiseSchedule

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULE = NoiseSchedule.from_scheduler_config(SD15)


@pytest.mark.parametrize(("name", "threshold"), [("sd", AlongSigma(0.35, 0.5)), ("sdxl", AlongSigma(0.45, 0.6))])
def test_thresholds_along_sigma_are_lpos(golden, name, threshold):
    known = golden("lpo_thresholds")
    trajectory = SCHEDULE.trajectory(20)
    assert [step.timestep for step in trajectory] == known["timesteps"].tolist()
    found = torch.tensor(threshold.at(trajectory, SCHEDULE), dtype=torch.float64)
    torch.testing.assert_close(found, known[f"{name}.sigma_exact"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found, known[f"{name}.sigma"].double(), rtol=0, atol=2e-5)  # a table of four digits


def test_one_number_is_the_threshold_of_every_step():
    trajectory = SCHEDULE.trajectory(5)
    assert StepSampler(steps=5, branch_from_step=1, threshold=0.2).thresholds(trajectory, SCHEDULE) == [0.2] * 5
    along = StepSampler(steps=5, branch_from_step=1, threshold=AlongSigma(0.1, 0.3)).thresholds(trajectory, SCHEDULE)
    assert (along[0], along[-1]) == (pytest.approx(0.3), pytest.approx(0.1))


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.4), (-0.1, 0.4), (0.5, 1.0)])
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(ConfigError, match="AlongSigma wants 0 <= low <= high < 1"):
        AlongSigma(low, high)
