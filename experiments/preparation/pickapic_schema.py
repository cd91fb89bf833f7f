"""The form in which preference pairs are published: Pick-a-Pic's parquet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from lightning_modules.randomness import derive_seed
from lightning_modules.sampling.eight_bit import png

# As published: yuvalkirstain/pickapic_v1 and _v2.
SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


def label_of(scores: Sequence[float], tie: float) -> float:
    """1 where the first score is higher, 0 where the second is, 0.5 where they are equal or closer than ``tie``."""
    gap = scores[0] - scores[1]
    return 0.5 if abs(gap) < tie or gap == 0 else float(gap > 0)


def pair_row(
    index: int,
    seed: int,
    caption: str,
    pictures: UInt8[np.ndarray, "2 H W 3"],
    label: float,
    examples: int,
    made_by: tuple[str, str],
) -> dict[str, Any]:
    """One row of ``SCHEMA``.

    Args:
        index: of the pair in its data set; with ``seed`` it names the pictures.
        seed: of the data set.
        caption: the prompt of both pictures.
        pictures: as bytes, RGB.
        label: 1 where the first is preferred, 0 where the second is, 0.5 for a tie.
        examples: rows of the data set that have this prompt.
        made_by: what made each picture.
    """
    uids = [f"{derive_seed(seed, 'picture', index, k):016x}" for k in (0, 1)]
    return {
        "are_different": label != 0.5,
        "best_image_uid": "tie" if label == 0.5 else uids[0 if label == 1 else 1],
        "caption": caption,
        "created_at": 0,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": f"{made_by[0]}://{uids[0]}",
        "image_1_uid": uids[1],
        "image_1_url": f"{made_by[1]}://{uids[1]}",
        "jpg_0": png(pictures[0]),
        "jpg_1": png(pictures[1]),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": made_by[0],
        "model_1": made_by[1],
        "ranking_id": index,
        "user_id": 0,
        "num_example_per_prompt": examples,
        "__index_level_0__": index,
    }
