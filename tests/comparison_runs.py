"""Run folders made by hand: what WinRate, Cost and the command line leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from callbacks.evaluation.report import Report

PROTOCOL = {
    "prompts": "0123",
    "number_of_prompts": 2,
    "images_per_prompt": 2,
    "image_size": 32,
    "seed": 0,
    "sampler": {"steps": 20, "guidance_scale": 3.0, "eta": 0.0},
    "rewards": ["shapes"],
}
BASE = [0.5, 0.5, 0.5, 0.5]


def scores(values: list[float]) -> dict[str, list[list[float]]]:
    """The reward and one part, half a point higher, of the pictures of two prompts."""
    half, parts = len(values) // 2, [value + 0.5 for value in values]
    return {"shapes": [values[:half], values[half:]], "shapes/correctness": [parts[:half], parts[half:]]}


def cost(step: int, pairs: int = 4, sampling: int = 0, seconds: float = 1.0) -> dict[str, float]:
    """After ``step`` steps of DPO, and a pool of ``sampling`` denoiser rows a step."""
    return {
        "step": step,
        "pairs": step * pairs,
        "data_pictures": 2 * step * pairs,
        "drawn_pictures": step * sampling / 4,
        "training_denoiser_rows": 4 * step * pairs,
        "sampling_denoiser_rows": step * sampling,
        "cpu_seconds": step * seconds,
        "wall_seconds": step * seconds,
        "process_memory_bytes": 1e9,
        "device_memory_bytes": 0.0,
    }


def write_run(
    folder: Path,
    values: list[float],
    *,
    base: list[float] | None = BASE,
    step: int = 100,
    halfway: list[float] | None = None,
    costs: list[dict[str, float]] | None = None,
    protocol: dict[str, Any] | None = None,
    split: str = "test",
    config: str = "seed_everything: 0\n",
    former: bool = False,
) -> Path:
    """A finished run with one evaluation on ``split`` and two on validation prompts, by the real report's code.

    A ``former`` one as before the scores of every picture were kept.
    """
    folder.mkdir(parents=True)
    reference = None if base is None else scores(base)
    how = PROTOCOL | (protocol or {})
    for name, at, found in (("val", step // 2, halfway or values), ("val", step, values), (split, step, values)):
        Report.of(name, at, scores(found), reference, how).append_to(folder / "win_rate.json")
    if former:
        entries = json.loads((folder / "win_rate.json").read_text())
        for entry in entries:
            del entry["scores"]
            for mean in (*entry["policy"].values(), *entry["reference"].values()):
                del mean["low"], mean["high"]
        (folder / "win_rate.json").write_text(json.dumps(entries))
    if costs is not None:
        (folder / "cost.json").write_text(json.dumps(costs))
    (folder / "config.yaml").write_text(config)
    return folder
