"""``predict``: pictures for a list of prompts, one file each."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from callbacks.evaluation.kept import picture_file
from callbacks.evaluation.pictures import (
    PictureRequest,
    alignment,
    evaluation_mode,
    gathered,
    make_pictures,
    my_share,
    policy_step,
    write_pictures,
)
from datamodules.prompts import prompt_texts
from lightning_modules.errors import ConfigError
from lightning_modules.files import atomic_file, resolved_path
from lightning_modules.sampling.pictures import Sampler
from lightning_modules.terminal import literal


class SavePictures(Callback):
    """Writes one PNG a prompt, and ``pictures.json`` that says which is which; idle in every job but ``predict``.

    Args:
        prompts: texts, or a prompt file.
        sampler: how the pictures are made.
        images_per_prompt: pictures per prompt.
        output: folder for the pictures; None takes ``pictures/step=*`` in the run folder.
        batch_size: pictures at a time on one device.
        image_size: side in pixels; None takes the policy's own.
        seed: seed of the noise, which is keyed by prompt and picture.
    """

    def __init__(
        self,
        prompts: list[str] | str | None = None,
        sampler: Sampler = Sampler(),  # noqa: B008  # frozen
        images_per_prompt: int = 1,
        output: str | None = None,
        batch_size: int = 8,
        image_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.prompts, self.sampler, self.images_per_prompt, self.output = prompts, sampler, images_per_prompt, output
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make and write all pictures.

        Raises:
            ConfigError: no prompts were given.
        """
        if self.prompts is None:
            raise ConfigError("predict draws pictures and has no prompts; give --pictures.prompts=FILE")
        module = alignment(pl_module, "predict")
        texts = prompt_texts(self.prompts)
        step = policy_step(trainer)
        folder = resolved_path(self.output or Path(trainer.default_root_dir) / "pictures" / f"step={step:07d}")
        requests = [
            PictureRequest(text, (self.seed, "pictures", p, i)) for p, text in enumerate(texts) for i in self._range()
        ]
        mine = []
        with evaluation_mode(module):
            for batch in my_share(trainer, requests, self.batch_size, "pictures"):
                denoise = module.policy.predict_noise
                images = make_pictures(trainer, module, self.sampler, denoise, batch, self.image_size)
                prompts = [request.prompt for request in batch]
                names = [picture_file(*map(int, request.key[2:])) for request in batch]
                write_pictures(images, prompts, [folder / name for name in names])
                mine += [{"file": name, "prompt": prompt} for name, prompt in zip(names, prompts)]
        entries = gathered(trainer, mine)
        if trainer.is_global_zero:
            with atomic_file(folder / "pictures.json") as file:
                file.write(json.dumps(entries, indent=1, ensure_ascii=False).encode())
            Console().print(literal(f"{len(entries)} pictures: {folder}"), soft_wrap=True)

    def _range(self) -> range:
        return range(self.images_per_prompt)
