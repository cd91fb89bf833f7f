"""A callback from outside of the packages: a plain one, and one that draws with the framework's own means."""

import json

import pytest
from outside import outside  # noqa: F401  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable:UserWarning")

OWN = '''
import json
from pathlib import Path

from lightning.pytorch import Callback

from callbacks.evaluation.pictures import PictureRequest, alignment, evaluation_mode, make_pictures
from callbacks.resume.due_evaluations import PolicyEvaluation
from lightning_modules.sampling.pictures import Sampler


class Losses(Callback):
    """Keeps every batch's loss, also over a restart."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = list(state_dict["seen"])


class Brightness(PolicyEvaluation):
    """Mean brightness of one picture, of the policy and of the reference, every few steps."""

    def __init__(self, prompt: str, every_n_steps: int = 1, sampler: Sampler = Sampler(steps=2)):
        super().__init__()
        self.prompt, self.every_n_steps, self.sampler = prompt, every_n_steps, sampler

    def evaluate(self, trainer, pl_module):
        module = alignment(pl_module, "Brightness")
        request = [PictureRequest(self.prompt, (0, "brightness"))]
        with evaluation_mode(module):
            found = [
                make_pictures(trainer, module, self.sampler, denoise, request).mean().item()
                for denoise in (module.policy.predict_noise, module.reference.predict_noise)
            ]
        path = Path(trainer.default_root_dir) / "brightness.json"
        history = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*history, [trainer.global_step, *found]]))
'''

WORDS = (
    "--trainer.callbacks=[{class_path: own.Losses}, {class_path: own.Brightness, init_args: {every_n_steps: 2, "
    "prompt: one small red circle on a black background}}]"
)


def test_the_command_runs_them_and_resumes_them(outside, tmp_path):  # noqa: F811
    first = outside(OWN, WORDS)
    (losses,) = [callback for callback in first.trainer.callbacks if type(callback).__name__ == "Losses"]
    assert len(losses.seen) == first.trainer.global_step == 2
    again = outside(OWN, WORDS, "--resume=last", "--trainer.max_steps=4")
    (resumed,) = [callback for callback in again.trainer.callbacks if type(callback).__name__ == "Losses"]
    assert resumed.seen[:2] == losses.seen
    assert len(resumed.seen) == 4
    history = json.loads((tmp_path / "run" / "brightness.json").read_text())
    assert [step for step, _, _ in history] == [2, 4]
    assert history[0][1] != history[0][2]  # the policy has moved
    assert history[0][2] == history[1][2]  # the reference never does
