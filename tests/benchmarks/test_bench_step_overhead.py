"""CPU time that a run adds to a training step: Lightning with a real run's callbacks against a bare loop.

Both train the same tiny networks on the same batches, in one process, in turn; they end with the same weights. What is
told is the difference per step, so that the size of the networks doesn't matter.
"""

import time

import torch
from alternating import Clock, alternate, spread
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


def callbacks():
    """What the command line gives a run, and what the YAMLs do, but for those that draw pictures."""
    return [Preemption(), ExactResume(), LossGuard(), RunProgress(), RunCheckpoint(every_n_steps=10**6),
            LearningRateMonitor(), Cost()]  # fmt: skip


def by_lightning(pipelines, batches, folder):
    module = make(pipelines, reference=AdapterOff())
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = Trainer(
        accelerator="cpu", logger=logger, default_root_dir=folder, callbacks=callbacks(), max_epochs=1,
        enable_model_summary=False, use_distributed_sampler=False, log_every_n_steps=10,
    )  # fmt: skip
    spent = []
    run = trainer.fit_loop.epoch_loop.run

    def timed(*args):
        begun = time.process_time()
        run(*args)
        spent.append(time.process_time() - begun)

    trainer.fit_loop.epoch_loop.run = timed
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return spent[0], trained_parameters(module.policy)


def by_hand(pipelines, batches):
    module = make(pipelines, reference=AdapterOff())
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


def test_what_a_step_costs_beside_its_networks(pipelines, tmp_path_factory, size, rounds, rows, handlers):
    batches = list(pairs(size.loop_steps))
    added, bare = [], []

    def both():
        run, trained = by_lightning(pipelines, batches, tmp_path_factory.mktemp("run"))
        loop, expected = by_hand(pipelines, batches)
        assert all(torch.equal(one, two) for one, two in zip(trained, expected, strict=True))
        added.append(1000 * (run - loop) / len(batches))
        bare.append(1000 * loop / len(batches))

    alternate({"both": both}, rounds, Clock("cpu"))
    rows.add("Step overhead", milliseconds_added=spread(added[1:]), milliseconds_of_the_step=spread(bare[1:]))
