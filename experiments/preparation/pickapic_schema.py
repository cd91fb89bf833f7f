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


def pair_row(
    index: int,
    seed: int,
    caption: str,
    pictures: UInt8[np.ndarray, "2 H W 3"],
    scores: Sequence[float],
    tie: float,
    examples: int,
    source: str,
) -> dict[str, Any]:
    """One row of ``SCHEMA``.

    Args:
        index: of the pair in its data set; with ``seed`` it names the pictures.
        seed: of the data set.
        caption: the prompt of both pictures.
        pictures: as bytes, RGB.
        scores: of both pictures; the higher one is preferred.
        tie: scores closer than that make a tie, label 0.5.
        examples: rows of the data set that have this prompt.
        source: what made the pictures.
    """
    gap = scores[0] - scores[1]
    label = 0.5 if abs(gap) < tie or gap == 0 else float(gap > 0)
    uids = [f"{derive_seed(seed, 'picture', index, k):016x}" for k in (0, 1)]
    return {
        "are_different": label != 0.5,
        "best_image_uid": "tie" if label == 0.5 else uids[0 if label == 1 else 1],
        "caption": caption,
        "created_at": 0,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": f"{source}://{uids[0]}",
        "image_1_uid": uids[1],
        "image_1_url": f"{source}://{uids[1]}",
        "jpg_0": png(pictures[0]),
        "jpg_1": png(pictures[1]),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": source,
        "model_1": source,
        "ranking_id": index,
        "user_id": 0,
        "num_example_per_prompt": examples,
        "__index_level_0__": index,
    }
