"""A decoder's upsampling and the convolution behind it as one convolution: ``policy.merged_upsampling``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d


def merge_upsampling(network: nn.Module) -> int:
    """Have each layer that doubles a map and convolves it do both at once, with 4 products in place of 9.

    In place, and for frozen weights, whose filters are computed once. Names and weights stay what they are; results
    move by rounding. A layer whose convolution is not a plain one of 3 x 3 stays as it is.

    Returns:
        how many layers were merged.
    """
    found = [part for part in network.modules() if type(part) is Upsample2D and _can_merge(part)]
    for part in found:
        conv: Any = part.conv
        filters = merged_filters(conv.weight).to(memory_format=_layout(conv.weight))
        part.register_buffer("filters", filters, persistent=False)
        part.__class__ = MergedUpsample2D
    return len(found)


def _can_merge(layer: Upsample2D) -> bool:
    conv: Any = getattr(layer, "conv", None)
    return (
        layer.interpolate
        and layer.norm is None
        and type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
    )


class MergedUpsample2D(Upsample2D):
    """Doubles both sides by repeating every value, and convolves, as one convolution of the small map.

    Of the nine values that a 3 x 3 filter meets in the doubled map, at most 2 x 2 differ. Which of its weights meet
    the same one depends on whether row and column are even or odd: four filters of 2 x 2, whose results interleave.
    """

    filters: Tensor

    def forward(
        self, hidden_states: Float[Tensor, "n i h w"], output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Float[Tensor, "n o H W"]:
        if output_size is not None:  # sides that are not doubled
            return super().forward(hidden_states, output_size, *args, **kwargs)
        n, _, h, w = hidden_states.shape
        conv: Any = self.conv
        bias = None if conv.bias is None else conv.bias.repeat(4)
        found = conv2d(hidden_states, self.filters, bias, padding=1)
        doubled = torch.empty(n, self.out_channels, 2 * h, 2 * w, dtype=found.dtype, device=found.device,
                              memory_format=_layout(found))  # fmt: skip
        parts = found.unflatten(1, (2, 2, -1))
        for row in range(2):
            for column in range(2):
                doubled[:, :, row::2, column::2] = parts[:, row, column, :, row : row + h, column : column + w]
        return doubled


def merged_filters(weight: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "four_o i 2 2"]:
    """The filters of even rows and even columns, even rows and odd columns, odd and even, odd and odd.

    Rows ``2 y`` and ``2 y + 1`` of the doubled map are row ``y`` of the small one. Around row ``2 y`` the upper weights
    meet ``y - 1``, the middle and the lower ones ``y``; around ``2 y + 1`` the upper and the middle ones meet ``y``,
    the lower ones ``y + 1``.
    """
    return _even_and_odd(_even_and_odd(weight, 2), 4).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)


def _even_and_odd(weight: Tensor, dim: int) -> Tensor:
    first, middle, last = weight.unbind(dim)
    even, odd = torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)
    return torch.stack([even, odd], dim)


def _layout(tensor: Tensor) -> torch.memory_format:
    innermost = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if innermost else torch.contiguous_format
