"""The embedded world's latent reward model, and LPO with it."""

from __future__ import annotations

import json

import pytest

from experiments import prepare_pickapic, run
from experiments.shapes import prepare as prepare_shapes


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")
def test_the_commands_of_lrm_tiny_make_a_model_that_lpo_tiny_takes_as_its_judge(tmp_path, monkeypatch):
    """On a handful of pairs and prompts; nothing is decoded."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("drawn", "0"), ("feedback-val", "1")):
        prepare_shapes.main(["--output", f"data/shapes/{name}", "--pairs", "16", "--seed", seed])
        prepare_pickapic.main(["--input", f"data/shapes/{name}", "--output", f"data/shapes/{name}-pairs"])
    quiet = "--trainer.enable_progress_bar=false"
    run.main(["--config", "lrm_tiny", "--data.batch_size=4", "--trainer.max_steps=2", "--trainer.val_check_interval=1",
              "--trainer.limit_val_batches=1", quiet])  # fmt: skip
    exported = tmp_path / "runs" / "lrm_tiny" / "export" / "preference"
    assert sum(file.stat().st_size for file in exported.rglob("*") if file.is_file()) < 3e6
    run.main(
        ["--config", "lpo_tiny", "--data.prompts_per_pool=2", "--data.prompts_per_batch=2", "--data.batch_size=4",
         "--data.sampler.steps=4", "--data.sampler.threshold=0.0", "--trainer.max_steps=2", quiet,
         "--trainer.callbacks.SampleGrid=null",
         "--trainer.callbacks.WinRate=null"]
    )  # fmt: skip
    entry = json.loads((tmp_path / "runs" / "lpo_tiny" / "cost.json").read_text())[-1]
    assert entry["step"] == 2
    assert entry["drawn_pictures"] == 0
    assert entry["sampling_denoiser_rows"] % (2 * 4 * 2) == 0  # two prompts, four steps, twice for guidance
