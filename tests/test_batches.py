"""Records move whole, and conditionings keep their rows in order."""

import json
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from lightning_modules.batches import Conditioning, DenoiserQuery, Record


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
    with pytest.raises(ValueError, match="pooled is NoneType in some and Tensor in others"):
        Conditioning.cat([cond(1), cond(2, pooled=False)])


def test_what_does_not_fit_cannot_be_joined_and_nothing_is_no_record():
    with pytest.raises(ValueError, match=r"embeds has different shapes, \(1, 1\) and \(2, 1\)"):
        Conditioning.cat([Conditioning(torch.zeros(1, 1, 1)), Conditioning(torch.zeros(1, 2, 1))])
    with pytest.raises(ValueError, match="at least one part"):
        Conditioning.cat([])
    queries = [DenoiserQuery(torch.zeros(1, 4, 2, 2), torch.tensor([1]), cond(1), scale) for scale in (1.0, 5.0)]
    with pytest.raises(ValueError, match="guidance_scale differs, 1.0 and 5.0"):
        DenoiserQuery.cat(queries)
    joined = DenoiserQuery.cat([queries[0], queries[0]])
    assert (len(joined.cond), joined.timesteps.tolist(), joined.guidance_scale) == (2, [1, 1], 1.0)


@dataclass(frozen=True)
class Kept(Record):
    steps: Real[Tensor, " m"]
    gaps: Float[Tensor, "m k"]
    flags: Bool[Tensor, " m"]


@pytest.mark.parametrize("steps", [torch.tensor([7, 5]), torch.tensor([0.5, 0.25])])
def test_a_record_comes_back_out_of_json_with_its_number_types(steps):
    kept = Kept(steps, torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([True, False]))
    back = Kept.from_json(json.loads(json.dumps(kept.to_json())))
    for name in ("steps", "gaps", "flags"):
        assert torch.equal(getattr(back, name), getattr(kept, name))
        assert getattr(back, name).dtype == getattr(kept, name).dtype


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"gaps": [0.1, 0.2]}, "gaps has 1 dimensions, not 2"),
        ({"steps": [7]}, "different lengths"),
        ({"flags": [["x"]]}, "type|bool|str"),
        ({"steps": None}, "None"),
    ],
)
def test_json_of_another_form_is_refused(change, error):
    value = {"steps": [7, 5], "gaps": [[0.1], [0.2]], "flags": [True, False]} | change
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError), match=error):
        Kept.from_json(value)
