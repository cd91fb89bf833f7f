"""What two processes hold of a training under DDP and under fsdp2, and what it costs them; from ``--size mid`` on.

DPO on a 35M-parameter UNet, with full fine-tuning and with LoRA; what each process holds of weights (the policy's and
the frozen copy's), gradients and moments is counted; peak memory and CPU time are what the ``Cost`` callback says.
"""

import json

import pytest
import yaml
from kill_harness import Harness, Order
from large_unet import save_a_35m_unet
from pairs_data import write_shards
from test_sharding import FULL, LORA, tree

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    write_shards(folder / "shards", [8])
    return folder


def held(folder, pipelines, name, adaptation, strategy):
    """Numbers that each process holds, its peak memory in MB, and the CPU seconds of both."""
    settings = tree(pipelines, folder / "shards", **adaptation)
    settings["trainer"] |= {"strategy": strategy, "devices": 2, "limit_val_batches": 0, "max_steps": STEPS}
    settings["trainer"]["callbacks"] = [
        {"class_path": "sharding_probe.Held"}, {"class_path": "Cost"}, {"class_path": "RunCheckpoint"},
    ]  # fmt: skip
    settings["model"]["init_args"]["policy"]["init_args"]["unet"] = save_a_35m_unet(folder)
    config, run = folder / f"{name}-{strategy}.yaml", folder / f"{name}-{strategy}"
    config.write_text(yaml.safe_dump(settings))
    log = folder / f"{name}-{strategy}.log"
    with Harness() as harness:  # a server of its own: a process's peak does not fall
        outcome = harness.run(Order(["--config", str(config), "--run_dir", str(run)], str(log), str(run), ranks=2))
    assert list(outcome.codes) == [0, 0], log.read_text()[-4000:]
    ranks = [json.loads((run / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    cost = json.loads((run / "cost.json").read_text())[-1]
    numbers = [sum(part["here"] for part in rank.values()) for rank in ranks]
    return numbers, cost["process_memory_bytes"] / 1e6, cost["cpu_seconds"]


@pytest.mark.parametrize(("name", "adaptation"), [("full fine-tuning", FULL), ("LoRA", LORA)])
def test_what_a_process_holds(folder, pipelines, name, adaptation, request, rows):
    if request.config.getoption("--size") == "tiny":
        pytest.skip("starts eight processes: --size mid")
    found = {strategy: held(folder, pipelines, name, adaptation, strategy) for strategy in ("ddp", "fsdp2")}
    for strategy, (numbers, peak, seconds) in found.items():
        millions = [number / 1e6 for number in numbers]
        rows.add(f"{name}, {strategy}", millions_held=tuple(millions), peak_mb=peak, cpu_seconds=seconds)
    assert max(found["fsdp2"][0]) < 0.6 * min(found["ddp"][0])
