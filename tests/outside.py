"""A module of somebody else beside a run of the embedded world that takes seconds."""

import sys

import pytest
from pairs_data import write_shards

from experiments import run

QUIET = ["--trainer.accelerator=cpu", "--trainer.callbacks=[]", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false"]  # fmt: skip


@pytest.fixture
def outside(tmp_path, monkeypatch, handlers):
    """``outside(source, *words)`` writes ``own.py``, runs a config with the words, and returns what ran.

    Two steps on the embedded pipeline, in ``tmp_path / "run"``, on four pairs unless ``data`` has other words; no
    callbacks, unless words name some.
    """
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "pairs", [4])

    def start(source, *words, config="dpo_tiny", data=(f"--data.shards={tmp_path / 'pairs'}", "--data.batch_size=2")):
        (tmp_path / "own.py").write_text(source)
        words = [f"--config={config}", f"--run_dir={tmp_path / 'run'}", *data, "--trainer.max_steps=2", *QUIET, *words]
        return run.main(words)

    yield start
    sys.modules.pop("own", None)
