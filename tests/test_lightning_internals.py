"""Lightning's private parts are used in one file, exist, and mean what that file says they mean."""

import ast
import importlib
import inspect
import pkgutil
import re
import signal
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_regression import BATCHES, Regression, Validated, fit
from torch.utils.data import DataLoader, TensorDataset

from callbacks.resume.exact_resume import ExactResume
from lightning_modules import lightning_internals as internals

PACKAGES = ("lightning_modules", "datamodules", "callbacks", "experiments")

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")


# ------------------------------------------------------------------------------------------- in one file


def modules():
    for package in PACKAGES:
        root = importlib.import_module(package)
        yield root
        for found in pkgutil.walk_packages(root.__path__, f"{package}."):
            yield importlib.import_module(found.name)


def private_uses(tree):
    """Names of Lightning's private modules and classes that a file imports, and of the trainer's parts that it asks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [name.name for name in node.names]
            path = f"{getattr(node, 'module', None) or ''}"
            for whole in (f"{path}.{name}" for name in names):
                if whole.lstrip(".").startswith("lightning.") and re.search(r"\._(?!_)", whole):
                    yield whole
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            of_trainer = re.search(r"(trainer|_running|strategy|cli)$", owner) and node.attr.startswith("_")
            if of_trainer or node.attr in ("fit_loop", "epoch_loop", "batch_progress", "epoch_progress", "val_loop"):
                yield f"{owner}.{node.attr}"


def test_no_other_file_imports_or_asks_for_private_parts():
    found = {}
    for package in PACKAGES:
        for file in Path(importlib.import_module(package).__path__[0]).rglob("*.py"):
            uses = sorted(set(private_uses(ast.parse(file.read_text(encoding="utf-8")))))
            if uses:
                found[file.name] = uses
    assert list(found) == ["lightning_internals.py"]
    assert len(found["lightning_internals.py"]) > 10  # the search finds what is there


def private_names(source):
    return set(re.findall(r"\b(?:self|cls)\.(_[a-z]\w*)", source)) | set(re.findall(r"\bdef (_[a-z]\w*)", source))


def own_classes():
    for module in modules():
        for _, found in inspect.getmembers(module, inspect.isclass):
            if found.__module__ == module.__name__:
                yield found


def test_no_subclass_uses_private_parts_of_lightning_s_classes():
    clashes = {}
    for own in own_classes():
        theirs = {
            name
            for base in own.__mro__
            if base.__module__.startswith("lightning.")
            for name in private_names(inspect.getsource(base))
        }
        common = theirs & private_names(inspect.getsource(own))
        if common:
            clashes[own.__qualname__] = common
    assert clashes == {}


# --------------------------------------------------------------------------- that mean what the file says


class Notes(Callback):
    """Asks a question at the end of every batch."""

    def __init__(self, question):
        self.question, self.answers = question, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.answers.append(self.question(trainer))


def asked(tmp_path, question, **options):
    notes = Notes(question)
    fit(tmp_path, notes, **options)
    return notes.answers


def test_counters(tmp_path):
    """Epochs have 10 batches; two make a step."""
    count = asked(tmp_path, internals.batches_trained, steps=6, accumulate=2)
    assert count == list(range(1, 13))
    last = asked(tmp_path, internals.at_epochs_last_batch, steps=6, accumulate=2)
    assert last == [n % BATCHES == BATCHES - 1 for n in range(12)]


class Ends(Callback):
    """Whether a batch, or an epoch, is open at the hooks where that is asked."""

    def __init__(self):
        self.batch, self.epoch = set(), set()

    def on_train_batch_end(self, trainer, *_):
        self.batch.add(("batch end", internals.batch_is_open(trainer)))

    def on_validation_start(self, trainer, pl_module):
        self.batch.add(("validation", internals.batch_is_open(trainer)))

    def on_train_epoch_start(self, trainer, pl_module):
        self.epoch.add(("epoch start", internals.epoch_is_open(trainer)))

    def on_train_end(self, trainer, pl_module):
        self.epoch.add(("end", internals.epoch_is_open(trainer)))


class Amid(Regression):
    """Whether it is amid a batch, in the order of hooks."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, where):
        self.seen.append((where, internals.amid_batch(self.trainer)))

    def on_train_batch_start(self, batch, batch_idx):
        self.note("start")

    def on_before_optimizer_step(self, optimizer):
        self.note("step")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.note("end")


def test_what_is_amid_a_batch(tmp_path):
    seen = fit(tmp_path, module=Amid(), steps=2).seen
    assert seen == [("start", False), ("step", True), ("end", False)] * 2


def test_what_is_open(tmp_path):
    ends = Ends()
    fit(tmp_path, ends, steps=20, module=Validated(), num_sanity_val_steps=0, val_check_interval=5)
    assert ends.batch == {("batch end", True), ("validation", False)}
    assert ends.epoch == {("epoch start", True), ("end", False)}


class Grows(Regression):
    """Epochs of 10 and 12 batches."""

    announces = True

    def train_dataloader(self):
        batches = 12 if internals.batches_trained(self.trainer) else 10
        if self.announces:
            internals.expect_batches(self.trainer, batches)
        return DataLoader(TensorDataset(torch.ones(batches, 3), torch.arange(batches)))


def test_announced_batches_are_not_left_out(tmp_path):
    """Resumed at the end of a shorter epoch; without the announcement Lightning leaves out as many as that had."""
    options = {"steps": -1, "max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    end = tmp_path / "end.ckpt"
    whole = fit(tmp_path, Saves(10, end), ExactResume(), module=Grows(), **options)
    resumed = fit(tmp_path, ExactResume(), module=Grows(), ckpt_path=end, **options)
    assert resumed.losses == whole.losses[10:]
    silent = Grows()
    silent.announces = False
    assert len(fit(tmp_path, ExactResume(), module=silent, ckpt_path=end, **options).losses) == 2


def test_saved_progress_is_read_and_corrected(tmp_path):
    saved = asked(tmp_path, internals.dump_checkpoint, steps=4, accumulate=3)[4]  # 5 batches, a window of 3 and 2 more
    progress = internals.SavedProgress.of(saved)
    assert (progress.batches_trained, progress.at_batch_end, progress.validation_due) == (5, True, False)
    progress.reopen_epoch()
    progress.round_down(3)
    progress.validation_due = True
    assert saved["loops"]["fit_loop"] != progress.state  # a copy
    progress.put_into(saved)
    again = internals.SavedProgress.of(saved)
    assert (again.batches_trained, again.at_batch_end, again.validation_due) == (3, False, True)
    assert saved["epoch"] == 0


class Saves(Callback):
    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, *_):
        if internals.batches_trained(trainer) == self.batches:
            trainer.save_checkpoint(self.path)


class Ours(Callback):
    """Runs the fit loop, and validates and ends when it is told to."""

    def __init__(self):
        self.seen, self.checks = [], []

    def setup(self, trainer, pl_module, stage):
        internals.run_fit_by(trainer, lambda: self.run(trainer))

    def run(self, trainer):
        self.seen.append("before")
        internals.fit_as_lightning(trainer)
        self.seen.append("after")
        internals.begin_and_end(trainer)

    def teardown(self, trainer, pl_module, stage):
        internals.run_fit_by_itself(trainer)
        assert "run" not in vars(trainer.fit_loop)

    def on_train_start(self, trainer, pl_module):
        self.seen.append("start")
        if len(self.seen) == 2:
            internals.validate_now(trainer)
            assert trainer.training

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(f"validation {trainer.global_step}")

    def on_train_batch_end(self, trainer, *_):
        self.checks.append(internals.validation_is_due(trainer))

    def on_train_end(self, trainer, pl_module):
        self.seen.append("end")


def test_the_loop_can_be_run_validated_and_ended(tmp_path):
    ours = Ours()
    fit(tmp_path, ours, steps=4, module=Validated(), num_sanity_val_steps=0, val_check_interval=2)
    middle = ["start", "validation 0", "validation 2", "validation 4", "end"]
    assert ours.seen == ["before", *middle, "after", "start", "end"]
    assert ours.checks == [False, True, False, True]


def test_a_training_is_not_validated_in_inference_mode(tmp_path):
    """A sharded network that is first asked there would keep tensors that it cannot be trained with."""
    seen = []

    class Looks(Validated):
        def validation_step(self, batch, batch_idx):
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    fit(tmp_path, steps=1, module=Looks(), val_check_interval=1)
    assert set(seen) == {(False, False)}


def test_handlers_and_children(tmp_path):
    """Lightning asks for handlers after all hooks; ours are put in place, and its own come back."""
    calls = []

    class Handlers(Callback):
        def setup(self, trainer, pl_module, stage):
            internals.replace_signal_handlers(trainer, lambda: calls.append("installed"))

        def on_train_start(self, trainer, pl_module):
            calls.append("started")
            assert signal.getsignal(signal.SIGTERM) == before
            internals.restore_signal_handlers(trainer)
            assert "register_signal_handlers" not in vars(trainer._signal_connector)
            assert internals.take_children(trainer) == []

    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path, Handlers(), steps=1)
    assert calls == ["installed", "started"]


def test_children_are_taken_from_the_launcher_of_scripts():
    launcher = internals._SubprocessScriptLauncher(None, 2, 1)
    children = [Mock(spec=subprocess.Popen), Mock(spec=subprocess.Popen)]
    launcher.procs.extend(children)
    trainer = Mock(spec=Trainer, strategy=Mock(launcher=launcher))
    assert internals.take_children(trainer) == children
    assert launcher.procs == []
    assert "_launch_process_observer(self.procs)" in inspect.getsource(type(launcher).launch)  # it watches this list


class Logged(Regression):
    """Logs a metric of every second batch."""

    def training_step(self, batch, batch_idx):
        self.log("every", 1.0, on_step=True)
        if batch_idx % 2 == 0:
            self.log("even", float(batch_idx), on_step=True)
        return super().training_step(batch, batch_idx)


def logger_of(tmp_path):
    class Lines(DummyLogger):
        def __init__(self):
            super().__init__()
            self.lines = []

        def log_metrics(self, metrics, step=None):
            self.lines.append((step, {name: metrics[name] for name in ("every", "even") if name in metrics}))

    return Lines()


def test_metrics_are_written_early(tmp_path):
    lines, seen = logger_of(tmp_path), []

    class Early(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = len(lines.lines)
            internals.update_step_logs(trainer)
            seen.append(len(lines.lines) - before)

    fit(tmp_path, Early(), steps=2, module=Logged(), logger=lines, log_every_n_steps=1)
    assert seen == [1, 1]
    assert [step for step, _ in lines.lines] == [0, 0, 1, 1]
    assert [line.get("even") for _, line in lines.lines] == [0.0] * 4  # Lightning repeats the last value


def test_loggers_are_told_the_trainers_step(tmp_path):
    lines = logger_of(tmp_path)

    class Counts(Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.fit_loop.epoch_loop._batches_that_stepped = 70
            internals.count_logged_steps(trainer)

    fit(tmp_path, Counts(), steps=2, module=Logged(), logger=lines, log_every_n_steps=1)
    assert [step for step, _ in lines.lines] == [0, 1]


@pytest.mark.parametrize(("choice", "expected"), [(True, True), (False, False)])
def test_whether_samplers_are_replaced(tmp_path, choice, expected):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    running = Trainer(devices=2, strategy="ddp", use_distributed_sampler=choice, **options)
    assert internals.replaces_samplers(running) is expected
    assert not internals.replaces_samplers(Trainer(devices=1, use_distributed_sampler=choice, **options))


def test_all_processes_share_out_a_model():
    strategy = ModelParallelStrategy()
    strategy.num_nodes, strategy.parallel_devices = 2, ["cpu"] * 4
    internals.shard_over_all_processes(strategy)
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (8, 1)
    assert re.search(r"_setup_device_mesh\(\s*self._data_parallel_size, self._tensor_parallel_size", source)
