"""Pairs per optimizer step: the same on every machine, and said."""

from unittest.mock import Mock

import pytest
from lightning.pytorch import Trainer

from datamodules.preference_pairs import PreferencePairsDataModule
from experiments.cli.step_size import settle_step
from lightning_modules.errors import ConfigError


def settled(ranks, batch, wanted=None, accumulated=1):
    trainer = Mock(spec=Trainer, world_size=ranks, accumulate_grad_batches=accumulated)
    data = PreferencePairsDataModule("nowhere", batch_size=batch, pairs_per_step=wanted)
    return settle_step(trainer, data), trainer.accumulate_grad_batches


@pytest.mark.parametrize(
    ("given", "told", "accumulated"),
    [
        ((8, 4, 2048), "8 devices x 4 x 64 = 2048 pairs per step", 64),
        ((1, 4, 2048), "1 device x 4 x 512 = 2048 pairs per step", 512),
        ((4, 10, 40), "4 devices x 10 x 1 = 40 pairs per step", 1),
        ((2, 3, None, 5), "2 devices x 3 x 5 = 30 pairs per step", 5),
        ((2, 3, 30, 5), "2 devices x 3 x 5 = 30 pairs per step", 5),
    ],
)
def test_batches_are_accumulated_until_they_make_a_step(given, told, accumulated):
    assert settled(*given) == (told, accumulated)


def test_what_does_not_divide_is_refused_with_the_nearest_that_does():
    message = (
        "data.pairs_per_step 2048 is no multiple of 6 devices x data.batch_size 4 = 24 pairs per batch; "
        "the nearest that are: 2040 and 2064. Or take"
    )
    with pytest.raises(ConfigError, match=message):
        settled(6, 4, 2048)
    with pytest.raises(ConfigError, match="= 80 pairs per batch; the nearest that is: 80. Or"):
        settled(8, 10, 40)


def test_two_numbers_for_one_thing_must_agree():
    message = "data.pairs_per_step 2048 is 8 devices x 4 x 64, but trainer.accumulate_grad_batches is 512; leave one"
    with pytest.raises(ConfigError, match=message):
        settled(8, 4, 2048, 512)


def test_a_step_of_no_pairs_is_none():
    with pytest.raises(ConfigError, match="data.pairs_per_step must be at least 1, got 0"):
        settled(1, 1, 0)
