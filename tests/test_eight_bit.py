"""Pictures as bytes: rounded, cut off at the ends, and never made of numbers that are none."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.errors import UserError
from lightning_modules.sampling.eight_bit import eight_bit, png


def test_bytes_are_rounded_and_clamped():
    images = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.2]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert eight_bit(images, [""])[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_colours_and_places_stay_where_they_are():
    images = torch.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4) / 255
    data = eight_bit(images, ["a", "b"])
    assert data.shape == (2, 2, 4, 3)
    assert torch.equal(torch.from_numpy(data).permute(0, 3, 1, 2).float() / 255, images)
    assert np.array_equal(np.array(Image.open(io.BytesIO(png(data[1])))), data[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_no_picture(value):
    images = torch.zeros(3, 3, 2, 2)
    images[1, 2, 0, 1] = value
    with pytest.raises(UserError, match=r"1 of 3 pictures are not finite numbers \(the first: 'second'\)"):
        eight_bit(images, ["first", "second", "third"])
