"""A whole LPO iteration against a whole SPO iteration on the embedded world: one pool of the same prompts, trained on.

    python tests/benchmarks/lpo_iteration.py            16 prompts
    python tests/benchmarks/lpo_iteration.py 32

Both are counted by ``Cost``: processor seconds from the start of the fit to its end, without start-up and exports.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from experiments import run
from experiments.cli.compose import find_config

WITHOUT = ("SampleGrid", "WinRate", "ExportPolicy", "RunCheckpoint")


def cost_of(name: str, prompts: int, folder: Path) -> dict[str, float]:
    """The last entry of ``cost.json`` of one pool."""
    assert find_config(name).exists()
    run_dir = folder / name
    run.main(
        ["--config", name, f"--run_dir={run_dir}", "--trainer.max_epochs=1", "--data.batch_size=16",
         f"--data.prompts_per_pool={prompts}", f"--data.prompts_per_batch={prompts}", "--data.min_pairs=0",
         "--trainer.enable_progress_bar=false", *(f"--trainer.callbacks.{callback}=null" for callback in WITHOUT)]
    )  # fmt: skip
    entry: dict[str, float] = json.loads((run_dir / "cost.json").read_text())[-1]
    return entry


def main() -> None:
    prompts = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    with tempfile.TemporaryDirectory() as folder:
        found = {name: cost_of(name, prompts, Path(folder)) for name in ("spo_tiny", "lpo_tiny")}
    for name, entry in found.items():
        counts = {key: round(value, 1) for key, value in entry.items() if key.endswith(("pairs", "rows", "pictures"))}
        print(f"{name}: {entry['cpu_seconds']:.1f} CPU s, {counts}")
    print(f"SPO / LPO: {found['spo_tiny']['cpu_seconds'] / found['lpo_tiny']['cpu_seconds']:.2f} in CPU time")


if __name__ == "__main__":
    main()
