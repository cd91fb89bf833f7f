"""CPU time that a run adds to a training step: Lightning with a real run's callbacks against a bare loop.

    OMP_NUM_THREADS=1 python tests/bench_step_overhead.py --steps 100 --rounds 5

Both train the same tiny networks on the same batches, in one process, in turn; they end with the same weights. What is
told is the difference per step, so that the size of the networks doesn't matter.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_world import make, pairs, trained_parameters
from torch.utils.data import DataLoader

from callbacks.cost import Cost
from callbacks.loss_guard import LossGuard
from callbacks.resume.checkpointing import RunCheckpoint
from callbacks.resume.exact_resume import ExactResume
from callbacks.resume.preemption import Preemption
from callbacks.run_progress import RunProgress
from lightning_modules.references import AdapterOff

PIPELINES = Path(__file__).parent / "pipelines"


def callbacks() -> list:
    """What the command line gives a run, and what the YAMLs do, but for those that draw pictures."""
    return [Preemption(), ExactResume(), LossGuard(), RunProgress(), RunCheckpoint(every_n_steps=10**6),
            LearningRateMonitor(), Cost()]  # fmt: skip


def by_lightning(batches: list, folder: Path) -> tuple[float, list]:
    module = make(PIPELINES, reference=AdapterOff())
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = Trainer(
        accelerator="cpu", logger=logger, default_root_dir=folder, callbacks=callbacks(), max_epochs=1,
        enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=10,
    )  # fmt: skip
    spent: list[float] = []
    start, end = trainer.fit_loop.epoch_loop.run, spent.append

    def timed(*args: object) -> None:
        begun = time.process_time()
        start(*args)
        end(time.process_time() - begun)

    trainer.fit_loop.epoch_loop.run = timed
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return spent[0], trained_parameters(module.policy)


def by_hand(batches: list) -> tuple[float, list]:
    module = make(PIPELINES, reference=AdapterOff())
    module.setup("fit")
    module.train()
    optimizer = module.configure_optimizers()["optimizer"]
    schedule = module.make_lr_scheduler(optimizer)
    begun = time.process_time()
    for batch in batches:
        loss = module.compute_loss(batch, "train").loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.process_time() - begun, trained_parameters(module.policy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    batches = list(pairs(args.steps))
    added, bare = [], []
    for number in range(args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            run, trained = by_lightning(batches, Path(folder))
            loop, expected = by_hand(batches)
        assert all(torch.equal(one, two) for one, two in zip(trained, expected, strict=True))
        if number:  # the first round warms up
            added.append(1000 * (run - loop) / args.steps)
            bare.append(1000 * loop / args.steps)
    told = [round(value, 2) for value in (min(added), statistics.median(added), max(added))]
    report = {"milliseconds added per step": told, "milliseconds of the step": round(statistics.median(bare), 2)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
