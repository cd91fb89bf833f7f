"""Records move whole, and conditionings keep their rows in order."""

import pytest
import torch

from lightning_modules.batches import Conditioning, DenoiserQuery


def cond(*rows, pooled=True):
    values = torch.tensor(rows, dtype=torch.float32)
    return Conditioning(values.reshape(-1, 1, 1), values.reshape(-1, 1) if pooled else None, None)


def test_a_record_moves_its_nested_tensors_and_leaves_the_rest():
    query = DenoiserQuery(torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64), cond(1, 2), 5.0).to("meta")
    assert {query.latents.device.type, query.timesteps.device.type, query.cond.pooled.device.type} == {"meta"}
    assert query.guidance_scale == 5.0
    assert query.cond.time_ids is None


def test_rows_are_repeated_joined_and_picked_in_order():
    assert cond(1, 2).repeat_interleave(2).pooled.flatten().tolist() == [1, 1, 2, 2]
    joined = Conditioning.cat([cond(1, 2), cond(3)])
    assert joined.pooled.flatten().tolist() == joined.embeds.flatten().tolist() == [1, 2, 3]
    assert joined[torch.tensor([2, 0])].pooled.flatten().tolist() == [3, 1]
    assert len(joined) == 3


def test_a_field_set_in_some_parts_only_cannot_be_joined():
    with pytest.raises(TypeError):
        Conditioning.cat([cond(1), cond(2, pooled=False)])
