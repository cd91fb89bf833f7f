"""The demo's whole road at its smallest: drawn pairs, shards, training, judging, resuming."""

import json

from experiments import demo


def test_the_demo_draws_trains_judges_and_goes_on_where_it_stopped(tmp_path, capsys):
    words = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--pairs", "8", "--seed", "1"]
    words += ["--trainer.max_steps=2", "--data.batch_size=4", "--trainer.enable_progress_bar=false"]
    demo.main(words)
    run = tmp_path / "runs" / "demo-seed1"
    judged = json.loads((run / "win_rate.json").read_text())
    assert [(entry["split"], entry["step"]) for entry in judged][-1] == ("test", 2)
    assert judged[-1]["comparisons"]["shapes"]["n"] == judged[-1]["comparisons"]["shapes/look"]["n"] > 0
    assert any((run / "samples").glob("*.png"))
    assert (run / "export").is_dir()
    first = capsys.readouterr().out
    assert first.count("$ python -m experiments.") == 4
    assert "win rate" in first
    demo.main(words)
    assert capsys.readouterr().out.count("$ python -m experiments.") == 2
