"""``policy.merged_upsampling``: a doubled map's convolution as one of the small map, equal within rounding."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file
from torch import nn

from datamodules.pools.fingerprint import fingerprint
from lightning_modules.errors import ConfigError
from lightning_modules.policies import FullFineTuning, StableDiffusion, StableDiffusion3
from lightning_modules.policies.merged_upsampling import MergedUpsample2D, merge_upsampling, merged_filters
from lightning_modules.randomness import generator


def layer(channels=3, out_channels=5, **options):
    torch.manual_seed(0)
    return Upsample2D(channels, use_conv=True, out_channels=out_channels, **options).double().requires_grad_(False)


def maps(n, channels, h, w):
    return torch.randn(n, channels, h, w, generator=generator("maps"), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 4), (5, 7)])
def test_a_merged_layer_computes_what_the_two_did(h, w, bias):
    plain = layer(bias=bias)
    merged = copy.deepcopy(plain)
    assert merge_upsampling(merged) == 1
    found, expected = merged(maps(2, 3, h, w)), plain(maps(2, 3, h, w))
    assert found.shape == (2, 5, 2 * h, 2 * w)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_filters_by_hand():
    """One row of one filter: on even places the right two weights meet one value, on odd places the left two."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1] = torch.tensor([1.0, 10.0, 100.0])
    even_even, even_odd, odd_even, odd_odd = merged_filters(weight)[:, 0].tolist()
    assert even_even == [[0, 0], [1, 110]]
    assert even_odd == [[0, 0], [11, 100]]
    assert odd_even == [[1, 110], [0, 0]]
    assert odd_odd == [[11, 100], [0, 0]]


def test_channels_innermost_stay_innermost():
    merged = layer().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(merged)
    merge_upsampling(merged)
    given = maps(2, 3, 4, 6).to(memory_format=torch.channels_last)
    assert merged.filters.is_contiguous(memory_format=torch.channels_last)
    assert merged(given).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(merged(given), plain(given), rtol=0, atol=1e-14)


def test_sides_that_are_not_doubled_take_the_plain_way():
    plain = layer()
    merged = copy.deepcopy(plain)
    merge_upsampling(merged)
    given = maps(1, 3, 4, 4)
    assert torch.equal(merged(given, (7, 9)), plain(given, (7, 9)))


def other_conv(**options):
    found = layer()
    found.conv = nn.Conv2d(3, 6, **{"kernel_size": 3, "padding": 1, **options}).double()
    return found


def adapted():
    """Of a class of its own, as a layer that LoRA adapts: its forward is not for others to take over."""
    found = layer()
    found.conv.__class__ = type("Adapted", (nn.Conv2d,), {})
    return found


@pytest.mark.parametrize(
    "given",
    [
        Upsample2D(3),
        Upsample2D(3, use_conv_transpose=True),
        layer(norm_type="rms_norm", eps=1e-6, elementwise_affine=True),
        layer(interpolate=False),
        layer(name="Conv2d_0"),
        other_conv(kernel_size=1, padding=0),
        other_conv(stride=2),
        other_conv(padding=2),
        other_conv(dilation=2),
        other_conv(groups=3),
        other_conv(padding_mode="reflect"),
        adapted(),
    ],
)
def test_other_layers_stay_as_they_are(given):
    assert merge_upsampling(given) == 0
    assert type(given) is Upsample2D


def make(pipelines, kind=StableDiffusion, name="tiny-sd15", **options):
    torch.manual_seed(3)
    return kind(str(pipelines / name), FullFineTuning(), **options)


@pytest.mark.parametrize(("kind", "name"), [(StableDiffusion, "tiny-sd15"), (StableDiffusion3, "tiny-sd3")])
def test_pictures_are_equal_within_rounding_and_nothing_else_moves(pipelines, kind, name):
    plain, merged = (make(pipelines, kind, name, merged_upsampling=value) for value in (False, True))
    layers = [part for part in merged.modules() if isinstance(part, MergedUpsample2D)]
    assert len(layers) == sum(type(part) is Upsample2D for part in plain.vae.decoder.modules()) > 0
    assert all(part in set(merged.vae.decoder.modules()) for part in layers)
    latents = torch.randn(3, plain.latent_channels, 4, 6, generator=generator("latents"))
    torch.testing.assert_close(merged.decode(latents), plain.decode(latents), rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == list(plain.state_dict())


def test_a_decoder_with_nothing_to_merge_is_refused(pipelines, tmp_path):
    AutoencoderKL(block_out_channels=(32,), latent_channels=4).save_pretrained(tmp_path)
    assert make(pipelines, vae=str(tmp_path)).downscale == 1
    with pytest.raises(ConfigError, match="merged_upsampling: .* no upsampling layer .* leave it out"):
        make(pipelines, vae=str(tmp_path), merged_upsampling=True)


def test_a_copy_and_another_number_type_take_the_filters_along(pipelines):
    merged = copy.deepcopy(make(pipelines, merged_upsampling=True)).double()
    plain = make(pipelines).double()
    latents = torch.randn(1, 4, 4, 4, generator=generator("latents"))
    torch.testing.assert_close(merged.decode(latents), plain.decode(latents), rtol=0, atol=1e-6)


def test_exported_weights_are_those_of_the_plain_policy(pipelines, tmp_path):
    for merged in (False, True):
        make(pipelines, merged_upsampling=merged).save_pretrained(tmp_path / str(merged))
    plain, other = (load_file(next((tmp_path / name / "unet").glob("*.safetensors"))) for name in ("False", "True"))
    assert list(plain) == list(other)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_pools_of_such_policies_are_others(pipelines):
    plain, again, other = (make(pipelines, merged_upsampling=value) for value in (False, False, True))
    assert fingerprint(plain) == fingerprint(again) != fingerprint(other)
